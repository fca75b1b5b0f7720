"""How sure a figure over items is: bootstrap intervals of means, differences and recovery, and how many items suffice.

    recovery = (recovered - quantized) / (full - quantized), each the mean of one score over the same items

The bootstrap draws items with replacement, all models' results of an item together, so what they share cancels; an
interval is the 2.5th to 97.5th percentile of the draws (Efron 1979). Items that agree in all results are drawn as one
multinomial count, which is the same distribution. Of several tasks each is drawn by itself and tasks count alike.

Wilson's interval (1927) stands beside that of an accuracy; it is not empty at 0 and 1.

What this does not know: items of one task are taken as independent draws of what the task could have asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
"""(items, models): results on the same items."""

DRAWS = 10_000
TAIL = 2.5  # percent on either side
Z = 1.959963984540054  # the normal distribution's 97.5 % point
FEW_KINDS = 64  # results of so many kinds are drawn as counts
CHUNK = 2**22  # values drawn at a time
PILOT = 100  # items that say how large a sample must be
STEPS = (50, 100, 150, 200, 300, 400, 500, 700, 1000, 1500, 2000, 3000, 5000, 7000, 10_000)


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the ends of its 95 % interval; None for what is undefined, said in `why`."""

    value: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""

    @property
    def half_width(self) -> float | None:
        """Half the distance between the ends."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        table = {"value": self.value, "low": self.low, "high": self.high}
        return table | ({"why": self.why} if self.why else {})


def wilson(right: float, count: int) -> Interval:
    """Wilson's 95 % interval of a share of `count` items, `right` of which count."""
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"{right} of {count} items is no share; give at least one item")
    share, extra = right / count, Z * Z / count
    middle = (share + extra / 2) / (1 + extra)
    spread = Z * math.sqrt(share * (1 - share) / count + extra / (4 * count)) / (1 + extra)
    return Interval(share, max(0.0, middle - spread), min(1.0, middle + spread))


def draws(strata: Sequence[Scores], seed: int = 0, count: int = DRAWS) -> NDArray[np.float64]:
    """Bootstrapped means (count, models) over items (items, models); of several tasks, the mean of their means."""
    if not strata or any(scores.ndim != 2 or not len(scores) for scores in strata):
        raise ValueError("there are no items to draw from; give at least one scored item of every task")
    total = np.zeros((count, strata[0].shape[1]))
    for number, scores in enumerate(strata):
        if not np.isfinite(scores).all():
            raise ValueError("results hold NaN or infinite values; leave such items out, and say so")
        total += _means(scores, np.random.default_rng([seed, number]), count)
    return total / len(strata)


