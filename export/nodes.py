"""The linears and experts of a written graph, by node: what profiles of a run know by name only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from rlkit.export.graph import LINEAR_OPS, load, module_of


@dataclass(frozen=True, slots=True)
class LinearNode:
    """The module that a node computes, and the width of its weights' codes, 0 where the graph does not say."""

    module: str
    bits: int


def linear_nodes(path: Path) -> dict[str, LinearNode]:
    """Every product with weights of an ONNX file by the node's name; no weight is read."""
    found = {}
    for node in load(path).graph:
        if node.op_type in (*LINEAR_OPS, "QMoE") and node.name:
            found[node.name] = LinearNode(module_of(node.name), _bits(node))
    return found


def _bits(node: ir.Node) -> int:
    for name in ("bits", "expert_weight_bits"):
        if name in node.attributes:
            return node.attributes[name].as_int()
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:  # made by other nodes, such as a DequantizeLinear
        return 0
    return int(weight.const_value.dtype.bitwidth)


def windows(path: Path) -> dict[int, int]:
    """The layers of an ONNX file whose attention sees a window of tokens alone -> its size."""
    found = {}
    for node in load(path).graph:
        size = node.attributes["local_window_size"].as_int() if "local_window_size" in node.attributes else -1
        layer = re.search(r"/layers\.(\d+)/", node.name or "")
        if layer and size > 0:
            found[int(layer[1])] = size
    return found
