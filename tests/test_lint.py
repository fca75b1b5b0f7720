"""Lint reads files and folders of any origin, walks all of a graph, and never a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from nodes import K, N, model_file, save
from rlkit.export import lint
from rlkit.export.targets import TARGETS


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        lint.lint_file(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xfe not a model")
    with pytest.raises(ValueError, match="no readable ONNX model"):
        lint.lint_file(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="target 'tpu' does not exist"):
        lint.lint_file(tmp_path / "bad.onnx", target="tpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        lint.lint_file(tmp_path / "empty")


def test_graphs_inside_nodes_and_functions_are_walked(tmp_path: Path) -> None:
    slow = {"K": K, "N": N, "bits": 2, "block_size": 64}
    inner = helper.make_node("MatMulNBits", ["x", "b", "scales"], ["z"], name="inner", domain="com.microsoft", **slow)
    branch = helper.make_graph([inner], "then", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    choose = helper.make_node("If", ["c"], ["h"], name="choose", then_branch=branch, else_branch=branch)
    body = helper.make_node("MatMulNBits", ["p", "q", "r"], ["s"], name="body", domain="com.microsoft", **slow)
    opsets = [helper.make_opsetid("", 25), helper.make_opsetid("com.microsoft", 1)]
    function = helper.make_function("own", "Layer", ["p", "q", "r"], ["s"], [body], opsets)
    call = helper.make_node("Layer", ["h", "b", "scales"], ["y"], name="call", domain="own")
    constants = {"b": np.zeros((N, 2, 16), np.uint8), "scales": np.ones((N, 2), np.float32)}
    inputs = {"x": (TensorProto.FLOAT, [1, K]), "c": (TensorProto.BOOL, [])}
    path = save(tmp_path / "m.onnx", [choose, call], constants, inputs, functions=(function,))
    found = lint.lint_file(path)
    assert [finding.node for finding in found] == ["inner", "inner", "function Layer: body"]
    assert all("accuracy_level 0" in finding.reason for finding in found)  # not that the function's weight is computed


def test_data_that_is_missing_cut_off_or_elsewhere_is_named(tmp_path: Path) -> None:
    stored = {"save_as_external_data": True, "location": "m.data", "size_threshold": 0}
    attributes = {"K": K, "N": N, "bits": 2, "block_size": 64}
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "scales"], ["y"], name="one", domain="com.microsoft", **attributes
    )
    constants = {"b": np.zeros((N, 2, 16), np.uint8), "scales": np.ones((N, 2), np.float32)}
    path = save(tmp_path / "m.onnx", [node], constants, {"x": (TensorProto.FLOAT, [1, K])}, **stored)
    whole = lint.lint_path(path)
    assert (len(whole.findings), whole.notes) == (1, ())
    data = tmp_path / "m.data"
    data.write_bytes(data.read_bytes()[:-1])
    cut = lint.lint_path(path)
    assert [finding.op for finding in cut.findings] == ["MatMulNBits", "initializer"]
    assert "ends behind the end of m.data" in cut.findings[1].reason
    data.unlink()
    gone = lint.lint_path(path)
    assert len(gone.findings) == 1  # the node is judged all the same
    assert gone.notes == ("m.data is missing: the data of 2 tensors was not checked",)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "../../m.data"
    onnx.save(model, path)
    away = [finding for finding in lint.lint_file(path) if finding.op == "initializer"]
    assert len(away) == 2
    assert "outside the model's folder" in away[0].reason


def bundle(folder: Path, model: Path, **config: Any) -> Path:
    folder.mkdir()
    model.rename(folder / "model.onnx")
    decoder = {"filename": "model.onnx", "session_options": {"provider_options": [], **config}}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    return folder


def test_a_folder_is_checked_for_what_it_was_made_for(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", model_file(tmp_path / "m.onnx", {}))
    assert lint.lint_path(folder).target.name == "cpu"
    assert lint.lint_file(folder) == []
    (folder / "rlkit.json").write_text('{"target": "dml"}')
    assert [finding.severity for finding in lint.lint_file(folder)] == ["slow"]
    assert lint.lint_file(folder, target="cpu") == []


@pytest.mark.parametrize(("provider", "target"), [("dml", "dml"), ("WebGPU", "webgpu"), ("RyzenAI", "npu")])
def test_a_foreign_folder_is_checked_for_its_provider(provider: str, target: str, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", model_file(tmp_path / "m.onnx", {}), provider_options=[{provider: {}}])
    linted = lint.lint_path(folder)
    assert (linted.target.name, linted.notes) == (target, ())


def test_a_provider_without_rules_is_said(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", model_file(tmp_path / "m.onnx", {}), provider_options=[{"cuda": {}}])
    assert "no rules are known for the provider cuda" in lint.lint_path(folder).notes[0]
    assert lint.lint_path(folder, "cpu").notes == ()


@pytest.mark.parametrize(
    ("attributes", "constants", "says"),
    [
        ({"N": 128}, {}, ["mlas.use_lut_gemm is on"]),
        ({"N": 128, "accuracy_level": 0}, {}, ["mlas.use_lut_gemm is on"]),
        ({"N": 128}, {"zeros": np.ones((128, 2), np.float32)}, ["mlas.use_lut_gemm is on"]),
        ({"N": 192}, {}, []),  # refused by the tables, taken by the int8 kernel
        ({"N": 192, "accuracy_level": 0}, {}, ["N % 128 = 0"]),
        ({"N": 128, "bits": 4}, {}, []),
    ],
)
def test_lookup_tables_are_judged_by_their_conditions(
    attributes: dict[str, int], constants: dict[str, Any], says: list[str], tmp_path: Path
) -> None:
    options = {"mlas.use_lut_gemm": "1"}
    found = lint.lint_file(bundle(tmp_path / "b", model_file(tmp_path / "m.onnx", attributes, **constants), **options))
    assert len(found) == len(says)
    assert all(says[0] in finding.reason for finding in found)


def test_folders_that_name_files_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", model_file(tmp_path / "m.onnx", {}))
    model_file(tmp_path / "other.onnx", {})
    config = folder / "genai_config.json"
    for name, says in (("../other.onnx", "outside its folder"), ("absent.onnx", r"lacks absent\.onnx")):
        config.write_text(json.dumps({"model": {"decoder": {"filename": name}}}))
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            lint.lint_file(folder)


def test_no_weight_is_read() -> None:
    def refuse() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    def constant(name: str, kind: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        tensor = ir.LazyTensor(refuse, dtype=kind, shape=ir.Shape(shape), name=name)
        return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=tensor)

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, K]))
    parts = [constant("b", ir.DataType.UINT8, (N, 2, 16)), constant("scales", ir.DataType.FLOAT, (N, 2))]
    attributes = {"K": K, "N": N, "bits": 2, "block_size": 64}
    node = ir.node("MatMulNBits", [x, *parts], attributes, domain="com.microsoft", name="one")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=parts, opset_imports={"": 20, "com.microsoft": 1})
    (found,) = lint.lint_model(ir.Model(graph, ir_version=10), TARGETS["cpu"])
    assert "accuracy_level 0" in found.reason
