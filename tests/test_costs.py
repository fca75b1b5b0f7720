"""Costs on registered devices, and scenarios put on them: hand-computed frames, language steps, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkit.profiles.device import find
from rlkit.profiles.forecast import Workload, forecast
from rlkit.profiles.scheduling import scenario, settings
from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.costs import Forecast
from rlkit.profiles.scheduling.modelsizes import built_in
from rlkit.profiles.scheduling.workload import Llm, Stream
from rlkit.recover import recipe

SHIPPED = Path(__file__).parent.parent / "apps" / "scenarios"
HX370 = Forecast(find("hx370")[0])
MAX395 = Forecast(find("max395")[0])
HEAD = 'schema_version = 1\ntitle = "t"\nduration_ms = 1000\n'
FRAMES = HEAD + '[streams.s]\nmodel = "yolov8n"\nrate = 30\n'
REQUESTS = (
    HEAD
    + '[requests.r]\nmodel = "smollm2-135m"\nprompt_tokens = 200\noutput_tokens = 10\nttft_ms = 500\ntpot_ms = 50\n'
    + 'arrivals = { process = "poisson", interval_ms = 100 }\n'
)


def made(text: str, costs: Forecast = HX370) -> settings.Prepared:
    return settings.prepare(scenario.parse(text, "mine.toml"), costs)


def only(prepared: settings.Prepared) -> Llm:
    (found,) = prepared.base.streams
    assert isinstance(found, Llm)
    return found


def test_a_frame_is_the_larger_of_both_bounds_and_a_start() -> None:
    """YOLOv8n, 8.7 GFLOP: on the iGPU 15 % of 23.7568 TFLOP/s; 2 bytes for each of 3.2 M weights and 60 M numbers."""
    found = HX370.frame("yolov8n", "igpu")
    seconds = 8.7e9 / (0.15 * 23.7568e12) + 300e-6
    assert found.cost.ns == round(1e9 * seconds) and found.weights_nbytes == 6_400_000
    assert found.cost.demand == pytest.approx(2 * 63.2e6 / seconds / 120e9)
    assert found.cost.millijoule is None  # no watts of the HX 370's units are known
    memory = HX370.frame("nsnet2", "cpu")  # 2.681 M weights of 4 bytes at 70 % of 120 GB/s, more than its arithmetic
    assert memory.cost.ns == round(1e9 * (4 * (2.681e6 + 5122) / (0.7 * 120e9) + 20e-6))


def test_energy_is_watts_by_seconds_where_watts_are_known() -> None:
    found = MAX395.frame("yolov8n", "npu")
    assert found.cost.millijoule == pytest.approx(20.0 * found.cost.ns / 1e6)
    assert any("no watts" in note for note in HX370.notes()) and not any("no watts" in note for note in MAX395.notes())


def test_memory_that_is_not_known_is_said() -> None:
    unknown = "how much memory hx370 has is not known: all fits; say it with --device hx370@32GB"
    assert unknown in HX370.notes()
    for known in (MAX395, Forecast(find("hx370@32GB")[0])):
        assert known.memory_nbytes is not None and not any("how much memory" in note for note in known.notes())


def test_a_unit_is_not_faster_than_the_bandwidth_known_of_its_kind() -> None:
    """The NPU reads 60 GB/s at most, on a bus of 120: two thirds of a token's time on the CPU cannot be its time."""
    cpu, npu = (HX370.language("llama-3.2-1b", unit, "w4", (64,), 128) for unit in ("cpu", "npu"))
    assert npu.decode[0].ns > 1.5 * cpu.decode[0].ns
    assert cpu.decode[0].demand == pytest.approx(0.8, rel=1e-3)  # its share of what all units read together
    assert npu.decode[0].demand == pytest.approx(0.8 * 60 / 120, rel=1e-3)


