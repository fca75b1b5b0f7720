"""Our own policy: what it sees coming, what it gives up, what it learns, and that it stays ahead of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.foresight import Play
from rlkit.profiles.scheduling.lookahead import Lookahead
from rlkit.profiles.scheduling.metrics import Metrics, measure
from rlkit.profiles.scheduling.oracle import exhaustive, violations
from rlkit.profiles.scheduling.policies import FIVE, POLICIES
from rlkit.profiles.scheduling.record import Fate, Run
from rlkit.profiles.scheduling.workload import Late, Lengths, Llm, Setting, Stream
from rlkit.runtime.jobs import Option
from simulated import gaming, llm, phase, setting, spans

MS = 1_000_000


def under(case: Setting, policy: str = "lookahead", seed: int = 0) -> Run:
    return run(expand(case, seed), POLICIES[policy]())


def frames(name: str, period: float, *ms: float | None, **more: object) -> Stream:
    """Frames that take ms[i] on unit i; None: not there."""
    options = tuple(Option(unit, round(time * MS)) for unit, time in enumerate(ms) if time is not None)
    base: dict[str, object] = {"deadline": round(period * MS)}
    return Stream(name, options, round(period * MS), **(base | more))  # type: ignore[arg-type]


def seconds(*streams: Stream | Llm, units: int = 1, length: float = 1.0, **more: object) -> Setting:
    return setting(*streams, units=units, duration=round(length * 1000 * MS), **more)


def request(*phases: tuple[int, str, float, float], **more: object) -> Llm:
    """Phases (unit, variant, ms per chunk of 256, or 64 where the variant says so, ms per token)."""
    chunks = [phase(unit, 64 if "64" in name else 256, round(ms * MS), variant=name) for unit, name, ms, _ in phases]
    tokens = [phase(unit, 1, round(ms * MS), variant=name) for unit, name, _, ms in phases if "64" not in name]
    base: dict[str, object] = {"ttft": 500 * MS, "tpot": 50 * MS, "output": Lengths(8, 8)}
    return llm(chunks, tokens, **(base | more))


def test_a_unit_is_left_idle_for_a_frame_that_is_about_to_come() -> None:
    """A long step with time to spare does not begin where it would make the tight frame of a moment later late."""
    tight = frames("tight", 20, 5, deadline=6 * MS, offset=2 * MS)
    long = frames("long", 100, 10)
    assert measure(under(seconds(tight, long))).violation_rate == 0
    assert {name: measure(under(seconds(tight, long), name)).violation_rate > 0 for name in FIVE} == dict.fromkeys(
        FIVE, True
    )


def test_small_chunks_let_frames_through() -> None:
    case = seconds(request((0, "", 60, 8), (0, "chunk=64", 16, 8)), frames("A", 40, 10, deadline=20 * MS))
    done = under(case)
    assert {variant for *_, number, variant in done.steps if number == 0} == {"", "chunk=64"}
    assert violations(done) == 0 < violations(under(case, "hetero-eft"))


def test_whole_prompts_and_full_quality_where_nothing_is_gained_by_less() -> None:
    case = seconds(
        request((0, "", 60, 8), (0, "chunk=64", 16, 8), (0, "w2", 55, 6)), frames("A", 40, None, 10), units=2
    )
    assert {variant for *_, variant in under(case).steps} == {""}


def test_fewer_bits_where_they_save_frames() -> None:
    """A token as asked takes longer than the frames leave, one of fewer bits does not."""
    talk = request((0, "", 5, 13), (0, "w2", 5, 7), output=Lengths(20, 20))
    fine = tuple(
        replace(each, options=tuple(replace(option, quality=0.9) for option in each.options)) for each in talk.decode
    )
    case = seconds(replace(talk, decode=(talk.decode[0], fine[1])), frames("A", 20, 11, deadline=12 * MS))
    done = under(case)
    assert violations(done) == 0 < violations(under(case, "edf"))
    assert 0.9 <= measure(done).streams[0].quality < 1  # type: ignore[operator]


def test_flexible_frames_leave_the_unit_that_others_need() -> None:
    """Where each would finish first alone, all would crowd onto unit 1, which the tight ones need."""
    tight, other = frames("tight", 16, 28, 15), frames("other", 33, 17, 6)
    case = seconds(tight, other, replace(other, name="third", options=frames("x", 33, 13, 5).options), units=2)
    rates = {name: measure(under(case, name)).violation_rate for name in (*FIVE, "lookahead")}
    assert rates["lookahead"] < 0.05 < min(rate for name, rate in rates.items() if name != "lookahead")


def test_what_follows_a_frame_is_learned_and_counts() -> None:
    """The first stream has time, but not what comes after it."""
    first = frames("first", 20, 5)
    after = frames("after", 20, 6, after="first", deadline=14 * MS)
    other = frames("other", 20, 8, deadline=round(19.5 * MS))
    done = under(seconds(first, after, other))
    late = [
        name
        for name in ("first", "after", "other")
        for each in measure(done).streams
        if each.name == name and each.violations > 2
    ]
    assert late == []
    assert measure(under(seconds(first, after, other), "edf")).violation_rate > 0.3


def test_frames_that_cannot_be_in_time_cost_no_time() -> None:
    """A frame that no unit does in time is never started; without the rule to drop it, it runs when nothing suffers."""
    hopeless = frames("hopeless", 50, 60, offset=MS)
    fine = frames("fine", 10, 4)
    done = under(seconds(hopeless, fine))
    assert [each.violations for each in measure(done).streams] == [20, 0]
    assert not any(name.startswith("hopeless") for name in spans(done))
    late = under(seconds(replace(hopeless, late=Late.RUN), frames("fine", 100, 30)))
    assert late.fate(1) is Fate.DONE and measure(late).streams[1].violations == 0


def test_time_that_a_request_has_saved_is_spent_on_frames() -> None:
    """Tokens come twice as fast as asked: a single late one is no violation, so no frame is given up for it."""
    talk = request((0, "", 20, 10), output=Lengths(30, 30), tpot=24 * MS)
    case = seconds(talk, frames("A", 50, 22, deadline=24 * MS))
    done = measure(under(case))
    assert done.violation_rate == 0
    assert done.streams[0].language is not None and done.streams[0].language.late_tokens > 0


def test_switches_between_models_are_foreseen() -> None:
    """Two frames of each in a period fit only if the model is switched as little as possible."""
    pair = [frames(name, 20, 7, switch_ns=(4 * MS,), deadline=20 * MS) for name in ("A", "B")]
    case = seconds(*pair, length=2)
    assert measure(under(case)).violation_rate < 0.03
    assert measure(under(case, "hetero-eft")).violation_rate > 0.2


@pytest.mark.parametrize("seed", range(3))
def test_overload_is_shared_better_than_by_any_of_the_five(seed: int) -> None:
    case = slowed(gaming(3), 2)
    rates = {name: measure(under(case, name, seed)).violation_rate for name in (*FIVE, "lookahead")}
    assert rates["lookahead"] <= 0.7 * min(rates[name] for name in FIVE), rates


def slowed(case: Setting, times: int) -> Setting:
    """Every frame takes so many times as long."""
    streams = [
        replace(each, options=tuple(replace(option, ns=option.ns * times) for option in each.options))
        if isinstance(each, Stream)
        else each
        for each in case.streams
    ]
    return replace(case, streams=tuple(streams))


@pytest.mark.parametrize("seed", range(4))
def test_near_the_optimum_of_small_cases(seed: int) -> None:
    streams = [frames("A", 12, 5, 7, jitter=MS), frames("B", 18, 6, 5, jitter=MS), frames("C", 18, None, 6)]
    load = expand(seconds(*streams, units=2, length=0.036), seed)
    best = exhaustive(load, tries=5_000)
    assert violations(run(load, Lookahead())) <= best.violations + 1


def test_a_long_run_is_the_same_twice_and_serves_requests() -> None:
    case = gaming(4)
    first, second = (under(case, seed=5) for _ in range(2))
    assert first.rows == second.rows
    made: Metrics = measure(first)
    assert made.violation_rate < 0.02
    assert sum(each.language.tokens for each in made.streams if each.language) > 0


def test_frames_of_streams_that_only_meet_by_chance_are_not_taken_to_follow_each_other() -> None:
    """Many frames behind one long one: those that come late by jitter appear when another ends, now and then."""
    quick = [frames(f"q{n}", 10 + n // 2, 0.4, jitter=4 * MS, deadline=30 * MS) for n in range(6)]
    done = under(seconds(*quick, frames("long", 25, 8, jitter=4 * MS), length=3))
    assert measure(done).violation_rate < 0.01


def test_futures_of_very_short_tokens_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times in nanoseconds: half a million tokens would fit into the least horizon in time."""
    ends: list[float] = []
    finish = Play._finish

    def counted(self: Play, unit: int) -> None:
        ends.append(self.now)
        assert len(ends) < 50_000
        finish(self, unit)

    monkeypatch.setattr(Play, "_finish", counted)
    talk = llm([phase(0, 64, 700)], [phase(0, 1, 100)], range(0, 10_000, 5_000), output=Lengths(12, 12))
    tight = Stream("tight", (Option(0, 900),), 2_000, 1_000)
    done = under(setting(talk, tight, duration=10_000))
    assert len(done.rows) > 10 and ends
