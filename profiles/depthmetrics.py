"""How far predicted disparity and depth are from the truth, and what can be had without a network.

Over the pixels whose truth is known, d predicted and t true:

    three-pixel error  share of |d - t| > 3 px and |d - t| > 5 % of t (KITTI 2015's D1; against the truth, not d)
    EPE                mean |d - t|, pixels
    AbsRel             mean |d - t| / t, of depth
    delta < 1.25       share of max(d / t, t / d) < 1.25, of depth
    SSIM               mean over windows of Wang et al. 2004: Gaussian of sigma 1.5 (11 x 11), K1 = 0.01, K2 = 0.03,
                       population covariance, and the data range of the maps compared, by scikit-image

A window counts towards SSIM if all of it is known. SSIM of depth is of its log scale, since that is what the
networks say; a single SSIM of the whole image, or constants for bytes on such maps, says next to nothing.

The constant prediction says one number everywhere. Semi-global matching is OpenCV's StereoSGBM (Hirschmueller 2008),
its gaps filled as KITTI's devkit fills them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from rlkit.recover.depthsample import Image, LogScale, Map, Mask

PIXELS, SHARE = 3.0, 0.05  # KITTI: both must be passed
RATIO = 1.25
SIGMA, TRUNCATE, K1, K2 = 1.5, 3.5, 0.01, 0.03
WINDOW = 2 * int(TRUNCATE * SIGMA + 0.5) + 1  # 11


@dataclass(frozen=True, slots=True)
class StereoScore:
    """Disparity against truth: errors in pixels, shares in 0..1, and over how many pixels."""

    three_pixel: float
    epe: float
    pixels: int

    def to_json(self) -> dict[str, Any]:
        """As plain numbers."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DepthScore:
    """Depth against truth: shares in 0..1, RMSE in metres, SSIM (None where no whole window is known)."""

    abs_rel: float
    delta_1_25: float
    rmse_m: float
    ssim: float | None
    pixels: int

    def to_json(self) -> dict[str, Any]:
        """As plain numbers."""
        return asdict(self)


