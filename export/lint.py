"""Does every packed matrix of a written ONNX file meet a fast kernel? The runtime does not say when it does not.

MatMulNBits dequantizes the whole matrix at every call, tens to hundreds of times slower, unless all of these hold:
bits, block_size and accuracy_level are a row of the target's table (`export.plan.TARGETS`); the weight is a constant,
so that it can be repacked once; zero points are constant uint8 or left out; there is no g_idx.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir

from rlkit.export import graph
from rlkit.export.plan import Target, target_named


@dataclass(frozen=True, slots=True)
class Finding:
    """A node that would run slowly or not at all, why, and what to change."""

    node: str
    reason: str
    fix: str

    def to_json(self) -> dict[str, str]:
        """Plain JSON values."""
        return asdict(self)


def lint_file(path: Path, *, target: str = "cpu") -> list[Finding]:
    """Check an ONNX file, anybody's; FileNotFoundError or ValueError if it cannot be read."""
    where = target_named(target)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give an .onnx file or the model.onnx of a bundle")
    try:
        model = graph.load(path)
    except Exception as error:
        line = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is no readable ONNX model ({line}); export it again") from error
    return lint_model(model, where)


def lint_model(model: ir.Model, target: Target) -> list[Finding]:
    """Check a graph in memory."""
    return [finding for node in graph.matmul_nodes(model) for finding in _check(node, target)]


def _check(node: ir.Node, target: Target) -> Iterator[Finding]:
    name = node.name or "an unnamed node"
    bits, block = _integer(node, "bits", 4), _integer(node, "block_size", 0)
    level = _integer(node, "accuracy_level", 0)
    if target.kernel(bits, block, level) is None:
        found = f"{bits} bits in blocks of {block} at accuracy_level {level} have no kernel on {target.name}"
        yield Finding(name, found, target.remedy(bits))
    weight, zeros, g_idx = _input(node, 1), _input(node, 3), _input(node, 4)
    if weight is None or weight.const_value is None:
        yield Finding(name, "its weight is computed, not a constant", "store the packed weight as an initializer")
    if zeros is not None:
        if zeros.const_value is None:
            yield Finding(name, "its zero points are computed, not constants", "store them as a uint8 initializer")
        elif zeros.const_value.dtype != ir.DataType.UINT8:
            found = f"its zero points are {zeros.const_value.dtype.name}, not packed uint8"
            yield Finding(name, found, "round them to integers and pack them, or leave them out")
    if g_idx is not None:
        yield Finding(name, "it has g_idx, reordered groups", "store the columns in group order and drop g_idx")


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _input(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or not value.name else value
