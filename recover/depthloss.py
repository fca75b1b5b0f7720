"""What depth networks learn by: how far a prediction is from a truth, or a smaller network from a larger one.

    one image   0.85 (1 - SSIM) + 0.1 L1 + 0.9 edge smoothness                 (weights of 2206.09071)
    a pair      sum over stages of w_k smooth-L1, w = 1/4, 1/2, 1, 1           (AnyNet, 1810.11408)
    a teacher   the same towards its answers, + how features are spread over the image, level by level

Three things differ from the published monocular code. SSIM is that of depthmetrics (Gaussian windows, the constants in
the range of the maps compared): constants meant for bytes make any two maps alike. The smoothness weighs each pixel's
own step by exp(-EDGE |step of the truth|), so that edges are free; published is the image's mean with the sign turned,
which asks for flat maps most where there are most edges. Pixels without a truth count nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from rlkit.recover.depthsample import REACH

SSIM_SHARE, L1_SHARE, SMOOTH_SHARE = 0.85, 0.1, 0.9
STAGES = (0.25, 0.5, 1.0, 1.0)
EDGE = 40.0  # of a map in -REACH..REACH: a step of 0.05, about 10 % of depth, weighs a seventh
SPAN = 2 * REACH
SIGMA, RADIUS, K1, K2 = 1.5, 5, 0.01, 0.03  # as depthmetrics: windows of 11 x 11
SPREAD_SHARE = 1.0  # of features' distance beside that of answers


def _blur(values: torch.Tensor) -> torch.Tensor:
    """Gaussian means (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    at = torch.arange(-RADIUS, RADIUS + 1, device=values.device, dtype=values.dtype)
    weights = torch.exp(-0.5 * (at / SIGMA) ** 2)
    weights = (weights / weights.sum()).view(1, 1, -1, 1)
    flat = values.flatten(0, 1).unsqueeze(1)
    blurred = functional.conv2d(functional.conv2d(flat, weights), weights.transpose(2, 3))
    return blurred.view(*values.shape[:2], *blurred.shape[-2:])


def ssim(predicted: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor, span: float = SPAN) -> torch.Tensor:
    """Mean SSIM of maps (B, 1, H, W) over windows that are known as a whole; 1 where there are none.

    Raises ValueError for maps smaller than the window.
    """
    height, width = truth.shape[-2:]
    if min(height, width) <= 2 * RADIUS:
        raise ValueError(
            f"maps of {width}x{height} are smaller than SSIM's window of {2 * RADIUS + 1}; use larger ones"
        )
    x, y = torch.where(valid, predicted, 0), torch.where(valid, truth, 0)
    mx, my, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y], 1)).chunk(5, 1)
    vx, vy, vxy = xx - mx * mx, yy - my * my, xy - mx * my
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    similarity = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    whole = -functional.max_pool2d(-valid.float(), 2 * RADIUS + 1, 1) > 0
    return _mean(similarity, whole) if bool(whole.any()) else similarity.new_ones(())


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(where, values, 0).sum() / where.sum().clamp(min=1)


def smoothness(predicted: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean step between neighbours of a map (B, 1, H, W), each weighed down by the truth's own step there."""
    total = predicted.new_zeros(())
    for axis in (2, 3):
        steps, true = predicted.diff(dim=axis), truth.diff(dim=axis)
        count = valid.shape[axis] - 1
        both = valid.narrow(axis, 0, count) & valid.narrow(axis, 1, count)
        total = total + _mean(steps.abs() * torch.exp(-EDGE * true.abs()), both)
    return total


def mono(predicted: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The loss of maps (B, 1, H, W) on a LogScale."""
    similar = 1 - ssim(predicted, truth, valid)
    far = _mean((predicted - truth).abs(), valid)
    return SSIM_SHARE * similar + L1_SHARE * far + SMOOTH_SHARE * smoothness(predicted, truth, valid)


def stereo(stages: Sequence[torch.Tensor], truth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The loss of each stage's disparities (B, 1, H, W) in pixels."""
    total = truth.new_zeros(())
    for share, predicted in zip(STAGES, stages, strict=False):  # three stages without a propagation
        total = total + share * _mean(functional.smooth_l1_loss(predicted, truth, reduction="none"), valid)
    return total


def spread(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """How differently features (B, C, H, W) are spread over the image, level by level, whatever their channels.

    Attention transfer (Zagoruyko and Komodakis, 1612.03928): mean squares over channels, scaled to length 1, and the
    squared distance of the two. Levels are compared where both have them; a pair differs in channels only.
    """
    total = student[0].new_zeros(())
    for ours, theirs in zip(student, teacher, strict=False):
        maps = [functional.normalize(each.pow(2).mean(1).flatten(1), dim=1) for each in (ours, theirs)]
        total = total + (maps[0] - maps[1]).pow(2).sum(1).mean()
    return total
