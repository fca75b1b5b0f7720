"""Comparing providers: probes and cut models compute what they should, differences are named, gaps are said aloud."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from rlkit.apps.benchmarks import webgpu_cases as cases
from rlkit.apps.benchmarks import webgpu_models
from rlkit.apps.benchmarks import webgpu_parity as bench
from rlkit.export import probes
from rlkit.export.probes import Attention, Product
from rlkit.profiles import parity
from rlkit.recover import packing
from rlkit.runtime import onnxjobs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def bundle(models: Path) -> Path:
    return webgpu_models.tiny_bundle("llama", models)


def here(folder: Path) -> bench.Elsewhere:
    """This very environment, as if it were another."""
    return bench.Elsewhere(Path(sys.executable), {}, folder)


def run(model: Any, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def job(folder: Path, name: str, case: cases.Case, **changes: Any) -> dict[str, Any]:
    probe = cases.probe(case, seed=0)
    (folder / f"{name}.onnx").write_bytes(probe.model.SerializeToString())
    onnxjobs.save_arrays(folder / f"{name}.npz", probe.feeds)
    runs = [{"feeds": str(folder / f"{name}.npz"), "out": str(folder / f"{name}.out.npz")}]
    made = {"name": name, "model": str(folder / f"{name}.onnx"), "provider": onnxjobs.CPU, "runs": runs}
    return {**made, **changes}


@pytest.mark.parametrize("case", [case for case in cases.products() if case.level == 0], ids=lambda case: case.name)
def test_product_is_what_its_constants_stand_for(case: Product) -> None:
    probe = probes.product(case)
    stored = {value.name: onnx_array(value) for value in probe.model.graph.initializer}
    qweight = stored["qweight"].reshape(case.n, -1)[:, : -(-case.k * case.bits // 8)]
    zeros = stored.get("qzeros")
    weight = packing.dequantize(qweight, stored["scales"], zeros, case.bits, case.block, case.k)
    expected = probe.feeds["x"] @ weight.T + stored.get("bias", np.float32(0))
    assert parity.error(run(probe.model, probe.feeds)["y"], expected) <= 1e-5


def onnx_array(value: Any) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(value)


@pytest.mark.parametrize(
    "case",
    [
        Attention(32, new=5, rotary=False),
        Attention(64, heads=4, kv_heads=1, new=3, past=6, rotary=False),
        Attention(16, heads=2, kv_heads=2, new=1, past=9, rotary=False, rows=2),
    ],
    ids=lambda case: case.name,
)
def test_attention_is_what_numpy_computes(case: Attention) -> None:
    probe = probes.attention(case)
    found = run(probe.model, probe.feeds)
    expected = parity.attend(probe.feeds["q"], found["keys"], found["values"], case.heads, case.past)
    assert parity.error(found["y"], expected) <= 1e-5


def test_packed_attention_is_the_same_as_three_inputs() -> None:
    case = Attention(32, new=6, past=3)
    apart, packed = (probes.attention(each) for each in (case, replace(case, packed=True)))
    assert "k" in apart.feeds and "k" not in packed.feeds
    first, second = (run(probe.model, probe.feeds) for probe in (apart, packed))
    assert all(parity.error(second[name], first[name]) <= 1e-6 for name in first)


@pytest.mark.parametrize(("subgroup", "keys"), [(4, 4), (8, 8), (32, 16)])
def test_the_shaders_model_is_exact_within_its_first_pass(subgroup: int, keys: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((1, 24, 64)), *rng.standard_normal((2, 1, 2, 24, 16))
    exact = parity.attend(q, k, v, 4)
    passes = parity.attend_in_passes(q, k, v, 4, subgroup=subgroup)
    by_token = [parity.error(passes[:, token], exact[:, token]) for token in range(24)]
    assert max(by_token[:keys]) <= 1e-12
    assert min(by_token[keys:]) > 1e-4
    later = q[:, -2:], k[:, :, -keys:], v[:, :, -keys:]
    found = parity.attend_in_passes(*later, 4, keys - 2, subgroup=subgroup)
    assert parity.error(found, parity.attend(*later, 4, keys - 2)) <= 1e-12


@pytest.mark.parametrize("family", webgpu_models.FAMILIES)
def test_a_cut_model_computes_every_node_from_what_it_is_given(family: str, models: Path) -> None:
    bundle = webgpu_models.tiny_bundle(family, models)
    feeds = cases.step_feeds(cases.STEPS[0], bundle, {})
    values = {**run(probes.exposed(bundle / "model.onnx"), feeds), **feeds}
    operators = probes.operators(bundle / "model.onnx")
    assert {"MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"} <= set(operators.values())
    model = probes.cut(bundle / "model.onnx", values)
    given = probes.cut_feeds(model, values)
    assert all(row.error <= 1e-6 for row in parity.differences(run(model, given), values, operators))
    assert ("/q_norm/" in " ".join(operators)) == (family == "qwen3")  # not within attention
    spoilt = next(name for name in given if "layers.0/attn/GroupQueryAttention" in name)
    rows = parity.differences(run(model, {**given, spoilt: given[spoilt] + 1}), values, operators)
    assert {row.name for row in rows if row.error > 1e-6} == readers(bundle, spoilt.removesuffix(probes.FED))


def readers(bundle: Path, name: str) -> set[str]:
    import onnx

    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return {output for node in graph.node if name in node.input for output in node.output if output}


def test_differences_name_the_first_and_the_worst() -> None:
    expected = {name: np.array([2.0, -4.0]) for name in "abcd"}
    found = {**expected, "b": np.array([2.0, -4.4]), "c": np.array([2.0, np.nan]), "d": np.array([2.0])}
    rows = parity.differences(found, expected, {"a": "Mul", "b": "Mul", "c": "Add", "d": "Sub", "absent": "Sub"})
    assert [row.name for row in rows] == ["a", "b", "c", "d"]
    assert rows[1].error == pytest.approx(0.1)
    assert rows[2].error == rows[3].error == float("inf")
    first = parity.first_over(rows, 1e-4)
    assert first is not None and (first.name, first.op) == ("b", "Mul")
    assert parity.first_over(rows[:1], 1e-4) is None
    worst = parity.worst_by_operator(rows)
    assert worst["Mul"].name == "b" and list(worst)[-1] == "Mul"
    assert parity.error(np.zeros(3), np.zeros(3)) == parity.error(np.zeros(0), np.zeros(0)) == 0


def test_jobs_say_what_ran_and_survive_what_did_not(tmp_path: Path) -> None:
    case = Product(4, 32)
    broken = job(tmp_path, "broken", case)
    Path(broken["model"]).write_bytes(b"no model")
    asked = [broken, job(tmp_path, "webgpu", case, provider=bench.WEBGPU), job(tmp_path, "cpu", case)]
    facts, answers = here(tmp_path).run(asked, "jobs")
    assert facts["onnxruntime"] == ort.__version__
    assert "error" in answers["broken"]
    assert bench.WEBGPU in answers["webgpu"]["error"] and not (tmp_path / "webgpu.out.npz").exists()
    assert answers["cpu"]["placed"] == {"MatMulNBits": [onnxjobs.CPU]}
    probe = cases.probe(case, seed=0)
    assert parity.error(onnxjobs.load_arrays(tmp_path / "cpu.out.npz")["y"], run(probe.model, probe.feeds)["y"]) == 0


def test_arrays_keep_their_names(tmp_path: Path) -> None:
    arrays = {"/a/b:0": np.arange(3), "": np.zeros((2, 0), np.float32), "names": np.array(1, np.int32)}
    onnxjobs.save_arrays(tmp_path / "x.npz", arrays)
    loaded = onnxjobs.load_arrays(tmp_path / "x.npz")
    assert list(loaded) == list(arrays)
    assert all(
        loaded[name].dtype == value.dtype and np.array_equal(loaded[name], value) for name, value in arrays.items()
    )


def judged(case: cases.Case, off: float, *, subgroup: int = 4) -> dict[str, Any]:
    probe = cases.probe(case, seed=0)
    cpu = run(probe.model, probe.feeds)
    outputs = {"cpu": cpu, "webgpu": {name: value + np.float32(off) for name, value in cpu.items()}}
    return cases.judge(case, probe.feeds, outputs, {"cpu": None, "webgpu": None}, 1e-4, subgroup)


def test_only_the_known_deviation_is_let_through() -> None:
    prompt = Attention(32, new=12, rotary=False)
    assert judged(Product(4, 32), 0)["passed"] and not judged(Product(4, 32), 0.1)["passed"]
    assert judged(prompt, 0.1)["note"] == cases.NARROW
    assert judged(prompt, 0.1)["explained"] > 1e-3  # an offset is not what the shader does
    wide = judged(replace(prompt, new=24), 0.1, subgroup=32)
    assert not wide["passed"] and wide["explained"] > 1e-3
    assert not judged(prompt, 0.1, subgroup=0)["passed"]  # unknown
    for exact in (replace(prompt, new=1, past=11), replace(prompt, new=4), replace(prompt, window=4)):
        assert not judged(exact, 0.1)["passed"]


def test_what_neither_provider_knows_is_told() -> None:
    case = Attention(64, past=17, normed=True)
    row = cases.judge(case, {}, {}, {"cpu": "too many inputs", "webgpu": "too many inputs"}, 1e-4, 4)
    assert row["passed"] and "too many inputs" in row["note"]
    assert not cases.judge(replace(case, normed=False), {}, {}, {"cpu": "no", "webgpu": "no"}, 1e-4, 4)["passed"]
    assert not cases.judge(case, {}, {}, {"cpu": None, "webgpu": "no"}, 1e-4, 4)["passed"]


def step(name: str, bundle: Path, *, spoil: str = "", subgroup: int = 4) -> dict[str, Any]:
    chosen = next(each for each in cases.STEPS if each.name == name)
    feeds = cases.step_feeds(chosen, bundle, {})
    values = {**run(probes.exposed(bundle / "model.onnx"), feeds), **feeds}
    operators = probes.operators(bundle / "model.onnx")
    parts = {name: value + (operators.get(name) == spoil) for name, value in values.items()}
    return cases.judge_step(name, values, {"webgpu": values, "parts": parts}, operators, 1e-4, subgroup)


def test_a_step_fails_by_the_operator_that_differs(bundle: Path) -> None:
    fine = step("prompt of 24", bundle)
    assert fine["passed"] and fine["first"] is None and fine["nodes"] > 30
    wrong = step("prompt of 24", bundle, spoil="MatMulNBits")
    assert not wrong["passed"] and wrong["first"].startswith("MatMulNBits")
    known = step("prompt of 24", bundle, spoil="GroupQueryAttention")
    assert known["passed"] and known["first"].startswith("GroupQueryAttention") and known["note"] == cases.NARROW
    assert not step("prompt of 24", bundle, spoil="GroupQueryAttention", subgroup=32)["passed"]
    assert not step("prompt of 4", bundle, spoil="GroupQueryAttention")["passed"]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "rlkit.apps.benchmarks.webgpu_parity", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_what_cannot_be_tried_is_skipped_aloud(tmp_path: Path) -> None:
    done = command("-o", str(tmp_path / "a"), "--python", sys.executable, "--driver", str(tmp_path / "none.json"))
    assert done.returncode == bench.SKIPPED
    assert done.stdout.startswith("SKIPPED: no Vulkan driver at")
    with pytest.raises(bench.Unavailable, match="cannot run onnxruntime"):
        bench.Elsewhere(Path(shutil.which("true") or "true"), {}, tmp_path).run([], "jobs")
    (tmp_path / "b").mkdir()
    with pytest.raises(
        bench.Unavailable, match=f"has no {bench.WEBGPU}"
    ):  # this environment's runtime has the CPU only
        bench.compare_probes(here(tmp_path / "b"), cases.products()[:1], "products")


@pytest.mark.slow
def test_webgpu_computes_what_the_cpu_computes(tmp_path: Path) -> None:
    done = command("-o", str(tmp_path / "out"), "--json")
    if done.returncode == bench.SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] and len(found["products"]) == len(cases.products())
    exact = [row for row in found["attentions"] if row["error"] is not None and row["note"] != cases.NARROW]
    assert len(exact) >= 20 and max(row["error"] for row in exact) <= bench.LIMIT
    assert all(row["explained"] <= bench.LIMIT for row in found["attentions"] if row["explained"] is not None)
    assert json.loads((tmp_path / "out" / "webgpu-parity.json").read_text()) == found
