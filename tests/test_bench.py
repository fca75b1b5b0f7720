"""The benchmark with models that take exact times, the worker's protocol, and worker processes without a runtime."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlkit.profiles import bench, worker
from rlkit.profiles.bench import Case, Kind, Measurement, Plan, Series, Subject, Work, standard
from rlkit.profiles.bundle import read_size, size_of
from rlkit.profiles.operators import Storage
from rlkit.profiles.timing import Basis
from rlkit.recover.progress import Progress
from shapes import SMOLLM2_135M

PREFILL, DECODE = Case(Kind.PREFILL, 8), Case(Kind.DECODE, 4, depth=8)


class Model:
    """Each generation takes the next of `seconds` per token; remembers what it was asked."""

    def __init__(self, seconds: list[float], log: list[str] | None = None, name: str = "m") -> None:
        self.seconds, self.name = iter(seconds), name
        self.log = log if log is not None else []
        self.asked: list[Work] = []

    def __call__(self, asked: Work) -> Iterator[float]:
        self.asked.append(asked)
        self.log.append(self.name)
        yield from [next(self.seconds)] * asked.new_tokens

    def subject(self) -> Subject:
        return Subject(self.name, self, lambda: 123, lambda depth: 1000 + depth, 3)


def test_tests_are_named_as_llama_bench_names_them() -> None:
    names = [test.name for test in standard((512, 64), 128, (4096, 0))]
    assert names == ["pp64", "pp512", "tg128", "pp64 @ d4096", "pp512 @ d4096", "tg128 @ d4096"]
    assert [test.name for test in standard((0,), 8)] == ["tg8"]
    assert [test.name for test in standard((8,), 0)] == ["pp8"]
    assert Plan(standard((512,), 128, (0, 4096))).room == 4096 + 512 + 1


def test_rounds_become_speeds_bytes_and_memory() -> None:
    model = Model([9.0, 1.0, 2.0, 9.0, 0.25, 0.5])  # a warm-up of each test must not count
    (found,) = bench.measure([model.subject()], Plan((PREFILL, DECODE), repeats=2, warm_ups=1))
    prefill, decode = found.series
    assert prefill.rounds == ((1.0,), (2.0,)) and decode.rounds == ((0.25,) * 4, (0.5,) * 4)
    assert prefill.tokens_per_s.mean == 6.0 and decode.tokens_per_s.mean == 3.0
    assert prefill.ttft is not None and (prefill.ttft.mean, prefill.ttft.p50) == (1.5, 1.5)
    assert prefill.tpot is None and prefill.token_seconds is None and prefill.bytes_per_s is None
    assert decode.ttft is None and decode.tpot is not None and decode.tpot.mean == 0.375
    assert decode.token_seconds is not None and decode.token_seconds.count == 8
    assert decode.nbytes_per_token == 1000 + 8 + 2 and decode.bytes_per_s == 1010 / 0.375
    assert prefill.nbytes_per_token is None and prefill.peak_nbytes == 123 and found.threads == 3


def test_a_measurement_survives_json() -> None:
    (found,) = bench.measure([Model([1.0] * 9).subject()], Plan((PREFILL, DECODE), repeats=2))
    table = json.loads(json.dumps(found.to_json()))
    assert table["series"][1]["tokens_per_s"]["mean"] == 1.0 and table["series"][0]["test"] == "pp8"
    assert Measurement.from_json(table) == found
    for damaged in ({**table, "series": [{}]}, {"name": "m", "timings": []}, {**table, "series": 5}):
        with pytest.raises(ValueError, match="of another version; measure again"):
            Measurement.from_json(damaged)


def test_prefill_and_decode_make_one_timing() -> None:
    rounds = tuple((second,) for second in (1.0, 2.0, 3.0, 4.0, 5.0))
    series = (Series(PREFILL, rounds, peak_nbytes=5), Series(DECODE, ((0.5, 1.5),), 1010, 7))
    timing = Measurement("m", series).timing()
    assert (timing.basis, timing.prompt_tokens, timing.new_tokens) == (Basis.MEASURED, 8, 4)
    assert (timing.ttft_seconds, timing.tpot_seconds) == (3.0, 1.0)
    assert timing.spread is not None
    assert (timing.spread.ttft_p10_seconds, timing.spread.ttft_p90_seconds) == pytest.approx((1.4, 4.6))
    assert timing.nbytes_per_token == 1010 and timing.peak_nbytes == 7
    with pytest.raises(ValueError, match="measure both"):
        Measurement("m", series[:1]).timing()


def test_what_is_timed_is_new_every_round_and_the_same_for_all_subjects() -> None:
    a, b = Model([1.0] * 20), Model([1.0] * 20)
    tests = standard((16,), 4, (0, 8))
    bench.measure([a.subject(), b.subject()], Plan(tests, repeats=3, warm_ups=1, vocab=5000))
    assert a.asked == b.asked
    assert len({str(asked.prompt) for asked in a.asked if len(asked.prompt) == 16}) == 8
    assert all(min(asked.prompt) >= 256 and max(asked.prompt) < 5000 for asked in a.asked)


def test_a_depth_is_filled_alike_for_all_its_tests() -> None:
    model = Model([1.0] * 20)
    bench.measure([model.subject()], Plan(standard((16,), 4, (0, 8)), repeats=1, warm_ups=0))
    shallow, generate, deep, deeper = model.asked
    assert shallow.fill == generate.fill == [] and len(deep.fill) == 8 and deep.fill == deeper.fill
    assert (shallow.room, deep.room, deeper.room) == (17, 25, 25)
    assert (len(deep.prompt), deep.new_tokens) == (16, 1)
    assert (len(deeper.prompt), deeper.new_tokens) == (1, 4)


def test_subjects_alternate_and_turn_round() -> None:
    log: list[str] = []
    models = [Model([1.0] * 9, log, name) for name in "ab"]
    bench.measure([model.subject() for model in models], Plan((PREFILL,), repeats=2, warm_ups=2))
    assert "".join(log) == "abbaabba"


def test_ratios_are_medians_of_paired_rounds() -> None:
    a, b = Model([1.0, 2.0, 4.0], name="a"), Model([2.0, 4.0, 4.0], name="b")
    found = bench.measure([a.subject(), b.subject()], Plan((PREFILL,), repeats=3, warm_ups=0))
    (ratio,) = bench.ratios(found)
    assert ratio.to_json() == {"name": "b", "against": "a", "test": "pp8", "time": 2.0}
    assert bench.ratios(found[:1]) == ()


def test_progress_counts_rounds() -> None:
    events: list[Progress] = []
    bench.measure([Model([1.0] * 9).subject()], Plan((PREFILL, DECODE), repeats=1, warm_ups=1), events.append)
    assert [(event.done, event.total) for event in events] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert events[2].note == "m, tg4 @ d8"


def test_a_model_that_stops_early_is_refused() -> None:
    with pytest.raises(ValueError, match="stopped after 1 of 8 tokens"):
        bench.one_round(lambda _asked: iter([1.0]), Work([], [1], 8, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tests": ()}, "no test to run"),
        ({"repeats": 0}, "at least 1 repeat"),
        ({"warm_ups": -1}, "at least 1 repeat"),
        ({"vocab": 1}, "no random prompts"),
    ],
)
def test_absurd_plans_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{"tests": (PREFILL,), **change})


def test_absurd_tests_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        bench.measure([], Plan((PREFILL,)))
    with pytest.raises(ValueError, match="none may be negative"):
        standard((512,), 128, (0, -1))
    with pytest.raises(ValueError, match="0 tokens after 0 are no test"):
        Case(Kind.PREFILL, 0)
    for rounds in ((), ((),), ((0.0,),), ((1.0, -1.0),)):
        with pytest.raises(ValueError, match="measure it again"):
            Series(DECODE, rounds)


def test_the_worker_answers_line_by_line() -> None:
    said: list[dict[str, Any]] = []
    lines = io.StringIO('{"fill": [], "prompt": [1, 2], "new_tokens": 3, "room": 9}\n{"peak": true}\n')
    worker.answer(Model([0.5]), lines, said.append)
    assert said[:2] == [{"ready": True, "threads": 0, "provider": "cpu"}, {"seconds": [0.5, 0.5, 0.5]}]
    before, after = said[2]["peak_nbytes"], worker.peak_nbytes()
    assert (before is None) == (after is None) and (before or 0) <= (
        after or 0
    )  # another thread may raise it meanwhile


def test_peak_memory_is_that_of_this_process() -> None:
    peak = worker.peak_nbytes()
    assert peak is None or 2**23 < peak < 2**38


FAKE = """
import json, sys
from rlkit.profiles.worker import answer
def generate(asked):
    if asked.prompt[0] == 13:
        sys.exit("no luck")
    yield from [0.25] * asked.new_tokens
