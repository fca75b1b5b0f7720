"""Rows of an Arrow IPC stream, enough of it for tables of text: strings, integers, booleans, lists and structs of them.

A stream is messages, each a flatbuffer and a body of buffers; the first says the columns, the others are batches of
rows (arrow.apache.org/docs/format/Columnar.html). Refused, not guessed: compressed bodies, dictionaries, other types.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA, BATCH = 1, 3  # kinds of messages
INT, UTF8, BOOL, LIST, STRUCT = 2, 5, 6, 12, 13  # kinds of types
CONTINUED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class _Flat:
    """A table of a flatbuffer: `at` is where it lies in `data`."""

    data: bytes
    at: int

    def _place(self, field: int) -> int:
        """Where a field lies; 0 for one that is left out."""
        vtable = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        size = struct.unpack_from("<H", self.data, vtable)[0]
        offset = 4 + 2 * field
        found = struct.unpack_from("<H", self.data, vtable + offset)[0] if offset < size else 0
        return self.at + found if found else 0

    def number(self, field: int, form: str = "<i", default: int = 0) -> int:
        place = self._place(field)
        return int(struct.unpack_from(form, self.data, place)[0]) if place else default

    def table(self, field: int) -> _Flat | None:
        place = self._place(field)
        return _Flat(self.data, place + struct.unpack_from("<I", self.data, place)[0]) if place else None

    def text(self, field: int) -> str:
        start, length = self._vector(field)
        return self.data[start : start + length].decode()

    def tables(self, field: int) -> list[_Flat]:
        start, length = self._vector(field)
        places = (start + 4 * number for number in range(length))
        return [_Flat(self.data, place + struct.unpack_from("<I", self.data, place)[0]) for place in places]

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """A vector of structs of two 64-bit numbers."""
        start, length = self._vector(field)
        return [struct.unpack_from("<qq", self.data, start + 16 * number) for number in range(length)]

    def _vector(self, field: int) -> tuple[int, int]:
        place = self._place(field)
        if not place:
            return 0, 0
        start = place + int(struct.unpack_from("<I", self.data, place)[0])
        return start + 4, int(struct.unpack_from("<I", self.data, start)[0])


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    kind: int
    bits: int
    signed: bool
    children: tuple[_Column, ...]


def read_rows(data: bytes) -> list[dict[str, Any]]:
    """The rows of a stream, in order, each a dictionary by column.

    Raises ValueError for bytes that are no such stream, end too soon, or hold what is not read here.
    """
    try:
        return list(_rows(data))
    except (struct.error, IndexError, StopIteration, UnicodeDecodeError) as error:
        raise ValueError(f"the Arrow data is damaged or no stream ({error}); fetch it again") from error


def _rows(data: bytes) -> Iterator[dict[str, Any]]:
    columns: tuple[_Column, ...] | None = None
    for head, body in _messages(data):
        kind, table = head.number(1, "<B"), head.table(2)
        if kind == SCHEMA and table is not None:
            columns = tuple(_column(field) for field in table.tables(1))
        elif kind == BATCH and table is not None and columns is not None:
            if table.table(3) is not None:
                raise ValueError("the Arrow data is compressed, which is not read here; write it uncompressed")
            batch = _Batch(body, iter(table.pairs(1)), iter(table.pairs(2)))
            values = [batch.values(column) for column in columns]
            names = [column.name for column in columns]
            yield from (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))
        else:
            raise ValueError(f"an Arrow message of kind {kind} is not read here; write plain columns")
    if columns is None:
        raise ValueError("there is no Arrow stream here; give a file that begins with a schema")


def _messages(data: bytes) -> Iterator[tuple[_Flat, bytes]]:
    at = 0
    while at < len(data):
        mark, size = struct.unpack_from("<II", data, at)
        if mark != CONTINUED:
            raise ValueError(f"byte {at} begins no Arrow message; give a stream of Arrow 0.15 or later")
        if size == 0:
            return
        start = at + 8
        head = _Flat(data, start + struct.unpack_from("<I", data, start)[0])
        length = head.number(3, "<q")
        body = data[start + size : start + size + length]
        if length < 0 or len(body) < length:
            raise ValueError("the Arrow data ends before its last batch; fetch it again")
        yield head, body
        at = start + size + length


def _column(field: _Flat) -> _Column:
    name, kind = field.text(0), field.number(2, "<B")
    if kind not in (INT, UTF8, BOOL, LIST, STRUCT) or field.table(4) is not None:
        raise ValueError(f"column {name} has Arrow type {kind}, which is not read here; use text, integers or lists")
    detail = field.table(3)
    bits = detail.number(0) if kind == INT and detail is not None else 0
    signed = bool(detail.number(1, "<B")) if kind == INT and detail is not None else False
    return _Column(name, kind, bits, signed, tuple(_column(child) for child in field.tables(5)))


@dataclass(frozen=True, slots=True)
class _Batch:
    """The body of a batch; nodes are (length, nulls), buffers (offset, bytes), in the order of the columns."""

    body: bytes
    nodes: Iterator[tuple[int, int]]
    buffers: Iterator[tuple[int, int]]

    def values(self, column: _Column) -> list[Any]:
        length, nulls = next(self.nodes)
        valid = self._bits(length)
        found = self._plain(column, length)
        if nulls:
            return [value if there else None for value, there in zip(found, valid, strict=True)]
        return found

    def _plain(self, column: _Column, length: int) -> list[Any]:
        if column.kind == STRUCT:
            parts = [self.values(child) for child in column.children]
            names = [child.name for child in column.children]
            return [dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True)]
        if column.kind == BOOL:
            return self._bits(length)
        if column.kind == INT:
            dtype = np.dtype(f"<{'i' if column.signed else 'u'}{column.bits // 8}")
            return [int(value) for value in self._numbers(dtype)[:length]]
        ends = self._numbers(np.dtype("<i4"))[: length + 1].tolist() or [0]
        if column.kind == UTF8:
            text = self._buffer()
            return [text[start:end].decode() for start, end in pairwise(ends)]
        inner = self.values(column.children[0])
        return [inner[start:end] for start, end in pairwise(ends)]

    def _buffer(self) -> bytes:
        offset, length = next(self.buffers)
        return self.body[offset : offset + length]

    def _numbers(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        raw = self._buffer()
        return np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)

    def _bits(self, length: int) -> list[bool]:
        packed = np.frombuffer(self._buffer(), np.uint8)
        flags = np.unpackbits(packed, bitorder="little")[:length]
        return [bool(flag) for flag in flags] if len(flags) else [True] * length
