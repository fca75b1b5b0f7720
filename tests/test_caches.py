"""Which kept cache serves a prompt, what is rewound, and what goes when there are too many."""

from __future__ import annotations

from typing import Any, cast

import pytest

from rlkit.runtime.caches import LEAST_NBYTES, LEAST_ROOM, Cache, Caches

A, B = list(range(100, 140)), list(range(200, 240))


class Recorded:
    """A generator that remembers how it was rewound."""

    def __init__(self, *, rewinds: bool = True) -> None:
        self.rewound: list[int] = []
        self._rewinds = rewinds

    def rewind_to(self, length: int) -> None:
        if not self._rewinds:
            raise RuntimeError("a sliding window cannot go back")
        self.rewound.append(length)


def caches(count: int = 4, nbytes: int = 10**9, *, rewinds: bool = True) -> Caches:
    def make(adapter: str | None, room: int) -> Cache:
        return Cache(cast(Any, Recorded(rewinds=rewinds)), adapter, room)

    return Caches(make, 10, 20_000, count, nbytes)


def used(kept: Caches, ids: list[int], *, adapter: str | None = None, room: int = 50) -> Cache:
    """A cache after a stream whose prompt and reply are `ids`."""
    cache = kept.take(ids, adapter, room)
    cache.ids.extend(ids[len(cache.ids) :])
    kept.give(cache, keep=True)
    return cache


def rewound(cache: Cache) -> list[int]:
    return cast(Recorded, cache.generator).rewound


def test_a_conversation_goes_on_where_it_was() -> None:
    kept = caches()
    first = used(kept, A)
    again = kept.take([*A, 1, 2, 3], None, 60)
    assert again is first
    assert again.ids == A
    assert rewound(again) == []


def test_a_cache_is_rewound_to_what_is_shared() -> None:
    kept = caches()
    first = used(kept, A)
    again = kept.take([*A[:30], 7, 8], None, 60)
    assert again is first
    assert again.ids == A[:30]
    assert rewound(again) == [30]


def test_the_last_id_is_always_computed() -> None:
    kept = caches()
    used(kept, A)
    again = kept.take(A, None, 60)
    assert again.ids == A[:-1]
    assert rewound(again) == [len(A) - 1]


def test_the_same_prompt_again_is_not_computed_however_long_the_reply_was() -> None:
    kept = caches()
    first = used(kept, [*A[:5], *B])
    assert kept.take(A[:6], None, 20) is first


def test_little_in_common_leaves_a_conversation_its_cache() -> None:
    kept = caches()
    first = used(kept, A)
    other = kept.take([*A[:10], *B], None, 60)
    assert other is not first
    assert other.ids == []
    kept.give(other, keep=False)
    assert kept.take([*A, 1], None, 60) is first


def test_the_longest_prefix_is_taken() -> None:
    kept = caches()
    both = [kept.take(A, None, 60) for _ in range(2)]
    for cache, ids in zip(both, (A[:20], [*A[:30], 1]), strict=True):
        cache.ids.extend(ids)
        kept.give(cache, keep=True)
    found = kept.take([*A, 5], None, 60)
    assert found is both[1]
    assert found.ids == A[:30]


def test_adapters_are_kept_apart() -> None:
    kept = caches()
    first = used(kept, A, adapter="poem")
    assert kept.take([*A, 1], None, 60) is not first
    assert kept.take([*A, 1], "poem", 60) is first
    used(kept, A, adapter="poem")
    kept.drop("poem")
    assert kept.take([*A, 1], "poem", 60).ids == []


def test_room_is_for_growing_and_a_cache_without_it_is_not_taken() -> None:
    kept = caches()
    assert used(kept, A).room == LEAST_ROOM
    assert kept.take([*A, 1], None, LEAST_ROOM + 1).room == 2 * LEAST_ROOM
    assert kept.take([1], None, 19_999).room == 20_000


def test_where_a_token_takes_much_less_room_is_made_at_first() -> None:
    def make(adapter: str | None, room: int) -> Cache:
        return Cache(cast(Any, Recorded(rewinds=True)), adapter, room)

    large = Caches(make, LEAST_NBYTES // 1000, 20_000)
    assert large.take(A, None, 50).room == 1000
    assert large.take(A, None, 1001).room == 1024


def test_a_cache_in_use_is_nobody_elses() -> None:
    kept = caches()
    used(kept, A)
    assert kept.take([*A, 1], None, 60) is not kept.take([*A, 1], None, 60)


def test_the_oldest_go_when_there_are_too_many() -> None:
    kept = caches(count=2)
    first = used(kept, A)
    used(kept, B)
    used(kept, list(range(300, 340)))
    assert kept.take([*A, 1], None, 60) is not first
    assert caches(count=0).nbytes == 0
    none = caches(count=0)
    assert used(none, A) is not none.take([*A, 1], None, 60)


def test_bytes_are_bounded_and_counted() -> None:
    kept = caches(nbytes=2 * 10 * LEAST_ROOM)
    first = kept.take(A, None, 50)
    assert kept.nbytes == 10 * LEAST_ROOM  # in use
    kept.give(first, keep=False)
    assert kept.nbytes == 0
    for ids in (A, B, list(range(300, 340))):
        used(kept, ids)
    assert kept.nbytes == 2 * 10 * LEAST_ROOM
    used(kept, list(range(400, 440)), room=2 * LEAST_ROOM + 1)  # more than is allowed: nothing is kept of it
    assert kept.nbytes == 0
    kept.clear()


def test_what_cannot_be_rewound_is_not_used() -> None:
    kept = caches(rewinds=False)
    first = used(kept, A)
    assert kept.take([*A[:30], 7], None, 60) is not first
    second = used(kept, B)
    assert kept.take([*B, 7], None, 60) is second  # nothing to rewind


@pytest.mark.parametrize(("count", "nbytes"), [(-1, 5), (1, -5)])
def test_bounds_are_checked(count: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="cannot be kept; use 0 to keep none"):
        caches(count, nbytes)
