"""Measuring the machine: the rate arithmetic with a fake clock, and one short real measurement."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from rlkit.profiles import machine
from rlkit.profiles.machine import Machine, Rate


def ticking(step_seconds: float) -> Callable[[], float]:
    """A clock that moves on by `step_seconds` whenever it is read."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += step_seconds
        return now

    return clock


def test_read_rate_is_bytes_over_the_seconds_of_a_pass() -> None:
    rate = machine.measure_read(2, nbytes=2**20, seconds=0.0, clock=ticking(0.5))
    assert rate == Rate(best=2**20 / 0.5, median=2**20 / 0.5, trials=3)
    assert rate.spread == 0.0


def test_matmul_rate_counts_two_operations_per_product() -> None:
    rate = machine.measure_matmul(shapes=((2, 3, 5),), seconds=0.0, clock=ticking(0.25))
    assert rate.best == 2 * 2 * 3 * 5 / 0.25


def test_the_best_trial_counts_and_the_spread_says_how_far_the_median_is() -> None:
    assert Rate(best=10.0, median=8.0, trials=5).spread == pytest.approx(0.2)


def test_a_real_measurement_is_quick_and_survives_json() -> None:
    measured = machine.measure_machine(threads=1, read_nbytes=8 * 2**20, seconds=0.02)
    assert measured.source == "measured" and measured.cpu and measured.threads == 1
    assert measured.read_bytes_per_s > 1e8 and measured.flops_per_s > 1e8
    assert measured.memory_nbytes > 2**28
    assert Machine.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_zero_peaks_are_refused() -> None:
    with pytest.raises(ValueError, match="measure the machine again"):
        Machine("cpu", "Linux", 1, 1, 2**30, 0.0, 0.0, 1.0, 0.0, "2026-11-22")
