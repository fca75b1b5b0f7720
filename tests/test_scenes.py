"""Scenes: depth and disparity by other means than the renderer's, what the two images agree on, seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rlkit.recover import raycast, scenes, texture
from rlkit.recover.depthsample import StereoSample
from rlkit.recover.raycast import Lens, Surfaces
from rlkit.recover.scenes import View

SMALL = View(height=64, width=96, max_disparity=24.0)
CLEAN = View(height=64, width=96, max_disparity=24.0, noise=0, blur=0, exposure=0)


@pytest.fixture(scope="module")
def clean() -> StereoSample:
    return scenes.stereo(5, 0, 4, CLEAN)


def surfaces(*rows: tuple[NDArray[Any], NDArray[Any], tuple[float, float], float]) -> Surfaces:
    """Surfaces of (centre, axes a b normal as rows, halves, radius), all of one grey."""
    count = len(rows)
    centre, axes, half, radius = (np.array(part, np.float32) for part in zip(*rows, strict=True))
    one = np.ones((count, 3), np.float32)
    indices, texel, shift = np.zeros(count, np.int32), np.ones(count, np.float32), np.zeros((count, 2), np.float32)
    return Surfaces(centre, axes[:, 0], axes[:, 1], axes[:, 2], half, radius, indices, texel, shift, one, one)


def test_a_slanted_plane_has_the_depth_of_its_equation() -> None:
    normal = np.array([0.3, -0.2, -1.0]) / np.linalg.norm([0.3, -0.2, -1.0])
    axis_a = np.cross(normal, [0, 1, 0]) / np.linalg.norm(np.cross(normal, [0, 1, 0]))
    centre = np.array([0.1, 0.2, 4.0])
    lens = Lens(20, 30, 25.0, eye=0.4)
    plane = surfaces((centre, np.array([axis_a, np.cross(normal, axis_a), normal]), (np.inf, np.inf), 0.0))
    depth = raycast.cast(plane, lens).depth
    points = np.stack([depth * lens.columns + 0.4, depth * lens.rows[:, None], depth], -1)
    np.testing.assert_allclose(points @ normal, centre @ normal, atol=1e-5)  # each point is on the plane


def test_a_rectangle_ends_at_its_halves_and_hides_what_is_behind() -> None:
    flat = np.eye(3)
    both = surfaces(
        (np.array([0, 0, 4.0]), flat, (np.inf, np.inf), 0.0), (np.array([0, 0, 2.0]), flat, (0.5, 0.25), 0.0)
    )
    lens = Lens(41, 61, 40.0)
    hits = raycast.cast(both, lens)
    inside = (np.abs(2 * lens.columns) <= 0.5) & (np.abs(2 * lens.rows[:, None]) <= 0.25)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(hits.which, inside)
    np.testing.assert_allclose(hits.depth, np.where(inside, 2, 4))


def test_a_ball_has_its_radius_and_nothing_around_it() -> None:
    centre = np.array([0.2, -0.1, 3.0])
    lens = Lens(40, 50, 45.0, eye=0.3)
    depth = raycast.cast(surfaces((centre, np.eye(3), (0.0, 0.0), 0.7)), lens).depth
    seen = np.isfinite(depth)
    points = np.stack([depth * lens.columns + 0.3, depth * lens.rows[:, None], depth], -1)[seen]
    np.testing.assert_allclose(np.linalg.norm(points - centre, axis=1), 0.7, atol=1e-5)
    assert (points[:, 2] < 3).all()  # the near side
    expected = np.pi * (45 * 0.7 / 3) ** 2
    assert expected < seen.sum() < 1.15 * expected  # a ball looks a little larger than its middle's circle


def test_depth_is_within_the_room_and_disparity_is_its_inverse(clean: StereoSample) -> None:
    camera = CLEAN.camera
    mono = scenes.depth(5, 0, 4, CLEAN)
    np.testing.assert_allclose(clean.disparity, camera.focal_px * camera.baseline_m / mono.depth, rtol=1e-5)
    np.testing.assert_array_equal(clean.left, mono.image)
    assert mono.depth.min() >= CLEAN.near and mono.depth.max() <= CLEAN.far
    assert clean.disparity.max() <= CLEAN.max_disparity
    np.testing.assert_allclose(clean.depth().depth, mono.depth, rtol=1e-5)
    spread = clean.disparity.reshape(4, -1)
    assert ((spread.max(1) / spread.min(1)) > 1.8).all()  # near and far in every scene


def warped(sample: StereoSample) -> tuple[NDArray[Any], NDArray[Any]]:
    """The right images seen from the left by the disparity, and where they show the left pixel's point."""
    width = sample.left.shape[2]
    at = np.arange(width) - sample.disparity.astype(np.float64)
    column = np.floor(at).clip(0, width - 2).astype(int)
    share = (at - column)[..., None]
    first, second = (np.take_along_axis(sample.right, (column + i)[..., None], 2) for i in (0, 1))
    assert sample.occluded is not None
    return first * (1 - share) + second * share, ~sample.occluded & (at >= 0) & (at <= width - 1)


