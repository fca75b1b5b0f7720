"""Forecasts: both formulas on numbers small enough to check by hand, published shapes, places, memory and energy."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import configs
from rlkit.profiles.account import Model, account_of, costs, life_tpot_seconds, life_ttft_seconds
from rlkit.profiles.account import roofline_seconds as roofline
from rlkit.profiles.architecture import Architecture, of_config
from rlkit.profiles.device import find
from rlkit.profiles.forecast import Adapters, Forecast, Peaks, Workload, forecast, forecast_model
from rlkit.profiles.hardware import Device, Efficiency, Memory, Unit, Value
from rlkit.profiles.machine import Machine
from rlkit.profiles.operators import NAMED, Cache, Kind, Operator, Step, Storage, operators, operators_of, prefill_steps
from rlkit.profiles.places import Place, of_machine, of_rates, of_unit
from rlkit.profiles.rates import Calibrated
from rlkit.profiles.timing import Basis, Spread, Timing, milliseconds
from rlkit.recover import recipe
from rlkit.recover.recipe import Recipe, Rule, Scheme
from shapes import LLAMA2_7B, QWEN3_4B, SMOLLM2_135M

HALF = Storage(scale_bits=16, float_bits=16, activation_bits=16, kv=Cache(16))
W4 = Recipe("w4-g128", (Rule(("*",), Scheme(4, 128)),))
W4G32, MIXED = recipe.load("w4"), recipe.load("w4w2-gateup")
GPT_OSS, DEEPSEEK = of_config(configs.GPT_OSS_20B), of_config(configs.DEEPSEEK_V3)
REAL = Peaks(40e9, 100e9)

# One operator is bound by compute (2 s against 1 s), one by memory (1 s against 4 s); the second runs twice.
HEAVY = Operator("heavy", Kind.NORM, 1, flops=20, weight_nbytes=100)
WIDE = Operator("wide", Kind.ATTENTION, 2, flops=10, kv_nbytes=300, activation_nbytes=100)
PEAKS = Peaks(bytes_per_s=100.0, flops_per_s=10.0)


def test_the_roofline_adds_each_operators_larger_bound() -> None:
    assert roofline(account_of([HEAVY, WIDE], PEAKS)) == 2.0 + 2 * 4.0


def test_the_papers_formula_takes_the_larger_total() -> None:
    both = account_of([HEAVY, WIDE], PEAKS)
    assert life_ttft_seconds(both) == max(40 / 10, 900 / 100)
    assert life_tpot_seconds(both) == 9.0


def test_launches_add_to_both() -> None:
    slow = account_of([HEAVY, WIDE], replace(PEAKS, dispatch_seconds=0.5))
    assert roofline(slow) == 10.0 + 3 * 0.5
    assert life_ttft_seconds(slow) == 9.0 + 1.5
    assert life_tpot_seconds(slow) == 9.0 + 1.5


def test_costs_name_what_bounds_them() -> None:
    heavy, wide = costs(account_of([HEAVY, WIDE], PEAKS))
    assert (heavy.bound, wide.bound) == ("compute", "memory")
    assert (wide.flops, wide.nbytes, wide.seconds, wide.intensity) == (20, 800, 8.0, 0.025)
    assert costs(account_of([HEAVY], replace(PEAKS, dispatch_seconds=9.0)))[0].bound == "dispatch"


def test_packed_weights_have_a_peak_of_their_own() -> None:
    peaks = replace(PEAKS, packed_flops_per_s=40.0)
    packed, floats = (Operator("product", Kind.LINEAR, 1, flops=400, bits=bits) for bits in (4, 16))
    assert peaks.spent(packed).seconds == 10.0 and peaks.spent(floats).seconds == 40.0
    assert peaks.spent(replace(packed, kind=Kind.ATTENTION)).seconds == 40.0  # the bits are the cache's


def test_the_baseline_is_bytes_over_bandwidth() -> None:
    # 1023 prompt tokens and 2 new ones: the one decode step attends to 1024 tokens.
    made = forecast(QWEN3_4B, W4, of_rates(Peaks(64e9, 1e18), HALF), Workload(1023, 2))
    expected = (2_089_696_000 + 1024 * 147_456) / 64e9
    assert made.baseline.tpot_seconds == pytest.approx(expected, rel=1e-12)
    assert made.baseline.tokens_per_s == pytest.approx(28.56, abs=0.005)
    assert made.roofline.nbytes_per_token == 2_089_696_000 + 1024 * 147_456


@pytest.mark.parametrize("model", [of_config(configs.LLAMA2_7B), GPT_OSS, DEEPSEEK], ids=lambda model: model.name)
@pytest.mark.parametrize("prompt", [5, 90, 400])
def test_decode_time_is_the_mean_over_its_steps(model: Architecture, prompt: int) -> None:
    """Windows and the bound of attention bend the line; the pieces are found."""
    place = of_rates(Peaks(40e9, 1e9 if prompt == 400 else 100e12))
    steps = [forecast(model, W4G32, place, Workload(prompt + past, 2)).roofline.tpot_seconds for past in range(60)]
    made = forecast(model, W4G32, place, Workload(prompt, 61))
    assert made.roofline.tpot_seconds == pytest.approx(sum(steps) / 60, rel=1e-6)


@pytest.mark.parametrize("model", [of_config(configs.QWEN3_4B), GPT_OSS, DEEPSEEK], ids=lambda model: model.name)
@pytest.mark.parametrize("options", ["cpu", "eager"])
@pytest.mark.parametrize(("prompt", "chunk"), [(1000, 64), (1024, 64), (300, 128), (64, 64), (7, 512)])
def test_chunks_add_up_to_every_operator_of_every_pass(
    model: Architecture, options: str, prompt: int, chunk: int
) -> None:
    place = replace(of_rates(REAL), options=NAMED[options])
    made = forecast(model, MIXED, place, Workload(prompt, 2, chunk=chunk, batch=3))
    one = Model(model, MIXED, place)
    steps = prefill_steps(prompt, chunk, batch=3)
    whole = account_of(operators_of(model, one.weights, place.storage, steps, place.options), REAL)
    assert made.roofline.ttft_seconds == pytest.approx(roofline(whole), rel=1e-9)
    assert made.life.ttft_seconds == pytest.approx(life_ttft_seconds(whole), rel=1e-9)
    by_name = {cost.name: cost for cost in made.prefill.costs}
    assert by_name.keys() == {cost.name for cost in costs(whole)}
    for cost in costs(whole):
        assert by_name[cost.name].flops == pytest.approx(cost.flops, rel=1e-9)
        assert by_name[cost.name].nbytes == pytest.approx(cost.nbytes, rel=1e-6)


def test_the_operators_are_those_of_the_step_after_the_prompt() -> None:
    made = forecast(QWEN3_4B, W4G32, REAL, Workload(100, 1))
    one = Model(of_config(configs.QWEN3_4B), W4G32, of_rates(REAL))
    ops = operators(one.architecture, one.weights, Storage(), Step(1, 100), NAMED["cpu"])
    assert [cost.name for cost in made.decode.costs] == list(dict.fromkeys(op.name for op in ops if op.nbytes))
    assert sum(cost.seconds for cost in made.decode.costs) == pytest.approx(made.roofline.tpot_seconds)


def test_logits_of_every_prompt_token_cost_time_and_memory() -> None:
    every, last = (forecast(SMOLLM2_135M, W4G32, REAL, Workload(512, 8, all_logits=flag)) for flag in (True, False))
    assert every.roofline.ttft_seconds > 1.2 * last.roofline.ttft_seconds
    assert every.roofline.tpot_seconds == last.roofline.tpot_seconds
    assert every.memory.nbytes - last.memory.nbytes == 511 * 49152 * 4
    assert "every prompt token" in " ".join(every.assumptions) and "last token" in " ".join(last.assumptions)


def test_two_bit_gates_are_forecast_to_be_faster_by_their_bytes() -> None:
    w4, mixed = (forecast(QWEN3_4B, recipe.load(name), REAL, Workload(128, 64)) for name in ("w4", "w4w2-gateup"))
    assert w4.baseline.nbytes_per_token is not None and mixed.baseline.nbytes_per_token is not None
    gain = w4.baseline.tpot_seconds / mixed.baseline.tpot_seconds
    assert gain == pytest.approx(w4.baseline.nbytes_per_token / mixed.baseline.nbytes_per_token)
    assert gain > 1.2


def test_small_chunks_read_the_weights_again() -> None:
    whole, chunks = (forecast(QWEN3_4B, W4G32, REAL, Workload(512, 2, chunk=size)) for size in (None, 16))
    assert chunks.roofline.ttft_seconds > whole.roofline.ttft_seconds
    assert chunks.roofline.tpot_seconds == whole.roofline.tpot_seconds
    assert chunks.baseline.ttft_seconds > 30 * whole.baseline.ttft_seconds
    assert chunks.memory.activations_nbytes < whole.memory.activations_nbytes


def test_a_batch_shares_the_weights() -> None:
    fast = Peaks(40e9, 10e12)
    one, four = (forecast(QWEN3_4B, W4G32, fast, Workload(64, 64, batch=batch)) for batch in (1, 4))
    assert four.memory.cache_nbytes == 4 * one.memory.cache_nbytes
    assert one.roofline.tpot_seconds < four.roofline.tpot_seconds < 2 * one.roofline.tpot_seconds
    assert four.tokens_per_s > 2 * one.tokens_per_s
    assert four.tokens_per_s == pytest.approx(4 / four.roofline.tpot_seconds)


def test_a_batch_of_a_mixture_reads_more_of_its_experts() -> None:
    one, four = (forecast(GPT_OSS, W4G32, REAL, Workload(64, 2, batch=batch)).roofline for batch in (1, 4))
    assert one.nbytes_per_token is not None and four.nbytes_per_token is not None
    experts = 24 * 3 * (2880 * 2880 // 2 + 90 * 2880 * 4 + 45 * 2880)
    cached = 65 * 24 * 2 * 8 * 64 * 4
    more = (13.24 - 4) * experts + 3 * cached  # 13.24 = 32 (1 - (1 - 4 / 32)^4)
    assert four.nbytes_per_token - one.nbytes_per_token == pytest.approx(more, rel=1e-3)


def test_adapters_of_one_rank_are_counted() -> None:
    plain, branched = (
        forecast(LLAMA2_7B, W4, of_rates(REAL, HALF), Workload(64, 2), adapters=adapters)
        for adapters in (None, Adapters(16, ("*.q_proj", "*.v_proj")))
    )
    names = {cost.name: cost for cost in branched.decode.costs}
    assert names["adapters"].flops == 16_777_216 and "adapters" not in {cost.name for cost in plain.decode.costs}
    assert branched.roofline.tpot_seconds > plain.roofline.tpot_seconds


def test_eager_attention_is_slower_and_needs_room_for_its_scores() -> None:
    fused = of_rates(REAL)
    plain, eager = (forecast(QWEN3_4B, W4G32, place, Workload(512, 2)) for place in (fused, fused.having(eager=True)))
    assert eager.roofline.ttft_seconds > plain.roofline.ttft_seconds
    assert eager.memory.activations_nbytes - plain.memory.activations_nbytes == 2 * 32 * 512 * 512 * 4
    assert "eager" in " ".join(eager.assumptions)


def test_caches_of_fewer_bits_are_smaller_and_faster() -> None:
    made = [
        forecast(LLAMA2_7B, W4G32, of_rates(REAL).having(cache=name), Workload(2048, 64))
        for name in ("fp32", "fp16", "int8", "int4")
    ]
    sizes = [one.memory.cache_nbytes for one in made]
    assert sizes[0] == 2112 * 1_048_576 and sizes[1] == sizes[0] // 2
    assert [one.roofline.tpot_seconds for one in made] == sorted(
        (one.roofline.tpot_seconds for one in made), reverse=True
    )
    assert sizes[2] == pytest.approx(sizes[0] / 4, rel=2e-3) and sizes[3] == pytest.approx(sizes[0] / 8, rel=4e-3)


def test_it_says_that_it_is_uncalibrated_and_what_it_assumes() -> None:
    machine = Machine("Some CPU", "Linux", 2, 2, 2**34, 40e9, 0.1, 100e9, 0.2, "2026-11-22")
    made = forecast(SMOLLM2_135M, W4G32, of_machine(machine), Workload(64, 16))
    text = " ".join(made.assumptions)
    assert "uncalibrated" in text and "40.0 GB/s" in text and "int8" in text and "counted as 0" in text
    table = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert table["label"] == "uncalibrated" and table["schema_version"] == 1
    assert sum(cost["seconds"] for cost in table["prefill"]["operators"]) == pytest.approx(made.roofline.ttft_seconds)
    assert table["expected"]["tpot_seconds"][0] == made.roofline.tpot_seconds < table["expected"]["tpot_seconds"][1]
    assert made.roofline.basis is Basis.FORECAST


def test_peaks_of_a_machine_name_their_source() -> None:
    peaks = Peaks.of(Machine("Some CPU", "Linux", 2, 2, 2**34, 40e9, 0.1, 100e9, 0.2, "2026-11-22"))
    assert (peaks.bytes_per_s, peaks.flops_per_s) == (40e9, 100e9)
    assert peaks.source == "Some CPU, measured 2026-11-22"


@pytest.mark.parametrize(
    ("name", "bits", "kinds"),
    [
        ("hx370:cpu", 32, ("fp32", "int8-vnni")),
        ("hx370:igpu", 16, ("fp16-wmma", "fp16-wmma")),
        ("hx370:npu", 16, ("bf16-gemm", "bf16-gemm")),
        ("h100", 16, ("fp16-tensor", "fp16-tensor")),
    ],
)
def test_units_compute_and_store_as_their_bundles_do(name: str, bits: int, kinds: tuple[str, str]) -> None:
    place = of_unit(*find(name))
    assert isinstance(place.rates, Peaks)
    assert (place.rates.roof, place.rates.packed_roof) == kinds
    assert place.storage.activation_bits == place.storage.kv.bits == place.storage.scale_bits == bits


def test_an_npu_stores_two_bit_codes_in_four() -> None:
    npu, igpu = (
        forecast(QWEN3_4B, MIXED, of_unit(*find(f"hx370:{unit}")), Workload(64, 8)) for unit in ("npu", "igpu")
    )
    assert npu.memory.weights_nbytes > 1.2 * igpu.memory.weights_nbytes
    assert "4-bit fields" in " ".join(npu.assumptions) and "4-bit fields" not in " ".join(igpu.assumptions)


def test_a_prompt_may_be_read_at_another_unit() -> None:
    igpu, npu = (of_unit(*find(f"hx370:{unit}")) for unit in ("igpu", "npu"))
    work = Workload(1024, 64)
    alone, there = forecast(QWEN3_4B, W4G32, igpu, work), forecast(QWEN3_4B, W4G32, npu, work)
    both = forecast(QWEN3_4B, W4G32, igpu, work, prefill_at=npu)
    assert both.roofline.ttft_seconds == there.roofline.ttft_seconds != alone.roofline.ttft_seconds
    assert both.roofline.tpot_seconds == alone.roofline.tpot_seconds
    assert both.memory.weights_nbytes == alone.memory.weights_nbytes  # one form for both
    assert "hx370:npu and hx370:igpu share" in " ".join(both.assumptions)
    mixed = forecast(QWEN3_4B, MIXED, igpu, work, prefill_at=npu)
    one_each = [forecast(QWEN3_4B, MIXED, place, work).memory.weights_nbytes for place in (igpu, npu)]
    assert mixed.memory.weights_nbytes == sum(one_each) and "forms of both" in " ".join(mixed.assumptions)


def test_two_devices_share_no_cache() -> None:
    with pytest.raises(ValueError, match=r"are not one device.*name two units of one device"):
        forecast(QWEN3_4B, W4G32, of_unit(*find("hx370")), Workload(64, 8), prefill_at=of_unit(*find("max395:npu")))


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    small = replace(of_rates(REAL), name="box:cpu", memory_nbytes=3 * 10**9)
    assert forecast(QWEN3_4B, W4G32, small, Workload(64, 8)).memory.fits is True
    with pytest.raises(ValueError, match=r"does not fit: weights 2\.\d\d \+ cache .* box:cpu has 3.00 GB.*--kv int8"):
        forecast(QWEN3_4B, W4G32, small, Workload(8192, 8))
    with pytest.raises(ValueError, match=r"weights 16.*fewer bits"):
        forecast(QWEN3_4B, None, small, Workload(64, 8))
    assert forecast(QWEN3_4B, W4G32, REAL, Workload(64, 8)).memory.fits is None


def test_energy_is_watts_times_seconds_where_watts_are_known() -> None:
    made = forecast(QWEN3_4B, W4G32, of_unit(*find("ai7-350:igpu")), Workload(64, 8))
    assert made.energy.step_joules == pytest.approx(14.11 * made.roofline.tpot_seconds)
    assert made.energy.prefill_joules == pytest.approx(28 * made.roofline.ttft_seconds)
    assert "design power" in made.energy.basis
    npu = forecast(QWEN3_4B, W4G32, of_unit(*find("hx370:npu")), Workload(64, 8)).energy
    assert (npu.prefill_joules, npu.step_joules, npu.basis) == (None, None, "no power is known")


def device(**unit: object) -> Device:
    def value(number: float, of: str) -> Value:
        return Value(number, of, "here", "2026-11", "measured")

    peaks = {"fp32": value(100e9, "FLOP/s")}
    cpu = Unit("cpu", peaks=peaks, dispatch=value(1e-5, "s"), **unit)  # type: ignore[arg-type]
    return Device("box", "A box", {"cpu": cpu}, (Memory("DDR", value(40e9, "B/s"), (value(16e9, "B"),)),))


def test_measured_shares_slow_their_class_down() -> None:
    shares = {"linear": Efficiency(0.5, 0.8), "attention": Efficiency(0.25, None)}
    plain, calibrated = (of_unit(box, box.units["cpu"]) for box in (device(), device(efficiency=shares)))
    rough, made = (forecast(SMOLLM2_135M, W4G32, place, Workload(256, 8)) for place in (plain, calibrated))
    assert isinstance(calibrated.rates, Calibrated) and made.label == "calibrated" and rough.label == "uncalibrated"
    before, after = ({cost.name: cost.seconds for cost in one.prefill.costs} for one in (rough, made))
    linear = Operator("x", Kind.LINEAR, 1, 10**9, 10**3, bits=4)
    assert calibrated.rates.spent(linear).compute == 2 * plain.rates.spent(linear).compute
    assert calibrated.rates.spent(linear).memory == 1.25 * plain.rates.spent(linear).memory
    assert after["attention"] > before["attention"] and after["down_proj"] > 1.9 * before["down_proj"]
    assert after["norm"] == before["norm"]
    assert "not measured: embedding, norm" in " ".join(made.assumptions)


def test_a_unit_without_bandwidth_or_peaks_is_refused() -> None:
    blank = Device("box", "A box", {"cpu": Unit("cpu")})
    with pytest.raises(ValueError, match=r"^box: the cpu has no known rate for fp32"):
        of_unit(blank, blank.units["cpu"])
    value = Value(1e12, "FLOP/s", "here", "2026-11", "measured")
    unread = Device("box", "A box", {"cpu": Unit("cpu", peaks={"fp32": value})})
    with pytest.raises(ValueError, match=r"^box: the cpu has no known bandwidth"):
        of_unit(unread, unread.units["cpu"])


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match="exceed the model's context of 8192"):
        forecast(SMOLLM2_135M, W4G32, REAL, Workload(8192, 1))


def test_absurd_values_are_refused() -> None:
    for peaks in ((0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="must be positive"):
            Peaks(*peaks)
    with pytest.raises(ValueError, match="must be positive"):
        Peaks(1.0, 1.0, -1e-6)
    for counts in ((0, 1), (1, 0), (-5, 1), (10**10, 1)):
        with pytest.raises(ValueError, match="at least 1, and at most"):
            Workload(*counts)
    with pytest.raises(ValueError, match="0 tokens a chunk"):
        Workload(1, 1, chunk=0)
    with pytest.raises(ValueError, match="0 sequences"):
        Workload(1, 1, batch=0)
    with pytest.raises(ValueError, match="'int3' is not known; use fp32"):
        of_rates(REAL).having(cache="int3")


def test_a_prepared_model_counts_what_stays_once() -> None:
    """A thousand forecasts do not touch the operators of a whole step again."""
    model = Model(GPT_OSS, W4G32, of_rates(REAL))
    first = [forecast_model(model, Workload(prompt, 8)) for prompt in (64, 64)]
    assert first[0] == first[1] and isinstance(first[0], Forecast)
    assert [key[:3] for key in model._fixed] == [(64, 1, 1), (1, 1, 1)]


def test_places_say_where_they_are() -> None:
    place = of_unit(*find("max395@64gb:igpu"))
    assert (place.name, place.memory_nbytes, place.shared) == ("max395:igpu", 64 * 10**9, "max395")
    assert isinstance(place, Place) and place.stored(None) is None


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
