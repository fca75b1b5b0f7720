"""Divergence against distributions whose KL is known, and the cache against live logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rlkit.profiles.divergence import CacheSpec, Divergence, LogitsFn, cached, compare, live, predicted_rows
from rlkit.profiles.text import Batch, batches

Floats = NDArray[np.float32]


def constant(*probabilities: float, shift: float = 0.0) -> LogitsFn:
    """A model that gives the same distribution everywhere."""
    row = np.log(np.array(probabilities, dtype=np.float64)) + shift

    def logits(ids: NDArray[np.int64]) -> Floats:
        return np.broadcast_to(row, (*ids.shape, len(row))).astype(np.float32)

    return logits


def noisy(vocab: int, seed: int, noise: float = 0.0, scale: float = 3.0) -> LogitsFn:
    """A model of random logits that depend on the ids alone; `noise` blurs them in a second random way."""
    table = np.random.default_rng(seed).standard_normal((vocab, vocab), dtype=np.float32) * scale
    table += noise * np.random.default_rng(seed + 1).standard_normal((vocab, vocab), dtype=np.float32)
    return lambda ids: table[ids]


def text(vocab: int, rows: int, width: int, seed: int = 0) -> list[Batch]:
    rng = np.random.default_rng(seed)
    return batches([rng.integers(0, vocab, rng.integers(2, width + 1)).tolist() for _ in range(rows)], max_ids=64)


ONE = [Batch(np.array([[0, 1, 0, 1]]), np.array([4]))]


def test_known_distributions() -> None:
    p, q = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)
    found = compare(live(constant(*p), ONE), constant(*q), ONE)
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.kl_mean == pytest.approx(expected, abs=1e-7)
    assert found.kl_median == pytest.approx(expected, abs=1e-7)
    assert found.kl_stderr == pytest.approx(0.0, abs=1e-9)
    assert found.top1_agreement == 0.0
    assert found.tokens == 3  # ids 1, 0, 1 follow
    assert found.perplexity_original == pytest.approx((0.25 * 0.5 * 0.25) ** (-1 / 3), rel=1e-6)
    assert found.perplexity_other == pytest.approx((0.5 * 0.25 * 0.5) ** (-1 / 3), rel=1e-6)


def test_a_constant_added_to_logits_changes_nothing() -> None:
    p = (0.7, 0.2, 0.1)
    found = compare(live(constant(*p), ONE), constant(*p, shift=50.0), ONE)
    assert found.kl_mean == pytest.approx(0.0, abs=1e-6) and found.kl_mean >= 0.0
    assert found.top1_agreement == 1.0


def test_it_equals_a_plain_float64_calculation() -> None:
    vocab, rows = 300, text(300, 12, 9)
    original, other = noisy(vocab, 0), noisy(vocab, 0, noise=0.7)
    found = compare(live(original, rows), other, rows)
    kl, nll, same = [], [], []
    for batch in rows:
        for row, length in enumerate(batch.lengths):
            for at in range(length - 1):
                a, b = (model(batch.ids)[row, at].astype(np.float64) for model in (original, other))
                log_p, log_q = a - np.log(np.exp(a).sum()), b - np.log(np.exp(b).sum())
                kl.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
                nll.append(-float(log_q[batch.ids[row, at + 1]]))
                same.append(a.argmax() == b.argmax())
    assert found.tokens == len(kl) == sum(batch.predicted for batch in rows)
    assert found.kl_mean == pytest.approx(np.mean(kl), abs=1e-6)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), abs=1e-5)
    assert found.perplexity_other == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    assert found.top1_agreement == pytest.approx(np.mean(same))


def test_padding_is_ignored() -> None:
    original, other = noisy(50, 0), noisy(50, 0, noise=0.5)
    tight = Batch(np.array([[3, 7, 9]]), np.array([3]))
    padded = Batch(np.array([[3, 7, 9, 0, 0, 0]]), np.array([3]))

    def poisoned(ids: NDArray[np.int64]) -> Floats:
        logits = np.array(other(ids))
        logits[:, 2:] = np.nan  # the last real position predicts nothing that is known, and the rest is padding
        return logits

    expected = compare(live(original, [tight]), other, [tight])
    assert compare(live(original, [padded]), poisoned, [padded]) == expected


def test_rows_longer_than_a_chunk_are_cut_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = text(40, 6, 30)
    original, other = noisy(40, 0), noisy(40, 0, noise=0.5)
    whole = compare(live(original, rows), other, rows)
    monkeypatch.setattr("rlkit.profiles.divergence.CHUNK_VALUES", 40 * 3)
    assert compare(live(original, rows), other, rows) == whole


def test_the_standard_error_counts_windows_not_tokens() -> None:
    """Two windows, all tokens of one equal: the error is that of two values, however many tokens they have."""
    rows = [Batch(np.array([[0] * 9, [1] * 9]), np.array([9, 9]))]
    table = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32))
    found = compare(live(constant(0.5, 0.5), rows), lambda ids: table[ids], rows)
    high = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert found.kl_mean == pytest.approx(high / 2, abs=1e-6)
    assert found.kl_stderr == pytest.approx(high / 2, rel=1e-5)  # sd of (0, high) is high / sqrt 2; / sqrt 2 again


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    def broken(ids: NDArray[np.int64]) -> Floats:
        return np.full((*ids.shape, 3), bad, np.float32)

    with pytest.raises(ValueError, match="NaN or infinite"):
        compare(live(constant(0.5, 0.25, 0.25), ONE), broken, ONE)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        compare(live(constant(0.5, 0.5), ONE), constant(0.5, 0.25, 0.25), ONE)
    with pytest.raises(ValueError, match="do not fit ids"):
        predicted_rows(np.zeros((1, 3, 2), np.float32), ONE[0])
    with pytest.raises(ValueError, match="no text to compare on"):
        compare(live(constant(0.5, 0.5), []), constant(0.5, 0.5), [])


def test_a_float32_cache_changes_nothing_and_float16_less_than_1e_5_nats(tmp_path: Path) -> None:
    vocab, rows = 2000, text(2000, 30, 20)
    original, other = noisy(vocab, 0), noisy(vocab, 0, noise=0.5)
    expected = compare(live(original, rows), other, rows)
    exact = compare(cached(CacheSpec(tmp_path, "m", "float32"), original, rows), other, rows)
    half = compare(cached(CacheSpec(tmp_path, "m"), original, rows), other, rows)
    assert exact.kl_mean == pytest.approx(expected.kl_mean, abs=1e-7)
    assert abs(half.kl_mean - expected.kl_mean) < 1e-5
    assert half.top1_agreement == expected.top1_agreement
    assert half.perplexity_original == pytest.approx(expected.perplexity_original, rel=1e-3)
    same = compare(cached(CacheSpec(tmp_path, "m"), original, rows), original, rows)
    assert same.kl_mean < 1e-6 and same.top1_agreement == 1.0


def test_a_cache_is_computed_once_and_belongs_to_its_model_and_text(tmp_path: Path) -> None:
    rows = text(30, 8, 6)
    calls = 0

    def counted(ids: NDArray[np.int64]) -> Floats:
        nonlocal calls
        calls += 1
        return noisy(30, 0)(ids)

    first = cached(CacheSpec(tmp_path, "a"), counted, rows)
    assert calls == len(rows)
    again = cached(CacheSpec(tmp_path, "a"), counted, rows)
    assert calls == len(rows) and again.path == first.path
    assert cached(CacheSpec(tmp_path, "b"), counted, rows).path != first.path
    assert cached(CacheSpec(tmp_path, "a"), counted, text(30, 8, 6, seed=1)).path != first.path
    with pytest.raises(ValueError, match="float16 or float32"):
        CacheSpec(tmp_path, "a", "int8")


def test_an_interrupted_cache_is_absent_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows = text(30, 40, 12)
    assert len(rows) > 3
    model, calls = noisy(30, 0), 0

    def failing(ids: NDArray[np.int64]) -> Floats:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return model(ids)

    spec = CacheSpec(tmp_path, "m", "float32")
    with pytest.raises(KeyboardInterrupt):
        cached(spec, failing, rows)
    assert not spec.path(rows).exists()
    reference = cached(spec, failing, rows)
    assert calls == 3 + len(rows) - 2  # two batches were kept
    assert [path.name for path in tmp_path.iterdir()] == [spec.path(rows).name]
    other = noisy(30, 0, noise=0.5)
    assert compare(reference, other, rows) == compare(cached(spec, model, rows), other, rows)
    assert compare(reference, other, rows).kl_mean == pytest.approx(compare(live(model, rows), other, rows).kl_mean)


def test_results_survive_json() -> None:
    found = compare(live(constant(0.5, 0.5), ONE), constant(0.25, 0.75), ONE)
    assert Divergence.from_json(json.loads(json.dumps(found.to_json()))) == found
