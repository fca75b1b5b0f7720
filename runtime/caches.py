"""Caches of finished replies, kept so that a prompt which begins as one of them did is not computed again.

A kept cache is rewound to the longest prefix that it shares with the new prompt. One of which less than half would
stay, and which does not hold the whole prompt, is left to the conversation it belongs to. The oldest go when there are
too many or too many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlkit.runtime import genai

KEPT_COUNT = 4
KEPT_NBYTES = 2**30
LEAST_ROOM, LEAST_NBYTES = 2048, 2**28  # a conversation grows to so many tokens, or bytes, before it moves


@dataclass(slots=True, eq=False)
class Cache:
    """genai's generator with room for `room` tokens, of which it holds `ids`; all of one adapter."""

    generator: genai.Generator
    adapter: str | None
    room: int
    ids: list[int] = field(default_factory=list)


Make = Callable[[str | None, int], Cache]


class Caches:
    """Caches nobody uses now, the latest last; `make(adapter, room)` makes a new one of `token_nbytes` a token.

    `count` and `nbytes` bound what is kept; 0 keeps nothing. `limit` is the most room there can be.
    """

    def __init__(
        self, make: Make, token_nbytes: int, limit: int, count: int = KEPT_COUNT, nbytes: int = KEPT_NBYTES
    ) -> None:
        if count < 0 or nbytes < 0:
            raise ValueError(f"{count} caches of {nbytes} bytes cannot be kept; use 0 to keep none")
        self._make, self._token_nbytes, self._limit = make, token_nbytes, limit
        self._most, self._most_nbytes = count, nbytes
        self._kept: list[Cache] = []
        self._lent_room = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, those in use among them."""
        return self._token_nbytes * (self._lent_room + sum(cache.room for cache in self._kept))

    def take(self, ids: Sequence[int], adapter: str | None, room: int) -> Cache:
        """A cache that holds a prefix of `ids`, short of the last one, and has room for `room` tokens in all.

        A new one has room up to the next power of two, so that a conversation may grow in it.
        """
        cache = self._found(ids, adapter, room)
        if cache is None:
            least = min(LEAST_ROOM, LEAST_NBYTES // max(self._token_nbytes, 1))
            grown = min(self._limit, max(least, 1 << (room - 1).bit_length()))
            self._trim(self._most - 1, self._most_nbytes - grown * self._token_nbytes)  # before there is one more
            cache = self._make(adapter, grown)
        self._lent_room += cache.room
        return cache

    def give(self, cache: Cache, *, keep: bool) -> None:
        """Take back a cache, and keep it for later if it is sound and not too large."""
        self._lent_room -= cache.room
        if keep and cache.ids:
            self._kept.append(cache)
        self._trim(self._most, self._most_nbytes)

    def drop(self, adapter: str | None) -> None:
        """Forget what was computed with an adapter."""
        self._kept = [cache for cache in self._kept if cache.adapter != adapter]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def _found(self, ids: Sequence[int], adapter: str | None, room: int) -> Cache | None:
        wanted = np.asarray(ids[:-1], np.int64)
        fitting = [cache for cache in self._kept if cache.adapter == adapter and cache.room >= room]
        offers = [(_shared(cache.ids, wanted), cache) for cache in fitting]
        for shared, cache in sorted(offers, key=lambda offer: offer[0], reverse=True):
            if shared and (2 * shared >= len(cache.ids) or shared == len(wanted)):
                self._kept.remove(cache)
                if _rewound(cache, shared):
                    return cache
        return None

    def _trim(self, count: int, nbytes: int) -> None:
        while self._kept and (
            len(self._kept) > count or sum(cache.room for cache in self._kept) * self._token_nbytes > nbytes
        ):
            del self._kept[0]


def _shared(held: Sequence[int], wanted: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """The length of the longest common prefix."""
    count = min(len(held), len(wanted))
    differ = np.flatnonzero(np.asarray(held[:count], np.int64) != wanted[:count])
    return int(differ[0]) if len(differ) else count


def _rewound(cache: Cache, length: int) -> bool:
    """Shorten a cache; False where the runtime cannot do so for this model, and then it is of no use."""
    if length == len(cache.ids):
        return True
    try:
        cache.generator.rewind_to(length)
    except RuntimeError:  # sliding windows and recurrent states have forgotten what was before
        return False
    del cache.ids[length:]
    return True
