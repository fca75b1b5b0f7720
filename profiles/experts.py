"""How many experts a step touches.

    unique experts = sum over experts of 1 - (1 - q_e)^T     q_e: chance that a token takes expert e; they sum to k

for T tokens that choose independently. With even routing q = active / count, so E (1 - (1 - k/E)^T). Real routing is
not even: `skew` s makes the chance of the i-th expert proportional to i^-s, at most 1; 0 is even. What this does not
know: that tokens of one text choose alike, which touches fewer.
"""

from __future__ import annotations

import math
from functools import lru_cache


def unique_experts(count: int, active: int, tokens: int, skew: float = 0.0) -> float:
    """Expected number of different experts, of `count`, that `tokens` tokens with `active` each use.

    Raises ValueError if the skew is negative or no number, or more are active than there are.
    """
    if not (0.0 <= skew <= 10.0):
        raise ValueError(f"skew = {skew} is outside 0..10; 0 is even routing, 1 is strongly uneven")
    if not 1 <= active <= count or tokens < 0:
        raise ValueError(f"{active} active of {count} experts for {tokens} tokens is contradictory; check the model")
    if tokens <= 1 or active == count:
        return float(active * min(tokens, 1))
    if not skew:
        return count * (1.0 - (1.0 - active / count) ** tokens)
    return math.fsum(1.0 - (1.0 - chance) ** tokens for chance in _chances(count, active, skew))


@lru_cache(maxsize=256)
def _chances(count: int, active: int, skew: float) -> tuple[float, ...]:
    """Chance of each expert to be taken by a token; what exceeds 1 is shared among the rest."""
    weights = [(index + 1) ** -skew for index in range(count)]
    certain = 0
    while certain < active:
        scale = (active - certain) / math.fsum(weights[certain:])
        if weights[certain] * scale <= 1.0:
            return (1.0,) * certain + tuple(weight * scale for weight in weights[certain:])
        certain += 1
    return (1.0,) * certain + (0.0,) * (count - certain)
