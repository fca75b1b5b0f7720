"""How ids go into the model and tokens come out of it: two ways over genai's generator.

`Appended` chooses tokens in numpy and appends them, so a cache outlives its reply and the next one may have other
options. `Steered` hands genai scores to choose by: it alone knows which tokens a grammar allows, and on devices that
append only once, or for models that change their rotation at some length, its own loop must go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rlkit.runtime import genai
from rlkit.runtime.caches import Cache, Caches
from rlkit.runtime.sampling import Logits, Sampler


class Flow(Protocol):
    """One reply's way through the model."""

    reused: int  # tokens of the prompt that were in the cache before
    whole: bool  # the prompt goes in at once

    def feed(self, ids: Sequence[int]) -> None:
        """Compute the next tokens of the prompt."""

    def logits(self) -> Logits:
        """Of the token to come (V,); computes the token chosen last, if there is one."""

    def choose(self, sampler: Sampler, logits: Logits) -> int:
        """The token to come."""

    def close(self) -> None:
        """End, at any point."""


class Appended:
    """Tokens chosen by a sampler, in a cache that is kept afterwards."""

    whole = False

    def __init__(self, caches: Caches, cache: Cache) -> None:
        self._caches, self._cache = caches, cache
        self.reused = len(cache.ids)
        self._token: int | None = None
        self._sound = True

    def feed(self, ids: Sequence[int]) -> None:
        """Compute the next tokens of the prompt; one chosen before has to be computed first."""
        self._sound = False  # until it is done: nobody knows what an interrupted pass leaves behind
        self._cache.generator.append_tokens(np.asarray([ids], np.int32))
        self._cache.ids.extend(ids)
        self._sound = True

    def logits(self) -> Logits:
        """Of the token to come (V,)."""
        if self._token is not None:
            self.feed([self._token])
            self._token = None
        return last_logits(self._cache.generator)

    def choose(self, sampler: Sampler, logits: Logits) -> int:
        """The token to come; it is computed when the logits after it are asked for."""
        self._token = sampler.choose(logits)
        return self._token

    def close(self) -> None:
        """Give the cache back; one whose last pass failed is not kept."""
        self._caches.give(self._cache, keep=self._sound)


class Steered:
    """Tokens chosen by genai among those that it allows, by the scores of a sampler."""

    reused = 0

    def __init__(self, generator: genai.Generator, *, whole: bool = True) -> None:
        self._generator = generator
        self.whole = whole

    def feed(self, ids: Sequence[int]) -> None:
        """Compute tokens of the prompt."""
        self._generator.append_tokens(np.asarray([ids], np.int32))

    def logits(self) -> Logits:
        """Of the token to come (V,)."""
        return last_logits(self._generator)

    def choose(self, sampler: Sampler, logits: Logits) -> int:
        """The token to come: the best by the sampler's scores that the grammar allows."""
        self._generator.set_logits(sampler.noisy(logits)[None, None])
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def close(self) -> None:
        """Give the memory back."""
        del self._generator


def last_logits(generator: genai.Generator) -> Logits:
    """Logits of the token to come (V,), whether the graph computes those of every token or the last one's."""
    found = generator.get_logits()
    last: Logits = found.reshape(-1, found.shape[-1])[-1]
    return last
