"""The propagation of recover/propagate.py as one ONNX loop: its length is the width that comes in, whatever it is.

    own    (1 - a - l - b) v                          all columns at once, before the loop
    h      own + a * above(h) + l * h + b * below(h)  a column, in the loop; rows outside are 0, as their gates are

Exporters would unroll the recurrence into a few nodes per column of one width, or need minutes and a library more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

DOMAIN, NAME = "rlkit", "Propagate"  # of the node that stands for the loop until `with_loops`
PREFIX = "propagate"
END = np.iinfo(np.int64).max
CONSTANTS: dict[str, NDArray[np.generic]] = {
    "one": np.array(1, np.float32),
    "first": np.array([0], np.int64),
    "second": np.array([1], np.int64),
    "third": np.array([2], np.int64),
    "before_last": np.array([-2], np.int64),
    "end": np.array([END], np.int64),
    "gates": np.array([3], np.int64),  # the axis of gates, and where they are gone that of the width
    "last": np.array([-1], np.int64),
    "sides": np.array([0, 0, 1, 0, 0, 1], np.int64),  # a row of 0 above and below (B, C, H)
}


def with_loops(model: onnx.ModelProto) -> int:
    """Replace every node NAME (values (B, C, H, W), gates (B, C, H, 3, W) -> (B, C, H, W)); returns how many."""
    graph = model.graph
    found = 0
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if (node.domain, node.op_type) == (DOMAIN, NAME):
            nodes += _loop(found, node.input[0], node.input[1], node.output[0])
            found += 1
        else:
            nodes.append(node)
    if not found:
        return 0
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(value, f"{PREFIX}.{name}") for name, value in CONSTANTS.items())
    kept = [each for each in model.opset_import if each.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return found


def _loop(number: int, values: str, gates: str, out: str) -> Iterator[onnx.NodeProto]:
    """The nodes of one loop; names within it start with its number."""

    def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
        taken = [f"{PREFIX}.{name[1:]}" if name[0] == "=" else local(name) for name in inputs]
        made = [local(name) for name in outputs]
        return helper.make_node(kind, taken, made, name=f"{PREFIX}/{number}/{outputs[0]}", **attributes)

    def local(name: str) -> str:
        return name if name in (values, gates, out) else f"{PREFIX}.{number}.{name}"

    yield node("ReduceSum", [gates, "=gates"], ["sum"], keepdims=0)
    yield node("Sub", ["=one", "sum"], ["share"])
    yield node("Mul", ["share", values], ["own"])
    yield node("Slice", ["own", "=second", "=end", "=gates"], ["own_rest"])
    yield node("Slice", [gates, "=second", "=end", "=last"], ["gates_rest"])
    for at, name, until in (("first", "above", "second"), ("second", "level", "third"), ("third", "below", "end")):
        yield node("Slice", ["gates_rest", f"={at}", f"={until}", "=gates"], [f"{name}_kept"])
        yield node("Squeeze", [f"{name}_kept", "=gates"], [name])  # (B, C, H, W - 1)
    yield node("Slice", [values, "=first", "=second", "=gates"], ["column"])
    yield node("Squeeze", ["column", "=gates"], ["start"])  # (B, C, H)
    inputs = ["start", "own_rest", "above", "level", "below"]
    axes: dict[str, Any] = {"scan_input_axes": [3] * 4, "scan_output_axes": [3]}
    yield node("Scan", inputs, ["state", "rest"], body=_step(), num_scan_inputs=4, **axes)
    yield node("Concat", ["column", "rest"], [out], axis=3)


def _step() -> onnx.GraphProto:
    """One column: the one before (B, C, H), its own share and its gates -> the column, as state and as output."""

    def outer(name: str) -> str:
        return f"{PREFIX}.{name}"

    nodes = [
        helper.make_node("Pad", ["before", outer("sides")], ["padded"]),
        helper.make_node("Slice", ["padded", outer("first"), outer("before_last"), outer("last")], ["upper"]),
        helper.make_node("Slice", ["padded", outer("third"), outer("end"), outer("last")], ["lower"]),
        helper.make_node("Mul", ["upper", "above"], ["from_above"]),
        helper.make_node("Mul", ["before", "level"], ["from_level"]),
        helper.make_node("Mul", ["lower", "below"], ["from_below"]),
        helper.make_node("Sum", ["own", "from_above", "from_level", "from_below"], ["after"]),
        helper.make_node("Identity", ["after"], ["kept"]),
    ]
    names = ("before", "own", "above", "level", "below")
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("after", "kept")]
    return helper.make_graph(nodes, "column", inputs, outputs)
