"""The automatic recipe: measured honestly, within its budget, never worse than a fixed recipe that fits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from rlkit.recover import recipe, sensitivity
from rlkit.recover.allocate import Budget, Choice, Unit, schemes, stored_nbytes
from rlkit.recover.candidates import Candidates, Search, plan_units, quantize_all
from rlkit.recover.model import linears, load_model
from rlkit.recover.progress import Progress
from rlkit.recover.recipe import Recipe, Rule, Scheme
from rlkit.recover.sensitivity import Auto, Work, auto_recipe, calibrate, compare, divergence, follow, wearing
from rlkit.recover.source import resolve
from rlkit.recover.sweep import Rows

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (14, 24))
ROWS, HELD_OUT = Rows(IDS[:10], output_rows=6), IDS[10:]
S2, S4, S8 = Scheme(2, 64), Scheme(4, 32), Scheme(8, 64)
ADAPTED = Scheme(2, 64, adapter_rank=32)
SEARCH = Search(schemes=(S2, ADAPTED, Scheme(4, 128)), head_schemes=(Scheme(4, 128),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.15)))[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(ROWS, HELD_OUT, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def units(model: Any) -> list[Unit]:
    return plan_units(model, SEARCH)


@pytest.fixture(scope="module")
def kept(model: Any, work: Work, units: list[Unit]) -> Candidates:
    return quantize_all(model, ROWS, units, SEARCH, work.scratch)


def all_in(units: list[Unit], scheme: Scheme) -> dict[str, Scheme]:
    return {name: scheme for unit in units for name in unit.modules}


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.from_numpy(HELD_OUT), use_cache=False).logits.double(), dim=-1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_measure_is_the_divergence_of_the_model_put_together(tied: bool, tmp_path: Path) -> None:
    """Against a copy whose weights are overwritten, embedding included where it is lm_head's."""
    model = load_model(resolve(tiny.llama(tmp_path / "hf", tied=tied, initializer_range=0.15)))[0]
    units = plan_units(model, SEARCH)
    kept = quantize_all(model, ROWS, units, SEARCH, tmp_path)
    chosen = all_in(units, S4) | {"model.layers.1.mlp.up_proj": ADAPTED}
    student = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in linears(student).items():
            module.weight.copy_(kept.weight(name, chosen[name]))
    p, q = log_probs(model), log_probs(student)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert expected > 0.05
    assert divergence(model, HELD_OUT, kept)(chosen) == pytest.approx(expected, rel=1e-3)


