"""The depth network: published sizes, any widths, the sizes of images it takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rlkit.recover import depthnets
from rlkit.recover.depthnets import FULL, REDUCED, DepthNet, DepthShape

PRUNED = DepthShape((3, 5), (7, 4), ((6, 2), (3, 8)))


@pytest.mark.parametrize(("shape", "values", "trained"), [(FULL, 1_966_465, 1_964_545), (REDUCED, 489_089, 488_193)])
def test_sizes_are_the_published_ones(shape: DepthShape, values: int, trained: int) -> None:
    network = DepthNet(shape)
    assert depthnets.value_count(network) == values
    assert sum(parameter.numel() for parameter in network.parameters()) == trained


@pytest.mark.parametrize("shape", [DepthShape.of(4, 8), DepthShape.of(2, 3, 4, 5), PRUNED])
def test_any_widths_and_levels_give_a_map_of_the_image(shape: DepthShape) -> None:
    torch.manual_seed(0)
    network = DepthNet(shape).eval()
    images = torch.rand(2, 3, 2 * shape.stride, 3 * shape.stride)
    with torch.no_grad():
        depth = network(images)
        assert depth.shape == (2, 1, *images.shape[2:])
        assert depth.abs().max() < 1 and depth.std() > 0
        torch.testing.assert_close(network(images[1:]), depth[1:])  # an image does not depend on its batch


def test_a_shape_survives_json() -> None:
    for shape in (FULL, PRUNED):
        assert DepthShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


def test_every_weight_is_trained() -> None:
    network = DepthNet(PRUNED)
    network(torch.rand(2, 3, 8, 8)).square().sum().backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((8, 64), "64x8 are smaller than the network's stride of 16; use larger ones"),
        ((32, 40), "40x32 do not fit a network of stride 16; pad both sizes"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(size: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        DepthNet(DepthShape.of(1, 1, 1, 1, 1))(torch.rand(1, 3, *size))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"down": [], "bottleneck": [1, 1], "up": []},
        {"down": [4], "bottleneck": [4, 4], "up": []},
        {"down": [4], "bottleneck": [4], "up": [[4, 4]]},
        {"down": [4], "bottleneck": [4, 4], "up": [[4, 0]]},
        {"down": [4.5], "bottleneck": [4, 4], "up": [[4, 4]]},
        {"down": [4], "bottleneck": [4, 4], "up": [[4]]},
        {"down": 4, "bottleneck": [4, 4], "up": [[4, 4]]},
        {"down": [4]},
    ],
)
def test_what_is_no_shape_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give|use"):
        DepthShape.from_json(fields)
