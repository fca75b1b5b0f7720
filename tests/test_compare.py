"""Forecast beside measurement: invented profiles whose gaps are known, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import configs
from rlkit.profiles import gaps
from rlkit.profiles.account import LOOP, Model, account_of, roofline_seconds
from rlkit.profiles.architecture import of_config
from rlkit.profiles.compare import (
    STARTS,
    UNEXPLAINED,
    Compared,
    Comparison,
    Where,
    compare_step,
    compared,
    findings,
    gap,
)
from rlkit.profiles.operators import Adapters, operators
from rlkit.profiles.opprofile import OperatorSeconds, Row
from rlkit.profiles.parts import Part, expected
from rlkit.profiles.places import of_rates
from rlkit.profiles.rates import Peaks
from rlkit.profiles.step import Step
from rlkit.recover import recipe

WRITING = 4e-6  # what the invented profiler adds to every kernel
PARTS = (
    Part("linear", "up_proj", 4, 30, 6e7, 3e7, 1e-3, 30e-6),
    Part("linear", "up_proj", 8, 2, 4e6, 4e6, 0.2e-3, 2e-6),
    Part("norm", "norm", 0, 31, 1e5, 2e5, 0.0, 31e-6),
    Part("elementwise", "residual", 0, 31, 1e5, 2e5, 0.1e-3, 31e-6),
)
WHERE = Where("here:cpu", "calibrated", 40e9, 400e9, 2)
PLACE = of_rates(Peaks(40e9, 400e9, 1e-6))


def profile(wall: float = 1.6e-3, gaps: float = 0.3e-3, *, tokens: int = 1, **seconds: float) -> OperatorSeconds:
    """Kernels as the runtime tells of them, each WRITING too long; the shortest does nothing else."""
    told = {"four": 1.1e-3, "eight": 0.2e-3, "fused": 0.15e-3, **seconds}
    rows = (
        Row("linear", "up_proj", 4, 30, told["four"] + 30 * WRITING),
        Row("linear", "up_proj", 8, 2, told["eight"] + 2 * WRITING),
        Row("norm", "norm", 0, 31, 31 * WRITING),
        Row("other", "Fancy", 0, 3, told["fused"] + 3 * WRITING),
    )
    return OperatorSeconds(tokens, 100, 2, 10, rows, gaps, wall, 2 * wall)


def made(found: OperatorSeconds | None = None, genai: float | None = 1.9e-3) -> Compared:
    return compared(PARTS, found or profile(), loop_seconds=0.2e-3, genai_seconds=genai, baseline_seconds=1e-3)


def of(step: Compared, name: str, bits: int = 0) -> tuple[float | None, float | None]:
    (row,) = [row for row in step.rows if (row.name, row.bits) == (name, bits)]
    return row.forecast_seconds, row.measured_seconds


def test_rows_stand_beside_each_other_without_the_profiler() -> None:
    step = made()
    assert of(step, "up_proj", 4) == (1e-3, pytest.approx(1.1e-3))
    assert of(step, "up_proj", 8) == (0.2e-3, pytest.approx(0.2e-3))
    assert of(step, "norm") == (0.0, pytest.approx(0.0))
    assert of(step, "Fancy") == (None, pytest.approx(0.15e-3))
    assert of(step, "residual") == (0.1e-3, None)
    assert of(step, STARTS) == (pytest.approx(94e-6), pytest.approx(0.15e-3))
    assert of(step, LOOP) == (0.2e-3, pytest.approx(0.3e-3))
    assert UNEXPLAINED not in {row.name for row in step.rows}


@pytest.mark.parametrize("wall", [0.9e-3, 1.45e-3, 1.6e-3, 9e-3])
@pytest.mark.parametrize("genai", [None, 1.9e-3, 1e-3])
def test_rows_are_the_whole_step(wall: float, genai: float | None) -> None:
    step = made(profile(wall), genai)
    assert sum(row.measured_seconds or 0.0 for row in step.rows) == pytest.approx(step.measured_seconds)
    assert step.forecast_seconds == pytest.approx(1.394e-3 + (0.2e-3 if genai else 0.0))
    assert sum(step.share(row) for row in step.rows) == pytest.approx(1.0)
    classes = step.classes()
    assert sum(row.difference for row in classes) == pytest.approx(sum(row.difference for row in step.rows))
    assert [row.name for row in classes][:2] == ["linear", "norm"] and classes[0].count == 32


def test_kernels_longer_than_the_step_are_scaled_to_it() -> None:
    step = made(profile(0.725e-3))
    assert of(step, "up_proj", 4)[1] == pytest.approx(0.55e-3) and of(step, STARTS)[1] == 0.0


def test_what_the_profile_cannot_hold_is_unexplained() -> None:
    step = made(profile(9e-3), 9.2e-3)
    starts, rest = of(step, STARTS)[1], of(step, UNEXPLAINED)[1]
    assert starts == pytest.approx(0.3e-3 + 66 * WRITING) and rest == pytest.approx(9e-3 - 1.45e-3 - starts)
    said = gap(step, WHERE)
    assert "unexplained" in said and "other work on the machine" in said and "after it comes" in said


def test_the_writing_of_a_profile_is_at_most_what_gaps_tell() -> None:
    """Kernels that are all long are not taken for the profiler's."""
    found = replace(profile(), rows=(Row("linear", "up_proj", 4, 30, 30e-3),), gap_seconds=30e-6, wall_seconds=29.95e-3)
    assert of(made(found), "up_proj", 4)[1] == pytest.approx(30e-3 - 60e-6, rel=1e-3)