def _means(scores: Scores, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    kinds, often = np.unique(scores, axis=0, return_counts=True)
    items = len(scores)
    if len(kinds) <= FEW_KINDS:
        return np.asarray(rng.multinomial(items, often / items, size=count) @ kinds / items)
    found = np.empty((count, scores.shape[1]))
    step = max(1, CHUNK // (items * scores.shape[1]))
    for start in range(0, count, step):
        part = rng.integers(0, items, (min(step, count - start), items))  # (draws, items)
        found[start : start + len(part)] = scores[part].mean(axis=1)
    return found


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, (TAIL, 100 - TAIL))
    return float(low), float(high)


def mean(strata: Sequence[Scores], seed: int = 0) -> Interval:
    """The mean of one model's results, (items, 1) per task."""
    value = float(np.mean([scores.mean() for scores in strata]))
    return Interval(value, *_ends(draws(strata, seed)[:, 0]))


def difference(strata: Sequence[Scores], seed: int = 0) -> Interval:
    """The mean of the first model's results less the second's, (items, 2) per task, over the same items."""
    found = draws(strata, seed)
    means = np.mean([scores.mean(axis=0) for scores in strata], axis=0)
    return Interval(float(means[0] - means[1]), *_ends(found[:, 0] - found[:, 1]))


def recovery(strata: Sequence[Scores], seed: int = 0) -> Interval:
    """The share of what quantization lost that came back; results (items, 3): full, quantized, recovered.

    More must be better: hand in bits per byte with their sign turned. Undefined where quantized is no worse than full.
    Without an interval where the loss is not clear of 0: a ratio's has no ends then. Draws in which nothing was lost,
    which are fewer than one in forty, have no ratio and are left out.
    """
    full, quantized, recovered = np.mean([scores.mean(axis=0) for scores in strata], axis=0)
    lost = full - quantized
    if abs(lost) < 1e-12:
        return Interval(None, why="undefined: full and quantized score the same on these items")
    if lost < 0:
        return Interval(None, why="undefined: quantized scores better than full on these items")
    found = draws(strata, seed)
    gaps = found[:, 0] - found[:, 1]
    value = float((recovered - quantized) / lost)
    if np.percentile(gaps, TAIL) <= 1e-12:
        return Interval(value, why="no interval: what quantization lost is not clear of 0 on these items")
    some = gaps > 1e-12
    return Interval(value, *_ends((found[some, 2] - found[some, 1]) / gaps[some]))


@dataclass(frozen=True, slots=True)
class Sizing:
    """How many items a task needs: `limit` of its `total`, for a half-width of `half_width` where `wanted` was asked.

    `known` items were looked at; `apart` is how far, in 95 of 100 samples at most, such a sample lies from all items.
    """

    limit: int
    total: int
    wanted: float
    half_width: float
    apart: float
    known: int

    def text(self) -> str:
        """In words."""
        found = f"± {100 * self.half_width:.1f} points"
        if self.half_width > self.wanted:
            said = f"all {self.total} items give {found}, wider than the {100 * self.wanted:.1f} asked for"
        elif self.limit == self.total:
            said = f"all {self.total} items, for {found}"
        else:
            far = f"within {100 * self.apart:.1f} points of all items, 95 times in 100"
            said = f"{self.limit} of {self.total} items, for {found} ({far})"
        return f"{said}; sized by the results of {self.known}"


def size(scores: Scores, total: int, wanted: float, seed: int = 0, count: int = 2000) -> Sizing:
    """The smallest sample whose intervals are at most `wanted` on either side, by results (items, models) known so far.

    Looked at are the mean of every model and the paired difference of every model from the first. Samples of each size
    are drawn from what is known (Monte Carlo); `total` items there are. Raises ValueError for no results.
    """
    if not 0 < wanted < 1:
        raise ValueError(f"a half-width of {wanted} is no share; ask for points such as 0.04")
    if scores.ndim != 2 or not len(scores):
        raise ValueError("there are no results to size a sample by; score some items first")
    columns = np.column_stack([scores, scores[:, 1:] - scores[:, :1]])
    rng = np.random.default_rng(seed)
    kinds, often = np.unique(columns, axis=0, return_counts=True)
    steps = [step for step in STEPS if step < total] + [total]
    for step in steps:
        found = rng.multinomial(step, often / len(columns), size=count) @ kinds / step  # (count, columns)
        low, high = np.percentile(found, (TAIL, 100 - TAIL), axis=0)
        half = float((high - low).max() / 2)
        if half <= wanted:
            break
    away = _apart(kinds, often, step, total, rng)
    return Sizing(step, total, wanted, half, away, len(scores))


def _apart(
    kinds: NDArray[np.float64], often: NDArray[np.int64], step: int, total: int, rng: np.random.Generator
) -> float:
    """How far a sample's means lie from those of all items, at most, in 95 of 100 samples without replacement."""
    whole = np.floor(often * (total / often.sum())).astype(np.int64)  # all items, as if they were like the known ones
    whole[np.argsort(-often)[: total - whole.sum()]] += 1
    found = rng.multivariate_hypergeometric(whole, step, size=2000, method="marginals") @ kinds / step
    return float(np.percentile(np.abs(found - whole @ kinds / total).max(axis=1), 95))