def _known(predicted: Map, truth: Map, valid: Mask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both at the known pixels; ValueError if they cannot be compared."""
    if not predicted.shape == truth.shape == valid.shape:
        shapes = f"prediction {predicted.shape}, truth {truth.shape}, mask {valid.shape}"
        raise ValueError(f"{shapes} differ; bring the prediction to the truth's size")
    if not valid.any():
        raise ValueError("no pixel has a known truth, so nothing can be scored; leave this sample out")
    d, t = predicted[valid].astype(np.float64), truth[valid].astype(np.float64)
    if not np.isfinite(d).all():
        raise ValueError("the prediction holds NaN or infinite values; fill or mask them first")
    if not (np.isfinite(t) & (t > 0)).all():
        raise ValueError("a truth marked as known is not finite and above 0; build its mask with depthsample.known")
    return d, t


def score_stereo(predicted: Map, truth: Map, valid: Mask) -> StereoScore:
    """Score disparities (..., H, W) in pixels; several images count by their pixels."""
    d, t = _known(predicted, truth, valid)
    error = np.abs(d - t)
    wrong = (error > PIXELS) & (error > SHARE * t)
    return StereoScore(float(wrong.mean()), float(error.mean()), len(t))


def score_depth(predicted: Map, truth: Map, valid: Mask, scale: LogScale) -> DepthScore:
    """Score depths (..., H, W) in metres. `scale` bounds both for SSIM; predictions must be above 0."""
    d, t = _known(predicted, truth, valid)
    if d.min() <= 0:
        raise ValueError(f"a predicted depth of {d.min():g} m is not in front of the camera; clip predictions above 0")
    error = d - t
    similarity = ssim(scale.encode(predicted), scale.encode(truth), valid, scale.span)
    near = np.maximum(d / t, t / d) < RATIO
    return DepthScore(
        float((np.abs(error) / t).mean()), float(near.mean()), float(np.sqrt((error**2).mean())), similarity, len(t)
    )


def ssim(predicted: Map, truth: Map, valid: Mask, data_range: float) -> float | None:
    """Mean SSIM of maps (..., H, W) over the windows that are known as a whole, None if there are none.

    Raises ValueError if a map is smaller than the window of 11 x 11.
    """
    from skimage.metrics import structural_similarity

    height, width = truth.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"maps of {width}x{height} are smaller than SSIM's window of {WINDOW}; use larger ones")
    total, windows = 0.0, 0
    maps = (values.reshape(-1, height, width) for values in (predicted, truth, valid))
    for guess, true, mask in zip(*maps, strict=True):
        _, similarity = structural_similarity(  # type: ignore[no-untyped-call]
            np.where(mask, true, 0).astype(np.float64),
            np.where(mask, guess, 0).astype(np.float64),
            data_range=data_range,
            gaussian_weights=True,
            sigma=SIGMA,
            use_sample_covariance=False,
            K1=K1,
            K2=K2,
            full=True,
        )
        inside = slice(WINDOW // 2, -(WINDOW // 2))
        whole = sliding_window_view(mask, (WINDOW, WINDOW)).all((2, 3))
        total += float(similarity[inside, inside][whole].sum())
        windows += int(whole.sum())
    return total / windows if windows else None


def constant(truths: Sequence[tuple[Map, Mask]]) -> float:
    """The one number that predicts best without looking, by mean absolute error: the median of training truths."""
    if not (values := [truth[valid] for truth, valid in truths]) or not (every := np.concatenate(values)).size:
        raise ValueError("there is no known truth to take a constant from; give at least one sample that has some")
    return float(np.median(every))


def semi_global(left: Image, right: Image, max_disparity: int = 192) -> tuple[Map, float]:
    """Disparity (H, W) by semi-global matching, gaps filled, and the share of pixels that were matched.

    Blocks of 5, penalties of 8 and 32 per channel and pixel of a block (OpenCV's documentation), uniqueness of 10 %, a
    left-right check of 1 px. Columns added at the left let matching begin at the image's edge.
    """
    import cv2

    if left.shape != right.shape:
        raise ValueError(f"left image {left.shape} and right image {right.shape} differ; give a pair of one size")
    count = -(-max_disparity // 16) * 16  # OpenCV takes multiples of 16
    block, channels = 5, 3
    matcher = cv2.StereoSGBM.create(
        minDisparity=0,
        numDisparities=count,
        blockSize=block,
        P1=8 * channels * block**2,
        P2=32 * channels * block**2,
        disp12MaxDiff=1,
        uniquenessRatio=10,
        speckleWindowSize=100,
        speckleRange=2,
        mode=cv2.STEREO_SGBM_MODE_SGBM_3WAY,
    )
    wide = [np.pad(image[..., ::-1], ((0, 0), (count, 0), (0, 0)), mode="edge") for image in (left, right)]
    found = np.asarray(matcher.compute(*wide), np.float32)[:, count:] / np.float32(16)  # stored in sixteenths
    matched = found >= 0
    return fill(found, matched), float(matched.mean())


def fill(disparity: Map, matched: Mask) -> Map:
    """Give a gap in a row the smaller of the disparities at its two ends, and what has one end that one.

    As interpolateBackground of KITTI's devkit: what is hidden belongs to what is behind. Rows without a match take the
    one above, else the one below; an image without any match is 0.
    """
    height, width = disparity.shape
    columns = np.arange(width)
    before = np.maximum.accumulate(np.where(matched, columns, -1), axis=1)
    after = np.minimum.accumulate(np.where(matched, columns, width)[:, ::-1], axis=1)[:, ::-1]
    endless = np.pad(disparity.astype(np.float32), ((0, 0), (1, 1)), constant_values=np.inf)
    filled = np.minimum(np.take_along_axis(endless, before + 1, 1), np.take_along_axis(endless, after + 1, 1))
    any_match = matched.any(1)
    if not any_match.any():
        return np.zeros_like(filled)
    rows = np.arange(height)
    source = np.maximum.accumulate(np.where(any_match, rows, -1))
    source = np.where(source < 0, rows[any_match][0], source)
    return np.ascontiguousarray(filled[source])
