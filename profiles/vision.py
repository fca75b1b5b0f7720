"""Operator models of vision networks, and the latency of a frame that they forecast at some place.

    conv            2 * outputs * k FLOPs, k = input channels / groups * kernel: a product of (pixels, k) with (k, n);
                    also in three dimensions; depthwise where k is the kernel alone
    transposed      2 * inputs * weights of an input channel
    product         2 * outputs * inner length
    all else        PER_ELEMENT FLOPs, bound by what it moves; what only renames its input moves nothing
    bytes           weights as stored, inputs and outputs once each, in the width the graph has them
    loop            a launch per step, beside those of the operators in it
    launches        one per operator that is left when norms are folded and activations joined (runtime/framenodes.py)

    seconds         sum over operators of max(FLOPs / peak, bytes / bandwidth) + launches * dispatch     (rates.Rates)

`floats` says how many bits floats take where they are 32 in the graph but 16 at the place. What this does not know:
layouts that kernels convert between, values that stay in caches from one operator to the next (profiles/visionrates.py
measures both), and operators that overlap.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit.profiles.rates import PACKED_BITS, Rates
from rlkit.profiles.step import Kind, Operator
from rlkit.runtime.framenodes import Node, Value, traced

CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv", "ConvInteger", "NhwcFusedConv")
TRANSPOSED = ("ConvTranspose", "QLinearConvTranspose")
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "QGemm")
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Dropout")
# FLOPs for each number of the larger of input and output; 1 where nothing is said, 0 for what only moves numbers.
PER_ELEMENT = {
    "BatchNormalization": 2,
    "Softmax": 5,
    "Tanh": 5,
    "Sigmoid": 5,
    "Resize": 7,
    "Upsample": 7,
    **dict.fromkeys(("Concat", "Slice", "Pad", "Transpose", "Gather", "GatherElements", "Split", "Expand", "Cast"), 0),
}
LOOP = "loop"
QUANTIZED = {"QLinearConv": 3, "QLinearConvTranspose": 3, "QLinearMatMul": 3, "QGemm": 3}  # where their weights are


@dataclass(frozen=True, slots=True)
class Part:
    """All operators of a name in a frame, with the seconds forecast for them together."""

    name: str
    kind: str
    count: int
    flops: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FrameForecast:
    """A frame somewhere: seconds, what they are made of by name, and what they rest on.

    bound_seconds: the roofline over totals, max(FLOPs / peak, bytes / bandwidth), the peak that of integers for those.
    """

    seconds: float
    bound_seconds: float
    flops: int
    nbytes: int
    launches: int
    parts: tuple[Part, ...]
    label: str
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def operators(nodes: Iterable[Node], *, floats: int = 32) -> tuple[Operator, ...]:
    """What a frame's nodes compute and move, equal ones counted together, in the order of their first."""
    found = Counter(nodes)
    return tuple(_operator(node, floats).counted(count) for node, count in found.items())


def forecast_file(
    model: Path, rates: Rates, *, shapes: Mapping[str, Sequence[int]] | None = None, floats: int = 32
) -> FrameForecast:
    """A frame of an ONNX file at rates: it runs once here, for the shapes of its operators; `shapes`: of open inputs.

    Raises what framebench.open_frame raises.
    """
    return forecast(operators(traced(model, shapes), floats=floats), rates)


def forecast(ops: Sequence[Operator], rates: Rates) -> FrameForecast:
    """Seconds of a frame of these operators at rates; ValueError for no operators."""
    if not ops:
        raise ValueError("a frame of no operators takes no time; trace a network first")
    rows: dict[tuple[str, str], list[tuple[Operator, float]]] = {}
    for op in ops:
        rows.setdefault((op.name, str(op.kind)), []).append((op, op.count * rates.spent(op).seconds))
    parts = [
        Part(
            name,
            kind,
            sum(op.count for op, _ in row),
            sum(op.count * op.flops for op, _ in row),
            sum(op.count * op.nbytes for op, _ in row),
            sum(seconds for _, seconds in row),
        )
        for (name, kind), row in rows.items()
    ]
    flops, nbytes = sum(part.flops for part in parts), sum(part.nbytes for part in parts)
    floats, *others = rates.roofs.values()
    integers = (*others, floats)[0]
    compute = sum(op.count * op.flops / (integers if 0 < op.bits <= PACKED_BITS else floats) for op in ops)
    return FrameForecast(
        seconds=sum(part.seconds for part in parts),
        bound_seconds=max(compute, nbytes / rates.bytes_per_s),
        flops=flops,
        nbytes=nbytes,
        launches=sum(op.count * op.launches for op in ops),
        parts=tuple(sorted(parts, key=lambda part: -part.seconds)),
        label=rates.label,
        assumptions=rates.assumptions(),
    )


