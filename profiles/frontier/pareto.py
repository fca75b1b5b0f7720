"""Non-dominated points: fewest bytes against most accuracy; the best within a budget; how far two frontiers are apart.

A point is dominated if another takes no more bytes and is no worse, and is better in one of the two. Of points that are
equal in both, the first is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Cost = Callable[[T], float]  # less is better
Gain = Callable[[T], float]  # more is better


def frontier(found: Sequence[T], cost: Cost[T], gain: Gain[T]) -> list[T]:
    """The points that no other dominates, by cost."""
    kept: list[T] = []
    for one in sorted(found, key=lambda one: (cost(one), -gain(one))):
        if not kept or gain(one) > gain(kept[-1]):
            kept.append(one)
    return kept


def within(found: Sequence[T], cost: Cost[T], gain: Gain[T], budget: float) -> T | None:
    """The best of those that cost no more than the budget, the cheapest of equals; None if there is none."""
    fit = [one for one in frontier(found, cost, gain) if cost(one) <= budget]
    return fit[-1] if fit else None


def cheapest(found: Sequence[T], cost: Cost[T], gain: Gain[T], least: float) -> T | None:
    """The cheapest of those that gain at least so much; None if there is none."""
    return next((one for one in frontier(found, cost, gain) if gain(one) >= least), None)


def shortfall(mine: Sequence[T], theirs: Sequence[T], cost: Cost[T], gain: Gain[T]) -> float:
    """How much worse my best is than theirs at the cost of any of theirs, at most (the additive epsilon indicator).

    0 if mine are as good throughout; infinite where I have nothing as cheap.
    """

    def short(one: T) -> float:
        best = within(mine, cost, gain, cost(one))
        return float("inf") if best is None else gain(one) - gain(best)

    return max(0.0, *(short(one) for one in frontier(theirs, cost, gain))) if theirs else 0.0


def distance(first: Sequence[T], second: Sequence[T], cost: Cost[T], gain: Gain[T]) -> float:
    """The larger of the two shortfalls: 0 for frontiers that offer the same."""
    return max(shortfall(first, second, cost, gain), shortfall(second, first, cost, gain))
