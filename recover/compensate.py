"""Error compensation: choose codes so that the layer's output, not its weight, stays close.

The measure is the second moment of the layer's input, H = E[x x^T] (K, K): the mean squared output error of a weight
error E (N, K) is trace(E H E^T).

1. GPTQ (Frantar et al. 2022, section 3, algorithm 1): columns are rounded one after the other and each one's error is
   spread over the columns still free. The grid of a group is searched when its first column is reached.
2. Refinement, repeated: the group scales are solved in closed form for the codes at hand (least squares in the metric
   of H, one small system per row), then each column's codes are re-chosen given all others (cyclic coordinate descent).
   Neither step can raise the error, but for the rounding of scales to float16; the best state is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlkit.recover.quantize import Quantized, search_grid, snap_scales
from rlkit.recover.recipe import Scheme


@dataclass(frozen=True, slots=True)
class Compensation:
    """Damping (fraction of H's mean diagonal added to it) and the number of refinement rounds."""

    damping: float = 0.01
    rounds: int = 1


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """H with `damping` times its mean diagonal added, float32; dead inputs keep a unit curvature."""
    mean = moment.diagonal().mean().clamp(min=1e-12)
    return moment + torch.diag(torch.full_like(moment.diagonal(), float(mean) * damping))


def output_error(error: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Mean squared output error per row (N,) of a weight error (N, K) under input second moment (K, K)."""
    return ((error @ moment) * error).sum(-1)


def compensate(
    weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme, options: Compensation | None = None
) -> Quantized:
    """Quantize `weight` (N, K) against input second moment `moment` (K, K)."""
    options = options or Compensation()
    weight, moment = weight.detach().float(), damped(moment.float(), options.damping)
    best = _gptq(weight, moment, scheme)
    least = output_error(weight - best.dequantize(), moment)
    current = best
    for _ in range(options.rounds):
        current = _redescend(weight, moment, _refit_scales(weight, moment, current))
        error = output_error(weight - current.dequantize(), moment)
        better = error < least
        best, least = _merge(best, current, better), torch.where(better, error, least)
    return best


def _merge(old: Quantized, new: Quantized, better: torch.Tensor) -> Quantized:
    """Row by row the better of two states; `better` is (N,) bool."""
    pick = better[:, None]
    return Quantized(
        torch.where(pick, new.codes, old.codes),
        torch.where(pick, new.scales, old.scales),
        torch.where(pick, new.zeros, old.zeros),
        old.scheme,
    )


def _gptq(weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme) -> Quantized:
    n, k = weight.shape
    work, top = weight.clone(), 2**scheme.bits - 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor = torch.linalg.cholesky(inverse, upper=True)  # (K, K) upper triangular, rows as in GPTQ's algorithm 1
    importance = factor.diagonal() ** -2
    codes = torch.empty((n, k), dtype=torch.uint8)
    scales, zeros = torch.empty(n, k // scheme.group), torch.empty(n, k // scheme.group)
    for group, start in enumerate(range(0, k, scheme.group)):
        stop = start + scheme.group
        scale, zero = search_grid(work[:, start:stop], scheme, importance[start:stop])
        scales[:, group], zeros[:, group] = scale[:, 0], zero[:, 0]
        errors = torch.empty(n, scheme.group)
        for column in range(start, stop):
            code = ((work[:, column] / scale[:, 0]).round() + zero[:, 0]).clamp(0, top)
            error = (work[:, column] - (code - zero[:, 0]) * scale[:, 0]) / factor[column, column]
            codes[:, column] = code.to(torch.uint8)
            work[:, column:stop] -= error[:, None] * factor[None, column, column:stop]
            errors[:, column - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return Quantized(codes, scales, zeros.to(torch.uint8), scheme)


def _refit_scales(weight: torch.Tensor, moment: torch.Tensor, state: Quantized) -> Quantized:
    """Group scales (N, G) minimizing the output error for fixed codes: per row, (C H C^T) s = C H w."""
    n, k = weight.shape
    group, groups = state.scheme.group, k // state.scheme.group
    levels = state.codes.view(n, groups, group).float() - state.zeros[..., None].float()
    system = torch.empty(n, groups, groups)
    for g in range(groups):
        spread = levels[:, g] @ moment[g * group : (g + 1) * group]  # (N, K)
        system[:, g] = (spread.view(n, groups, group) * levels).sum(-1)
    target = ((weight @ moment).view(n, groups, group) * levels).sum(-1)  # (N, G)
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp(min=1e-20)
    system = system + torch.diag_embed(ridge.expand(n, groups))
    solved = torch.linalg.solve(system, target[..., None])[..., 0]
    usable = torch.isfinite(solved) & (solved > 0)  # an empty or flipped group keeps the scale it has
    return Quantized(state.codes, torch.where(usable, snap_scales(solved), state.scales), state.zeros, state.scheme)


def _redescend(weight: torch.Tensor, moment: torch.Tensor, state: Quantized) -> Quantized:
    """One pass of coordinate descent over the columns, the codes of all other columns fixed."""
    k, group, top = weight.shape[1], state.scheme.group, 2**state.scheme.bits - 1
    codes, zeros = state.codes.clone(), state.zeros.float()
    error = weight - state.dequantize()  # (N, K)
    for start in range(0, k, group):
        stop, g = start + group, start // group
        scale, zero = state.scales[:, g], zeros[:, g]
        block = moment[start:stop, start:stop]
        pull = error @ moment[:, start:stop]  # (N, group): gradient of this block's columns
        moved = torch.zeros(len(weight), group)
        for i in range(group):
            column = start + i
            gradient = pull[:, i] + moved @ block[:, i]
            value = (codes[:, column] - zero) * scale
            code = ((value + gradient / block[i, i]) / scale).round().add_(zero).clamp_(0, top)
            moved[:, i] = value - (code - zero) * scale
            codes[:, column] = code.to(torch.uint8)
        error[:, start:stop] += moved
    return Quantized(codes, state.scales, state.zeros, state.scheme)
