"""Processes that share work: everything is answered once and in order, and what goes wrong in one is said here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clerks import Clerk, lost, refused
from rlkit.recover.scorerpool import ScorerPool, shared_out
from test_likelihood import items


@pytest.fixture(scope="module")
def pool() -> Iterator[ScorerPool]:
    made = ScorerPool(Clerk, 2)
    yield made
    made.close()


def test_pairs_are_answered_in_their_order(pool: ScorerPool) -> None:
    pairs = items(8)
    found = pool.score(pairs, 256)
    assert [(-one.logprob, one.tokens) for one in found] == [(len(rest), len(context)) for context, rest in pairs]
    assert pool.score([], 256) == []
    with pytest.raises(ValueError, match="pair 0 has no token in its context"):
        pool.score([([], [1])], 256)


def test_every_prompt_has_its_reply(pool: ScorerPool) -> None:
    prompts = [list(range(number, number + number % 7 + 1)) for number in range(30)]
    found = dict(pool.replies(prompts, [number % 3 + 1 for number in range(30)]))
    assert found == {number: prompt[: number % 3 + 1] for number, prompt in enumerate(prompts)}
    assert list(pool.replies([], [])) == []
    assert pool.ask("who") in (0, 1)


def test_what_goes_wrong_in_a_process_is_raised_here() -> None:
    pool = ScorerPool(refused, 2)
    with pytest.raises(ValueError, match=r"no room for number [01]; use another"):
        pool.score(items(1), 256)
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.score(items(1), 256)


def test_a_process_that_ends_is_said() -> None:
    pool = ScorerPool(lost, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"ended early.*use fewer workers than 2"):
            pool.score(items(1), 256)
    pool.close()


def test_what_shares_a_context_stays_together() -> None:
    pairs = items(8)
    shares = shared_out(pairs, 256, 4)
    assert sorted(number for share in shares for number in share) == list(range(len(pairs)))
    assert 2 <= len(shares) <= 4
    for context in {tuple(pair[0]) for pair in pairs}:
        same = {number for number, pair in enumerate(pairs) if tuple(pair[0]) == context}
        assert sum(bool(same & set(share)) for share in shares) == 1