def test_language_steps_are_the_forecast_s() -> None:
    """With shares of 1 and the chunk as the whole prompt, a step is what `rlkit forecast` says."""
    device = find("hx370")[0]
    size = built_in().models["smollm2-135m"]
    assert size.architecture is not None
    found = HX370.language("smollm2-135m", "igpu", "w4", (128,), 256)
    place = HX370._place("igpu")
    whole = forecast(size.architecture, recipe.load("w4"), place, Workload(64 + 128, 2, chunk=64))
    first = forecast(size.architecture, recipe.load("w4"), place, Workload(64, 2, chunk=64))
    assert found.decode[0].ns == pytest.approx(1e9 * first.roofline.tpot_seconds, rel=1e-6)
    assert len(found.decode) == len(found.prefill[128]) == 2
    assert found.decode[1].ns > found.decode[0].ns and found.least == tuple(cost.ns for cost in found.decode)
    later = whole.roofline.ttft_seconds - first.roofline.ttft_seconds  # two chunks of 64 behind 64 tokens
    assert 0.4e9 * later < found.prefill[128][0].ns < 1.1e9 * later
    assert device.bandwidth is not None


def test_two_bits_are_a_choice_only_where_a_kernel_takes_them() -> None:
    text = REQUESTS + 'recipes = ["w4", "w4w2-gateup"]\nqualities = [1.0, 0.9]\nchunks = [128, 32]\n'
    text = text.replace("smollm2-135m", "qwen3-0.6b")
    prepared = made(text)
    llm = only(prepared)
    variants = {
        name: {phase.options[0].variant for phase in llm.decode if phase.options[0].unit == index}
        for index, name in enumerate(prepared.base.units)
    }
    assert variants == {"cpu": {"", "w4w2-gateup"}, "igpu": {"", "w4w2-gateup"}, "npu": {""}}
    assert prepared.skipped == ("w4w2-gateup is stored as 4 bits on the npu, which has no kernel for less",)
    chunks = [phase.options[0].variant for phase in llm.prefill if phase.options[0].unit == 0]
    assert chunks == ["", "chunk=32", "w4w2-gateup", "w4w2-gateup,chunk=32"]
    assert {phase.options[0].units for phase in llm.decode} == {1}
    worth = {phase.options[0].variant: phase.options[0].quality for phase in llm.decode}
    assert worth == {"": 1.0, "w4w2-gateup": 0.9}
    quicker = {phase.options[0].variant: phase.options[0].ns for phase in llm.decode if phase.options[0].unit == 1}
    assert quicker["w4w2-gateup"] < quicker[""]


def test_moving_a_cache_costs_both_forms_at_the_speed_of_the_bus() -> None:
    """SmolLM2-135M keeps 2 x 30 x 3 x 64 numbers a token: 46,080 bytes as float32, 23,040 as float16."""
    llm = only(made(REQUESTS))
    assert llm.kv_nbytes == 46_080
    assert llm.move_token_ns[0] == (0.0, pytest.approx((46_080 + 23_040) / 120.0), pytest.approx(69_120 / 120.0))
    assert llm.move_ns[0] == (0, 300_000, 150_000)


@pytest.mark.parametrize(("overheads", "load", "switch"), [("none", 0, 0), ("switch", 0, 3), ("all", 3, 3)])
def test_overheads_are_as_asked(overheads: str, load: int, switch: int) -> None:
    text = FRAMES.replace("duration_ms", f'overheads = "{overheads}"\nduration_ms')
    (stream,) = made(text).base.streams
    assert (len(stream.load_ns), len(stream.switch_ns)) == (load, switch)
    if load:
        assert stream.load_ns[1] == round(1e9 * 6_400_000 / 2e9)


