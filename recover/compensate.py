"""Error compensation: choose codes so that the layer's output, not its weight, stays close.

The measure is the second moment of the layer's input, H = E[x x^T] (K, K): the mean squared output error of a weight
error E (N, K) is trace(E H E^T).

1. GPTQ (Frantar et al. 2022, section 3, algorithm 1): columns are rounded one after the other and each one's error is
   spread over the columns still free. The grid of a group is searched when its first column is reached. Groups are
   visited in order of what their inputs carry (the sum of H's diagonal), and so are the columns inside a group: what
   counts most is rounded while most columns are still free to make up for it. Every code stays at its place and groups
   stay contiguous, unlike with the activation ordering of the paper's own code.
2. Refinement, repeated: the group scales are solved in closed form for the codes at hand (least squares in the metric
   of H, one small system per row), then each column's codes are re-chosen given all others (cyclic coordinate descent).
   Neither step can raise the error, but for the rounding of scales to float16; the best state is kept.

H is known from a few thousand tokens only and codes fit its noise: damping is regularization as much as numerics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlkit.recover.quantize import Quantized, checked, search_grid, snap_scales
from rlkit.recover.recipe import Scheme

LARGEST = 60000.0  # a scale on which every weight rounds to zero: how a group of zeros is kept one


@dataclass(frozen=True, slots=True)
class Compensation:
    """Damping (fraction of H's mean diagonal added to it), refinement rounds, whether the order follows H."""

    damping: float = 0.05
    rounds: int = 2
    ordered: bool = True


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """H with `damping` times its mean diagonal added, float32; dead inputs keep a unit curvature."""
    mean = moment.diagonal().mean().clamp(min=1e-12)
    return moment + torch.diag(torch.full_like(moment.diagonal(), float(mean) * damping))


def checked_moment(moment: torch.Tensor, inputs: int) -> torch.Tensor:
    """`moment` in float32; ValueError unless it is finite and (inputs, inputs)."""
    if moment.shape != (inputs, inputs):
        shape = tuple(moment.shape)
        raise ValueError(f"the input moment has shape {shape} where the weight has {inputs} inputs; gather it again")
    if not torch.isfinite(moment).all():
        raise ValueError("the input moment has NaN or infinite entries: activations overflowed; gather it in float32")
    return moment.detach().float()


def output_error(error: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Mean squared output error per row (N,) of a weight error (N, K) under input second moment (K, K)."""
    return ((error @ moment) * error).sum(-1)


def compensate(
    weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme, options: Compensation | None = None
) -> Quantized:
    """Quantize `weight` (N, K) against input second moment `moment` (K, K). Groups of zeros stay zeros.

    Raises ValueError for weights or moments that are not finite or do not fit each other or the scheme.
    """
    options = options or Compensation()
    weight = checked(weight, scheme)
    moment = damped(checked_moment(moment, weight.shape[1]), options.damping)
    best = _gptq(weight, moment, scheme, options.ordered)
    least = output_error(weight - best.dequantize(), moment)
    current, pulled = best, weight @ moment
    for _ in range(options.rounds):
        current = _redescend(weight, moment, _refit_scales(pulled, moment, current))
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


def _visits(moment: torch.Tensor, group: int, ordered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The order (G,) of groups and, group by group, that of columns (K,)."""
    columns = torch.arange(len(moment)).view(-1, group)
    if not ordered:
        return torch.arange(len(columns)), columns.flatten()
    carried = moment.diagonal().view(-1, group)
    inside = columns.gather(1, carried.argsort(descending=True, stable=True))
    groups = carried.sum(-1).argsort(descending=True, stable=True)
    return groups, inside[groups].flatten()


def _gptq(weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme, ordered: bool) -> Quantized:
    (n, k), group, top = weight.shape, scheme.group, 2**scheme.bits - 1
    visited, order = _visits(moment, group, ordered)
    factor = _inverse_factor(moment[order][:, order])
    importance = factor.diagonal() ** -2
    empty = (weight.view(n, -1, group) == 0).all(-1)  # (N, G)
    work = weight.T[order].contiguous()  # (K, N): a column's weights lie together
    codes = torch.empty((k, n), dtype=torch.uint8)
    scales, zeros = torch.empty(n, k // group), torch.empty(n, k // group)
    for start in range(0, k, group):
        stop, g = start + group, int(visited[start // group])
        found, zero = (
            grid[:, 0] for grid in search_grid(work[start:stop].T.contiguous(), scheme, importance[start:stop])
        )
        scale = torch.where(empty[:, g], LARGEST, found)
        scales[:, g], zeros[:, g] = scale, zero
        errors = torch.empty(group, n)
        for column in range(start, stop):
            code = (work[column] / scale).round_().add_(zero).clamp_(0, top)
            codes[order[column]] = code.to(torch.uint8)
            error = (work[column] - code.sub_(zero).mul_(scale)).div_(factor[column, column])
            work[column:stop].addr_(factor[column, column:stop], error, alpha=-1)
            errors[column - start] = error
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return Quantized(codes.T.contiguous(), scales, zeros.to(torch.uint8), scheme)


def _inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """Upper triangular U (K, K) with U^T U = H^-1, rows as in GPTQ's algorithm 1."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise ValueError("the input moment is not positive definite even damped; raise Compensation.damping") from error
    return factor


def _refit_scales(pulled: torch.Tensor, moment: torch.Tensor, state: Quantized) -> Quantized:
    """Group scales (N, G) minimizing the output error for fixed codes: per row, (C H C^T) s = C H w.

    `pulled` is W H (N, K).
    """
    n, k = pulled.shape
    group, groups = state.scheme.group, k // state.scheme.group
    levels = state.codes.view(n, groups, group).float() - state.zeros[..., None].float()
    system = torch.empty(n, groups, groups)
    for g in range(groups):
        spread = levels[:, g] @ moment[g * group : (g + 1) * group]  # (N, K)
        system[:, g] = (spread.view(n, groups, group) * levels).sum(-1)
    target = (pulled.view(n, groups, group) * levels).sum(-1)  # (N, G)
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp(min=1e-20)
    system = system + torch.diag_embed(ridge.expand(n, groups))
    solved = torch.linalg.solve(system, target[..., None])[..., 0]
    usable = torch.isfinite(solved) & (solved > 0)  # an empty or flipped group keeps the scale it has
    return Quantized(state.codes, torch.where(usable, snap_scales(solved), state.scales), state.zeros, state.scheme)


def _redescend(weight: torch.Tensor, moment: torch.Tensor, state: Quantized) -> Quantized:
    """One pass of coordinate descent over the columns, the codes of all other columns fixed."""
    k, group, top = weight.shape[1], state.scheme.group, 2**state.scheme.bits - 1
    codes = state.codes.T.contiguous()  # (K, N): a column's codes lie together
    error = (weight - state.dequantize()).T.contiguous()  # (K, N)
    for start in range(0, k, group):
        stop, g = start + group, start // group
        scale, zero = state.scales[:, g].contiguous(), state.zeros[:, g].float()
        block = moment[start:stop, start:stop]
        pull = moment[start:stop] @ error  # (group, N): gradient of this block's columns
        moved = torch.zeros_like(pull)
        for i in range(group):
            gradient = torch.addmv(pull[i], moved.T, block[i])
            value = (codes[start + i] - zero).mul_(scale)
            code = gradient.div_(block[i, i]).add_(value).div_(scale).round_().add_(zero).clamp_(0, top)
            codes[start + i] = code.to(torch.uint8)
            moved[i] = value - code.sub_(zero).mul_(scale)
        error[start:stop] += moved
    return Quantized(codes.T.contiguous(), state.scales, state.zeros, state.scheme)
