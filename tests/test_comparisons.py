"""Suites of the recovery benchmark on a tiny model: what they measure, and that nothing is measured twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import tiny
from rlkit.apps.benchmarks import comparisons, recovery
from rlkit.apps.benchmarks.texts import Bench
from rlkit.apps.heldout import HeldOut
from rlkit.recover import corpus, layers, quantizers
from rlkit.recover.atomic import write_json
from rlkit.recover.model import load_model
from rlkit.recover.progress import silent
from rlkit.recover.source import resolve
from rlkit.recover.synthesize import Sampling, synthesize


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    source = resolve(tiny.llama(root / "hf", initializer_range=0.15))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in tiny.SENTENCES))
    held_out = HeldOut(root / "text.jsonl", root / "held-out", "tiny", min_tokens=40)
    texts = root / "out" / "texts"
    synthesize(*load_model(source), Sampling(sequences=72, length=16), texts / "16k")
    write_json(texts / "16k.json", {"seconds": 1.5})
    return Bench(source, held_out, root / "out", silent)


def test_a_text_is_sampled_once(bench: Bench) -> None:
    assert bench.text("16k") == (bench.out / "texts" / "16k", 1.5)


def test_errors_rank_the_quantizers(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    rows = comparisons.errors(bench)
    found = {row["quantizer"]: row["error"] for row in rows}
    assert list(found) == list(quantizers.QUANTIZERS)
    assert found["gptq"] < found["search"] < found["nearest"] < 1
    assert {row["layer"] for row in rows} == {"model.layers.1"}
    assert all(0 < row["error_elsewhere"] < 1 and row["seconds"] > 0 for row in rows)
    (gptq,) = (row for row in rows if row["quantizer"] == "gptq")
    assert gptq["error"] < gptq["error_elsewhere"]  # it fits its text
    comparisons.show_errors(rows)
    assert "gptq-act-order" in capsys.readouterr().out


def test_errors_of_scaled_inputs_are_those_of_the_layer_as_it_was(bench: Bench, tmp_path: Path) -> None:
    """The norm holds what awq divided by; the layer's own log knows it without looking there."""
    ids = corpus.Corpus.open(bench.text("16k")[0]).ids[:32]
    names = ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    model = load_model(bench.model)[0]
    model.model.layers[1].post_attention_layernorm.weight[:64] *= 20  # so that scaling is worth it
    seen = comparisons._middle(model, ids, tmp_path)
    treatment = layers.Treatment(dict.fromkeys(names, comparisons.SCHEME), {}, quantizers.find("awq"), None)
    state = layers.treat(comparisons._middle(model, ids, tmp_path), treatment)
    assert not state.others["model.layers.1.post_attention_layernorm.weight"].equal(
        seen.weight("post_attention_layernorm")
    )
    logged = [row["output_error"] for row in state.log["modules"].values()]
    for name, expected in zip(names, logged, strict=True):
        alone = replace(state, quantized={name: state.quantized[name]})
        assert comparisons._errors(alone, seen, seen)["error"] == pytest.approx(expected, rel=1e-2)


def test_a_repair_is_measured_before_and_after_and_once(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    result = comparisons.repair(bench)
    kl = {row["stage"]: row["divergence"]["kl_mean"] for row in result["stages"] if row["divergence"]}
    assert kl["corrected"] < kl["degraded"]
    assert list(kl) == ["degraded", "corrected", "distilled"]
    assert (result["damage"], result["amount"]) == ("noise", 0.2)
    assert {path.name for path in bench.out.iterdir()}.isdisjoint({"damaged", "repaired"})
    assert comparisons.repair(replace(bench, model=None)) == result
    comparisons.show_repair(result)
    assert "noise 0.2" in capsys.readouterr().out


def test_an_automatic_recipe_takes_no_more_than_the_fixed_one(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    rows = comparisons.auto(bench)
    assert [(row["recipe"], row["method"]) for row in rows] == [
        ("w4w2-gateup", "none"),
        ("auto", "none"),
        ("w4w2-gateup", "corrected"),
        ("auto", "corrected"),
    ]
    for fixed, auto in (rows[:2], rows[2:]):
        assert auto["bits_per_weight"] <= fixed["bits_per_weight"]
        assert "w4w2-gateup" in {row["name"] for row in auto["figures"]["compared"]}  # it fits the budget
        assert fixed["figures"] is None
    assert rows[2]["bits_per_weight"] > rows[0]["bits_per_weight"]  # the adapters
    comparisons.show_auto(rows)
    assert "corrected" in capsys.readouterr().out
    kept = [json.loads(path.read_text()) for path in sorted((bench.out / "cases").glob("auto-*.json"))]
    assert sorted(row["kl_mean"] for row in kept) == sorted(row["kl_mean"] for row in rows)


def test_an_unknown_suite_is_refused_with_those_there_are() -> None:
    program = typer.Typer()
    program.command()(recovery.main)
    done = CliRunner().invoke(program, ["--suite", "everything"])
    assert done.exit_code == 2
    assert "no suite 'everything'" in done.output
    for name in ("methods", "auto", "repair", "errors"):
        assert name in done.output
