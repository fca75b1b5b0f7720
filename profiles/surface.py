"""Positive numbers between the positions where they are known, all in logarithms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Surface:
    """Logarithms of positive numbers on a grid of logarithms of positions; what the grid lacks is its nearest's."""

    axes: tuple[NDArray[np.float64], ...]
    values: NDArray[np.float64]

    @classmethod
    def through(cls, points: Mapping[Point, float], name: str) -> Surface:
        """The surface through `points`; ValueError if there are none."""
        if not points:
            raise ValueError(f"nothing was measured of {name}; run `rlkit calibrate` again")
        places = np.log(np.array(list(points), np.float64))  # (points, axes)
        heights = np.log(np.array(list(points.values()), np.float64))
        axes = tuple(np.unique(column) for column in places.T)
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)  # (..., axes)
        apart = np.linalg.norm(grid[..., None, :] - places, axis=-1)  # (..., points)
        near = apart <= apart.min(-1, keepdims=True) + 1e-9
        return cls(axes, (near * heights).sum(-1) / near.sum(-1))

    def at(self, place: Sequence[float]) -> float:
        """The value between its neighbours, linear in logarithms; at the edge's beyond it."""
        values: Any = self.values
        for axis, position in zip(self.axes, place, strict=True):
            where = min(max(math.log(max(position, 1e-9)), axis[0]), axis[-1])
            upper = min(int(np.searchsorted(axis, where)), len(axis) - 1)
            lower = max(upper - 1, 0)
            gap = axis[upper] - axis[lower]
            share = (where - axis[lower]) / gap if gap > 0 else 0.0
            values = (1.0 - share) * values[lower] + share * values[upper]
        return math.exp(float(values))


def blend(found: Iterable[tuple[float, float]]) -> float:
    """The geometric mean of values, nearer ones weighing more (inverse squares of their distances)."""
    pairs = list(found)
    for apart, value in pairs:
        if apart < 1e-9:
            return value
    weights = [apart**-2 for apart, _value in pairs]
    return math.exp(sum(w * math.log(value) for w, (_a, value) in zip(weights, pairs, strict=True)) / sum(weights))
