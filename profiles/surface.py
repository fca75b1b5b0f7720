"""Positive numbers between the positions where they are known, all in logarithms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Surface:
    """Logarithms of positive numbers on a grid of logarithms of positions.

    A place of the grid without a point is filled from those on either side of it along an axis (the mean of what the
    axes say), then from those already filled; what lies outside of all of them is its nearest's.
    """

    axes: tuple[NDArray[np.float64], ...]
    values: NDArray[np.float64]

    @classmethod
    def through(cls, points: Mapping[Point, float], name: str) -> Surface:
        """The surface through `points`; ValueError if there are none."""
        if not points:
            raise ValueError(f"nothing was measured of {name}; run `rlkit calibrate` again")
        places = np.log(np.array(list(points), np.float64))  # (points, axes)
        axes = tuple(np.unique(column) for column in places.T)
        values = np.full([len(axis) for axis in axes], np.nan)
        where = tuple(np.searchsorted(axis, column) for axis, column in zip(axes, places.T, strict=True))
        values[where] = np.log(np.array(list(points.values()), np.float64))
        while np.isnan(values).any():
            filled = _between(axes, values)
            if np.array_equal(filled, values, equal_nan=True):
                return cls(axes, _nearest(axes, values))
            values = filled
        return cls(axes, values)

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


def _between(axes: Sequence[NDArray[np.float64]], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaps that have a value on either side along an axis, filled with the mean of what the axes say."""
    guesses = [np.apply_along_axis(_line, index, values, axis) for index, axis in enumerate(axes)]
    known = ~np.isnan(guesses)
    total = np.where(known, guesses, 0.0).sum(0)
    counts = known.sum(0)
    mean = np.divide(total, counts, out=np.full(values.shape, np.nan), where=counts > 0)
    return np.where(np.isnan(values), mean, values)


def _line(values: NDArray[np.float64], axis: NDArray[np.float64]) -> NDArray[np.float64]:
    known = ~np.isnan(values)
    if known.sum() < 2:
        return values
    return np.interp(axis, axis[known], values[known], left=np.nan, right=np.nan)


def _nearest(axes: Sequence[NDArray[np.float64]], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaps filled with the mean of the nearest values."""
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)  # (..., axes)
    known = ~np.isnan(values)
    apart = np.linalg.norm(grid[..., None, :] - grid[known], axis=-1)  # (..., known)
    near = apart <= apart.min(-1, keepdims=True) + 1e-9
    filled: NDArray[np.float64] = (near * values[known]).sum(-1) / near.sum(-1)
    return filled
