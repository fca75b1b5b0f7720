"""The graph's file: constants in the order in which the graph reads them, each loaded only while it is written.

Large ones start on a page, so that the runtime can map them. Tiny ones (shapes, switches) stay in model.onnx, where
shape inference sees them. A second graph over the same constants is a few hundred kilobytes more.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from rlkit.recover.progress import Progress, Tell, silent

DATA_SUFFIX = ".data"
PAGE = 4096
PAGED_FROM = 1 << 20  # smaller constants are copied anyway
INLINE_UP_TO = 256  # bytes


def write(model: ir.Model, path: Path, *, tell: Tell = silent) -> None:
    """Write `path` and, beside it, all constants in `path` + .data; afterwards they are mapped from there."""
    data = path.with_name(path.name + DATA_SUFFIX)
    values = list(_in_order(model))
    done, total = 0, sum(_nbytes(value) for value in values)
    with data.open("wb") as file:
        for value in values:
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes <= INLINE_UP_TO:
                continue
            raw = tensor.tobytes()
            if len(raw) >= PAGED_FROM:
                file.write(b"\0" * (-file.tell() % PAGE))
            start = file.tell()
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
    write_graph(model, path)


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
