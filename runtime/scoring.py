"""Logprobs of a prompt: chunk by chunk through the graph that keeps every token's logits, with a cache in between.

Only one chunk's logits are in memory, and each chunk is a piece of work of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.runtime.plain import Plain
from rlkit.runtime.request import Logprob
from rlkit.runtime.sampling import logprobs_of

SCORE_TOKENS = 128  # at a time: their logits over a vocabulary of 150,000 take 78 MB


def scores(plain: Plain, ids: Sequence[int], top: int, adapter: Path | None = None) -> Iterator[list[Logprob]]:
    """Yield logprobs of ids 1, 2, ... in lists, each with the `top` likeliest at its place; at least one list.

    Raises ValueError where the bundle has no graph that keeps all logits.
    """
    past: dict[str, NDArray[Any]] = {}
    for start in range(0, max(len(ids) - 1, 1), SCORE_TOKENS):
        known = np.array([ids[start : min(start + SCORE_TOKENS, len(ids) - 1)]], np.int64)
        if not known.size:  # a single id has nothing before it
            yield []
            return
        logits, past = plain.extend(known, past, adapter)
        yield logprobs_of(logits[0], ids[start + 1 : start + 1 + known.shape[1]], top)