answer(generate, sys.stdin, lambda reply: print(json.dumps(reply), flush=True), 3, "dml")
"""


def test_a_process_is_measured_through_pipes() -> None:
    with worker.start("fake", [sys.executable, "-c", FAKE]) as process:
        assert (process.threads, process.provider) == (3, "dml")
        assert list(process.generate(Work([], [1], 3, 4))) == [0.25, 0.25, 0.25]
        before, after = process.peak_nbytes(), process.peak_nbytes()
        assert (before or 0) <= (after or 0)
        with pytest.raises(ChildProcessError, match=r"measuring fake failed: it ended .*no luck"):
            list(process.generate(Work([], [13], 3, 4)))


def test_a_process_that_says_why_it_failed_is_quoted() -> None:
    failing = 'print(\'{"error": "ValueError: no such bundle"}\')'
    with (
        pytest.raises(ChildProcessError, match="failed: ValueError: no such bundle"),
        worker.start("x", [sys.executable, "-c", failing]),
    ):
        pass


def test_the_command_of_a_worker() -> None:
    words = worker.command(Path("b"), threads=2)
    assert words[1:] == ["-m", "rlkit.profiles.worker", "b", "cpu", "2"]


MANIFEST = {
    "recipe": {"name": "w4"},
    "shape": SMOLLM2_135M.to_json(),
    "tensors": [
        {"name": "a", "kind": "attention", "bits": 4, "group": 32, "nbytes": 100},
        {"name": "b", "kind": "gate_up", "bits": 2, "group": 64, "nbytes": 50},
        {"name": "c", "kind": "gate_up", "bits": 2, "group": 64, "nbytes": 50},
        {"name": "d", "kind": "lm_head", "bits": 4, "group": 32, "nbytes": 30},
        {"name": "e", "kind": "embedding", "bits": 32, "group": None, "nbytes": 7000},
        {"name": "rotary tables", "kind": "other", "bits": 32, "group": None, "nbytes": 9000},
    ],
}


def test_bytes_of_a_bundle() -> None:
    size = size_of(MANIFEST)
    assert size.recipe == "w4" and size.nbytes == 16230 and size.lowest_bits == 2
    assert size.nbytes_by_kind["gate_up"] == 100
    assert size.streamed_nbytes == 230  # without the embedding, of which a row is read, and the tables
    assert size.bits_per_weight == pytest.approx(8 * 7230 / SMOLLM2_135M.parameters)
    assert size.nbytes_at(10) == 230 + 10 * Storage().kv_token_nbytes(SMOLLM2_135M)


def test_an_embedding_that_is_the_lm_head_is_read() -> None:
    tensors = [{"kind": "embedding", "bits": 4, "nbytes": 70}, {"kind": "norm", "bits": 32, "nbytes": 5}]
    assert size_of({**MANIFEST, "tensors": tensors}).streamed_nbytes == 75


def test_a_manifest_without_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make one with `rlkit export`"):
        read_size(tmp_path)
    (tmp_path / "rlkit.json").write_text('{"shape": {}}')
    with pytest.raises(ValueError, match="export the bundle again"):
        read_size(tmp_path)
    (tmp_path / "rlkit.json").write_text(json.dumps(MANIFEST))
    assert read_size(tmp_path).recipe == "w4"
