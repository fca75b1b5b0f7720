"""Choosing tokens: what each option leaves, how often each token is drawn, and that the shortcuts lose nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.runtime.request import Sampling
from rlkit.runtime.sampling import GROUPS, Sampler, largest, logprob_of, logprobs_of

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
DRAWS = 4000


def drawn(sampling: Sampling, logits: np.ndarray = LOGITS, draws: int = DRAWS) -> np.ndarray:
    """How often each token is chosen."""
    sampler = Sampler(sampling)
    return np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=len(logits)) / draws


def among_noise(sampling: Sampling, allowed: list[int], draws: int = DRAWS) -> np.ndarray:
    """The same by noisy scores of which some tokens are allowed."""
    sampler, counts = Sampler(sampling), np.zeros(len(LOGITS))
    for _ in range(draws):
        scores = sampler.noisy(LOGITS)
        counts[allowed[int(scores[allowed].argmax())]] += 1
    return counts / draws


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(1, top_k=0), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(1, top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(1, top_k=99), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(1, top_k=0, top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(1, top_k=3, top_p=0.7), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # of the three's 0.85
        (Sampling(1, top_k=0, top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(1, top_k=0, min_p=0.3), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(1, top_k=0, min_p=1), [0, 1, 0, 0, 0]),
        (Sampling(0.5, top_k=2), [0, 0.16 / 0.2225, 0, 0.0625 / 0.2225, 0]),
        (Sampling(1, top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(0), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_shares(sampling: Sampling, shares: list[float]) -> None:
    seeded = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, seed=1)
    assert np.abs(drawn(seeded) - shares).max() < 0.03
    assert np.abs(among_noise(seeded, [0, 1, 2, 3, 4]) - shares).max() < 0.03


def test_noise_draws_from_what_is_allowed() -> None:
    sampling = Sampling(1, top_k=0, seed=2)
    assert np.abs(among_noise(sampling, [0, 2]) - [1 / 3, 0, 2 / 3, 0, 0]).max() < 0.03
    beyond = among_noise(Sampling(1, top_k=2, seed=2), [0, 2, 3], 200)  # top_k leaves 1 and 3
    assert beyond.tolist() == [0, 0, 0, 1, 0]
    assert set(np.flatnonzero(among_noise(Sampling(1, top_k=2, seed=2), [0, 2], 500))) == {0, 2}


def test_seeds_repeat_and_differ() -> None:
    logits = np.zeros(1000, np.float32)
    chosen = []
    for seed in (7, 7, 8):
        sampler = Sampler(Sampling(1, seed=seed))
        chosen.append([sampler.choose(logits) for _ in range(20)])
    assert chosen[0] == chosen[1] != chosen[2]


def test_penalties_and_bias_change_logits_and_nothing_else_does() -> None:
    logits = np.array([2, -2, 1, 0], np.float32)
    assert Sampler(Sampling(1)).changed(logits) is logits
    sampler = Sampler(Sampling(repetition_penalty=2), [0, 1, 1])
    assert sampler.changed(logits).tolist() == [1, -4, 1, 0]
    sampler = Sampler(Sampling(presence_penalty=0.5, frequency_penalty=0.25, bias={3: 9.0}), [0])
    assert sampler.changed(logits).tolist() == [2, -2, 1, 9]
    for token in (2, 2, 1):
        sampler.saw(token)
    assert sampler.changed(logits).tolist() == [2, -2.75, 0, 9]
    sampler = Sampler(Sampling(repetition_penalty=2))
    sampler.saw(2)
    assert sampler.changed(logits).tolist() == [2, -2, 0.5, 0]
    assert logits.tolist() == [2, -2, 1, 0]


def test_a_large_vocabulary_is_drawn_by_its_shares_too() -> None:
    logits = np.full(5000, -100, np.float32)
    likely = [0, 511, 512, 3000, 4999]
    logits[likely] = np.log([0.1, 0.2, 0.3, 0.15, 0.25])
    shares = drawn(Sampling(1, top_k=0, seed=3), logits)
    assert np.abs(shares[likely] - [0.1, 0.2, 0.3, 0.15, 0.25]).max() < 0.03
    assert math.isclose(shares[likely].sum(), 1)


def test_some_tokens_are_never_chosen() -> None:
    sampler = Sampler(Sampling(), never=(1, 3))
    assert sampler.choose(LOGITS) == 4
    hot = Sampler(Sampling(100, top_k=0, seed=0), never=(1, 3))
    assert {hot.choose(LOGITS) for _ in range(300)} == {0, 2, 4}
    assert {int(hot.noisy(LOGITS).argmax()) for _ in range(300)} == {0, 2, 4}


def test_tiny_temperatures_are_nearly_greedy() -> None:
    assert drawn(Sampling(1e-6, top_k=0, seed=0), draws=50)[1] == 1
    huge = np.array([1e4, -1e4, 1e4 - 1], np.float32)
    assert drawn(Sampling(1e-6, top_k=0, seed=0), huge, 50)[0] == 1


@given(
    st.integers(1, 200), st.sampled_from([1, 5, 50, GROUPS // 2, GROUPS - 1, 5000]), st.integers(1, 8), st.booleans()
)
def test_the_largest_are_those_of_a_full_sort(extra: int, count: int, rows: int, ties: bool) -> None:
    rng = np.random.default_rng(extra)
    logits = rng.standard_normal(GROUPS * rows + extra).astype(np.float32)
    if ties:
        logits = np.round(logits)
    count = min(count, len(logits))
    found = largest(logits, count)
    assert len({*found.tolist()}) == count
    assert logits[found].tolist() == np.sort(logits)[::-1][:count].tolist()


@pytest.mark.parametrize("sampling", [Sampling(1, 0, 0.97), Sampling(1, 0, min_p=0.002), Sampling(2, 0, 0.9, 0.001)])
def test_a_large_vocabulary_keeps_what_a_full_sort_keeps(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * 2
    ids, weights = Sampler(sampling)._kept(logits)
    shares = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    order = np.argsort(-logits, kind="stable")
    total, count = shares.sum(), len(order)
    if sampling.top_p < 1:
        count = int(np.searchsorted(shares[order].cumsum() / total, sampling.top_p)) + 1
    kept = [token for token in order[:count] if shares[token] >= sampling.min_p]
    assert 64 < len(kept) < 20_000
    assert abs(len(ids) - len(kept)) <= 1  # a tie of rounding
    shorter = min(len(ids), len(kept))
    assert np.sort(logits[ids])[::-1][:shorter].tolist() == logits[kept[:shorter]].tolist()
    np.testing.assert_allclose(weights, shares[ids], rtol=1e-5)


def test_logprobs() -> None:
    found = logprob_of(LOGITS * 1, 0, 2)
    assert found.id == 0
    assert math.isclose(found.value, math.log(0.05), rel_tol=1e-5)
    assert [token for token, _ in found.top] == [1, 3]
    assert math.isclose(found.top[0][1], math.log(0.4), rel_tol=1e-5)
    shifted = logprob_of(LOGITS + np.float32(1000), 0, 0)
    assert math.isclose(shifted.value, math.log(0.05), rel_tol=1e-3)
    assert shifted.top == ()
    rows = logprobs_of(np.stack([LOGITS, LOGITS[::-1]]), [1, 1], 1)
    assert [round(math.exp(one.value), 3) for one in rows] == [0.4, 0.25]
