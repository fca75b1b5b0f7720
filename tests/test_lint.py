"""Lint finds each form of MatMulNBits that the runtime would dequantize at every call, in anybody's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rlkit.export import lint
from rlkit.export.plan import target_named

N, K = 32, 128


def model_file(path: Path, attributes: dict[str, Any], **constants: np.ndarray | None) -> Path:
    """A file with one 2-bit MatMulNBits, block 64, level 4, changed as told; a constant of None becomes an input."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, K])]
    given = {"b": np.zeros((N, 2, 16), np.uint8), "scales": np.ones((N, 2), np.float32), **constants}
    names = ["x", "b", "scales", "zeros" if "zeros" in given else "", "g_idx" if "g_idx" in given else ""]
    for name, value in given.items():
        if value is None:
            inputs.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    chosen = {"K": K, "N": N, "bits": 2, "block_size": 64, "accuracy_level": 4} | attributes
    node = helper.make_node("MatMulNBits", names, ["y"], name="one", domain="com.microsoft", **chosen)
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, N])]
    stored = [numpy_helper.from_array(value, name) for name, value in given.items() if value is not None]
    graph = helper.make_graph([node], "g", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def zeros(kind: type = np.uint8) -> np.ndarray:
    return np.ones((N, 1), kind)


@pytest.mark.parametrize(
    ("attributes", "constants"),
    [
        ({}, {}),
        ({}, {"zeros": zeros()}),
        ({"block_size": 128}, {}),
        ({"block_size": 32}, {}),
        ({"bits": 4, "accuracy_level": 0}, {}),
        ({"bits": 4}, {}),
        ({"bits": 8}, {}),
    ],
)
def test_fast_forms_pass(attributes: dict[str, int], constants: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert lint.lint_file(model_file(tmp_path / "m.onnx", attributes, **constants)) == []


@pytest.mark.parametrize(
    ("attributes", "constants", "says"),
    [
        ({"accuracy_level": 0}, {}, "2 bits in blocks of 64 at accuracy_level 0"),
        ({"accuracy_level": 1}, {}, "accuracy_level 1"),
        ({"block_size": 16}, {}, "blocks of 16"),
        ({"block_size": 256}, {}, "blocks of 256"),
        ({"bits": 8, "accuracy_level": 0}, {}, "8 bits"),
        ({"bits": 3}, {}, "3 bits"),
        ({}, {"zeros": zeros(np.float32)}, "zero points are FLOAT"),
        ({}, {"zeros": None}, "zero points are computed"),
        ({}, {"b": None}, "weight is computed"),
        ({}, {"g_idx": np.zeros(K, np.int32)}, "g_idx"),
    ],
)
def test_slow_forms_are_found(
    attributes: dict[str, int], constants: dict[str, np.ndarray | None], says: str, tmp_path: Path
) -> None:
    findings = lint.lint_file(model_file(tmp_path / "m.onnx", attributes, **constants))
    assert len(findings) == 1
    assert findings[0].node == "one"
    assert says in findings[0].reason
    assert findings[0].fix
    assert set(findings[0].to_json()) == {"node", "reason", "fix"}


def test_defaults_of_the_operator_count() -> None:
    """Attributes left out mean 4 bits and level 0, which is fast on cpu only in float32."""
    assert target_named("cpu").kernel(4, 32, 0) is not None


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        lint.lint_file(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xfe not a model")
    with pytest.raises(ValueError, match="no readable ONNX model"):
        lint.lint_file(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="target 'npu'"):
        lint.lint_file(tmp_path / "bad.onnx", target="npu")
