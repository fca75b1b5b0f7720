"""What a run was worth, against numbers worked out by hand."""

from __future__ import annotations

import json
from math import exp

import pytest

from rlkit.profiles.scheduling import xrbench
from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.metrics import Metrics, Percentiles, measure, spread
from rlkit.profiles.scheduling.record import Run
from rlkit.profiles.scheduling.workload import Late, Lengths, Stream
from rlkit.runtime.jobs import Decision, Drop, Kind, Option, Start, State
from simulated import STAND_INS, gaming, llm, one, phase, setting, simulate

MS = 1_000_000


def test_frames_are_on_time_late_dropped_unfinished_or_left_out() -> None:
    costly = Stream("costly", (Option(0, 60 * MS, 0.0, 30.0),), 100 * MS, 50 * MS, late=Late.RUN)
    quick = Stream("quick", (Option(1, 10 * MS, 0.0, 5.0, "small", 0.5),), 100 * MS, 50 * MS, offset=99 * MS, count=5)
    blocked = Stream("blocked", (Option(0, 10 * MS, 0.0, 1.0),), 300 * MS, 20 * MS, offset=10 * MS)
    done = measure(simulate(setting(costly, quick, blocked, units=3, duration=405 * MS)))
    frames, small, never = done.streams
    # Frames at 0, 100, 200, 300 take 60 and are due after 50; the one at 400 is due after the end.
    assert (frames.jobs, frames.done, frames.late, frames.unfinished, frames.targets) == (5, 4, 4, 1, 4)
    assert (frames.violations, frames.violation_rate) == (4, 1.0)
    # At 99, 199, 299, 399: the last is cut off by the end and due after it.
    assert (small.jobs, small.done, small.targets, small.violations, small.quality) == (4, 3, 3, 0, 0.5)
    assert small.response == Percentiles(0.01, 0.01, 0.01)
    # At 10 and 310 behind frames that take until 60 and 360: both dropped.
    assert (never.dropped, never.violations, never.violation_rate, never.response) == (2, 2, 1.0, None)
    assert done.violation_rate == pytest.approx(6 / 9) and done.mean_rate == pytest.approx(2 / 3)
    assert done.utilization == pytest.approx({"u0": 245 / 405, "u1": 36 / 405, "u2": 0.0})
    assert (frames.energy_joules, done.energy_joules, done.dropped) == pytest.approx((0.12, 0.135, 2))


def test_unknown_energy_is_unknown_and_not_nothing() -> None:
    done = measure(simulate(setting(one("x", 5, 9))))
    assert (done.energy_joules, done.xrbench, done.streams[0].energy_joules) == (None, None, None)
    assert done.streams[0].score is not None and done.streams[0].score.qoe == 1.0


def test_a_request_is_judged_by_its_first_token_and_its_mean_time_per_token() -> None:
    """256 tokens in a chunk of 500, then a token each 70."""

    def judged(ttft: int, tpot: int, duration: int = 10_000, tokens: int = 4, **more: object) -> tuple[int, int, int]:
        stream = llm(
            [phase(0, 256, 500)], [phase(0, 1, 70)], ttft=ttft, tpot=tpot, output=Lengths(tokens, tokens), **more
        )
        found = measure(simulate(setting(stream, duration=duration))).streams[0]
        assert found.language is not None
        return found.targets, found.language.ttft_missed, found.language.tpot_missed

    assert judged(500, 70) == (2, 0, 0)
    assert judged(499, 69) == (2, 1, 1)
    assert judged(500, 1, tokens=1) == (1, 0, 0)  # no second token, no second target
    # Cut off at 400, before the first token: judged by what was due.
    assert judged(500, 70, duration=400) == (0, 0, 0)
    assert judged(399, 70, duration=400) == (1, 1, 0)
    assert judged(300, 70, duration=400) == (2, 1, 1)
    # Cut off behind the first token: not overdue yet, then overdue.
    assert judged(500, 70, duration=530) == (1, 0, 0)
    assert judged(500, 20, duration=530) == (2, 0, 1)
    assert judged(500, 70, duration=600) == (2, 0, 0)
    assert judged(500, 69, duration=600) == (2, 0, 1)


