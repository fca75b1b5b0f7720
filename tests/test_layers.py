"""Codes and corrections of one layer: what the alternation takes, leaves alone and gains."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rlkit.recover.correct import LowRank, Moments, correct, forecast
from rlkit.recover.layers import Treatment, alternate, stacked, treat
from rlkit.recover.quantize import Quantized
from rlkit.recover.quantizers import QUANTIZERS
from rlkit.recover.recipe import Scheme
from rlkit.recover.sweep import LayerMoments

SCHEME, NAMES = Scheme(2, 64), ("gate_proj", "up_proj")


@pytest.fixture
def layer() -> LayerMoments:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 128, generator=rng) @ torch.randn(128, 128, generator=rng)
    made = torch.nn.ModuleDict({name: torch.nn.Linear(128, 48, bias=False) for name in NAMES}).requires_grad_(False)
    for name in NAMES:
        made[name].weight.copy_(torch.randn(48, 128, generator=rng))
    outputs = {name: torch.rand(48, generator=rng) for name in NAMES}
    return LayerMoments("model.layers.0", made, dict.fromkeys(NAMES, x.T @ x / len(x)), outputs)


def codes(layer: LayerMoments, weights: dict[str, torch.Tensor]) -> dict[str, Quantized]:
    return stacked(weights, layer.inputs["gate_proj"], SCHEME, QUANTIZERS["gptq"].quantize)


def left(layer: LayerMoments, pairs: dict[str, tuple[Quantized, LowRank]]) -> float:
    """The damage forecast after codes and corrections."""
    return sum(
        forecast(
            layer.weight(name) - state.dequantize() - low_rank.product(),
            Moments(layer.inputs[name], layer.outputs[name]),
        )
        for name, (state, low_rank) in pairs.items()
    )


def test_it_ends_with_the_best_correction_of_its_codes(layer: LayerMoments) -> None:
    start = codes(layer, {name: layer.weight(name) for name in NAMES})
    for rounds in (0, 2):
        pairs = alternate(layer, dict.fromkeys(NAMES, 8), start, partial(codes, layer), rounds)
        for name, (state, low_rank) in pairs.items():
            assert torch.equal(state.codes, start[name].codes) is (rounds == 0)
            metric = Moments(layer.inputs[name], layer.outputs[name])
            expected = correct(layer.weight(name) - state.dequantize(), metric, 8)
            torch.testing.assert_close(low_rank.product(), expected.product())


def test_alternating_leaves_less(layer: LayerMoments) -> None:
    start = codes(layer, {name: layer.weight(name) for name in NAMES})
    found = [
        left(layer, alternate(layer, dict.fromkeys(NAMES, 8), start, partial(codes, layer), rounds))
        for rounds in (0, 1, 4)
    ]
    assert found[2] < found[1] < found[0]


def test_each_linear_has_a_rank_of_its_own_and_those_without_are_left_alone(layer: LayerMoments) -> None:
    ranks = {f"model.layers.0.{name}": rank for name, rank in (("gate_proj", 4), ("up_proj", 0))}
    schemes = {f"model.layers.0.{name}": SCHEME for name in NAMES}
    state = treat(layer, Treatment(schemes, ranks, QUANTIZERS["gptq"], 2))
    assert list(state.corrected) == ["model.layers.0.gate_proj"]
    assert state.corrected["model.layers.0.gate_proj"][1].a.shape == (4, 128)
    assert set(state.quantized) == set(schemes)
    assert [row["rank"] for row in state.log["modules"].values()] == [4, 0]
    without = treat(layer, Treatment(schemes, ranks, QUANTIZERS["gptq"], None))
    assert without.corrected == {}
