"""Metrics of depth and disparity against numbers worked out by hand, and the predictions made without a network."""

from __future__ import annotations

import numpy as np
import pytest

from rlkit.profiles import depthmetrics
from rlkit.recover import scenes
from rlkit.recover.depthsample import LogScale

RNG = np.random.default_rng(0)
SCALE = LogScale(0.5, 20)


def every(values: list[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array([values], np.float32)


def test_three_pixel_error_needs_both_limits_and_is_against_the_truth() -> None:
    truth = every([10, 10, 100, 100, 100, 61, 65, 50])
    guess = every([13, 13.1, 104, 105.5, 94.9, 64.1, 61.8, 9e9])
    #              3 px  wrong  4 %   5.5 %  5.1 %  5.08 % 4.9 %  not known
    # 61 -> 64.1 is wrong by 5.08 % of the truth and by 4.8 % of the prediction; 65 -> 61.8 the other way round
    valid = np.array([[True] * 7 + [False]])
    score = depthmetrics.score_stereo(guess, truth, valid)
    assert score.three_pixel == pytest.approx(4 / 7)
    assert score.epe == pytest.approx((3 + 3.1 + 4 + 5.5 + 5.1 + 3.1 + 3.2) / 7, rel=1e-5)
    assert score.pixels == 7 and score.to_json()["pixels"] == 7


def test_depth_errors_by_hand() -> None:
    truth, guess = np.ones((16, 16), np.float32) * 4, np.ones((16, 16), np.float32) * 4
    guess[0, :8] = [4.9, 5.1, 3.3, 3.1, 4, 4, 4, 4]  # delta: 1.225, 1.275, 1.212, 1.29
    valid = np.zeros((16, 16), np.bool_)
    valid[0, :8] = True
    score = depthmetrics.score_depth(guess, truth, valid, SCALE)
    assert score.delta_1_25 == pytest.approx(6 / 8)
    assert score.abs_rel == pytest.approx((0.9 + 1.1 + 0.7 + 0.9) / 4 / 8, rel=1e-5)
    assert score.rmse_m == pytest.approx(np.sqrt((0.81 + 1.21 + 0.49 + 0.81) / 8), rel=1e-5)
    assert score.ssim is None and score.pixels == 8  # no window is known as a whole


def plain_ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> np.ndarray:  # type: ignore[type-arg]
    """Wang et al.'s formula, a window at a time: (H - 10, W - 10)."""
    at = np.arange(-5, 6)
    weights = np.exp(-(at**2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    out = np.zeros((a.shape[0] - 10, a.shape[1] - 10))
    for y, x in np.ndindex(out.shape):
        p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
        mp, mq = (weights * p).sum(), (weights * q).sum()
        vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
        cov = (weights * (p - mp) * (q - mq)).sum()
        out[y, x] = (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
    return out


def test_ssim_is_the_published_formula_over_known_windows() -> None:
    truth = RNG.random((18, 20)).astype(np.float32)
    guess = (0.7 * truth + 0.3 * RNG.random((18, 20))).astype(np.float32)
    valid = np.ones(truth.shape, np.bool_)
    expected = plain_ssim(guess.astype(float), truth.astype(float), 1.8)
    assert depthmetrics.ssim(guess, truth, valid, 1.8) == pytest.approx(expected.mean(), abs=1e-6)
    valid[2, 3] = False  # and the windows around it do not count, whatever stands there
    guess[2, 3], truth[2, 3] = np.nan, 1e9
    kept = np.ones(expected.shape, bool)
    kept[:3, :4] = False
    assert depthmetrics.ssim(guess, truth, valid, 1.8) == pytest.approx(expected[kept].mean(), abs=1e-6)
    both = np.stack([guess, guess]), np.stack([truth, truth]), np.stack([valid, valid])
    assert depthmetrics.ssim(*both, 1.8) == pytest.approx(expected[kept].mean(), abs=1e-6)


def test_ssim_tells_a_constant_from_the_truth() -> None:
    """What the single SSIM of a whole image with constants for bytes does not: it gives a constant 0.99."""
    depth = scenes.depth(0, 0, 1, scenes.View(48, 64, max_disparity=16.0))
    flat = np.full_like(depth.depth, depthmetrics.constant([(depth.depth, depth.valid)]))
    same = depthmetrics.score_depth(depth.depth, depth.depth, depth.valid, SCALE)
    assert (same.ssim, same.abs_rel, same.delta_1_25) == (pytest.approx(1), 0, 1)
    constant = depthmetrics.score_depth(flat, depth.depth, depth.valid, SCALE)
    assert constant.ssim is not None and constant.ssim < 0.8 and constant.abs_rel > 0.2


def test_the_constant_is_the_median_of_known_training_truths() -> None:
    truths = [(every([1, 2, 50]), np.array([[True, True, False]])), (every([3, 4, 9]), np.ones((1, 3), np.bool_))]
    assert depthmetrics.constant(truths) == 3
    for empty in ([], [(every([1]), np.array([[False]]))]):
        with pytest.raises(ValueError, match="no known truth to take a constant from"):
            depthmetrics.constant(empty)


@pytest.mark.parametrize(
    ("guess", "truth", "valid", "words"),
    [
        ([1.0, 2.0], [1.0], [True], "bring the prediction to the truth's size"),
        ([np.nan], [1.0], [True], "prediction holds NaN or infinite"),
        ([1.0], [np.inf], [True], "truth marked as known is not finite"),
        ([1.0], [0.0], [True], "truth marked as known is not finite"),
        ([1.0], [1.0], [False], "no pixel has a known truth"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    guess: list[float], truth: list[float], valid: list[bool], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        depthmetrics.score_stereo(every(guess), every(truth), np.array([valid]))


def test_depth_behind_the_camera_and_maps_below_a_window_are_refused() -> None:
    one = np.ones((1, 1), np.bool_)
    with pytest.raises(ValueError, match="clip predictions above 0"):
        depthmetrics.score_depth(every([0]), every([1]), one, SCALE)
    with pytest.raises(ValueError, match="smaller than SSIM's window of 11"):
        depthmetrics.score_depth(every([1]), every([1]), one, SCALE)


def test_semi_global_matching_finds_most_of_a_scene_and_beats_a_constant() -> None:
    pair = scenes.stereo(3, 1, 1, scenes.View(128, 160, max_disparity=30.0))
    found, matched = depthmetrics.semi_global(pair.left[0], pair.right[0], 32)
    assert found.shape == (128, 160) and np.isfinite(found).all() and 0.7 < matched < 1
    assert pair.occluded is not None
    score = depthmetrics.score_stereo(found, pair.disparity[0], ~pair.occluded[0])
    assert score.three_pixel < 0.1 and score.epe < 1.5
    flat = np.full_like(found, depthmetrics.constant([(pair.disparity, pair.valid)]))
    assert depthmetrics.score_stereo(flat, pair.disparity[0], pair.valid[0]).three_pixel > 0.3
    with pytest.raises(ValueError, match="give a pair of one size"):
        depthmetrics.semi_global(pair.left[0], pair.right[0][:-1])


def test_gaps_take_what_is_behind() -> None:
    gap = -1
    rows = [[gap] * 4, [5, gap, gap, 3], [gap, 7, gap, gap], [gap] * 4]
    disparity = np.array(rows, np.float32)
    filled = depthmetrics.fill(disparity, disparity >= 0)
    np.testing.assert_array_equal(filled, [[5, 3, 3, 3], [5, 3, 3, 3], [7, 7, 7, 7], [7, 7, 7, 7]])
    np.testing.assert_array_equal(depthmetrics.fill(disparity[:1], disparity[:1] >= 0), np.zeros((1, 4)))