def test_the_model_is_never_changed(model: Any, units: list[Unit], kept: Candidates) -> None:
    before, weights = log_probs(model), {name: p.clone() for name, p in model.named_parameters()}
    with wearing(model, all_in(units, S4), kept):
        assert float((log_probs(model) - before).abs().max()) > 0.01
    with pytest.raises(RuntimeError, match="midway"), wearing(model, all_in(units, S4), kept):
        raise RuntimeError("midway")
    assert torch.equal(log_probs(model), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_in_bfloat16_is_measured_as_it_is(model: Any, units: list[Unit], kept: Candidates) -> None:
    small, chosen = copy.deepcopy(model).to(torch.bfloat16), all_in(units, S4)
    expected = divergence(model, HELD_OUT, kept)(chosen)
    assert divergence(small, HELD_OUT, kept)(chosen) == pytest.approx(expected, rel=0.2)


def test_nothing_replaced_diverges_by_nothing(model: Any, kept: Candidates) -> None:
    assert divergence(model, HELD_OUT, kept)({}) < 1e-6


def test_calibrated_damages_sum_to_what_was_measured(model: Any, units: list[Unit], kept: Candidates) -> None:
    measure = divergence(model, HELD_OUT, kept)
    calibrated, rows = calibrate(units, kept, measure)
    assert [unit.modules for unit in calibrated] == [unit.modules for unit in units]
    for kind in ("[qkv]_proj", "gate_proj", "down_proj"):
        members = [unit for unit in calibrated if unit.kind == kind]
        for scheme in (S2, ADAPTED):
            chosen = {name: scheme for unit in members for name in unit.modules}
            damages = [choice.damage for unit in members for choice in unit.choices if choice.scheme == scheme]
            assert sum(damages) == pytest.approx(measure(chosen), rel=1e-5)
    head = calibrated[-1]
    for choice in head.choices:  # alone in its kind: measured outright
        assert choice.damage == pytest.approx(measure({"lm_head": choice.scheme}), rel=1e-5)
    assert {row["kind"] for row in rows} == {unit.kind for unit in units}
    assert len({(row["kind"], row["class"]) for row in rows}) == len(rows) == 5 * 3 + 3


def test_damages_foretell_mixtures(model: Any, units: list[Unit], kept: Candidates) -> None:
    """They add up: for random mixtures, forecast and measurement go together and are of one size."""
    measure = divergence(model, HELD_OUT, kept)
    calibrated, _rows = calibrate(units, kept, measure)
    rng = np.random.default_rng(1)
    forecasts, measured = [], []
    for _ in range(12):
        share = rng.random()  # of two bits
        choices = [
            unit.choices[0] if rng.random() < share else unit.choices[-1 - int(rng.integers(2))] for unit in calibrated
        ]
        forecasts.append(sum(choice.damage for choice in choices))
        measured.append(measure(schemes(calibrated, choices)))
    assert np.corrcoef(np.log(forecasts), np.log(measured))[0, 1] > 0.9
    assert 0.5 < np.median(np.array(forecasts) / np.array(measured)) < 2


@pytest.fixture(scope="module")
def found(model: Any, work: Work, kept: Candidates) -> dict[float, Auto]:
    return {bits: auto_recipe(model, work, Budget(bits), SEARCH) for bits in (3.2, 5.4, 9.0)}


def test_never_worse_than_a_fixed_recipe_that_fits(found: dict[float, Auto]) -> None:
    names = {bits: {row["name"] for row in auto.figures["compared"]} for bits, auto in found.items()}
    assert names == {
        3.2: {"allocated"},
        5.4: {"allocated", "w4", "w4w2-gateup"},
        9.0: {"allocated", "w4", "w4w2-gateup", "w8"},
    }
    for bits, auto in found.items():
        assert auto.figures["kl"] == min(row["kl"] for row in auto.figures["compared"])
        assert auto.figures["bits_per_weight"] <= bits
    assert found[9.0].figures["kl"] < found[5.4].figures["kl"] < found[3.2].figures["kl"]


def test_at_equal_bytes_it_beats_the_mixed_recipe(found: dict[float, Auto]) -> None:
    rows = {row["name"]: row for row in found[5.4].figures["compared"]}
    assert found[5.4].figures["chosen"] == "allocated"
    assert rows["allocated"]["kl"] < 0.95 * rows["w4w2-gateup"]["kl"]


def test_the_recipe_says_what_the_rows_say(model: Any, found: dict[float, Auto], units: list[Unit]) -> None:
    for bits, auto in found.items():
        read = recipe.parse(auto.recipe.to_toml())
        assert read.name == f"auto-{bits:g}"
        assert f"KL {auto.figures['kl']:.4f}" in read.description
        assert f"{auto.figures['bits_per_weight']:.3f} bits per weight" in read.description
        nbytes = 0
        for unit, row in zip(units, auto.rows, strict=True):
            assert row["unit"] == unit.label
            scheme = Scheme(row["bits"], row["group"], adapter_rank=row["adapter_rank"])
            assert {read.scheme_for(name) for name in unit.modules} == {scheme}
            for name in unit.modules:
                n, k = linears(model)[name].weight.shape
                nbytes += stored_nbytes(scheme, n, k)
        assert nbytes == auto.figures["nbytes"] == sum(row["nbytes"] for row in auto.rows)


def test_the_recipe_keeps_its_word(model: Any, kept: Candidates, units: list[Unit], found: dict[float, Auto]) -> None:
    """The KL it states is that of a model made by its rules."""
    for auto in found.values():
        chosen = {name: auto.recipe.scheme_for(name) for unit in units for name in unit.modules}
        kl = divergence(model, HELD_OUT, kept)({name: scheme for name, scheme in chosen.items() if scheme})
        assert kl == pytest.approx(auto.figures["kl"], rel=1e-6)


def test_a_better_fixed_recipe_is_taken_over(units: list[Unit]) -> None:
    """A forecast that misleads costs nothing: measurement decides."""
    misled = [
        Unit(u.modules, u.k, u.weights, tuple(Choice(c.scheme, c.nbytes, c.nbytes) for c in u.choices)) for u in units
    ]
    named = {tuple(sorted(all_in(units, S4).items())): 0.1}
    told: list[Progress] = []
    best = compare(
        misled,
        Budget(6.0),
        (tiny.W4, tiny.W8),
        lambda chosen: named.get(tuple(sorted(chosen.items())), 0.7),
        tell=told.append,
    )
    assert list(best) == ["w4", "allocated"]
    assert best["w4"][1] == 0.1
    assert [(event.stage, event.done, event.total) for event in told] == [("compare", 1, 2), ("compare", 2, 2)]


def test_recipes_that_name_what_was_not_tried_are_not_compared(units: list[Unit]) -> None:
    assert follow(tiny.W4, units) is not None
    assert follow(Recipe("x", (Rule(("*.q_proj",), S2), Rule(("*",), S4))), units) is None  # q, k, v differ
    assert follow(Recipe("x", (Rule(("*",), Scheme(2, 32)),)), units) is None
    assert follow(Recipe("x", (Rule(("*_proj",), S4),)), units) is None  # leaves lm_head as it is


def test_asked_again_it_measures_nothing_and_says_the_same(
    model: Any, work: Work, found: dict[float, Auto], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "divergence", None)
    assert auto_recipe(model, work, Budget(5.4), SEARCH) == found[5.4]


def test_other_held_out_rows_are_measured_anew(model: Any, work: Work, found: dict[float, Auto]) -> None:
    other = auto_recipe(model, Work(ROWS, HELD_OUT[1:], work.scratch), Budget(5.4), SEARCH)
    assert other.figures["kl"] != found[5.4].figures["kl"]


def test_bytes_of_everything_as_the_budget(model: Any, work: Work, kept: Candidates, units: list[Unit]) -> None:
    def nbytes(plan: Recipe) -> int:
        total = 1000
        for name, module in linears(model).items():
            scheme = plan.scheme_for(name)
            assert scheme is not None
            total += stored_nbytes(scheme, *module.weight.shape)
        return total

    auto = auto_recipe(model, work, Budget(max_bytes=240_000, nbytes=nbytes), SEARCH)
    assert nbytes(auto.recipe) <= 240_000
    assert auto.recipe.name == "auto-0.24mb"
    assert auto.figures["nbytes"] + 1000 == nbytes(auto.recipe)


def test_a_budget_too_small_is_refused_before_any_work(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1.5 bits per weight cannot be met; the smallest reachable is"):
        auto_recipe(model, Work(ROWS, HELD_OUT, tmp_path), Budget(1.5), SEARCH)
    assert list(tmp_path.iterdir()) == []


def test_nothing_held_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold out some rows"):
        Work(ROWS, HELD_OUT[:0], tmp_path)


def test_a_model_that_is_damaged_is_refused(tmp_path: Path) -> None:
    model = load_model(resolve(tiny.llama(tmp_path / "hf")))[0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj has NaN or infinite weights"):
        auto_recipe(model, Work(ROWS, HELD_OUT, tmp_path / "w"), Budget(4), SEARCH)


def test_a_layer_of_zeros_costs_nothing(tmp_path: Path) -> None:
    model = load_model(resolve(tiny.llama(tmp_path / "hf", initializer_range=0.15)))[0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    auto = auto_recipe(model, Work(ROWS, HELD_OUT, tmp_path / "w"), Budget(5.4), SEARCH)
    dead = [row for row in auto.rows if row["unit"] in ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj")]
    assert [(row["bits"], row["adapter_rank"], row["forecast_kl"]) for row in dead] == [(2, 0, 0.0)] * 2


def test_calibration_uses_a_few_rows_and_the_comparison_all(
    model: Any, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "CALIBRATION_ROWS", 2)
    auto = auto_recipe(model, work, Budget(5.4), SEARCH)
    assert auto.figures["held_out_rows"] == [4, 24]
    assert auto.figures["bits_per_weight"] <= 5.4
