"""Seconds by operator class: of profiles with invented times, and of tiny bundles whose kernels are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import families
import tiny
from rlkit.export.build import export_bundle
from rlkit.export.nodes import LinearNode, linear_nodes
from rlkit.profiles import opprofile
from rlkit.profiles.opprofile import CUT_SECONDS, OperatorSeconds, Row, classify, profile_bundle, runs_of, summed

GQA = "/model/layers.0/attn/GroupQueryAttention"
GATE_UP = "/model/layers.{}/mlp/gate_up_proj/MatMulNBits"
LINEARS = {GATE_UP.format(layer): LinearNode(f"model.layers.{layer}.mlp.gate_up_proj", 2) for layer in range(2)}


def node(name: str, op: str, begin: int, duration: int) -> dict[str, Any]:
    args = {"op_name": op, "provider": "CPUExecutionProvider"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": begin, "dur": duration, "args": args}


def run(begin: int, durations: tuple[int, int, int], gap: int = 2) -> list[dict[str, Any]]:
    events, at = [], begin + gap
    kernels = ((GQA, "GroupQueryAttention"), *((name, "MatMulNBits") for name in LINEARS))
    for (name, op), duration in zip(kernels, durations, strict=True):
        events.append(node(name, op, at, duration))
        at += duration + gap
    whole = {"cat": "Session", "name": "model_run", "ts": begin, "dur": at - begin, "args": {}}
    return [*reversed(events), whole]  # the runtime writes no order that one could rely on


def test_medians_are_kernel_by_kernel() -> None:
    """A step that was interrupted once, in whichever kernel, leaves no trace."""
    loading = [{"cat": "Session", "name": "session_initialization", "ts": 5, "dur": 40, "args": {}}]
    events = loading + run(100, (10, 20, 30)) + run(1000, (900, 20, 30)) + run(3000, (10, 20, 700), gap=3)
    rows, gaps = summed(runs_of(events), LINEARS)
    assert rows == (
        Row("attention", "attention", 0, 1, pytest.approx(10e-6 + CUT_SECONDS)),
        Row("linear", "gate_up_proj", 2, 2, pytest.approx(50e-6 + 2 * CUT_SECONDS)),
    )
    assert gaps == pytest.approx(4 * (2e-6 - CUT_SECONDS))


def test_kernels_inside_a_branch_are_counted_once() -> None:
    inside = node("/branch/MatMul", "MatMul", 103, 5)
    whole = {"cat": "Session", "name": "model_run", "ts": 100, "dur": 12, "args": {}}
    (found,) = runs_of([whole, node("/If", "If", 102, 8), inside])
    assert [name for name, *_rest in found.kernels] == ["/branch/MatMul"] and sum(found.gaps) == 7


def test_profiles_without_kernels_or_with_changing_ones_are_refused() -> None:
    whole = {"cat": "Session", "name": "model_run", "ts": 9, "dur": 1, "args": {}}
    for events in ([], [whole], [*run(100, (1, 2, 3)), {**whole, "ts": 500}]):
        with pytest.raises(ValueError, match="measure again"):
            summed(runs_of(events), LINEARS)


@pytest.mark.parametrize(
    ("name", "op", "expected"),
    [
        ("/model/layers.3/attn/o_proj/MatMulNBits", "MatMulNBits", ("linear", "o_proj")),
        ("/lm_head/MatMul", "MatMul", ("linear", "lm_head")),
        ("/model/layers.3/mlp/up_proj/lora_A/MatMulNBits", "MatMulNBits", ("adapter", "adapters")),
        ("/model/layers.3/mlp/up_proj/lora_Add", "Add", ("elementwise", "adapters: sum")),
        ("/model/layers.0/attn/q_proj/lora_inputs_B/MatMul", "MatMul", ("adapter", "adapters")),
        ("/model/layers.0/attn/q_proj/lora_inputs_Add", "Add", ("elementwise", "adapters: sum")),
        ("/model/layers.0/attn/q_proj/offsets/ReduceSum", "ReduceSum", ("adapter", "offsets")),
        ("/model/embed_tokens/GatherBlockQuantized", "GatherBlockQuantized", ("embedding", "embedding")),
        ("/model/attn_mask_reformat/attn_mask_subgraph/Sub", "Sub", ("elementwise", "inputs")),
        (
            "/model/layers.1/input_layernorm/SkipLayerNorm",
            "SkipSimplifiedLayerNormalization",
            ("norm", "residual and norm"),
        ),
        ("/model/layers.0/input_layernorm/LayerNorm", "SimplifiedLayerNormalization", ("norm", "norm")),
        (
            "/model/layers.0/attn/q_norm/SimplifiedLayerNormalization",
            "SimplifiedLayerNormalization",
            ("norm", "head norm"),
        ),
        ("/model/layers.0/attn/GroupQueryAttention", "GroupQueryAttention", ("attention", "attention")),
        ("/model/layers.0/attn/k_norm/Reshape_2", "Reshape", ("norm", "head norm")),
        ("/model/layers.0/attn/qkv_proj/Add", "Add", ("linear", "bias")),
        ("/model/layers.1/residual_mul/Mul_2", "Mul", ("elementwise", "Mul")),
        ("/model/layers.1/mlp/act_fn/Mul/QuickGeluFusion/", "QuickGelu", ("elementwise", "activation")),
        ("/model/layers.1/mlp/Mul", "Mul", ("elementwise", "activation")),
        ("/model/layers.1/mlp/gate_up_proj/Split", "Split", ("elementwise", "split")),
        ("/model/layers.1/moe/experts/QMoE", "QMoE", ("experts", "experts")),
        ("/model/layers.1/moe/router/TopK", "TopK", ("elementwise", "routing")),
        ("/model/layers.1/moe/router/MatMulNBits", "MatMulNBits", ("linear", "router")),
        ("/somewhere", "FancyNewOperator", ("other", "FancyNewOperator")),
    ],
)
def test_classes(name: str, op: str, expected: tuple[str, str]) -> None:
    assert classify(name, op) == (*expected, 0)


def test_bits_are_those_of_linears_and_branches_alone() -> None:
    linear = LinearNode("model.layers.0.mlp.up_proj", 2)
    assert classify("/model/layers.0/mlp/up_proj/MatMulNBits", "MatMulNBits", linear)[2] == 2
    assert classify("/model/layers.0/mlp/up_proj/lora_A/MatMulNBits", "MatMulNBits", replace(linear, bits=8))[2] == 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("opprofile")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4W2, adapter_rank=32)
    return export_bundle(checkpoint, root / "bundle")


@pytest.mark.parametrize(("tokens", "past"), [(1, 40), (16, 0), (16, 40)])
def test_every_kernel_of_a_bundle_has_a_class(tokens: int, past: int, bundle: Path) -> None:
    found = profile_bundle(bundle, tokens, past, threads=1, steps=2)
    assert (found.prompt_tokens, found.past_tokens, found.threads, found.steps) == (tokens, past, 1, 2)
    counts = {(row.kind, row.name, row.bits): row.count for row in found.rows}
    assert counts["linear", "qkv_proj", 4] == counts["linear", "o_proj", 4] == counts["linear", "down_proj", 4] == 2
    assert counts["linear", "gate_proj", 2] == counts["linear", "up_proj", 2] == 2
    assert counts["adapter", "adapters", 8] == 8 and counts["elementwise", "adapters: sum", 0] == 4
    assert counts["linear", "lm_head", 4] == counts["embedding", "embedding", 0] == 1
    assert counts["attention", "attention", 0] == 2 and counts["norm", "residual and norm", 0] == 4
    assert "other" not in found.by_kind() and min(row.seconds for row in found.rows) > 0
    assert found.launches == sum(counts.values()) and found.wall_seconds > 0 and found.profiled_seconds > 0


def test_linears_of_a_graph(bundle: Path) -> None:
    found = linear_nodes(bundle / "model.onnx")
    assert found["/model/layers.1/mlp/up_proj/MatMulNBits"] == LinearNode("model.layers.1.mlp.up_proj", 2)
    assert found["/model/layers.1/mlp/up_proj/lora_A/MatMulNBits"].bits == 8
    assert found["/lm_head/MatMulNBits"] == LinearNode("lm_head", 4)


def test_experts_have_the_bits_of_their_codes(tmp_path: Path) -> None:
    bundle = export_bundle(families.folder("gpt-oss", tmp_path / "hf"), tmp_path / "bundle", recipe=tiny.W4)
    found = profile_bundle(bundle, 3, 5, threads=1, steps=1)
    classes = {(row.kind, row.name, row.bits): row.count for row in found.rows}
    assert classes["experts", "experts", 4] == 2 and ("linear", "bias", 0) in classes
    assert {name for kind, name, _bits in classes if kind == "linear"} == {
        "qkv_proj",
        "o_proj",
        "router",
        "lm_head",
        "bias",
    }


def test_float_linears_have_the_bits_of_their_type(tmp_path: Path) -> None:
    bundle = export_bundle(tiny.llama(tmp_path / "hf"), tmp_path / "bundle")
    assert linear_nodes(bundle / "model.onnx")["/model/layers.0/mlp/down_proj/MatMul"].bits == 32
    rows = profile_bundle(bundle, 1, 4, threads=1, steps=1).rows
    assert ("linear", "down_proj", 32, 2) in {(row.kind, row.name, row.bits, row.count) for row in rows}


def invented(wall: float, profiled: float) -> OperatorSeconds:
    rows = (
        Row("linear", "up_proj", 2, 30, 0.003),
        Row("linear", "lm_head", 4, 1, 0.001),
        Row("norm", "norm", 0, 9, 0.001),
    )
    return OperatorSeconds(1, 512, 2, 10, rows, 0.002, wall, profiled)


def test_what_is_left_is_dispatch_between_nothing_and_the_gaps() -> None:
    quiet = invented(0.006, 0.0075)
    assert quiet.kernel_seconds == pytest.approx(0.005) and quiet.dispatch_seconds == pytest.approx(0.001)
    assert quiet.overhead_seconds == pytest.approx(0.0015) and quiet.seconds == pytest.approx(0.006)
    assert invented(0.050, 0.06).dispatch_seconds == 0.002  # a busy machine
    assert invented(0.004, 0.06).dispatch_seconds == 0.0  # one that sped up before the profiler came
    expected = {"linear": 0.004, "norm": 0.001, "dispatch": 0.001}
    assert quiet.by_kind() == pytest.approx(expected) and quiet.launches == 40


def test_it_survives_json_and_is_drawn() -> None:
    found = invented(0.006, 0.0075)
    table = json.loads(json.dumps(found.to_json()))
    assert OperatorSeconds.from_json(table) == found and table["dispatch_seconds"] == pytest.approx(0.001)
    with pytest.raises(ValueError, match="schema_version 7, this rlkit reads 1"):
        OperatorSeconds.from_json({**table, "schema_version": 7})
    drawn = opprofile.table(found)
    assert drawn.rows[0] == ("linear", "up_proj", "2", "30", "3.000", "50.0%")
    assert drawn.rows[-2:] == (
        ("dispatch", "between kernels", "", "", "1.000", "16.7%"),
        ("all", "", "", "40", "6.000", "100.0%"),
    )
    assert "6.00 ms, 7.50 ms with the profiler" in drawn.note


def test_absurd_profiles_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 steps measure nothing"):
        profile_bundle(bundle, 1, 0, steps=0)
    with pytest.raises(ValueError, match="no step in a context of 256"):
        profile_bundle(bundle, 1, 256)
    with pytest.raises(FileNotFoundError, match="no bundle folder"):
        profile_bundle(tmp_path / "absent", 1, 0)
