"""The graph's file: constants in the order in which the graph reads them, each loaded only while it is written.

Large ones start on a page, so that the runtime can map them. Tiny ones (shapes, switches) stay in model.onnx, where
shape inference sees them. A second graph over the same constants is a few hundred kilobytes more.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir

from rlkit.recover.progress import Progress, Tell, silent

DATA_SUFFIX = ".data"
PAGE = 4096
PAGED_FROM = 1 << 20  # smaller constants are copied anyway
INLINE_UP_TO = 256  # bytes


def write(model: ir.Model, path: Path, *, tell: Tell = silent) -> str:
    """Write a graph's constants and the graph; returns the SHA-256 of the data file."""
    digest = write_constants(model, path, tell=tell)
    write_graph(model, path)
    return digest


def write_constants(model: ir.Model, path: Path, *, tell: Tell = silent) -> str:
    """Write all constants into `path` + .data, for graphs beside it; afterwards they are mapped from there.

    Returns the SHA-256 of the data file, which is taken while the next constant is loaded and written.
    """
    data = path.with_name(path.name + DATA_SUFFIX)
    values = list(_in_order(model))
    done, total = 0, sum(_nbytes(value) for value in values)
    with data.open("wb") as file, _Digest() as digest:
        for value in values:
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes <= INLINE_UP_TO:
                continue
            raw = tensor.tobytes()
            padding = b"\0" * (-file.tell() % PAGE) if len(raw) >= PAGED_FROM else b""
            file.write(padding)
            start = file.tell()
            digest.add(padding, raw)
            file.write(raw)
            value.const_value = ir.ExternalTensor(
                data.name,
                start,
                len(raw),
                tensor.dtype,
                shape=ir.Shape(list(tensor.shape)),  # type: ignore[arg-type]
                name=value.name or "",
                base_dir=path.parent,
            )
            done += len(raw)
            del raw, tensor
            tell(Progress("write", done, total))
    tell(Progress("write", total, total))
    return digest.hex


class _Digest:
    """SHA-256 in a thread of its own, at most one constant behind."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> _Digest:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, *parts: bytes) -> None:
        if self._last is not None:
            self._last.result()  # so that no more than two constants are in memory
        self._last = self._pool.submit(self._update, parts)

    def _update(self, parts: tuple[bytes, ...]) -> None:
        for part in parts:
            self._sum.update(part)

    @property
    def hex(self) -> str:
        return self._sum.hexdigest()


def write_graph(model: ir.Model, path: Path) -> None:
    """Write the graph alone; its constants stay where they are."""
    model.graph.sort()
    ir.save(model, path)


def _in_order(model: ir.Model) -> list[ir.Value]:
    """Constants by first reader, then those that only the graph's own bookkeeping holds."""
    found: dict[str, ir.Value] = {}
    constants = model.graph.initializers
    model.graph.sort()
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name and constants.get(value.name) is value:
                found.setdefault(value.name, value)
    return list({**found, **constants}.values())


def _nbytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
