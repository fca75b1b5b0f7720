"""Spatial propagation: values flow from left to right along an image, each pixel taking from three before it.

    h[y, x] = (1 - a - l - b) v[y, x] + a h[y-1, x-1] + l h[y, x-1] + b h[y+1, x-1]

with gates a, l, b per pixel and channel, scaled so that |a| + |l| + |b| <= 1, which keeps the recurrence stable, and 0
where the pixel they look at is outside (Liu et al., 1710.01020, as AnyNet, 1810.11408, uses it). Only the columns are
sequential: a column takes four operations of B * C * H values each, in any order of the rest, so it also runs without
a kernel of its own.

`unrolled` is a graph whose length is the width: for training and for export with a fixed width. `scanned` is the same
recurrence as one loop node, for a width that is not known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

Propagate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Values (B, C, H, W) and gates (B, C, H, 3, W) of `gates` -> propagated values (B, C, H, W)."""

TINY = 1e-8  # added to a sum of gates that may be 0


def gates(raw: torch.Tensor) -> torch.Tensor:
    """Raw gates (B, 3C, H, W), a before l before b -> gates (B, C, H, 3, W), scaled and 0 where they look outside."""
    above, level, below = raw.chunk(3, 1)
    total = above.abs() + level.abs() + below.abs() + TINY
    inside = [functional.pad(above[:, :, 1:], (0, 0, 1, 0)), level, functional.pad(below[:, :, :-1], (0, 0, 0, 1))]
    return torch.stack(inside, 3) / total.unsqueeze(3)


def _columns(values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a pixel keeps of itself (W, B, C, H), its gates (W, B, C, H, 3), and the rows that gates look at (3 * H)."""
    own = (1 - weights.sum(3)) * values  # (B, C, H, W)
    rows = torch.arange(values.shape[2], device=values.device)
    look = torch.stack([rows - 1, rows, rows + 1], 1).clamp(min=0)  # (H, 3); where clamped the gate is 0
    look = torch.minimum(look, rows[-1:]).reshape(-1)
    return own.permute(3, 0, 1, 2), weights.permute(4, 0, 1, 2, 3), look


def _step(before: torch.Tensor, own: torch.Tensor, weights: torch.Tensor, look: torch.Tensor) -> torch.Tensor:
    seen = before.index_select(2, look).reshape(weights.shape)  # (B, C, H, 3)
    return own + (weights * seen).sum(-1)


def unrolled(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Propagate, one column after the other."""
    own, by_column, look = _columns(values, weights)
    before = values[..., 0]
    done = [before]
    for own_column, column in zip(own.unbind(0)[1:], by_column.unbind(0)[1:], strict=True):
        before = _step(before, own_column, column, look)
        done.append(before)
    return torch.stack(done, -1)


def scanned(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Propagate in a loop that an exported graph keeps as one; for inference."""
    from torch._higher_order_ops.scan import scan

    own, by_column, look = _columns(values, weights)

    def step(
        before: torch.Tensor, column: tuple[torch.Tensor, torch.Tensor], look: torch.Tensor = look
    ) -> tuple[torch.Tensor, torch.Tensor]:
        after = _step(before, *column, look)
        return after, after.clone()  # a loop's output may not be its state

    first = values[..., 0].clone()
    _, rest = scan(step, first, (own[1:], by_column[1:]))  # (W - 1, B, C, H)
    return torch.cat([first.unsqueeze(-1), rest.permute(1, 2, 3, 0)], -1)