def test_rates_are_over_what_was_measured() -> None:
    step = made()
    row = step.rows[0]
    assert row.bytes_per_s == pytest.approx(3e7 / 1.1e-3) and row.flops_per_s == pytest.approx(6e7 / 1.1e-3)
    assert row.error == pytest.approx(1 / 1.1 - 1) and row.difference == pytest.approx(-0.1e-3)
    fancy = next(row for row in step.rows if row.name == "Fancy")
    assert (fancy.error, fancy.bytes_per_s, fancy.flops_per_s) == (None, None, None)
    assert step.error == pytest.approx(1.594e-3 / 1.9e-3 - 1) and step.baseline_error == pytest.approx(1 / 1.9 - 1)


@pytest.mark.parametrize(
    ("seconds", "where", "expected"),
    [
        ({"four": 2e-3}, WHERE, "it reaches 15.0 GB/s, 30.0 were forecast; slower than alone: data farther away"),
        ({"four": 0.6e-3}, WHERE, "more than the 40.0 of memory: what it reads is still in the caches"),
        ({"four": 0.8e-3}, replace(WHERE, bytes_per_s=60e9), "faster than alone: calibrate again"),
        ({"four": 2e-3}, replace(WHERE, flops_per_s=1e9), "30.0 GFLOP/s, 60.0 were forecast; slower than alone: thr"),
        ({"four": 2e-3}, replace(WHERE, label="uncalibrated"), "a peak is not what kernels reach"),
        ({"four": 0.5e-3}, replace(WHERE, label="uncalibrated"), "more than the 40.0 taken as the peak"),
        ({"fused": 3e-3}, WHERE, "Fancy, 3.00 ms measured and not forecast"),
    ],
)
def test_the_largest_gap_is_told_from_its_numbers(seconds: dict[str, float], where: Where, expected: str) -> None:
    found = profile(1.45e-3 + sum(value - {"four": 1.1e-3, "fused": 0.15e-3}[name] for name, value in seconds.items()))
    whole = profile(found.wall_seconds, **seconds)
    step = made(whole, genai=whole.wall_seconds + 0.2e-3)
    said = gap(step, where)
    assert expected in said and f"{step.share(step.largest):.0%} of all differences" in said


def test_starts_the_loop_and_what_does_not_run_may_be_the_largest_gap() -> None:
    slow = gap(made(profile(2.5e-3, gaps=2e-3), genai=2.7e-3), WHERE)
    assert "starts, 1.05 ms measured and 0.09 ms forecast" in slow and "15.91 us for each of 66 kernels" in slow
    around = gap(made(genai=9.6e-3), WHERE)
    assert f"{LOOP}, 8.00 ms measured and 0.20 ms forecast" in around and "alone takes 1.60 ms" in around
    assert "as the machine changed; repeat" in gap(made(genai=0.1e-3), WHERE)
    absent = (*PARTS, Part("linear", "gone", 4, 30, 1e6, 1e8, 5e-3, 0.0))
    said = gap(compared(absent, profile()), WHERE)
    assert "gone (4 bits), not run and 5.00 ms forecast" in said and "holds it in another operator" in said


def comparison(**changes: object) -> Comparison:
    made_of = {"bundle": "b", "recipe": "w4", "where": WHERE, "threads": 2, "steps": 10}
    return Comparison(**{**made_of, "compared": (made(profile(tokens=16)), made()), **changes})  # type: ignore[arg-type]


