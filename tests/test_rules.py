"""Each node that the runtime would run slowly, or refuse, is found, in anybody's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from nodes import K, N, model_file, save
from rlkit.export import lint
from rlkit.export.targets import TARGETS, target_named


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
        ({"K": 100}, {}),  # a ragged last block
        ({"N": 250}, {"bias": np.zeros(250, np.float32)}),
        ({}, {"scales": np.ones((N, 2), np.float16)}),
        ({}, {"scales": np.ones(2 * N, np.float32)}),  # flat
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
        ({"block_size": 48}, {}, "blocks of 48 are no power of two"),
        ({"block_size": 8}, {}, "blocks of 8"),
        ({"block_size": 512}, {}, "2 bits in blocks of 512 are refused"),
        ({"bits": 4, "weight_prepacked": 1}, {}, "packed ahead for CUDA"),
        ({}, {"b": np.zeros((N, 2, 8), np.uint8)}, "weight hold 512 numbers"),
        ({}, {"zeros": np.ones((N, 2), np.uint8)}, "zero points hold 64 numbers"),
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
    assert findings[0].severity in ("slow", "unsupported")
    assert set(findings[0].to_json()) == {"node", "op", "reason", "fix", "severity"}


def test_defaults_of_the_operator_count() -> None:
    """Attributes left out mean 4 bits and level 0, which is fast on cpu only in float32."""
    assert target_named("cpu").kernel(4, 32, 0) is not None


@pytest.mark.parametrize(
    ("target", "attributes", "constants", "says", "severity"),
    [
        ("webgpu", {"accuracy_level": 0}, {}, "", ""),
        ("webgpu", {"block_size": 256, "K": 96}, {}, "", ""),
        ("webgpu", {}, {"zeros": np.ones((N, 2), np.float32)}, "zero points are FLOAT", "unsupported"),
        ("webgpu", {}, {"g_idx": np.zeros(K, np.int32)}, "g_idx", "slow"),
        ("webgpu", {}, {"bias": np.zeros(N, np.float32)}, "", ""),
        ("dml", {"bits": 4, "accuracy_level": 0}, {}, "", ""),
        ("dml", {"bits": 8}, {}, "", ""),
        ("dml", {}, {}, "store the codes in 4-bit fields", "slow"),
        ("dml", {"bits": 4, "K": 96}, {}, "96 inputs are no multiple of the block 64", "slow"),
        ("dml", {"bits": 4}, {"bias": np.zeros(N, np.float32)}, "has a bias", "slow"),
        ("npu", {"bits": 4}, {"zeros": np.ones((N, 1), np.uint8)}, "", ""),
        ("npu", {"bits": 4}, {}, "has no zero points", "unsupported"),
        ("npu", {"bits": 8}, {"zeros": np.ones((N, 2), np.uint8)}, "npu has no kernel for 8 bits", "unsupported"),
        ("npu", {"bits": 4, "block_size": 16}, {"zeros": np.ones((N, 4), np.uint8)}, "blocks of 16", "unsupported"),
    ],
)
def test_each_target_has_rules_of_its_own(
    target: str, attributes: dict[str, int], constants: dict[str, Any], says: str, severity: str, tmp_path: Path
) -> None:
    found = lint.lint_file(model_file(tmp_path / "m.onnx", attributes, **constants), target=target)
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    assert all(says in finding.reason + finding.fix for finding in found)


def attention(path: Path, inputs: dict[int, str], **attributes: Any) -> Path:
    """A file with one GroupQueryAttention: separate q, k, v, plain cache, and what is told."""
    names = ["q", "k", "v", "pk", "pv", "lengths", "total", *[""] * 9]
    for index, name in inputs.items():
        names[index] = name
    while names[-1] == "":
        names.pop()
    outputs = ["y", "new_k", "new_v"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        outputs,
        name="attn",
        domain="com.microsoft",
        **{"num_heads": 2, "kv_num_heads": 2, **attributes},
    )
    kinds = {"pk8": TensorProto.INT8, "pv8": TensorProto.INT8, "pk4": TensorProto.UINT8, "pv4": TensorProto.UINT8}
    return save(path, [node], {}, {name: (kinds.get(name, TensorProto.FLOAT), None) for name in names if name})


SCALED = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
_NO_KIND = {"cpu": "PER_TOKEN does not exist", "webgpu": "", "dml": "", "npu": ""}
INT8 = {3: "pk8", 4: "pv8", 12: "ks", 13: "vs"}


@pytest.mark.parametrize(
    ("inputs", "attributes", "refused_by"),
    [
        ({}, {}, {}),
        ({14: "qn", 15: "kn"}, {}, {"cpu": "normalizes", "dml": "normalizes", "npu": "normalizes"}),
        ({}, {"do_rotary": 1}, {"dml": "do_rotary", "npu": "do_rotary"}),
        ({1: "", 2: ""}, {}, {"dml": "one tensor", "npu": "one tensor"}),
        ({}, {"sliding_window_cache": 1}, {"webgpu": "window", "dml": "window", "npu": "window"}),
        (INT8, SCALED, {"webgpu": "kvCacheQuantizationBits", "dml": "float cache", "npu": "float cache"}),
        (INT8 | {11: "sink"}, SCALED, {"cpu": "head_sink", "webgpu": "", "dml": "", "npu": ""}),
        (INT8, SCALED | {"softcap": 30.0}, {"cpu": "softcap", "webgpu": "", "dml": "", "npu": ""}),
        (INT8, SCALED | {"v_quant_type": "NONE"}, {"cpu": "differently", "webgpu": "", "dml": "", "npu": ""}),
        (INT8, SCALED | {"kv_cache_bit_width": 2}, {"cpu": "neither 4 nor 8", "webgpu": "", "dml": "", "npu": ""}),
        (INT8, SCALED | {"kv_cache_bit_width": 4}, {"cpu": "of type INT8", "webgpu": "", "dml": "", "npu": ""}),
        (INT8 | {3: "pk4", 4: "pv4"}, SCALED | {"kv_cache_bit_width": 4}, {"webgpu": "", "dml": "", "npu": ""}),
        (INT8 | {3: "pk"}, SCALED, {"cpu": "of type FLOAT", "webgpu": "", "dml": "", "npu": ""}),
        (INT8 | {13: ""}, SCALED, {"cpu": "no v_scale", "webgpu": "", "dml": "", "npu": ""}),
        (INT8, {**SCALED, "k_quant_type": "PER_TOKEN", "v_quant_type": "PER_TOKEN"}, _NO_KIND),
        ({}, {"kv_cache_bit_width": 8}, dict.fromkeys(("cpu", "webgpu", "dml", "npu"), "no quant types")),
    ],
)
def test_attention_that_a_provider_lacks_is_found(
    inputs: dict[int, str], attributes: dict[str, Any], refused_by: dict[str, str], tmp_path: Path
) -> None:
    path = attention(tmp_path / "m.onnx", inputs, **attributes)
    for target in TARGETS:
        found = lint.lint_file(path, target=target)
        assert [finding.op for finding in found] == ["GroupQueryAttention"] * (target in refused_by), target
        assert all(refused_by[target] in finding.reason + finding.fix for finding in found)


def embedding(path: Path, data: np.ndarray, zeros: np.ndarray | None = None, **attributes: int) -> Path:
    constants = {"data": data, "scales": np.ones((8, 1), np.float32)} | ({} if zeros is None else {"zeros": zeros})
    names = ["data", "ids", "scales", *(["zeros"] if zeros is not None else [])]
    chosen = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1} | attributes
    node = helper.make_node("GatherBlockQuantized", names, ["y"], name="rows", domain="com.microsoft", **chosen)
    return save(path, [node], constants, {"ids": (TensorProto.INT64, [1])})


@pytest.mark.parametrize(
    ("zeros", "attributes", "says"),
    [
        (None, {}, ""),
        (np.zeros((8, 1), np.uint8), {"bits": 2}, ""),
        (np.zeros((8, 1), np.float32), {}, "zero points are FLOAT, its data UINT8"),
        (None, {"bits": 3}, "3 bits in uint8"),
        (None, {"gather_axis": 1}, "along axis 1"),
        (None, {"block_size": 24}, "no power of two"),
    ],
)
def test_packed_embeddings_are_checked(
    zeros: np.ndarray | None, attributes: dict[str, int], says: str, tmp_path: Path
) -> None:
    path = embedding(tmp_path / "m.onnx", np.zeros((8, 16), np.uint8), zeros, **attributes)
    found = lint.lint_file(path)
    assert len(found) == bool(says)
    assert all(says in finding.reason for finding in found)
    assert [finding.severity for finding in lint.lint_file(path, target="dml")] == ["slow"]
    assert [finding.severity for finding in lint.lint_file(path, target="npu")] == ["unsupported"]


def pair(
    path: Path, *, bits: int = 2, block: int = 64, axis: int = 0, turned: bool = False, shared: bool = False
) -> Path:
    """DequantizeLinear + MatMul, as exporters to QDQ write it."""
    shape = (N, K) if turned else (K, N)
    blocks = tuple(-(-size // block) if index == axis else size for index, size in enumerate(shape))
    kind = {2: TensorProto.UINT2, 4: TensorProto.UINT4, 8: TensorProto.UINT8}[bits]
    stored = {
        "w": helper.make_tensor("w", kind, shape, [1] * (N * K)),
        "scales": np.ones(blocks, np.float32),
        "zeros": helper.make_tensor("zeros", kind, blocks, [1] * int(np.prod(blocks))),
    }
    nodes = [helper.make_node("DequantizeLinear", list(stored), ["dq"], name="dq", axis=axis, block_size=block)]
    if turned:
        nodes.append(helper.make_node("Transpose", ["dq"], ["turned"], name="turn", perm=[1, 0]))
    weight = "turned" if turned else "dq"
    nodes.append(helper.make_node("MatMul", ["x", weight], ["a" if shared else "y"], name="one"))
    if shared:
        nodes.append(helper.make_node("MatMul", ["x", weight], ["b"], name="two"))
        nodes.append(helper.make_node("Concat", ["a", "b"], ["y"], name="both", axis=0))
    return save(path, nodes, stored, {"x": (TensorProto.FLOAT, [1, K])})


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({}, ""),
        ({"block": 32}, ""),
        ({"bits": 4, "block": 16}, ""),
        ({"bits": 8, "block": 32}, ""),
        ({"block": 16}, "joined, it is 2 bits in blocks of 16"),
        ({"axis": 1, "block": 32}, "blocks run along axis 1"),
        ({"bits": 4, "axis": 1, "block": 32, "turned": True}, "a Transpose stands between"),
        ({"bits": 4, "shared": True}, "several nodes share it"),
        ({"bits": 4, "block": 24}, "its block_size is 24"),
    ],
)
def test_pairs_are_judged_as_the_runtime_treats_them(form: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = pair(tmp_path / "m.onnx", **form)
    found = lint.lint_file(path)
    assert bool(found) == bool(says)
    assert all(says in finding.reason and finding.op == "DequantizeLinear + MatMul" for finding in found)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    run = onnx.load(tmp_path / "run.onnx").graph.node
    assert any(node.op_type == "DequantizeLinear" for node in run) == (bool(says) and "joined" not in says)


def test_constants_may_be_nodes_but_not_be_overridden(tmp_path: Path) -> None:
    packed, scales = np.zeros((N, 2, 16), np.uint8), np.ones((N, 2), np.float32)
    attributes = {"K": K, "N": N, "bits": 2, "block_size": 64, "accuracy_level": 4}
    made = helper.make_node("Constant", [], ["b"], name="b", value=numpy_helper.from_array(packed, "b"))
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "scales"], ["y"], name="one", domain="com.microsoft", **attributes
    )
    inputs = {"x": (TensorProto.FLOAT, [1, K])}
    assert lint.lint_file(save(tmp_path / "a.onnx", [made, node], {"scales": scales}, inputs)) == []
    open_ = inputs | {"b": (TensorProto.UINT8, [N, 2, 16])}
    (found,) = lint.lint_file(save(tmp_path / "b.onnx", [node], {"b": packed, "scales": scales}, open_))
    assert "can be overridden" in found.reason


def test_bfloat16_has_no_kernel_on_the_cpu(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="one")]
    inputs = {name: (TensorProto.BFLOAT16, [16, 16]) for name in "xw"}
    path = save(tmp_path / "m.onnx", nodes, {}, inputs, TensorProto.BFLOAT16)
    (found,) = lint.lint_file(path)
    assert (found.node, found.severity) == ("one", "unsupported")
    assert "bfloat16" in found.reason
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert lint.lint_file(save(tmp_path / "c.onnx", [helper.make_node("Identity", ["x"], ["y"])], {}, inputs)) == []


@pytest.mark.parametrize(
    ("op", "domain", "refused_by"),
    [
        ("MatMulNBitsMlp", "com.microsoft", {"cpu", "dml", "npu"}),
        ("QMoE", "com.microsoft", {"dml", "npu"}),
        ("Elsewhere", "their.domain", {"cpu", "webgpu", "dml", "npu"}),
        ("Tanh", "", {"npu"}),
        ("MatMul", "", {"npu"}),
        ("Sigmoid", "", set()),
    ],
)
def test_operators_that_a_target_lacks_are_found(op: str, domain: str, refused_by: set[str], tmp_path: Path) -> None:
    nodes = [helper.make_node(op, ["x", "x"], ["y"], domain=domain)]
    path = save(tmp_path / "m.onnx", nodes, {}, {"x": (TensorProto.FLOAT, None)})
    for target in TARGETS:
        found = lint.lint_file(path, target=target)
        assert [finding.severity for finding in found] == ["unsupported"] * (target in refused_by), target
        assert all(finding.node == "the unnamed node that makes y" for finding in found)


def test_attributes_of_the_wrong_type_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attribute bits of one is of type STRING, not INT"):
        path = tmp_path / "m.onnx"
        node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], name="one", domain="com.microsoft", bits="two")
        lint.lint_file(save(path, [node], {}, {name: (TensorProto.FLOAT, None) for name in "xbs"}))
