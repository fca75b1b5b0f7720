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
from rlkit.profiles.bench import Plan, Round, Subject
from rlkit.profiles.bundle import read_size, size_of
from rlkit.profiles.operators import Storage
from rlkit.profiles.timing import Basis
from rlkit.recover.progress import Progress
from shapes import SMOLLM2_135M


class Model:
    """Takes the next of `ttft` seconds for the first token and `tpot` for each later one; remembers its prompts."""

    def __init__(self, ttft: list[float], tpot: float, log: list[str] | None = None, name: str = "m") -> None:
        self.ttft, self.tpot, self.name = iter(ttft), tpot, name
        self.log = log if log is not None else []
        self.prompts: list[list[int]] = []

    def __call__(self, ids: list[int], new_tokens: int) -> Iterator[float]:
        self.prompts.append(ids)
        self.log.append(self.name)
        yield next(self.ttft)
        yield from [self.tpot] * (new_tokens - 1)

    def subject(self) -> Subject:
        return Subject(self.name, self, lambda: 123, lambda depth: 1000 + depth)


def test_medians_spread_bytes_and_memory() -> None:
    model = Model([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0], 0.5)  # two warm-ups that must not count
    (found,) = bench.measure([model.subject()], Plan((8,), new_tokens=4, repeats=5))
    (timing,) = found.timings
    assert (timing.basis, timing.prompt_tokens, timing.new_tokens) == (Basis.MEASURED, 8, 4)
    assert (timing.ttft_seconds, timing.tpot_seconds) == (3.0, 0.5)
    assert timing.tokens_per_s == 2.0 and timing.end_to_end_tokens_per_s == 4 / 4.5
    assert timing.spread is not None
    assert (timing.spread.ttft_p10_seconds, timing.spread.ttft_p90_seconds) == pytest.approx((1.4, 4.6))
    assert timing.spread.repeats == 5
    assert timing.nbytes_per_token == 1000 + 8 + 2 and timing.peak_nbytes == 123
    assert timing.bytes_per_s == 1010 / 0.5
    assert len(found.rounds[0]) == 5
    assert json.loads(json.dumps(found.to_json()))["timings"][0]["tokens_per_s"] == 2.0


def test_every_round_has_its_own_prompt_and_all_subjects_share_it() -> None:
    a, b = Model([1.0] * 9, 0.1), Model([1.0] * 9, 0.1)
    bench.measure([a.subject(), b.subject()], Plan((16,), new_tokens=2, repeats=3, vocab=5000))
    assert a.prompts == b.prompts
    assert len({str(prompt) for prompt in a.prompts}) == 5
    assert all(len(prompt) == 16 and min(prompt) >= 256 and max(prompt) < 5000 for prompt in a.prompts)


def test_subjects_alternate_and_turn_round() -> None:
    log: list[str] = []
    models = [Model([1.0] * 9, 0.1, log, name) for name in "ab"]
    bench.measure([model.subject() for model in models], Plan((4,), new_tokens=2, repeats=2, warm_ups=2))
    assert "".join(log) == "abbaabba"


def test_ratios_are_medians_of_paired_rounds() -> None:
    a = Model([1.0, 2.0, 4.0], 0.1, name="a")
    b = Model([2.0, 4.0, 4.0], 0.05, name="b")
    found = bench.measure([a.subject(), b.subject()], Plan((4,), new_tokens=3, repeats=3, warm_ups=0))
    (ratio,) = bench.ratios(found)
    assert (ratio.name, ratio.against, ratio.prompt_tokens) == ("b", "a", 4)
    assert (ratio.ttft, ratio.tpot) == (2.0, 0.5)
    assert bench.ratios(found[:1]) == ()


def test_progress_counts_rounds() -> None:
    events: list[Progress] = []
    bench.measure([Model([1.0] * 9, 0.1).subject()], Plan((4, 8), 2, repeats=1, warm_ups=1), events.append)
    assert [(event.done, event.total) for event in events] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_model_that_stops_early_is_refused() -> None:
    with pytest.raises(ValueError, match="stopped after 1 of 8 tokens"):
        bench.one_round(lambda _ids, _new: iter([1.0]), [1], 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": ()}, "must be positive"),
        ({"prompt_tokens": (0,)}, "must be positive"),
        ({"new_tokens": 1}, "at least 2"),
        ({"repeats": 0}, "at least 1 repeat"),
        ({"vocab": 1}, "no random prompts"),
    ],
)
def test_absurd_plans_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{"prompt_tokens": (4,), "new_tokens": 4, **change})
    with pytest.raises(ValueError, match="nothing to measure"):
        bench.measure([], Plan((4,), 4))


def test_a_summary_of_rounds() -> None:
    timing = bench.summarize([Round(1.0, 0.1, 4), Round(3.0, 0.3, 4)], 7)
    assert (timing.ttft_seconds, timing.tpot_seconds, timing.new_tokens) == (2.0, pytest.approx(0.2), 4)


def test_the_worker_answers_line_by_line() -> None:
    said: list[dict[str, Any]] = []
    lines = io.StringIO('{"prompt_ids": [1, 2], "new_tokens": 3}\n{"peak": true}\n')
    worker.answer(Model([1.0], 0.5), lines, said.append)
    assert said[:2] == [{"ready": True, "threads": 0}, {"seconds": [1.0, 0.5, 0.5]}]
    assert said[2]["peak_nbytes"] == worker.peak_nbytes()


def test_peak_memory_is_that_of_this_process() -> None:
    peak = worker.peak_nbytes()
    assert peak is None or 2**23 < peak < 2**38


FAKE = """
import json, sys
from rlkit.profiles.worker import answer
def generate(ids, new_tokens):
    if ids[0] == 13:
        sys.exit("no luck")
    yield 0.5
    yield from [0.25] * (new_tokens - 1)
answer(generate, sys.stdin, lambda reply: print(json.dumps(reply), flush=True), 3)
"""


def test_a_process_is_measured_through_pipes() -> None:
    with worker.start("fake", [sys.executable, "-c", FAKE]) as process:
        assert process.threads == 3
        assert list(process.generate([1], 3)) == [0.5, 0.25, 0.25]
        assert process.peak_nbytes() is None or process.peak_nbytes() == process.peak_nbytes()
        with pytest.raises(ChildProcessError, match=r"measuring fake failed: it ended .*no luck"):
            list(process.generate([13], 3))


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