def test_language_times_are_those_of_the_tokens() -> None:
    costs = [phase(0, 256, 500 * MS)], [phase(0, 1, 70 * MS)]
    stream = llm(*costs, times=(0, 2000 * MS), ttft=600 * MS, tpot=60 * MS)
    found = measure(simulate(setting(stream, duration=4000 * MS))).streams[0]
    language = found.language
    assert language is not None
    assert language.ttft == Percentiles(0.5, 0.5, 0.5)
    assert language.tpot is not None and language.tpot.p99 == pytest.approx(0.07)
    assert (language.tokens, language.late_tokens, found.late, found.done) == (6, 4, 2, 2)
    assert language.tokens_per_s == pytest.approx(1 / 0.07)
    assert language.throughput == pytest.approx(6 / 4)
    assert found.energy_joules == pytest.approx(0.006) and found.response is not None


def test_a_dropped_request_misses_what_it_had_not_met() -> None:
    class Dropper:
        name = "dropper"

        def __init__(self, kind: Kind) -> None:
            self.kind = kind

        def decide(self, state: State) -> Decision:
            job = state.ready[0]
            return Drop(job) if job.kind is self.kind else Start(job, job.options[0])

    case = setting(llm([phase(0, 256, 50)], [phase(0, 1, 7)], droppable=True))
    for kind, missed in ((Kind.PREFILL, 2), (Kind.DECODE, 1)):
        found = measure(simulate(case, Dropper(kind))).streams[0]
        assert (found.dropped, found.targets, found.violations) == (1, 2, missed)


def test_a_request_whose_frame_never_finished_is_due_by_its_nominal_time() -> None:
    heard = Stream("heard", (Option(0, 900),), 5000, 5000, count=1)
    late = measure(
        simulate(setting(heard, llm([phase(0, 256, 50)], [phase(0, 1, 7)], after="heard", ttft=100), duration=300))
    )
    assert (late.streams[1].targets, late.streams[1].violations, late.streams[1].unfinished) == (2, 2, 1)


# XRBench's scores.


def test_scores_are_xrbenchs() -> None:
    assert xrbench.real_time(0) == 0.5
    assert xrbench.real_time(-MS) == pytest.approx(1 / (1 + exp(-15)))
    assert xrbench.real_time(100_000) == pytest.approx(1 / (1 + exp(1.5)))
    assert xrbench.real_time(10**12) == 0.0 and xrbench.real_time(-(10**12)) == 1.0
    # Three of four ran, two in time at 300 mJ, one a second late; one was dropped and counts twice.
    found = xrbench.score([-MS * 5, -MS * 5, MS * 1000], [300.0, 300.0, 300.0], frames=4, dropped=1)
    assert found.qoe == 0.75 and found.energy == pytest.approx(0.8)
    assert found.real_time == pytest.approx(2 / 3)
    assert found.model == pytest.approx(2 * 0.8 / 4 * 0.75)
    assert xrbench.overall([found, found]) == pytest.approx(30.0)
    assert xrbench.score([], [], frames=2, dropped=2).model == 0.0
    assert xrbench.score([0], [None], frames=1, dropped=0).model is None
    assert xrbench.overall([]) is None
    with pytest.raises(ValueError, match="0 frames"):
        xrbench.score([], [], 0, 0)


def test_spread_is_between_the_best_and_the_worst() -> None:
    found = spread({"fcfs": 0.5, "edf": 0.2, "llf": 0.2})
    assert (found.best, found.worst) == ("edf", "fcfs")
    assert found.points == pytest.approx(30.0) and found.relative == pytest.approx(0.6)
    assert spread({"fcfs": 0.0}).relative == 0.0
    with pytest.raises(ValueError, match="no policies"):
        spread({})


# All of it.


@pytest.fixture(scope="module")
def played() -> Run:
    return run(expand(gaming(seconds=10), 5), STAND_INS["edf"]())


def test_every_frame_is_one_thing(played: Run) -> None:
    done = measure(played)
    assert sum(stream.jobs for stream in done.streams) == len(played.workload)
    for stream in done.streams:
        assert stream.jobs == stream.done + stream.dropped + stream.unfinished
        assert 0 <= stream.violations <= stream.targets and stream.late <= stream.done
    assert 0.0 < done.utilization["npu"] <= 1.0 and 0.0 < done.violation_rate < 1.0


def test_metrics_are_plain_json(played: Run) -> None:
    done: Metrics = measure(played)
    assert done == measure(played)
    value = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert value["violation_rate"] == done.violation_rate and len(value["streams"]) == 5
    assert value["streams"][4]["language"]["ttft"]["p50"] > 0.0
