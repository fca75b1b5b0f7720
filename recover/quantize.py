"""Weights on integer grids: weight (N, K) <-> Quantized(codes, scales, zeros).

    codes   (N, K)        uint8 in 0 .. 2^bits - 1
    scales  (N, K/group)  float32 holding float16 values, so every reader computes with the same number
    zeros   (N, K/group)  uint8; dequantized weight = (codes - zeros) * scales

Round-to-nearest with a range search is the floor that `compensate.py` starts from: for each group, a list of scales and
zero points is tried and the one with the smallest weighted squared error is kept. `quantize_plain` spans each group's
full range instead, as most tools do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlkit.recover.recipe import Scheme

BLOCK = 2**23  # weights worked on at a time: 32 MiB in float32, of which compensation needs about ten
SHRINK_STEPS = 20  # scales tried per zero point, from the full range down
SHRINK_LOWEST = {2: 0.25, 4: 0.6, 8: 0.9}  # smallest fraction of the full range worth trying, by bits


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized matrix: codes (N, K) uint8, scales (N, G) float32, zeros (N, G) uint8, and its scheme."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, K) that the codes stand for, computed in float32; a large one block by block."""
        n, k = self.codes.shape
        weight = torch.empty(n, k, dtype=dtype)
        step = max(1, BLOCK // k)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            levels = self.codes[rows].float().view(-1, k // self.scheme.group, self.scheme.group)
            levels.sub_(self.zeros[rows, :, None]).mul_(self.scales[rows, :, None])
            weight[rows] = levels.view(-1, k)
        return weight


def checked(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """`weight` (N, K) detached, float32 and contiguous; ValueError if `scheme` cannot hold it or it is not finite."""
    if weight.dim() != 2 or weight.shape[1] % scheme.group:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not divide into groups of {scheme.group} along its inputs; "
            "take Scheme.resolve(K), or leave it at bits = 16"
        )
    if scheme.bits not in SHRINK_LOWEST:
        raise ValueError(f"bits = {scheme.bits} has no codes; use one of {tuple(SHRINK_LOWEST)}")
    weight = weight.detach().float().contiguous()
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{bad} of {weight.numel()} weights are NaN or infinite; repair the source or fetch it again")
    return weight


def snap_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales rounded to float16 values (kept as float32), none zero or beyond float16's normal range."""
    return scales.clamp(min=2.0**-14, max=60000.0).half().float()


def search_grid(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point per group with the least squared error, weighted by `importance` (K,) >= 0.

    Args:
        weight: (N, K) with K a multiple of scheme.group.

    Returns:
        scales (N, G) float32, zeros (N, G) float32 (whole numbers).
    """
    n, k = weight.shape
    groups = weight.view(n, -1, scheme.group)  # (N, G, group)
    weights = torch.ones(k) if importance is None else importance
    metric = weights.view(1, -1, scheme.group)
    top = 2**scheme.bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # (N, G): zero stays representable
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for scale, zero in _candidates(low, high, scheme):
        scale = snap_scales(scale)
        codes = (groups / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, top)
        error = codes.sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups).square_().mul_(metric).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def _candidates(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and zero points (N, G) worth trying: the full range first, then ever smaller ones."""
    top, middle = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    if scheme.bits == 2 and not scheme.symmetric:
        yield _covering(low, high, top)  # its zero point may be 0 or 3, which suits a group on one side of zero
    for shrink in torch.linspace(1.0, SHRINK_LOWEST[scheme.bits], SHRINK_STEPS).tolist():
        if scheme.symmetric:
            yield torch.maximum(-low, high) * shrink / middle, torch.full_like(low, middle)
        elif scheme.bits > 2:
            yield _covering(low * shrink, high * shrink, top)
        else:  # with four levels the zero point is worth trying outright, with the smallest scale covering both ends
            for zero in (1, 2):
                yield torch.maximum(-low / zero, high / (top - zero)) * shrink, torch.full_like(low, zero)


def _covering(low: torch.Tensor, high: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = ((high - low) / top).clamp(min=1e-12)
    return scale, (-low / scale).round().clamp(0, top)


def quantize_nearest(weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None) -> Quantized:
    """Round-to-nearest on the searched grid; the baseline that every other method has to beat.

    Args:
        weight: (N, K); importance: (K,) or None for a plain squared error.
    """
    weight = checked(weight, scheme)
    scales, zeros = search_grid(weight, scheme, importance)
    return on_grid(weight, scales, zeros, scheme)


def quantize_plain(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Round-to-nearest on the grid that spans each group from its smallest to its largest weight; (N, K)."""
    weight = checked(weight, scheme)
    scales, zeros = full_range(weight, scheme)
    return on_grid(weight, scales, zeros, scheme)


def full_range(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (N, G) of the grid that spans every group of `weight` (N, K), and zero."""
    groups = weight.view(len(weight), -1, scheme.group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if scheme.symmetric:
        middle = 2 ** (scheme.bits - 1)
        return snap_scales(torch.maximum(-low, high) / middle), torch.full_like(low, middle)
    scale, zero = _covering(low, high, 2**scheme.bits - 1)
    return snap_scales(scale), zero


def on_grid(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scheme: Scheme) -> Quantized:
    """The nearest codes of `weight` (N, K) on a given grid (N, G)."""
    n, k = weight.shape
    top = 2**scheme.bits - 1
    codes = (weight.view(n, -1, scheme.group) / scales[..., None]).round() + zeros[..., None]
    return Quantized(codes.clamp(0, top).to(torch.uint8).view(n, k), scales, zeros.to(torch.uint8), scheme)
