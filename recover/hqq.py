"""Half-quadratic quantization: a grid for each group without any calibration, that lets outliers be outliers.

Badri & Shaji 2023 (HQQ) minimize sum |W - D(Q(W))|^p with p < 1 instead of the squared error: a few large weights,
which clip, should not pull the grid away from all others. With an auxiliary error E standing in for W - D, the two
halves are solved in turn, beta growing each time:

    E <- shrink(W - D),  shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)      (generalized soft threshold)
    grid <- least squares for W - E

All is reckoned in steps of the grid, so that p and beta mean the same for every group. Where the original moves a real
zero point and leaves the scale, the formats here know whole zero points only: that zero point is found first, both
whole numbers around it are tried, and the scale is refitted for each by the same alternation; the least error wins.
"""

from __future__ import annotations

import torch

from rlkit.recover.quantize import Quantized, checked, full_range, on_grid, snap_scales
from rlkit.recover.recipe import Scheme

POWER = 0.7
BETA, GROWTH = 1.0, 1.01  # beta = 10, as published for weights not in steps, lets twice as much of a weight be outlying
ITERATIONS = 10


def quantize_hqq(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Quantize `weight` (N, K); ValueError if it is not finite or does not divide into groups."""
    weight = checked(weight, scheme)
    groups = weight.view(len(weight), -1, scheme.group)  # (N, G, group)
    scales, zeros = full_range(weight, scheme)
    best = _deviation(groups, scales, zeros, scheme)
    start = scales  # a shorter start lets go of every outlier, which is worse for the layer's output
    for zero in _zeros(groups, scales, zeros, scheme):
        scale = _refit(groups, start, zero, scheme)
        deviation = _deviation(groups, scale, zero, scheme)
        better = deviation < best
        best = torch.where(better, deviation, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return on_grid(weight, scales, zeros, scheme)


def _zeros(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, ...]:
    """Zero points (N, G) worth trying: `zeros` and the whole numbers on both sides of the best real one."""
    if scheme.symmetric:
        return (zeros,)
    top, beta = 2**scheme.bits - 1, BETA
    inside, real = groups / scales[..., None], zeros  # in steps
    for _ in range(ITERATIONS):
        codes = (inside + real[..., None]).round_().clamp_(0, top)
        outlying = _shrink(inside - (codes - real[..., None]), beta)
        real = (codes - (inside - outlying)).mean(-1).clamp(0, top)
        beta *= GROWTH
    return zeros, real.floor(), real.ceil()


def _refit(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scales (N, G) for given whole zero points, alternated with the codes, from `scales` on."""
    beta = BETA
    for _ in range(ITERATIONS):
        levels = _levels(groups, scales, zeros, scheme)
        steps = groups / scales[..., None]
        target = groups - _shrink(steps - levels, beta) * scales[..., None]
        fitted = (target * levels).sum(-1) / levels.square().sum(-1).clamp(min=1.0)
        scales = torch.where(fitted > 0, fitted, scales)  # an empty or flipped group keeps the scale it has
        beta *= GROWTH
    return snap_scales(scales)


def _levels(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Nearest codes less the zero point, (N, G, group) float32 whole numbers."""
    zeros = zeros[..., None]
    return (groups / scales[..., None]).round_().add_(zeros).clamp_(0, 2**scheme.bits - 1).sub_(zeros)


def _deviation(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """sum |W - D|^p of every group, (N, G)."""
    return (groups - _levels(groups, scales, zeros, scheme) * scales[..., None]).abs().pow(POWER).sum(-1)


def _shrink(x: torch.Tensor, beta: float) -> torch.Tensor:
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-8).pow(POWER - 1) / beta).clamp_(min=0)
