"""The head of a .gguf file: its metadata and the names, types and places of its tensors, no weights.

Written out because reading the token lists, which no shape needs, takes seconds in the usual reader; they are skipped
here. All numbers are little-endian, strings are a uint64 length and UTF-8 bytes:

    "GGUF"  uint32 version  uint64 tensors  uint64 entries
    entries:  string key, uint32 type, value            (type 9, an array: uint32 type, uint64 length, values)
    tensors:  string name, uint32 dims, uint64 size per dim (fastest first), uint32 type, uint64 offset
    padding to `general.alignment` (32), then the tensors' bytes at their offsets
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
MAX_DIMS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# type -> (name, weights per block, bytes per block); from ggml's block structs, 2026-11-22
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's name, shape (outputs first, as torch has it), type name, stored bytes and where in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata without its arrays, and the list of tensors."""

    metadata: dict[str, Value]
    tensors: tuple[GgufTensor, ...]


def read_header(path: Path) -> GgufHeader:
    """Read the head of a .gguf file; ValueError if it is damaged, truncated or of another version."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (struct.error, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged, truncated or no GGUF file ({error}); download it again") from error


class _Reader:
    """A position in the file, moved on by every read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self) -> GgufHeader:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version, tensor_count, entry_count = self._unpack("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not one of {VERSIONS}")
        metadata: dict[str, Value] = {}
        for _ in range(entry_count):
            key = self._string()
            value = self._value(*self._unpack("I"))
            if value is not None:
                metadata[key] = value
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}, no positive number of bytes")
        start = -(-self._at // alignment) * alignment
        tensors = tuple(replace(tensor, start=start + tensor.start) for tensor in found)
        end = max((tensor.start + tensor.nbytes for tensor in tensors), default=start)
        if end > len(self._data):
            raise ValueError(f"it should hold {end} bytes and has {len(self._data)}")
        names = [tensor.name for tensor in tensors]
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise ValueError(f"it holds {_short(twice[0])} twice")
        return GgufHeader(metadata, tensors)

    def _tensor(self) -> GgufTensor:
        """The next entry; its start still counts from the first tensor's."""
        name = self._string()
        (dims,) = self._unpack("I")
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(f"tensor {_short(name)} has {dims} dimensions")
        *sizes, kind, offset = self._unpack(f"{dims}QIQ")
        if kind not in TYPES:
            raise ValueError(f"tensor {_short(name)} has type {kind}, unknown here")
        label, block, block_nbytes = TYPES[kind]
        if sizes[0] % block:
            raise ValueError(f"tensor {_short(name)} has rows of {sizes[0]}, no multiple of the {block} of {label}")
        return GgufTensor(name, tuple(reversed(sizes)), label, math.prod(sizes) // block * block_nbytes, offset)

    def _value(self, kind: int) -> Value | None:
        """The next value; arrays are skipped and give None."""
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            value: Value = self._unpack(_scalar(kind))[0]
            return value
        item, length = self._unpack("IQ")
        if item == STRING:
            for _ in range(length):
                self._skip(*self._unpack("Q"))
        else:
            self._skip(length * struct.calcsize(_scalar(item)))
        return None

    def _unpack(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from(f"<{layout}", self._data, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return values

    def _string(self) -> str:
        return self._bytes(*self._unpack("Q")).decode()

    def _bytes(self, length: int) -> bytes:
        start = self._at
        self._skip(length)
        return self._data[start : self._at]

    def _skip(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise ValueError(f"it ends at byte {len(self._data)}, in the middle of its head")
        self._at += length


def _short(name: str) -> str:
    """A name from a file, fit for one line of a message."""
    return repr(name if len(name) <= 80 else f"{name[:80]}...")


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a metadata value has type {kind}, unknown here")
    return SCALARS[kind]