def _operator(node: Node, floats: int) -> Operator:
    """One run of a node."""
    ins, outs = [_sized(each, floats) for each in node.ins], [_sized(each, floats) for each in node.outs]
    if node.kind in CONVOLUTIONS:
        return _convolution(node, ins, outs)
    if node.kind in TRANSPOSED:
        weight = ins[QUANTIZED.get(node.kind, 1)]
        flops = 2 * _count(ins[0]) * _count(weight) // weight.shape[0]
        moved = _nbytes(ins[0]) + sum(map(_nbytes, outs))
        pixels = _count(ins[0]) // ins[0].shape[1]
        shape = weight.shape[1], _count(weight) // weight.shape[1], 0
        return Operator(
            "transposed conv", Kind.CONV, 1, flops, _nbytes(weight), moved, bits=weight.bits, tokens=pixels, shape=shape
        )
    if node.kind in PRODUCTS:
        return _product(node, ins, outs)
    if node.kind == "Scan":  # the steps are the last size of what export/visionscan.py lets it run over
        return Operator(LOOP, Kind.ELEMENTWISE, 1, 0, launches=ins[-1].shape[-1] if ins else 1)
    return _moving(node, ins, outs)


def _convolution(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> Operator:
    """Weights (n, channels / groups, kernel ...); a joined sum is an input more."""
    at = QUANTIZED.get(node.kind, 1)
    weight, out = ins[at], outs[0]
    n, k = weight.shape[0], math.prod(weight.shape[1:])
    flops = 2 * _count(out) * k
    channels = ins[0].shape[1]
    depthwise = weight.shape[1] == 1 and n > 1 and channels == n
    name = "depthwise conv" if depthwise else f"conv {len(weight.shape) - 2}d"
    whole = [each for index, each in enumerate(ins) if index != at and len(each.shape) > 1]
    moved = sum(map(_nbytes, whole)) + _nbytes(out)
    pixels = _count(out) // n
    shape = n, k, channels // weight.shape[1] if weight.shape[1] else 1  # groups
    return Operator(
        name, Kind.CONV, 1, flops, _nbytes(weight), moved, launches=1, bits=weight.bits, tokens=pixels, shape=shape
    )


def _product(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> Operator:
    at = QUANTIZED.get(node.kind, 1)
    weight, out = ins[at], outs[0]
    rows, n = _count(out) // max(out.shape[-1], 1), max(out.shape[-1], 1)
    k = _count(ins[0]) // max(rows, 1)
    moved = _nbytes(ins[0]) + _nbytes(out)
    return Operator(
        "product",
        Kind.LINEAR,
        1,
        2 * rows * n * k,
        _nbytes(weight),
        moved,
        bits=weight.bits,
        tokens=rows,
        shape=(n, k, 0),
    )


def _moving(node: Node, ins: Sequence[Value], outs: Sequence[Value]) -> Operator:
    """All that multiplies no matrices. Of a slice or a gather only what it takes is read."""
    read, written = max(map(_nbytes, ins), default=0), sum(map(_nbytes, outs))
    others = sum(map(_nbytes, ins)) - read
    taken = PER_ELEMENT.get(node.kind) == 0 and node.kind not in ("Concat", "Pad")
    moved = 0 if node.kind in VIEWS else (min(read, written) if taken else read) + others + written
    numbers = max([*map(_count, ins), *map(_count, outs)], default=0)
    flops = 0 if node.kind in VIEWS else PER_ELEMENT.get(node.kind, 1) * numbers
    return Operator(node.kind.lower(), Kind.ELEMENTWISE, 1, flops, 0, moved, launches=1)


def _sized(value: Value, floats: int) -> Value:
    return Value(floats, value.shape) if value.bits == 32 else value


def _count(value: Value) -> int:
    return math.prod(value.shape)


def _nbytes(value: Value) -> int:
    return _count(value) * value.bits // 8
