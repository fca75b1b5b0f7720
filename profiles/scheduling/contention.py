"""How steps that run at the same time share the memory's bandwidth.

A step with demand d spends d of its time alone on the shared memory and 1 - d on its own unit. While the demands add up
to more than the cap, every access to the memory takes x times as long, for all alike:

    rate_i = 1 / ((1 - d_i) + d_i * x),    x >= 1 such that sum(d_i * rate_i) = cap

so the memory is exactly full, never more (x = sum / cap, the first thing to try, promises more than there is as soon as
demands differ), and a step without demand keeps its speed. Otherwise x = 1. What this does not know: priorities of the
memory controller between units, caches that two units share, and what a queue on one unit does (there steps wait).
"""

from __future__ import annotations

from collections.abc import Sequence


def rates(demands: Sequence[float], cap: float) -> tuple[float, ...]:
    """Speed of each step beside the others, as a share of its speed alone."""
    if sum(demands) <= cap:
        return (1.0,) * len(demands)
    # sum d / (1 + d (x - 1)) falls and is convex in x: from the left, Newton's steps rise to the root, never past it.
    x, step = 1.0, 1.0
    while step > 0.0 and x + step > x:
        excess, slope = -cap, 0.0
        for demand in demands:
            rate = 1.0 / (1.0 + demand * (x - 1.0))
            excess += demand * rate
            slope += (demand * rate) ** 2
        step = excess / slope
        x += max(step, 0.0)
    return tuple(1.0 / (1.0 + demand * (x - 1.0)) for demand in demands)