def test_both_images_show_the_same_where_the_disparity_says_so(clean: StereoSample) -> None:
    seen, partner = warped(clean)
    difference = np.abs(seen - clean.left).mean(-1)
    unmoved = np.abs(clean.right.astype(float) - clean.left).mean(-1)[partner].mean()
    assert np.median(difference[partner]) < 1.5  # of 255
    assert difference[partner].mean() < 0.3 * unmoved
    assert difference[~partner].mean() > 2 * difference[partner].mean()


def test_what_is_hidden_is_behind_something_or_outside(clean: StereoSample) -> None:
    assert clean.occluded is not None
    share = clean.occluded.mean((1, 2))
    assert (share > 0.02).all() and (share < 0.4).all()
    outside = np.arange(96) - clean.disparity < -1
    assert clean.occluded[outside].all()
    columns, behind, visible = np.arange(96) - clean.disparity, 0, 0
    for scene in range(4):  # of the points that fall on one place of the right image it sees the nearest
        for row in range(0, 64, 8):
            at, disparity, hidden = columns[scene, row], clean.disparity[scene, row], clean.occluded[scene, row]
            for x in np.flatnonzero(~hidden):
                visible += 1
                behind += disparity[np.abs(at - at[x]) < 0.2].max() > disparity[x] + 3
    assert visible > 2000 and behind < 0.01 * visible  # some are, at the edges: right pixels are whole


def test_scenes_depend_on_seed_and_index_alone() -> None:
    together = scenes.stereo(1, 2, 3, SMALL)
    for offset in range(3):
        alone = scenes.stereo(1, 2 + offset, 1, SMALL)
        np.testing.assert_array_equal(alone.left[0], together.left[offset])
        np.testing.assert_array_equal(alone.right[0], together.right[offset])
        np.testing.assert_array_equal(alone.disparity[0], together.disparity[offset])
    assert not np.array_equal(together.left[0], together.left[1])
    assert not np.array_equal(scenes.stereo(9, 2, 1, SMALL).left[0], together.left[0])
    assert together.name == "scenes 2 to 4 of seed 1"


def test_noise_changes_the_images_and_not_the_truth(clean: StereoSample) -> None:
    noisy = scenes.stereo(5, 0, 4, SMALL)
    np.testing.assert_array_equal(noisy.disparity, clean.disparity)
    difference = noisy.left.astype(float) - clean.left
    assert 0.5 < difference.std() < 12
    assert not np.array_equal(difference, noisy.right.astype(float) - clean.right)


def test_a_room_may_be_empty() -> None:
    sample = scenes.stereo(0, 0, 1, View(height=32, width=32, max_disparity=8, objects=(0, 0)))
    assert np.isfinite(sample.disparity).all() and sample.valid.all()


def test_textures_wrap_and_get_smaller_by_their_mean() -> None:
    bank = texture.bank()
    assert bank.texels.min() >= 0 and bank.texels.max() <= 1
    zero = np.zeros(3, np.int32)
    u = np.array([3.25, 3.25 + texture.SIZE, 3.25 - texture.SIZE], np.float32)
    looked = bank.look(zero + 4, zero, u, np.full(3, 7.5, np.float32))
    np.testing.assert_allclose(looked, looked[0], atol=1e-5)
    rows = np.arange(4, dtype=np.float32)
    block = bank.look(np.full((4, 4), 4), np.zeros((4, 4), int), *np.meshgrid(rows, rows))
    middle = bank.look(np.array([4]), np.array([2]), np.array([1.5], np.float32), np.array([1.5], np.float32))
    np.testing.assert_allclose(middle, block.mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 4}, "show nothing"),
        ({"near": 3.0}, "leave no room"),
        ({"near": float("nan")}, "leave no room"),
        ({"max_disparity": 300.0}, "outside the image"),
        ({"objects": (4, 3)}, "no range"),
        ({"noise": -0.1}, "use 0..1"),
        ({"blur": 0.5}, "use 0..1"),
    ],
)
def test_a_view_that_shows_nothing_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        View(**change)


@pytest.mark.parametrize("bad", [(-1, 0, 1), (0, -1, 1), (0, 0, 0)])
def test_no_scene_is_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="use a seed and a first from 0 and a count from 1"):
        scenes.depth(*bad, SMALL)
