"""The operators that the runtime runs for a frame, with the shapes it saw: after fusing, before layouts of its own.

Batch norms are folded into convolutions, activations joined to them, and pairs of quantizing and dequantizing are
integer operators, as on every processor; only the blocked layouts of one processor's kernels are left out. Operators
inside a loop are listed as often as they ran; of what contains others only a Scan is listed, which says its steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.runtime import framebench

CONTROL = ("If", "Loop")
BITS = {"float": 32, "float16": 16, "bfloat16": 16, "double": 64, "uint8": 8, "int8": 8, "int32": 32, "int64": 64}
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that an operator reads or writes."""

    bits: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Node:
    """One run of an operator. parameter_nbytes: what it reads of constants."""

    kind: str
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    parameter_nbytes: int = 0


def traced(
    model: Path | bytes, shapes: Mapping[str, Sequence[int]] | None = None, values: Mapping[str, float] | None = None
) -> tuple[Node, ...]:
    """What one frame on the processor runs; errors as framebench.open_frame."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder, "run"))
        frame = framebench.open_frame(model, shapes=shapes, values=values, profile=prefix, fused=True)
        frame.run()
        return nodes(frame.recorded())


def nodes(records: Iterable[Mapping[str, Any]]) -> tuple[Node, ...]:
    """The runtime's records of operators as nodes."""
    return tuple(
        Node(
            kind=record["op_name"],
            ins=_values(record["input_type_shape"]),
            outs=_values(record["output_type_shape"]),
            parameter_nbytes=int(record.get("parameter_size", 0)),
        )
        for record in records
        if "output_type_shape" in record and record["op_name"] not in CONTROL
    )


def _values(listed: Sequence[Mapping[str, Sequence[int]]]) -> tuple[Value, ...]:
    found = (next(iter(each.items()), None) for each in listed)
    return tuple(Value(BITS.get(pair[0], 32), tuple(pair[1])) for pair in found if pair is not None)
