"""Candidates are what they say: real quantized matrices, kept exactly, with the damage they forecast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from rlkit.recover import candidates, layers
from rlkit.recover.allocate import stored_nbytes
from rlkit.recover.candidates import Candidate, Candidates, Search, plan_units, quantize_all
from rlkit.recover.correct import LowRank
from rlkit.recover.model import linears, load_model
from rlkit.recover.progress import Progress
from rlkit.recover.quantize import Quantized, quantize_nearest
from rlkit.recover.recipe import Scheme
from rlkit.recover.source import resolve
from rlkit.recover.sweep import LayerMoments, Rows

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (6, 16))
ROWS = Rows(IDS, output_rows=4)
S2, S4, ADAPTED = Scheme(2, 64), Scheme(4, 32), Scheme(2, 64, adapter_rank=32)
SEARCH = Search(schemes=(S2, ADAPTED, S4), head_schemes=(S4,), fixed=(tiny.W8,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.15)))[0]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def kept(model: Any, scratch: Path) -> Candidates:
    return quantize_all(model, ROWS, plan_units(model, SEARCH), SEARCH, scratch)


def test_units_cover_every_linear_once(model: Any) -> None:
    units = plan_units(model, Search())
    names = [name for unit in units for name in unit.modules]
    assert sorted(names) == sorted(linears(model))
    assert [len(unit.modules) for unit in units] == [3, 1, 1, 1, 1] * 2 + [1]
    assert sum(unit.weights for unit in units) == sum(module.weight.numel() for module in linears(model).values())


def test_choices_are_those_asked_for_and_those_of_the_fixed_recipes(model: Any) -> None:
    units = {unit.label: unit for unit in plan_units(model, Search(schemes=(S2, ADAPTED), head_schemes=(S4,)))}
    found = {label: {choice.scheme for choice in unit.choices} for label, unit in units.items()}
    w8 = Scheme(8, 64)
    assert found["model.layers.0.mlp.gate_proj"] == {S2, ADAPTED, S4, w8}
    assert found["lm_head"] == {S4, w8}
    gate = units["model.layers.0.mlp.gate_proj"]
    assert [choice.nbytes for choice in gate.choices] == sorted(stored_nbytes(c.scheme, 256, 128) for c in gate.choices)


def test_groups_are_fitted_to_the_matrix_and_never_offered_twice(tmp_path: Path) -> None:
    narrow = load_model(resolve(tiny.llama(tmp_path / "hf", hidden_size=96, intermediate_size=192)))[0]
    both = Search(schemes=(Scheme(4, 128), Scheme(4, 64), S4), fixed=())
    groups = {unit.kind: [choice.scheme.group for choice in unit.choices] for unit in plan_units(narrow, both)}
    assert groups["gate_proj"] == groups["[qkv]_proj"] == [32]  # K = 96
    assert groups["down_proj"] == [64, 32]  # K = 192
    assert groups["o_proj"] == [128, 64, 32]  # K = 4 heads of 32


def test_linears_that_no_group_divides_are_left_out(tmp_path: Path) -> None:
    odd = load_model(resolve(tiny.llama(tmp_path / "hf", intermediate_size=250)))[0]
    kinds = {unit.kind for unit in plan_units(odd, Search())}
    assert kinds == {"[qkv]_proj", "o_proj", "gate_proj", "up_proj", "lm_head"}
    none = load_model(resolve(tiny.llama(tmp_path / "none", hidden_size=72, head_dim=18, intermediate_size=250)))[0]
    with pytest.raises(ValueError, match="multiple of 32"):
        plan_units(none, Search())


def test_lm_head_never_takes_an_adapter(model: Any) -> None:
    head = plan_units(model, Search(head_schemes=(ADAPTED,), fixed=()))[-1]
    assert [choice.scheme for choice in head.choices] == [S2]


def test_what_is_kept_is_what_was_made(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    made = {}
    for scheme in (S2, ADAPTED, S4, Scheme(8, 32), Scheme(4, 32, symmetric=True)):
        state = quantize_nearest(torch.randn(7, 64, generator=rng), scheme)
        low_rank = LowRank(torch.randn(32, 64, generator=rng), torch.randn(7, 32, generator=rng))
        made["model.layers.0.m", scheme] = Candidate(
            state, low_rank if scheme.adapter_rank else None, 0.1 * scheme.bits
        )
    Candidates(tmp_path / "c").add("model.layers.0", made)
    read = Candidates(tmp_path / "c")
    assert read.done == ["model.layers.0"]
    for (module, scheme), candidate in made.items():
        expected = candidate.quantized.dequantize()
        if candidate.low_rank is not None:
            expected = expected + candidate.low_rank.product()
        torch.testing.assert_close(read.weight(module, scheme), expected, rtol=1e-6, atol=1e-6)
        assert read.forecast(module, scheme) == candidate.forecast


def test_every_choice_is_carried_out(model: Any, kept: Candidates) -> None:
    """More bits and an adapter leave smaller errors; the forecasts agree."""
    for name, module in linears(model).items():
        if name == "lm_head":
            continue
        errors = {s: float((kept.weight(name, s) - module.weight).norm()) for s in (S2, ADAPTED, S4)}
        forecasts = {s: kept.forecast(name, s) for s in (S2, ADAPTED, S4)}
        assert 0 < errors[S4] < errors[S2] < float(module.weight.norm())
        assert 0 < forecasts[S4] < forecasts[S2]
        assert forecasts[ADAPTED] < 0.8 * forecasts[S2]
    head = linears(model)["lm_head"].weight
    assert float((kept.weight("lm_head", S4) - head).norm() / head.norm()) < 0.15


def layer_of(n: int, k: int, *, outputs: str, seed: int = 0) -> LayerMoments:
    rng = torch.Generator().manual_seed(seed)
    layer = torch.nn.ModuleDict({"m": torch.nn.Linear(k, n, bias=False)}).requires_grad_(False)
    x, g = torch.randn(200, k, generator=rng), torch.randn(200, n, generator=rng)
    full = g.T @ g / 200
    moments = {"full": {"m": full}, "diagonal": {"m": full.diagonal().clone()}, "none": {}}[outputs]
    return LayerMoments("model.layers.0", layer, {"m": x.T @ x / 200}, moments)


@pytest.mark.parametrize("outputs", ["full", "diagonal", "none"])
@pytest.mark.parametrize("scheme", [S2, ADAPTED], ids=["bare", "adapted"])
def test_the_forecast_is_half_the_trace(outputs: str, scheme: Scheme, tmp_path: Path) -> None:
    layer = layer_of(16, 64, outputs=outputs)
    made = candidates.try_layer(layer, {"model.layers.0.m": [scheme]}, SEARCH)
    kept = Candidates(tmp_path)
    kept.add("model.layers.0", made)
    error = (layer.layer.get_submodule("m").weight - kept.weight("model.layers.0.m", scheme)).double()
    g = layer.outputs.get("m", torch.ones(16)).double()
    g = torch.diag(g) if g.dim() == 1 else g
    expected = float(torch.trace(g @ error @ layer.inputs["m"].double() @ error.T)) / 2
    assert kept.forecast("model.layers.0.m", scheme) == pytest.approx(expected, rel=1e-3)


def test_large_matrices_in_blocks_of_rows_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, layer = {"model.layers.0.m": [S2, S4]}, layer_of(16, 64, outputs="full")
    whole = candidates.try_layer(layer, wanted, SEARCH)
    monkeypatch.setattr(layers, "BLOCK", 5 * 64)
    parts = candidates.try_layer(layer, wanted, SEARCH)
    for key, candidate in whole.items():
        torch.testing.assert_close(parts[key].quantized.dequantize(), candidate.quantized.dequantize())


def test_what_is_kept_is_not_made_again(model: Any, kept: Candidates, scratch: Path) -> None:
    told: list[Progress] = []
    again = quantize_all(model, ROWS, plan_units(model, SEARCH), SEARCH, scratch, tell=told.append)
    assert told == []
    assert again.done == kept.done == ["model.layers.0", "model.layers.1", ""] or sorted(again.done) == sorted(
        kept.done
    )


def test_an_interrupted_search_goes_on_where_it_stopped(model: Any, kept: Candidates, tmp_path: Path) -> None:
    units, told = plan_units(model, SEARCH), list[Progress]()

    def stop(event: Progress) -> None:
        if event.stage == "candidates":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_all(model, ROWS, units, SEARCH, tmp_path, tell=stop)
    found = quantize_all(model, ROWS, units, SEARCH, tmp_path, tell=told.append)
    assert [(event.done, event.note) for event in told if event.stage == "candidates"] == [
        (2, "model.layers.1"),
        (3, "lm_head"),
    ]
    for unit in units:
        for name in unit.modules:
            for choice in unit.choices:
                torch.testing.assert_close(found.weight(name, choice.scheme), kept.weight(name, choice.scheme))


def test_a_file_cut_off_is_made_again(model: Any, kept: Candidates, tmp_path: Path) -> None:
    units = plan_units(model, SEARCH)
    file = quantize_all(model, ROWS, units, SEARCH, tmp_path).folder / "model.layers.1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    found = quantize_all(model, ROWS, units, SEARCH, tmp_path)
    name = "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(found.weight(name, S2), kept.weight(name, S2))


def test_other_rows_or_schemes_are_another_search(model: Any, kept: Candidates, scratch: Path) -> None:
    other = Search(schemes=(S4,), head_schemes=(S4,), fixed=())
    folders = {
        quantize_all(model, rows, plan_units(model, search), search, scratch).folder
        for rows, search in ((ROWS, other), (Rows(IDS[:5], output_rows=4), other), (Rows(IDS, output_rows=3), other))
    }
    assert len(folders | {kept.folder}) == 4


def test_the_quantizer_can_be_replaced(model: Any, tmp_path: Path) -> None:
    def coarse(weight: torch.Tensor, _moment: torch.Tensor, scheme: Scheme) -> Quantized:
        return quantize_nearest(torch.zeros_like(weight), scheme)

    search = Search(schemes=(S4,), head_schemes=(S4,), fixed=(), quantize=coarse)
    found = quantize_all(model, ROWS, plan_units(model, search), search, tmp_path)
    assert float(found.weight("model.layers.0.mlp.up_proj", S4).abs().max()) == 0


def test_a_search_without_adapters_offers_none() -> None:
    bare = Search().without_adapters()
    assert len(bare.schemes) == len(set(bare.schemes)) < len(Search().schemes)
    schemes = [*bare.schemes, *(rule.scheme for recipe in bare.fixed for rule in recipe.rules)]
    assert not any(scheme.adapter_rank for scheme in schemes)
    assert [recipe.name for recipe in bare.fixed] == [recipe.name for recipe in Search().fixed]
