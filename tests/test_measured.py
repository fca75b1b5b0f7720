"""Forecasts from measured operators: on a table made of a known law they return that law's seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest

import configs
from rlkit.profiles.account import LOOP, Model
from rlkit.profiles.architecture import of_config
from rlkit.profiles.efficiency import attention_work
from rlkit.profiles.forecast import Workload, forecast, forecast_model
from rlkit.profiles.measured import Measured
from rlkit.profiles.measured import seconds as measured_seconds
from rlkit.profiles.operators import NAMED, Kind, Operator, Step, operators
from rlkit.profiles.places import Place
from rlkit.profiles.rates import Peaks
from rlkit.recover import recipe
from test_efficiency import TABLE, attention_law, law

SMOLLM2, GPT_OSS = of_config(configs.SMOLLM2_135M), of_config(configs.GPT_OSS_20B)
PEAKS = Peaks(2e10, 1e11, 1e-6)
HERE = Place("here:cpu", Measured(TABLE, PEAKS))
W4 = recipe.load("w4")
START = TABLE.peaks.dispatch_seconds


def seconds(op: Operator) -> float:
    return Measured(TABLE, PEAKS).spent(op).seconds


def test_a_product_takes_what_was_measured() -> None:
    op = Operator("p", Kind.LINEAR, 1, 2 * 8 * 2048 * 2048, 2_000_000, 1000, 0, 1, 4, 8, (2048, 2048, 32))
    assert seconds(op) == pytest.approx(law(4, 32, 8, 2048, 2048, cached=False), rel=1e-6)
    assert seconds(replace(op, launches=3)) == pytest.approx(seconds(op) + 2 * START)


def test_experts_are_products_of_fewer_tokens_each() -> None:
    n = k = 2048
    nbytes = n * (k // 2 + k // 32 * 4 + k // 64)
    op = Operator("e", Kind.EXPERTS, 1, 2 * 32 * n * k, 4 * nbytes, 0, 0, 1, 4, 8, (n, k, 32))
    assert seconds(op) == pytest.approx(4 * law(4, 32, 8, n, k, cached=False), rel=1e-2)


def test_attention_takes_what_was_measured_for_every_sequence() -> None:
    nbytes, flops = attention_work(1, 1024, 16, 4, 64)
    op = Operator("a", Kind.ATTENTION, 1, int(flops), 0, 0, int(nbytes), 1, 32, 1, (1, 1024, 16, 4, 64))
    assert seconds(op) == pytest.approx(attention_law(1, 1024, 16, 4, 64), rel=1e-3)
    assert seconds(replace(op, tokens=3)) == pytest.approx(3 * seconds(op))


def test_rows_go_by_their_accesses() -> None:
    norm = Operator("residual and norm", Kind.NORM, 1, 5 * 1024, 4096, 4 * 4 * 1024, tokens=1)
    assert seconds(norm) == pytest.approx(1e-6 + 1024e-9, rel=1e-3)
    assert seconds(replace(norm, kind=Kind.ELEMENTWISE, activation_nbytes=3 * 4 * 1024)) == pytest.approx(
        2e-6, rel=0.03
    )


def test_what_was_not_measured_goes_at_the_peaks() -> None:
    eight = Operator("p", Kind.LINEAR, 1, 2 * 2048 * 2048, 4_000_000, 1000, 0, 1, 8, 1, (2048, 2048, 32))
    cache = Operator("a", Kind.ATTENTION, 1, 10**6, 0, 0, 10**6, 1, 8, 1, (1, 1024, 16, 4, 64))
    for op in (eight, cache):
        with pytest.raises(ValueError, match="not measured"):
            measured_seconds(TABLE, op)
        assert seconds(op) == PEAKS.spent(op).seconds


def test_a_models_forecast_is_the_sum_of_its_operators_and_the_loop() -> None:
    made = forecast(SMOLLM2, W4, HERE, Workload(64, 1))
    one = Model(SMOLLM2, W4, HERE)
    ops = operators(SMOLLM2, one.weights, HERE.storage, Step(1, 64), NAMED["cpu"])
    loop = TABLE.token_seconds(49152, 30)
    assert made.roofline.tpot_seconds == pytest.approx(sum(op.count * one.rates.spent(op).seconds for op in ops) + loop)
    rows = {cost.name: cost for cost in made.decode.costs}
    assert rows[LOOP].seconds == pytest.approx(loop) and made.decode.costs[-1].name == LOOP
    assert {cost.name: cost.seconds for cost in made.prefill.costs}[LOOP] == TABLE.prompt_seconds(49152, 30)
    assert made.label == "calibrated" and "calibrated on" in made.assumptions[0]


def test_a_small_model_stays_in_the_caches() -> None:
    small, large = (Model(model, W4, HERE).rates for model in (SMOLLM2, GPT_OSS))
    assert isinstance(small, Measured) and isinstance(large, Measured)
    op = Operator("p", Kind.LINEAR, 1, 2 * 2048 * 2048, 2_000_000, 1000, 0, 1, 4, 1, (2048, 2048, 32))
    assert small.spent(op).seconds < large.spent(op).seconds
    assert small.streamed == pytest.approx(86.3e6, rel=0.05)


def test_a_cache_drives_a_small_model_out_of_the_caches() -> None:
    one = Model(SMOLLM2, W4, HERE)
    short, long = (one.account(1, (past,)) for past in (16, 8000))
    assert long["down_proj"].seconds > 1.2 * short["down_proj"].seconds
    assert long["down_proj"].nbytes == short["down_proj"].nbytes


@pytest.mark.parametrize("model", [SMOLLM2, GPT_OSS], ids=lambda model: model.name)
def test_interpolated_times_are_added_up_closely(model: object) -> None:
    """Between measured depths times bend, so pieces are halved until they are straight enough."""
    one = Model(model, W4, HERE)  # type: ignore[arg-type]
    steps = [forecast_model(one, Workload(past, 1)).roofline.tpot_seconds for past in range(100, 400)]
    made = forecast_model(one, Workload(100, 301))
    assert made.roofline.tpot_seconds == pytest.approx(sum(steps) / 300, rel=1e-2)


def test_latent_and_eager_models_are_forecast_too() -> None:
    deepseek = of_config(configs.DEEPSEEK_V2_LITE)
    assert forecast(deepseek, W4, HERE, Workload(64, 8)).roofline.tpot_seconds > 0
    eager = forecast(SMOLLM2, W4, HERE.having(eager=True), Workload(64, 8))
    assert {"attention: scores", "rotary"} <= {cost.name for cost in eager.decode.costs}
