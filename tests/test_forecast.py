"""Forecasts: both formulas on numbers small enough to check by hand, and a published shape end to end."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from rlkit.profiles.forecast import Peaks, Workload, costs, forecast, life_tpot_seconds, life_ttft_seconds
from rlkit.profiles.forecast import roofline_seconds as roofline
from rlkit.profiles.machine import Machine
from rlkit.profiles.operators import Cache, Kind, Operator, Storage
from rlkit.profiles.timing import Basis, Spread, Timing, milliseconds
from rlkit.recover import recipe
from rlkit.recover.recipe import Recipe, Rule, Scheme
from shapes import LLAMA2_7B, QWEN3_4B, SMOLLM2_135M

HALF = Storage(scale_bits=16, float_bits=16, activation_bits=16, kv=Cache(16))
W4 = Recipe("w4-g128", (Rule(("*",), Scheme(4, 128)),))

# One operator is bound by compute (2 s against 1 s), one by memory (1 s against 4 s); the second runs twice.
HEAVY = Operator("heavy", Kind.LINEAR, 1, flops=20, weight_nbytes=100)
WIDE = Operator("wide", Kind.ATTENTION, 2, flops=10, kv_nbytes=300, activation_nbytes=100)
PEAKS = Peaks(bytes_per_s=100.0, flops_per_s=10.0)


def test_the_roofline_adds_each_operators_larger_bound() -> None:
    assert roofline([HEAVY, WIDE], PEAKS) == 2.0 + 2 * 4.0


def test_the_papers_formula_takes_the_larger_total() -> None:
    assert life_ttft_seconds([HEAVY, WIDE], PEAKS) == max(40 / 10, 900 / 100)
    assert life_tpot_seconds([HEAVY, WIDE], PEAKS) == 9.0


def test_launches_add_to_both() -> None:
    slow = replace(PEAKS, dispatch_seconds=0.5)
    assert roofline([HEAVY, WIDE], slow) == 10.0 + 3 * 0.5
    assert life_ttft_seconds([HEAVY, WIDE], slow) == 9.0 + 1.5
    assert life_tpot_seconds([HEAVY, WIDE], slow) == 9.0 + 1.5


def test_costs_name_what_bounds_them() -> None:
    heavy, wide = costs([HEAVY, WIDE], PEAKS)
    assert (heavy.bound, wide.bound) == ("compute", "memory")
    assert (wide.flops, wide.nbytes, wide.seconds) == (20, 800, 8.0)
    assert costs([HEAVY], replace(PEAKS, dispatch_seconds=9.0))[0].bound == "dispatch"


def test_the_baseline_is_bytes_over_bandwidth() -> None:
    # 1023 prompt tokens and 2 new ones: the one decode step attends to 1024 tokens.
    made = forecast(QWEN3_4B, W4, Peaks(64e9, 1e18), Workload(1023, 2), HALF)
    expected = (2_089_696_000 + 1024 * 147_456) / 64e9
    assert made.baseline.tpot_seconds == pytest.approx(expected, rel=1e-12)
    assert made.baseline.tokens_per_s == pytest.approx(28.56, abs=0.005)
    assert made.roofline.nbytes_per_token == 2_089_696_000 + 1024 * 147_456


def test_decode_time_is_the_mean_over_its_steps() -> None:
    def tpot(prompt_tokens: int, new_tokens: int) -> float:
        return forecast(LLAMA2_7B, W4, PEAKS_REAL, Workload(prompt_tokens, new_tokens)).roofline.tpot_seconds

    steps = [tpot(100 + past, 2) for past in range(9)]  # the nine decode steps of ten new tokens
    assert tpot(100, 10) == pytest.approx(sum(steps) / 9, rel=1e-12)


PEAKS_REAL = Peaks(40e9, 100e9)


def test_logits_of_every_prompt_token_cost_time_and_memory() -> None:
    every, last = (
        forecast(SMOLLM2_135M, W4G32, PEAKS_REAL, Workload(512, 8, all_logits=flag)) for flag in (True, False)
    )
    assert every.roofline.ttft_seconds > 1.2 * last.roofline.ttft_seconds
    assert every.roofline.tpot_seconds == last.roofline.tpot_seconds
    assert every.roofline.peak_nbytes is not None and last.roofline.peak_nbytes is not None
    assert every.roofline.peak_nbytes - last.roofline.peak_nbytes == 511 * 49152 * 4


W4G32 = recipe.load("w4")


def test_two_bit_gates_are_forecast_to_be_faster_by_their_bytes() -> None:
    w4, mixed = (forecast(QWEN3_4B, recipe.load(name), PEAKS_REAL, Workload(128, 64)) for name in ("w4", "w4w2-gateup"))
    assert w4.baseline.nbytes_per_token is not None and mixed.baseline.nbytes_per_token is not None
    gain = w4.baseline.tpot_seconds / mixed.baseline.tpot_seconds
    assert gain == pytest.approx(w4.baseline.nbytes_per_token / mixed.baseline.nbytes_per_token)
    assert gain > 1.2


def test_it_says_that_it_is_uncalibrated_and_what_it_assumes() -> None:
    made = forecast(SMOLLM2_135M, W4G32, PEAKS_REAL, Workload(64, 16))
    text = " ".join(made.assumptions)
    assert "uncalibrated" in text and "40.0 GB/s" in text and "int8" in text and "every prompt token" in text
    table = json.loads(json.dumps(made.to_json()))
    assert table["label"] == "uncalibrated" and table["schema_version"] == 1
    assert sum(cost["seconds"] for cost in table["prefill"]) == pytest.approx(made.roofline.ttft_seconds)
    assert made.roofline.basis is Basis.FORECAST


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match="exceed the model's context of 8192"):
        forecast(SMOLLM2_135M, W4G32, PEAKS_REAL, Workload(8192, 1))


def test_absurd_values_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Peaks(0.0, 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        Workload(0, 1)


def test_peaks_of_a_machine_name_their_source() -> None:
    peaks = Peaks.of(Machine("Some CPU", "Linux", 2, 2, 2**34, 40e9, 0.1, 100e9, 0.2, "2026-11-22"))
    assert (peaks.bytes_per_s, peaks.flops_per_s) == (40e9, 100e9)
    assert peaks.source == "Some CPU, measured 2026-11-22"


def test_a_forecast_takes_less_than_50_ms() -> None:
    begin = time.perf_counter()
    for _ in range(5):
        forecast(QWEN3_4B, W4G32, PEAKS_REAL, Workload(1024, 128))
    assert (time.perf_counter() - begin) / 5 < 0.05


def test_a_comparison_is_a_subtraction() -> None:
    spread = Spread(0.9, 1.1, 0.09, 0.11, repeats=5)
    measured = Timing(Basis.MEASURED, 64, 11, 1.0, 0.1, nbytes_per_token=1000, peak_nbytes=7, spread=spread)
    made = Timing(Basis.FORECAST, 64, 11, 0.5, 0.05)
    gap = made.minus(measured)
    assert (gap.ttft_seconds, gap.tpot_seconds) == (-0.5, -0.05)
    assert (gap.ttft_relative, gap.tpot_relative) == (-0.5, -0.5)
    assert measured.tokens_per_s == 10.0 and measured.bytes_per_s == 10_000.0 and measured.seconds == 2.0
    assert measured.end_to_end_tokens_per_s == 5.5 and measured.prompt_tokens_per_s == 64.0
    assert Timing.from_json(json.loads(json.dumps(measured.to_json()))) == measured
    assert Timing.from_json(made.to_json()) == made and made.bytes_per_s is None
    with pytest.raises(ValueError, match="workloads differ"):
        made.minus(replace(measured, prompt_tokens=65))
    with pytest.raises(ValueError, match="no duration"):
        replace(made, ttft_seconds=0.0)


def test_milliseconds_have_three_digits() -> None:
    texts = [milliseconds(seconds) for seconds in (0.002314, 0.009996, 0.01524, 0.09996, 0.1526, 12.0)]
    assert texts == ["2.31", "10.0", "15.2", "100", "153", "12000"]
