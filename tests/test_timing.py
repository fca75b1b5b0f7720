"""Summaries of repeated measurements."""

from __future__ import annotations

import pytest

from rlkit.profiles.timing import Summary, percentile


def test_a_summary_has_mean_deviation_and_percentiles() -> None:
    found = Summary.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.p50, found.count) == (3.0, 3.0, 5)
    assert found.std == pytest.approx(2.5**0.5) and found.error == pytest.approx(0.5**0.5)
    assert found.p95 == pytest.approx(4.8)
    assert found.text() == "3.0 ± 1.6" and found.text(2) == "3.00 ± 1.58"


def test_one_value_has_no_deviation_and_none_no_summary() -> None:
    found = Summary.of([2.0])
    assert (found.mean, found.std, found.error, found.p95) == (2.0, None, None, 2.0)
    assert found.text() == "2.0"
    with pytest.raises(ValueError, match="nothing to summarize"):
        Summary.of([])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (10.0, 1.4), (50.0, 3.0), (90.0, 4.6), (100.0, 5.0)])
def test_percentiles_lie_between_neighbours(share: float, expected: float) -> None:
    assert percentile([5.0, 3.0, 1.0, 2.0, 4.0], share) == pytest.approx(expected)
