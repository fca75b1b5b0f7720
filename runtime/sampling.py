"""Choosing a token from logits (V,) in numpy, so that one cache serves requests with other options and seeds repeat.

The order is penalties and bias, temperature, top_k, top_p, min_p, as in Hugging Face's generation; then one draw.
Finding the k likeliest of a large vocabulary is most of the work: the k-th largest of the maxima of groups of tokens is
at most the k-th largest of all, so it leaves few candidates to sort, and none of the k is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlkit.runtime.request import Logprob, Sampling

GROUPS = 1024  # maxima of so many groups bound the k-th largest from below
FIRST = 64  # candidates looked at first where a share of the probability is asked for

BLOCK = 512  # weights summed at a time
TINY = np.finfo(np.float32).tiny

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]


class Sampler:
    """Chooses the tokens of one reply; `prompt_ids` count for the repetition penalty, `never` is never chosen."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] = (), never: Collection[int] = ()) -> None:
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)
        self._never = np.array(sorted(never), np.int64)
        self._biased = np.array(list(sampling.bias), np.int64)
        self._biases = np.array(list(sampling.bias.values()), np.float32)
        self._seen = dict.fromkeys(prompt_ids) if sampling.repetition_penalty != 1 else {}  # an ordered set
        self._counts: dict[int, int] = {}

    @property
    def _keeps_all(self) -> bool:
        return (self._sampling.top_k, self._sampling.top_p, self._sampling.min_p) == (0, 1, 0)

    def choose(self, logits: Logits) -> int:
        """The next token; `logits` (V,) are left as they are."""
        changed = self.changed(logits)
        if self._sampling.temperature == 0:
            return int(changed.argmax())
        if self._keeps_all:
            return _drawn(_weights(changed, self._sampling.temperature), self._rng.random())
        ids, weights = self._kept(changed)
        return int(ids[_drawn(weights, self._rng.random())])

    def noisy(self, logits: Logits) -> Logits:
        """Scores (V,) whose largest, among whatever tokens are allowed, is drawn as `choose` draws from those.

        Adding Gumbel noise to logits and taking the largest samples from their softmax, and from that of any part of
        them (Gumbel 1954; Yellott 1977). Tokens that `choose` would drop come after all others instead.
        """
        changed = self.changed(logits)
        if self._sampling.temperature == 0:
            return changed
        noise = -np.log(np.maximum(self._rng.standard_exponential(len(changed), np.float32), TINY))
        scores = changed / np.float32(self._sampling.temperature) + noise
        if not self._keeps_all:
            ids, _ = self._kept(changed)
            last = np.float32(np.ptp(scores[np.isfinite(scores)]) + 1)
            kept = scores[ids]
            scores -= last
            scores[ids] = kept
        return np.asarray(scores, np.float32)

    def saw(self, token: int) -> None:
        """Count a token that the reply has grown by."""
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._sampling.repetition_penalty != 1:
            self._seen[token] = None

    def changed(self, logits: Logits) -> Logits:
        """Logits after penalties and bias; the same array where there are none."""
        asked, counted = self._sampling, bool(self._counts)
        repeated = asked.repetition_penalty != 1 and self._seen
        penalized = counted and (asked.presence_penalty or asked.frequency_penalty)
        if not (repeated or penalized or len(self._biased) or len(self._never)):
            return logits
        changed = logits.copy()
        if repeated:
            ids = np.fromiter(self._seen, np.int64)
            seen, penalty = changed[ids], np.float32(asked.repetition_penalty)
            changed[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if penalized:
            ids = np.fromiter(self._counts, np.int64)
            times = np.fromiter(self._counts.values(), np.float32)
            changed[ids] -= np.float32(asked.presence_penalty) + np.float32(asked.frequency_penalty) * times
        changed[self._biased] += self._biases
        changed[self._never] = -np.inf
        return changed

    def _kept(self, logits: Logits) -> tuple[Ids, Logits]:
        """The tokens left by top_k, top_p and min_p, likeliest first where one of the first two is asked for."""
        asked = self._sampling
        if not asked.top_k and asked.top_p == 1:
            weights = _weights(logits, asked.temperature)
            ids = np.flatnonzero(weights >= asked.min_p)
            return ids, weights[ids]
        if asked.top_k:
            ids = largest(logits, min(asked.top_k, len(logits)))
            weights = _weights(logits[ids], asked.temperature)
            total = float(weights.sum(dtype=np.float64))
        else:
            ids, weights, total = self._nucleus(logits)
        if asked.top_p < 1:
            count = int(np.searchsorted(weights.cumsum(dtype=np.float64), asked.top_p * total)) + 1
            ids, weights = ids[:count], weights[:count]
        count = int(np.count_nonzero(weights >= asked.min_p))
        return ids[:count], weights[:count]

    def _nucleus(self, logits: Logits) -> tuple[Ids, Logits, float]:
        """Enough of the likeliest tokens for top_p, their weights, and the sum of all weights."""
        asked, count = self._sampling, FIRST
        total = float(_weights(logits, asked.temperature).sum(dtype=np.float64))
        while True:
            ids = largest(logits, min(count, len(logits)))
            weights = _weights(logits[ids], asked.temperature)
            if weights.sum(dtype=np.float64) >= asked.top_p * total or len(ids) == len(logits):
                return ids, weights, total
            count = count * 8 if count * 8 <= GROUPS // 2 else len(logits)


def _weights(logits: Logits, temperature: float) -> Logits:
    """Probabilities up to a factor: the likeliest has weight 1."""
    scaled = (logits - logits.max()) * np.float32(1 / max(temperature, 1e-30))  # the largest float32 is 3e38
    return np.asarray(np.exp(scaled), np.float32)


def _drawn(weights: Logits, share: float) -> int:
    """The place in weights (N,) where `share`, in 0..1, of their sum is reached: by sums of blocks, then in a block."""
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    target = share * blocks[-1]
    block = min(int(np.searchsorted(blocks, target, side="right")), len(blocks) - 1)
    before = blocks[block - 1] if block else 0.0
    inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    place = min(int(np.searchsorted(inside, target - before, side="right")), len(inside) - 1)
    return block * BLOCK + place


def largest(logits: Logits, count: int) -> Ids:
    """The ids of the `count` largest of logits (V,), the largest first."""
    rows = len(logits) // GROUPS
    if rows > 1 and count <= GROUPS // 2:
        bounds = logits[: rows * GROUPS].reshape(rows, GROUPS).max(axis=0)
        least = np.partition(bounds, GROUPS - count)[GROUPS - count]
        ids = np.flatnonzero(logits >= least)
    else:
        ids = np.arange(len(logits))
    found = ids[np.argsort(-logits[ids])[:count]]
    return np.asarray(found, np.int64)


def logprob_of(logits: Logits, token: int, count: int) -> Logprob:
    """A token's logprob under logits (V,) as they are, with those of the `count` likeliest."""
    (found,) = logprobs_of(logits[None], [token], count)
    return found


def logprobs_of(logits: Logits, tokens: Iterable[int], count: int) -> list[Logprob]:
    """Logprobs of one token per row of logits (T, V)."""
    return [_logprob(row, token, count) for row, token in zip(logits, tokens, strict=True)]


def _logprob(row: Logits, token: int, count: int) -> Logprob:
    highest = row.max()
    norm = float(highest) + float(np.log(np.exp(row - highest).sum(dtype=np.float64)))
    top = tuple((int(each), float(row[each]) - norm) for each in largest(row, count)) if count else ()
    return Logprob(int(token), float(row[token]) - norm, top)