def test_bursts_and_turns_are_drawn_by_seed_within_the_duration() -> None:
    burst = REQUESTS.replace(
        '"poisson", interval_ms = 100', '"bursty", interval_ms = 200, within_ms = 5, burst = { low = 2, high = 3 }'
    )
    turns = REQUESTS.replace('"poisson", interval_ms = 100', '"turns", interval_ms = 20, offset_ms = 7, sigma = 0')
    prepared = made(burst.replace("duration_ms = 1000", "duration_ms = 20000"))
    drawn = [prepared.setting(seed).streams[0] for seed in (1, 1, 2)]
    assert all(isinstance(one, Llm) for one in drawn)
    times = [one.arrivals.times for one in drawn if isinstance(one, Llm)]
    assert times[0] == times[1] != times[2] and list(times[0]) == sorted(times[0]) and times[0][-1] < 20_000_000_000
    gaps = {later - sooner for sooner, later in zip(times[0], times[0][1:], strict=False)}
    assert 5_000_000 in gaps
    turn = made(turns).setting(3).streams[0]
    assert isinstance(turn, Llm)
    assert turn.arrivals.times == (7_000_000,)  # the next is due after 500 + 10 * 50 + 20 ms
    assert len(expand(prepared.setting(1), 1)) == len(times[0])


def test_requests_may_follow_frames() -> None:
    text = FRAMES + REQUESTS.removeprefix(HEAD).replace(
        'process = "poisson", interval_ms = 100', 'process = "after", stream = "s", probability = 0.25'
    )
    llm = made(text).base.streams[1]
    assert isinstance(llm, Llm) and (llm.after, llm.probability) == ("s", 0.25)


@pytest.mark.parametrize(
    ("text", "device", "said"),
    [
        (FRAMES.replace("yolov8n", "yolo"), "hx370", "streams.s.model = 'yolo' is not known of hx370; there is ritnet"),
        (FRAMES + 'units = ["gpu"]\n', "hx370", "streams.s.units = ['gpu']: hx370 has cpu, igpu, npu"),
        (
            FRAMES.replace("yolov8n", "plane-rcnn") + 'units = ["npu"]\n',
            "hx370",
            "streams.s.model = 'plane-rcnn': no unit can run it: plane-rcnn does not run on the npu: proposals",
        ),
        (FRAMES.replace("yolov8n", "qwen3-4b"), "hx370", "qwen3-4b is a language model; use it in [requests]"),
        (REQUESTS.replace("smollm2-135m", "yolov8n"), "hx370", "yolov8n is no language model; use it in [streams]"),
        (REQUESTS + 'recipes = ["w5"]\n', "hx370", "requests.r.recipes: no recipe 'w5'"),
        (REQUESTS.replace("= 200", "= 9000"), "hx370", "requests.r.prompt_tokens and output_tokens: up to 9010 tokens"),
        (REQUESTS.replace("smollm2-135m", "qwen3-4b"), "hx370@4GB", "requests.r.model: qwen3-4b takes"),
        (
            REQUESTS.replace("smollm2-135m", "qwen3-0.6b").replace("= 200", "= 6000"),
            "hx370@2GB",
            "requests.r.prompt_tokens: a cache of",
        ),
    ],
)
def test_what_cannot_be_is_one_line_with_file_and_key(text: str, device: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^mine\.toml: ") as caught:
        made(text, Forecast(find(device)[0]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_own_models_come_with_the_scenario() -> None:
    text = FRAMES.replace("yolov8n", "own") + (
        '[models.own]\nsource = "measured by us"\ngflop = 1\nparams_m = 1\nactivations_m = 1\n'
    )
    (stream,) = made(text).base.streams
    assert isinstance(stream, Stream) and stream.weights_nbytes == 4_000_000 + 2_000_000 + 1_000_000


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.toml")))
@pytest.mark.parametrize("costs", [HX370, MAX395], ids=["hx370", "max395"])
def test_shipped_scenarios_fit_both_devices(name: str, costs: Forecast) -> None:
    prepared = settings.prepare(scenario.read(SHIPPED / f"{name}.toml"), costs)
    setting = prepared.setting(0)
    assert setting.units == ("cpu", "igpu", "npu") and len(expand(setting, 0)) > 0
    assert all(option.ns > 0 and 0 < option.demand <= 1 for stream in setting.streams for option in stream.options)
