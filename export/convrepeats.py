"""ONNX models of one vision operator several times in a chain, to time it where it runs.

A chain reuses what it writes as a network does, and its layouts are converted at its ends alone. Convolutions keep
their number of channels, so that each can follow the other; operators that change sizes stand beside one that changes
them back only where they come in pairs (resize after pooling).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rlkit.export import visionscan

OPSET, IR_VERSION = 17, 9
X, Y = "x", "y"
FLOAT = TensorProto.FLOAT


def convolutions(channels: int, size: tuple[int, ...], count: int, *, groups: int = 1, int8: bool = False) -> bytes:
    """`count` convolutions of kernel 3 with a ReLU each, or in integers without; size is (H, W) or (D, H, W)."""
    rng = np.random.default_rng(0)
    shape = channels, channels // groups, *(3,) * len(size)
    values = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
    attributes: dict[str, Any] = {"pads": [1] * (2 * len(size)), "group": groups}
    nodes, constants = [], {"bias": np.zeros(channels, np.float32)}
    if int8:
        constants = {"scale": np.array(0.05, np.float32), "zero": np.array(128, np.uint8)}
        constants |= {"scales": np.full(channels, 0.01, np.float32), "zeros": np.zeros(channels, np.int8)}
        values = np.clip(np.rint(values / 0.01), -127, 127).astype(np.int8)
    for index in range(count):
        constants[f"w{index}"] = np.roll(values, index, 0)  # equal contents would be packed once
        before, after = X if index == 0 else f"h{index - 1}", Y if index == count - 1 else f"h{index}"
        if int8:
            names = [before, "scale", "zero", f"w{index}", "scales", "zeros", "scale", "zero"]
            nodes.append(helper.make_node("QLinearConv", names, [after], **attributes))
        else:
            nodes.append(helper.make_node("Conv", [before, f"w{index}", "bias"], [f"c{index}"], **attributes))
            nodes.append(helper.make_node("Relu", [f"c{index}"], [after]))
    return _model(nodes, constants, (1, channels, *size), TensorProto.UINT8 if int8 else FLOAT)


def movers(kind: str, shape: tuple[int, int, int], count: int) -> bytes:
    """`count` links of operators over (channels, H, W) that move numbers: one of MOVERS."""
    constants: dict[str, Any] = {
        "one": np.ones(shape[0], np.float32),
        "half": np.full(shape[0], 0.5, np.float32),
        "starts": np.array([0], np.int64),
        "ends": np.array([shape[1]], np.int64),
        "axis": np.array([2], np.int64),
        "below": np.array([0, 0, 0, 0, 0, 0, 1, 0], np.int64),
        "double": np.array([1, 1, 2, 2], np.float32),
        "scale": np.array(0.05, np.float32),
        "zero": np.array(128, np.uint8),
    }
    nodes: list[onnx.NodeProto] = []
    for index in range(count):
        before, after = X if index == 0 else f"h{index - 1}", Y if index == count - 1 else f"h{index}"
        nodes += MOVERS[kind](before, f"b{index}", after)
    used = {name for node in nodes for name in node.input}
    stored = {name: value for name, value in constants.items() if name in used}
    return _model(nodes, stored, (1, *shape), TensorProto.UINT8 if kind == "integer" else FLOAT)


def _add(before: str, _between: str, after: str) -> list[onnx.NodeProto]:
    return [helper.make_node("Add", [before, X], [after])]


def _normalize(before: str, _between: str, after: str) -> list[onnx.NodeProto]:
    return [helper.make_node("BatchNormalization", [before, "one", "half", "half", "one"], [after])]


def _slice(before: str, between: str, after: str) -> list[onnx.NodeProto]:
    pad = helper.make_node("Pad", [before, "below"], [between])
    return [pad, helper.make_node("Slice", [between, "starts", "ends", "axis"], [after])]


def _pool(before: str, between: str, after: str) -> list[onnx.NodeProto]:
    pool = helper.make_node("MaxPool", [before], [between], kernel_shape=[2, 2], strides=[2, 2])
    return [pool, helper.make_node("Resize", [between, "", "double"], [after], mode="linear")]


def _integer(before: str, _between: str, after: str) -> list[onnx.NodeProto]:
    names = [before, "scale", "zero", "scale", "zero"]
    return [helper.make_node("QLinearLeakyRelu", names, [after], domain="com.microsoft", alpha=0.2)]


MOVERS = {"add": _add, "normalize": _normalize, "slice": _slice, "pool": _pool, "integer": _integer}


def loop(columns: int) -> bytes:
    """The loop of export/visionscan.py over columns of 8 channels of 32 rows, one more than it steps."""
    gates = numpy_helper.from_array(np.full((1, 8, 32, 3, columns), 0.25, np.float32), "gates")
    ends = [helper.make_tensor_value_info(name, FLOAT, [1, 8, 32, columns]) for name in (X, Y)]
    node = helper.make_node(visionscan.NAME, [X, "gates"], [Y], domain=visionscan.DOMAIN)
    graph = helper.make_graph([node], "loop", ends[:1], ends[1:], [gates])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    visionscan.with_loops(model)
    return bytes(model.SerializeToString())


def _model(nodes: list[onnx.NodeProto], constants: dict[str, Any], shape: tuple[int, ...], kind: int) -> bytes:
    stored = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, kind, list(shape)) for name in (X, Y)]
    graph = helper.make_graph(nodes, "repeats", ends[:1], ends[1:], stored)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())
