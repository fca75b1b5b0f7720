"""AnyNet: published sizes, stages that can be left out, costs and propagation against plain loops."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlkit.recover import anynet, propagate
from rlkit.recover.anynet import AnyNet, AnyShape, UpTo

TINY = AnyShape(spn=2, volume=((3, 2), (2,), (2,)), disparities=(4, 2, 2))


@pytest.fixture(scope="module")
def network() -> AnyNet:
    torch.manual_seed(0)
    return AnyNet(TINY).eval()


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.rand(2, 1, 3, 32, 48, generator=generator)
    return left, right


@pytest.mark.parametrize(("spn", "count"), [(8, 43_269), (4, 36_933), (2, 35_277), (1, 34_827), (0, 34_629)])
def test_sizes_are_the_published_ones(spn: int, count: int) -> None:
    network = AnyNet(AnyShape(spn=spn))
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert network.shape.stages == (4 if spn else 3) and network.shape.max_disparity == 176


def test_parts_have_the_published_sizes() -> None:
    network = AnyNet()
    parts = [network.features, *network.volumes]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [1_983, 28_674, 1_986, 1_986]


@torch.no_grad()
def test_each_stage_gives_a_map_and_costs_only_what_it_needs(
    network: AnyNet, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ran: list[str] = []
    parts = {"stage 1": network.volumes[0], "stage 2": network.volumes[1], "stage 4": network.refine}
    hooks = [part.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, part in parts.items()]
    every = network(*pair)
    assert [tuple(disparity.shape) for disparity in every] == [(1, 1, 32, 48)] * 4
    ran.clear()
    for stage, disparity in enumerate(every, 1):
        torch.testing.assert_close(UpTo(network, stage)(*pair), disparity)
        if stage == 1:
            assert ran == ["stage 1"]
    for hook in hooks:
        hook.remove()
    assert not UpTo(network, 1).training and UpTo(AnyNet(TINY), 1).training


def test_without_propagation_there_are_three_stages(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    network = AnyNet(replace(TINY, spn=0))
    assert len(network(*pair)) == 3
    with pytest.raises(ValueError, match="stage 4 is none of this network's; use 1 to 3"):
        UpTo(network, 4)


def test_every_weight_is_trained(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    network = AnyNet(TINY)
    sum(disparity.square().mean() for disparity in network(*pair)).backward()  # type: ignore[union-attr]
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


@torch.no_grad()
def test_stage_four_begins_close_to_stage_three(network: AnyNet) -> None:
    """On a constant map its gates only mix equal values, so it changes nothing but the border of its convolutions."""
    assert network.refine is not None
    refined = network.refine(torch.randn(1, 3, 8, 12), torch.full((1, 1, 8, 12), 7.0))
    torch.testing.assert_close(refined, torch.full((1, 1, 8, 12), 7.0))


def value_at(row: torch.Tensor, at: float) -> torch.Tensor:
    """Columns of (C, W) interpolated at a place, 0 outside."""
    left = int(at // 1)
    there = [row[:, i] if 0 <= i < row.shape[1] else torch.zeros(row.shape[0]) for i in (left, left + 1)]
    return there[0] + (there[1] - there[0]) * (at - left)


def test_costs_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 2, 3, 2, 6)
    disparity = torch.rand(2, 1, 2, 6) * 9 - 2  # some fall outside on either side
    from_zero, around = anynet.costs_from_zero(left, right, 4), anynet.costs_around(left, right, disparity, 3)
    for b in range(2):
        for y in range(2):
            for x in range(6):
                for k in range(4):
                    expected = (left[b, :, y, x] - value_at(right[b, :, y], x - k)).abs().sum()
                    torch.testing.assert_close(from_zero[b, k, y, x], expected)
                for j, k in enumerate(range(-2, 3)):
                    at = float(x - disparity[b, 0, y, x] - k)
                    expected = (left[b, :, y, x] - value_at(right[b, :, y], at)).abs().sum()
                    torch.testing.assert_close(around[b, j, y, x], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("true", [0, 2, 3])
def test_the_cheapest_disparity_is_the_true_one(true: int) -> None:
    """A scene at one disparity: the mean under softmax is that disparity, from zero and as a correction of a guess."""
    torch.manual_seed(0)
    right = torch.randn(1, 4, 3, 40) * 20
    left = torch.roll(right, true, 3)
    middle = (..., slice(8, 32))
    found = anynet.mean_disparity(anynet.costs_from_zero(left, right, 5), 0)[middle]
    torch.testing.assert_close(found, torch.full_like(found, float(true)))
    guess = torch.full((1, 1, 3, 40), true - 1.0)
    correction = anynet.mean_disparity(anynet.costs_around(left, right, guess, 3), -2)[middle]
    torch.testing.assert_close(correction, torch.ones_like(correction))


def propagated(values: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """The recurrence of propagate.py, a pixel at a time."""
    batch, channels, height, width = values.shape
    done = values.clone()
    for b in range(batch):
        for c in range(channels):
            for x in range(1, width):
                for y in range(height):
                    gates = raw[b, [c, channels + c, 2 * channels + c], y, x]
                    gates = gates / (gates.abs().sum() + 1e-8)
                    seen = [(float(g), y + i - 1) for i, g in enumerate(gates) if 0 <= y + i - 1 < height]
                    own = 1 - sum(gate for gate, _ in seen)
                    done[b, c, y, x] = own * values[b, c, y, x] + sum(g * done[b, c, r, x - 1] for g, r in seen)
    return done


def test_propagation_is_that_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    values, raw = torch.randn(2, 2, 4, 5), torch.randn(2, 6, 4, 5)
    raw[0, :, 1, 2] = 0  # no gate at all: the pixel keeps its own value
    torch.testing.assert_close(propagate.unrolled(values, propagate.gates(raw)), propagated(values, raw))


@pytest.mark.slow  # torch compiles the loop
def test_propagation_as_a_loop_node_is_the_same() -> None:
    torch.manual_seed(0)
    values, gates = torch.randn(1, 2, 4, 6), propagate.gates(torch.randn(1, 6, 4, 6))
    torch.testing.assert_close(propagate.scanned(values, gates), propagate.unrolled(values, gates))


def test_propagation_stays_stable_over_a_long_row() -> None:
    torch.manual_seed(0)
    values, gates = torch.rand(1, 1, 3, 400), propagate.gates(torch.randn(1, 3, 3, 400) * 100)
    assert propagate.unrolled(values, gates).abs().max() < 20


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        ((1, 3, 8, 32), (1, 3, 8, 32), "32x8 are smaller than the network's stride of 16"),
        ((1, 3, 32, 40), (1, 3, 32, 40), "40x32 do not fit a network of stride 16"),
        ((1, 3, 32, 32), (1, 3, 32, 48), "give rectified pairs of one size"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(
    network: AnyNet, left: tuple[int, ...], right: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        network(torch.rand(left), torch.rand(right))


def test_a_shape_survives_json() -> None:
    assert AnyShape.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY


@pytest.mark.parametrize(
    "change",
    [
        {"spn": -1},
        {"features": 0},
        {"blocks": True},
        {"volume": [[4], [4]]},
        {"volume": [[4], [], [4]]},
        {"volume": [[4], [0], [4]]},
        {"volume": 4},
        {"disparities": [12, 3]},
        {"disparities": [12, 3, 0]},
        {"wings": 2},
    ],
)
def test_what_is_no_shape_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"use|give|see"):
        AnyShape.from_json({**TINY.to_json(), **change})
