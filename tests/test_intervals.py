"""Intervals against what is known in closed form, and recovery where there is nothing to recover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from rlkit.profiles import intervals
from rlkit.profiles.intervals import Interval


def column(right: int, count: int) -> NDArray[np.float64]:
    return np.array([[1.0]] * right + [[0.0]] * (count - right))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)  # Newcombe 1998, table I, method 3
def test_wilson(right: int, count: int, low: float, high: float) -> None:
    found = intervals.wilson(right, count)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert found.value == right / count


@pytest.mark.parametrize(("right", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_of_no_share(right: int, count: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        intervals.wilson(right, count)


def test_the_bootstrap_of_an_accuracy_is_the_binomial() -> None:
    found = intervals.mean([column(600, 1000)])
    half = 1.96 * math.sqrt(0.6 * 0.4 / 1000)
    assert found.value == pytest.approx(0.6)
    assert found.half_width == pytest.approx(half, rel=0.05)
    assert found == intervals.mean([column(600, 1000)])
    assert found != intervals.mean([column(600, 1000)], seed=1)


def test_values_of_many_kinds_are_drawn_item_by_item() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, (400, 1))
    found = intervals.mean([values])
    assert found.half_width == pytest.approx(1.96 * values.std() / 20, rel=0.06)
    assert found.low is not None and found.high is not None and found.low < values.mean() < found.high


def test_counts_and_items_draw_the_same_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    scores = (rng.random((200, 2)) < (0.4, 0.6)).astype(np.float64)
    counted = intervals.draws([scores])
    monkeypatch.setattr(intervals, "FEW_KINDS", 0)
    monkeypatch.setattr(intervals, "CHUNK", 200 * 2 * 700)  # several portions, the last one smaller
    drawn = intervals.draws([scores])
    assert drawn.shape == counted.shape == (intervals.DRAWS, 2)
    np.testing.assert_allclose(drawn.mean(axis=0), counted.mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(counted.T), atol=6e-5)


def test_what_models_share_cancels_in_a_difference() -> None:
    one = (np.arange(1000) % 2 == 0).astype(np.float64)
    other = one.copy()
    other[:30] = 0.0  # 15 of the right ones are lost
    paired = intervals.difference([np.column_stack([one, other])])
    assert paired.value == pytest.approx(0.015)
    assert paired.low is not None and 0.0 < paired.low < 0.015
    apart = intervals.mean([one[:, None]]).half_width
    assert apart is not None and paired.half_width is not None and paired.half_width < apart / 3


def test_tasks_count_alike_however_many_items_they_have() -> None:
    found = intervals.mean([column(10, 10), column(0, 1000)])
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def three(count: int, full: int, quantized: int, recovered: int) -> NDArray[np.float64]:
    """Results of full, quantized and recovered; who answers an item right answers all before it right."""
    return np.column_stack([(np.arange(count) < right).astype(np.float64) for right in (full, quantized, recovered)])


def test_recovery_and_its_interval() -> None:
    found = intervals.recovery([three(1000, 700, 500, 660)])
    assert found.value == pytest.approx(0.8) and not found.why
    # given the items that are lost, each of 200 came back with probability 0.8
    assert found.half_width == pytest.approx(1.96 * math.sqrt(0.8 * 0.2 / 200), rel=0.08)


def test_recovery_may_exceed_all_and_fall_below_none() -> None:
    assert intervals.recovery([three(1000, 700, 500, 720)]).value == pytest.approx(1.1)
    assert intervals.recovery([three(1000, 700, 500, 480)]).value == pytest.approx(-0.1)


def test_recovery_of_several_tasks_is_that_of_their_means() -> None:
    found = intervals.recovery([three(100, 80, 40, 60), three(1000, 600, 580, 600)])
    assert found.value == pytest.approx(((0.6 + 0.6) - (0.4 + 0.58)) / ((0.8 + 0.6) - (0.4 + 0.58)))


@pytest.mark.parametrize(("quantized", "word"), [(700, "score the same"), (710, "scores better")])
def test_where_nothing_was_lost_there_is_no_recovery(quantized: int, word: str) -> None:
    found = intervals.recovery([three(1000, 700, quantized, 720)])
    assert (found.value, found.low, found.high) == (None, None, None)
    assert word in found.why
    assert found.to_json() == {"value": None, "low": None, "high": None, "why": found.why}


def test_a_loss_that_may_be_none_gives_no_interval() -> None:
    rng = np.random.default_rng(1)
    scores = (rng.random((100, 3)) < 0.5).astype(np.float64)
    scores[:, 1] = scores[:, 0]
    scores[0, :2] = (1.0, 0.0)  # one item lost
    found = intervals.recovery([scores])
    assert found.value is not None and found.low is None and "not clear of 0" in found.why


@pytest.mark.parametrize("strata", [[], [np.zeros((0, 1))], [np.zeros(3)]])
def test_no_items_no_interval(strata: list[NDArray[np.float64]]) -> None:
    with pytest.raises(ValueError, match="no items to draw from"):
        intervals.draws(strata)
    with pytest.raises(ValueError, match="NaN"):
        intervals.draws([np.array([[1.0], [np.nan]])])


def test_a_sample_is_as_large_as_its_interval_must_be() -> None:
    found = intervals.size(column(50, 100), 10_000, 0.04)
    assert found.limit == 700  # 1.96 * 0.5 / sqrt(n) <= 0.04 from 600 items on
    assert found.half_width <= 0.04 < 1.96 * 0.5 / math.sqrt(500)
    assert found.apart == pytest.approx(1.96 * 0.5 / math.sqrt(700) * math.sqrt(0.93), rel=0.1)
    assert found.text().startswith("700 of 10000 items, for ± 3.")
    assert "sized by the results of 100" in found.text()


def test_a_clear_case_needs_few_and_a_wide_one_all() -> None:
    assert intervals.size(column(100, 100), 10_000, 0.02).limit == 50
    narrow = intervals.size(column(50, 100), 300, 0.01)
    assert narrow.limit == 300 and "wider than the 1.0 asked for" in narrow.text() and narrow.apart == 0.0
    exact = intervals.size(column(50, 100), 300, 0.06)
    assert exact.limit == 300 and exact.text().startswith("all 300 items, for ± 5.")
    assert intervals.size(column(1, 2), 20, 0.5).limit == 20  # fewer items than the smallest sample


def test_differences_between_models_count_too() -> None:
    half = (np.arange(100) % 2).astype(np.float64)
    same = intervals.size(np.column_stack([half, half]), 10_000, 0.04)
    opposite = intervals.size(np.column_stack([half, 1 - half]), 10_000, 0.04)
    assert same.limit == 700 and opposite.limit > 2000  # a difference of -1 and 1 has twice the spread


@pytest.mark.parametrize("wanted", [0.0, 1.0, -0.1, math.nan])
def test_a_width_that_is_none(wanted: float) -> None:
    with pytest.raises(ValueError, match="no share"):
        intervals.size(column(1, 2), 20, wanted)
    with pytest.raises(ValueError, match="no results"):
        intervals.size(np.zeros((0, 1)), 20, 0.1)


def test_half_width_of_what_has_no_ends() -> None:
    assert Interval(0.5).half_width is None


def test_draws_in_which_nothing_was_lost_have_no_share_of_it() -> None:
    scores = np.ones((100, 3))
    scores[:4, 1:] = 0  # 17 of 1,000 draws hold none of these four: 0 of 0 came back in them
    found = intervals.recovery([scores])
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