def test_findings_say_what_to_do() -> None:
    told = list(findings(comparison()))
    assert told[0] == (
        "prompt of 16 after 100: forecast 1.59 ms, measured 1.90 ms (-16%; bytes over bandwidth -47%); the graph alone "
        "takes 1.60 ms"
    )
    assert told[1].startswith("prompt of 16 after 100: the largest gap is Fancy") and len(told) == 4
    assert "run `rlkit calibrate`" in list(findings(comparison(where=replace(WHERE, label="uncalibrated"))))[-1]
    assert "calibrated with 2 threads, and the bundle ran with 1" in list(findings(comparison(threads=1)))[-1]
    assert "13.0 ms more for making a generator" in list(findings(comparison(generator_seconds=0.013)))[-1]
    tokens = comparison(generator_seconds=0.013, compared=(made(),))
    assert not any("generator" in line for line in findings(tokens))
    (whole, _gap) = list(findings(comparison(compared=(made(genai=None),))))
    assert whole == "token after 100: forecast 1.39 ms, measured 1.60 ms (-13%; bytes over bandwidth -38%)"


def test_it_is_plain_json() -> None:
    table = json.loads(json.dumps(comparison().to_json(), allow_nan=False))
    assert (table["schema_version"], table["kind"], table["place"], table["label"]) == (
        1,
        "compare",
        "here:cpu",
        "calibrated",
    )
    row = table["compared"][1]["rows"][0]
    assert row["name"] == "up_proj" and row["difference"] == pytest.approx(-0.1e-3) and 0 < row["share"] < 1
    assert table["findings"] == list(findings(comparison()))


def test_tables_have_every_row_and_empty_cells_for_what_is_unknown() -> None:
    classes, prompt, token = gaps.tables(comparison())
    assert classes.columns == ("forecast / measured, ms", "prompt of 16 after 100", "token after 100")
    assert classes.rows[0] == ("linear", "1.20 / 1.30 (-8%)", "1.20 / 1.30 (-8%)")
    assert ("other", "- / 0.15", "- / 0.15") in classes.rows
    assert classes.rows[-1] == ("bytes/bandwidth", "1.00 / 1.90 (-47%)", "1.00 / 1.90 (-47%)")
    assert prompt.title == "prompt of 16 after 100" and {len(row) for row in token.rows} == {len(gaps.COLUMNS)}
    cells = {row[1] + row[2]: row for row in token.rows}
    assert cells["up_proj4"][3:9] == ("30", "1.000", "1.100", "-0.100", "-9%", "30.00")
    assert cells["Fancy"][4:9] == ("", "0.150", "-0.150", "", "")
    assert cells["residual"][4:8] == ("0.100", "", "+0.100", "")
    assert token.rows[-1][0] == "all" and token.rows[-1][4:6] == ("1.594", "1.900")


def test_numbers_for_a_spreadsheet() -> None:
    lines = gaps.to_csv(comparison()).splitlines()
    assert lines[0].startswith("prompt_tokens,past_tokens,class,operator,bits,runs,forecast_seconds")
    assert len(lines) == 1 + 2 * len(made().rows)
    assert "1,100,other,Fancy,,3,,0.00015" in lines[-4]


@pytest.mark.parametrize("config", [configs.QWEN3_4B, configs.GPT_OSS_20B, configs.LLAMA2_7B])
@pytest.mark.parametrize("step", [Step(1, 700), Step(64, 0), Step(8, 8, 8)])
def test_the_parts_are_the_whole_forecast(config: dict[str, object], step: Step) -> None:
    model = Model(of_config(config), recipe.load("w4w2-gateup"), PLACE)
    parts = expected(model, step)
    ops = operators(model.architecture, model.weights, PLACE.storage, step, PLACE.options)
    whole = roofline_seconds(account_of(ops, PLACE.rates))
    assert sum(part.seconds + part.start_seconds for part in parts) == pytest.approx(whole)
    assert sum(part.nbytes for part in parts) == sum(op.count * op.nbytes for op in ops)
    assert len({(part.name, part.bits) for part in parts}) == len(parts)


def test_parts_have_the_names_of_profiles() -> None:
    model = Model(of_config(configs.GPT_OSS_20B), recipe.load("w4"), PLACE, Adapters(8))
    names = {part.name: part for part in expected(model, Step(1, 10))}
    assert {"attention", "experts", "router", "bias", "adapters", "adapters: sum", "lm_head"} <= set(names)
    assert not any("." in name or "window" in name for name in names) and names["bias"].seconds == 0
    assert names["experts"].kind == "experts" and "activation" not in names


def test_a_step_is_compared_with_the_forecast_of_the_same_step() -> None:
    model = Model(of_config(configs.QWEN3_4B), recipe.load("w4"), PLACE)
    step = compare_step(model, profile(), 1.9e-3)
    parts = expected(model, Step(1, 100))
    assert step.forecast_seconds == pytest.approx(sum(part.seconds + part.start_seconds for part in parts))
    assert step.baseline_seconds > model.streamed_nbytes() / 40e9 and of(step, LOOP)[0] is None
    every = compare_step(model, profile(tokens=8), all_logits=True)
    last = compare_step(model, profile(tokens=8))
    assert every.forecast_seconds > last.forecast_seconds and last.genai_seconds is None
