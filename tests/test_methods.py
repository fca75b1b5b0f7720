"""Every method of recovery on a tiny model: what it changes, what it keeps, and that it helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny
from rlkit.recover import methods, quantizers, recipe
from rlkit.recover.distill import Distillation
from rlkit.recover.model import load_model
from rlkit.recover.placement import Placement
from rlkit.recover.recipe import Recipe, Rule, Scheme
from rlkit.recover.recovery import Settings
from rlkit.recover.source import Source, resolve
from rlkit.recover.synthesize import Sampling, synthesize
from rlkit.recover.workbench import Amounts
from test_recovery import Run, run

GATE_UP = Recipe("gate-up", (Rule(("*.gate_proj", "*.up_proj"), Scheme(2, 64, adapter_rank=8)),))
PLAN = Distillation(steps=18, batch=16, warmup=1, scale_lr=2e-3, norm_lr=1e-4)  # a tiny model
SETTINGS = Settings(amounts=Amounts(statistics_rows=32, output_rows=16, rounds=1), distillation=PLAN)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.1))


@pytest.fixture(scope="module")
def corpus(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "text"
    synthesize(*load_model(source), Sampling(sequences=160, length=32), folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Source, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    out = tmp_path_factory.mktemp("made")
    return {
        name: run(source, out / name, GATE_UP, corpus=corpus, settings=replace(SETTINGS, method=name))
        for name in methods.METHODS
    }


def kl(found: Run, stage: int = -1) -> float:
    return float(found.facts["stages"][stage]["divergence"]["kl_mean"])


def test_the_recipe_file_knows_every_name() -> None:
    assert tuple(methods.METHODS) == recipe.METHODS
    assert tuple(quantizers.QUANTIZERS) == recipe.QUANTIZERS


def test_each_method_has_the_quantizer_that_the_help_names() -> None:
    found = {method.name: method.quantizer for method in methods.METHODS.values()}
    assert found == {**dict.fromkeys(recipe.METHODS, "gptq"), "recover-lora": "search"}


def test_methods_that_learn_are_better_than_codes_alone(made: dict[str, Run]) -> None:
    assert kl(made["full"]) < kl(made["corrected"]) < kl(made["none"])
    assert kl(made["scales"]) < kl(made["none"])
    assert kl(made["recover-lora"]) < kl(made["recover-lora"], -2), "than round-to-nearest, where it starts"
    assert kl(made["full"]) < kl(made["recover-lora"])


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("none", ["layers", "round-to-nearest", "compensated"]),
        ("recover-lora", ["layers", "search", "distilled"]),
        ("scales", ["layers", "round-to-nearest", "compensated", "distilled"]),
        ("corrected", ["layers", "round-to-nearest", "compensated", "corrected"]),
        ("full", ["layers", "round-to-nearest", "compensated", "corrected", "distilled"]),
    ],
)
def test_stages_of_each_method(made: dict[str, Run], name: str, stages: list[str]) -> None:
    assert [row["stage"] for row in made[name].facts["stages"]] == ["synthesize", *stages]
    assert made[name].facts["settings"]["method"] == name


def test_only_methods_with_adapters_leave_one(made: dict[str, Run]) -> None:
    kept = {name for name, found in made.items() if (found.out / "adapter").exists()}
    assert kept == {"recover-lora", "corrected", "full"}


def test_scales_and_norms_are_trained_codes_are_not(made: dict[str, Run]) -> None:
    before, after = (load_file(made[name].out / "model.safetensors") for name in ("none", "scales"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    parts = {name.rpartition(".")[2] if "_proj" in name else "norm" for name in changed}
    assert parts == {"scales", "norm"}
    for name in changed:
        assert np.abs(after[name] - before[name]).max() < 0.2 * np.abs(before[name]).max()
        if name.endswith(".scales"):
            assert (after[name].astype(np.float16) == after[name]).all()


def test_norms_stay_as_published_in_recover_lora(made: dict[str, Run], source: Source) -> None:
    original = load_model(source)[0].state_dict()
    for name, tensor in load_file(made["recover-lora"].out / "model.safetensors").items():
        if name.endswith("norm.weight"):
            np.testing.assert_array_equal(tensor, original[name].numpy())


def test_every_layer_is_logged_with_its_memory(made: dict[str, Run]) -> None:
    rows = made["full"].facts["layers"]
    assert [row["layer"] for row in rows] == ["model.layers.0", "model.layers.1", "lm_head"]
    gate = rows[0]["modules"]["mlp.gate_proj"]
    assert (gate["bits"], gate["group"], gate["rank"]) == (2, 64, 8)
    assert 0 < gate["output_error"] < 1
    assert gate["kl_forecast"] > 0
    assert rows[0]["peak_nbytes"] > 1e7
    assert made["full"].facts["peak_nbytes"] >= rows[-1]["peak_nbytes"]


def test_adapters_on_float_linears_are_folded_into_them(source: Source, corpus: Path, tmp_path: Path) -> None:
    placed = replace(SETTINGS, adapters=(Placement(("*.v_proj",), 4), Placement(("*.gate_proj",), 8)))
    found = run(source, tmp_path / "ckpt", GATE_UP, corpus=corpus, settings=placed)
    adapters = load_file(found.out / "adapter" / "adapter_model.safetensors")
    assert {name.rsplit(".", 3)[1] for name in adapters} == {"gate_proj"}
    original, stored = load_model(source)[0].state_dict(), load_file(found.out / "model.safetensors")
    change = (
        stored["model.layers.0.self_attn.v_proj.weight"] - original["model.layers.0.self_attn.v_proj.weight"].numpy()
    )
    assert np.linalg.matrix_rank(change, tol=1e-4) == 4
    np.testing.assert_array_equal(
        stored["model.layers.0.self_attn.q_proj.weight"], original["model.layers.0.self_attn.q_proj.weight"].numpy()
    )


def test_the_recipe_chooses_method_and_quantizer_unless_told(source: Source, corpus: Path, tmp_path: Path) -> None:
    plan = recipe.parse('method = "none"\nquantizer = "hqq"\n[[rule]]\nmatch = "*.up_proj"\nbits = 2\n')
    found = run(source, tmp_path / "a", plan, corpus=corpus, settings=SETTINGS)
    assert [row["stage"] for row in found.facts["stages"]] == ["synthesize", "layers", "round-to-nearest", "hqq"]
    told = run(source, tmp_path / "b", plan, corpus=corpus, settings=replace(SETTINGS, quantizer="search"))
    assert [row["stage"] for row in told.facts["stages"]] == ["synthesize", "layers", "search"]


@pytest.mark.parametrize("quantizer", recipe.QUANTIZERS)
def test_every_quantizer_works_with_correction(source: Source, corpus: Path, quantizer: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="corrected", quantizer=quantizer)
    found = run(source, tmp_path / "ckpt", GATE_UP, corpus=corpus, settings=settings)
    assert kl(found) < kl(found, -2)
    measured = found.facts["stages"][-1]["divergence"]["kl_mean"]
    assert measured < 1.2 * kl(found, 2), "no worse than the floor"
