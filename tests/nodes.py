"""ONNX files of one node or a few, written in code: what lint is tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

N, K = 32, 128
NAMES = ["b", "scales", "zeros", "g_idx", "bias"]


def model_file(path: Path, attributes: dict[str, Any], **constants: np.ndarray | None) -> Path:
    """A file with one 2-bit MatMulNBits, block 64, level 4, changed as told; a constant of None becomes an input."""
    chosen = {"K": K, "N": N, "bits": 2, "block_size": 64, "accuracy_level": 4} | attributes
    blocks = -(-chosen["K"] // max(chosen["block_size"], 1))
    packed = np.zeros((chosen["N"], blocks, chosen["block_size"] * chosen["bits"] // 8), np.uint8)
    given = {"b": packed, "scales": np.ones((chosen["N"], blocks), np.float32), **constants}
    last = max((NAMES.index(name) for name in given), default=0)
    names = ["x", *(name if name in given else "" for name in NAMES[: last + 1])]
    node = helper.make_node("MatMulNBits", names, ["y"], name="one", domain="com.microsoft", **chosen)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(given["scales"].dtype))
    return save(path, [node], given, {"x": (kind, [1, chosen["K"]])}, kind)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    inputs: dict[str, tuple[int, list[Any] | None]],
    kind: int = TensorProto.FLOAT,
    functions: tuple[onnx.FunctionProto, ...] = (),
    **options: Any,
) -> Path:
    """Write a model whose output is y; constants of None become uint8 inputs."""
    taken = {name: (TensorProto.UINT8, None) for name, value in constants.items() if value is None}
    stored = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
        for name, value in constants.items()
        if value is not None
    ]
    described = [helper.make_tensor_value_info(name, *form) for name, form in {**inputs, **taken}.items()]
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    graph = helper.make_graph(nodes, "g", described, outputs, stored)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 25), ("com.microsoft", 1), ("own", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=13, functions=functions)
    onnx.save(model, path, **options)
    return path
