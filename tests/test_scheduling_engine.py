"""The simulator: hand-checked schedules, every rule of the engine's docstring, and what holds in any run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.contention import rates
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.record import NEVER, Fate, Run
from rlkit.profiles.scheduling.workload import Arrivals, Late, Lengths, Llm, Setting, Stream
from rlkit.runtime.jobs import Decision, Drop, Kind, Option, Start, State, Wake
from simulated import STAND_INS, gaming, llm, one, phase, setting, simulate, spans


class Scripted:
    """A policy made of a function."""

    name = "scripted"

    def __init__(self, decide: Callable[[State], Decision]) -> None:
        self.decide = decide


def missed(done: Run) -> int:
    deadlines = done.workload.deadlines
    return sum(not 0 <= finish <= due for finish, due in zip(done.finished, deadlines, strict=True))


# Hand checks of non-preemptive schedules.

A = Stream("A", (Option(0, 4),), period=10, deadline=10, count=3, late=Late.RUN)
CASE_A = setting(one("B", 7, 30), A)
EARLY = {"A0": (0, 4), "B0": (4, 11), "A1": (11, 15), "A2": (20, 24)}


@pytest.mark.parametrize(
    ("case", "policy", "expected", "misses"),
    [
        (CASE_A, "fcfs", {"B0": (0, 7), "A0": (7, 11), "A1": (11, 15), "A2": (20, 24)}, 1),
        (CASE_A, "edf", EARLY, 0),
        (CASE_A, "sjf", EARLY, 0),
        (CASE_A, "llf", EARLY, 0),
        (setting(one("X", 3, 12), one("Y", 6, 7)), "edf", {"Y0": (0, 6), "X0": (6, 9)}, 0),
        (setting(one("X", 3, 12), one("Y", 6, 7)), "sjf", {"X0": (0, 3), "Y0": (3, 9)}, 1),
        (setting(one("P", 8, 10), one("Q", 2, 9)), "edf", {"Q0": (0, 2), "P0": (2, 10)}, 0),
        (setting(one("P", 8, 10), one("Q", 2, 9)), "llf", {"P0": (0, 8), "Q0": (8, 10)}, 1),
    ],
)
def test_hand_checks_on_one_unit(case: Setting, policy: str, expected: dict[str, tuple[int, int]], misses: int) -> None:
    done = simulate(case, policy)
    assert (spans(done), missed(done)) == (expected, misses)


def test_hand_check_on_two_units() -> None:
    def on_the_npu(state: State) -> Decision:
        return Start(state.ready[0], state.ready[0].options[0]) if state.units[0].running is None else None

    def earliest(state: State) -> Decision:
        ways = [
            (max(state.now, state.units[option.unit].until) + option.ns, job.number, option.unit, job, option)
            for job in state.ready
            for option in job.options
            if state.units[option.unit].running is None
        ]
        return Start(*min(ways, key=lambda way: way[:3])[3:]) if ways else None

    both = [
        Stream(f"M{i}", (Option(0, npu), Option(1, gpu)), 1000, 1000, count=1)
        for i, npu, gpu in ((1, 4, 10), (2, 5, 6))
    ]
    case = setting(*both, units=2)
    assert max(simulate(case, Scripted(on_the_npu)).finished) == 9
    assert max(simulate(case, Scripted(earliest)).finished) == 6


# The rules, one by one.


def test_steps_share_the_bandwidth_while_they_overlap() -> None:
    # Both ask for all of it: half speed until the short one is done (8 ns of work in 16), then 12 - 8 = 4 more.
    streams = [Stream(f"s{u}", (Option(u, ns, 1.0),), 1000, 1000, count=1) for u, ns in ((0, 8), (1, 12))]
    assert spans(simulate(setting(*streams, units=2))) == {"s00": (0, 16), "s10": (0, 20)}
    # A wider memory, or a step that does not use it, slows nobody.
    assert spans(simulate(setting(*streams, units=2, cap=2.0))) == {"s00": (0, 8), "s10": (0, 12)}
    # A step that comes in the middle: 4 alone, then half speed.
    late = Stream("late", (Option(1, 2, 1.0),), 1000, 1000, offset=4, count=1)
    assert spans(simulate(setting(streams[0], late, units=2))) == {"s00": (0, 10), "late0": (4, 8)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(0, 1), min_size=1, max_size=6), st.floats(0.1, 3.0))
def test_the_memory_is_exactly_full_or_nobody_waits(demands: list[float], cap: float) -> None:
    speeds = rates(demands, cap)
    moved = sum(demand * speed for demand, speed in zip(demands, speeds, strict=True))
    assert moved == pytest.approx(min(sum(demands), cap), rel=1e-9)
    assert all(speed == 1.0 for demand, speed in zip(demands, speeds, strict=True) if demand == 0.0)
    assert all(0.0 < speed <= 1.0 for speed in speeds)
    if sum(demands) <= cap:
        assert set(speeds) == {1.0}
    # Who asks for more is slowed more.
    assert [s for _, s in sorted(zip(demands, speeds, strict=True))] == sorted(speeds, reverse=True)


def test_late_frames_are_dropped_before_dispatch_and_with_them_what_comes_after() -> None:
    long = Stream("long", (Option(0, 50),), 1000, 1000, count=1)
    frames = Stream("frames", (Option(0, 5),), 20, 20, count=4)
    child = Stream("child", (Option(0, 1),), 20, 25, after="frames")
    done = simulate(setting(long, frames, child, duration=100))
    # Frames 0 and 1 are due at 20 and 40, before the unit is free at 50; 2, due at 60, is in time.
    assert spans(done) == {
        "long0": (0, 50),
        "frames2": (50, 55),
        "child2": (55, 56),
        "frames3": (60, 65),
        "child3": (65, 66),
    }
    assert sorted(time for time in done.dropped if time != NEVER) == [50] * 4
    kept = simulate(setting(long, Stream("frames", (Option(0, 5),), 20, 20, count=4, late=Late.RUN), duration=100))
    assert kept.dropped == [NEVER] * 5
    # A deadline that is now is not past, also where another one is.
    due, past = (Stream(f"by{deadline}-", (Option(0, 5),), 1000, deadline, count=1) for deadline in (50, 49))
    assert spans(simulate(setting(long, due)))["by50-0"] == (50, 55)
    assert spans(simulate(setting(long, due, past))) == {"long0": (0, 50), "by50-0": (50, 55)}


def test_what_comes_after_a_frame_waits_for_it_and_may_not_exist() -> None:
    eye = Stream("eye", (Option(0, 7),), 20, 20)
    gaze = Stream("gaze", (Option(1, 2),), 20, 20, after="eye", probability=0.5)
    done = simulate(setting(gaze, eye, units=2, duration=2000))
    timed = spans(done)
    children = {name: span for name, span in timed.items() if name.startswith("gaze")}
    assert 30 < len(children) < 70
    assert all(start == timed[name.replace("gaze", "eye")][1] for name, (start, _) in children.items())


def test_a_request_reads_its_prompt_in_chunks_then_makes_a_token_a_step() -> None:
    case = setting(llm([phase(0, 128, 50, 60)], [phase(0, 1, 7, 8, 9)]), duration=1000)
    done = simulate(case)
    assert [(start, finish) for start, finish, *_ in done.steps] == [(0, 50), (50, 110), (110, 119), (119, 128)]
    assert done.tokens == {0: [110, 119, 128]} and done.finished == [128]
    # A last chunk of 20 tokens: 19 / 127 of the way from one token's 10 to a full chunk's 60, or padded to a full one.
    short = {"prompt": Lengths(148, 148), "output": Lengths(1, 1)}
    assert simulate(setting(llm([phase(0, 128, 50, 60, least=(9, 10))], [phase(0, 1, 7)], **short))).finished == [67]
    assert simulate(setting(llm([phase(0, 128, 50, 60)], [phase(0, 1, 7)], **short))).finished == [110]


def test_a_policy_sees_what_is_left_and_the_next_target() -> None:
    seen = []

    def look(state: State) -> Decision:
        job = state.ready[0]
        seen.append((job.kind, job.remaining, job.deadline, job.steps_done, len(job.options)))
        return Start(job, job.options[0])

    wide = phase(0, 256, 80, variant="chunk=256")
    case = setting(llm([phase(0, 128, 50, 60), wide], [phase(0, 1, 7)]), units=2, duration=1000)
    simulate(case, Scripted(look))
    assert seen == [
        (Kind.PREFILL, (110, None), 1000, 0, 2),
        (Kind.PREFILL, (60, None), 1000, 1, 2),
        (Kind.DECODE, (7, None), 210, 2, 1),
        (Kind.DECODE, (7, None), 217, 3, 1),
    ]


def test_a_variant_of_a_step_may_advance_more() -> None:
    wide, pair = phase(0, 256, 80, variant="chunk=256"), phase(0, 2, 9, variant="draft")
    last = Scripted(lambda state: Start(state.ready[0], state.ready[0].options[-1]))
    done = simulate(setting(llm([phase(0, 128, 50), wide], [phase(0, 1, 7), pair])), last)
    assert done.steps == [(0, 80, 0, 0, "chunk=256"), (80, 89, 0, 0, "draft")]
    assert done.tokens == {0: [80, 89, 89]}


def test_a_cache_is_moved_between_the_units_of_prefill_and_decode() -> None:
    move = {"move_ns": ((0, 30), (40, 0)), "move_token_ns": ((0.0, 0.5), (1.0, 0.0))}
    case = setting(llm([phase(0, 256, 50)], [phase(1, 1, 7)], **move), units=2)
    # 30 + 0.5 * 256 with the first decode step, nothing with the second.
    assert [(start, finish) for start, finish, *_ in simulate(case).steps] == [(0, 50), (50, 215), (215, 222)]


def test_models_are_loaded_once_and_switched_to() -> None:
    def stream(name: str, offset: int, model: str = "") -> Stream:
        costs = {"load_ns": (100,), "switch_ns": (3,), "model": model}
        return Stream(name, (Option(0, 5),), 500, 400, offset=offset, count=2, **costs)  # type: ignore[arg-type]

    timed = spans(simulate(setting(stream("a", 0), stream("b", 200), duration=2000)))
    assert [finish - start for start, finish in timed.values()] == [105, 105, 8, 8]
    shared = spans(simulate(setting(stream("a", 0, "m"), stream("b", 200, "m"), duration=2000)))
    assert [finish - start for start, finish in shared.values()] == [105, 5, 5, 5]


def test_setup_of_a_waiting_request_follows_the_unit() -> None:
    """Another model runs on the unit between two steps: the switch back is paid, the move of the cache is not."""
    talk = llm([phase(0, 256, 50)], [phase(0, 1, 7)], switch_ns=(4, 4), move_ns=((0, 9), (9, 0)))
    frame = Stream("frame", (Option(0, 5),), 1000, 1000, offset=20, count=1, priority=1, switch_ns=(1, 1))
    by_priority = Scripted(
        lambda state: (
            None
            if state.units[0].running
            else Start(job := max(state.ready, key=lambda job: job.priority), job.options[0])
        )
    )
    done = simulate(setting(talk, frame, units=2), by_priority)
    assert [(start, finish) for start, finish, *_ in done.steps] == [(0, 50), (50, 55), (55, 66), (66, 73)]


def test_memory_and_places_admit_requests_in_order() -> None:
    def talk(name: str, times: tuple[int, ...], **more: object) -> Llm:
        chunk, step = (phase(0, 256, 50),), (phase(0, 1, 7),)
        base: dict[str, object] = {"kv_nbytes": 10, "weights_nbytes": 1000}
        lengths = Lengths(256, 256), Lengths(2, 2)
        return Llm(name, chunk, step, Arrivals("times", times=times), *lengths, 900, 100, **(base | more))  # type: ignore[arg-type]

    def seen(*streams: Llm, memory: int | None) -> list[int]:
        most: list[int] = []

        def decide(state: State) -> Decision:
            most.append(len(state.ready))
            return Start(state.ready[0], state.ready[0].options[0])

        done = simulate(setting(*streams, memory_nbytes=memory), Scripted(decide))
        assert all(done.fate(number) is Fate.DONE for number in range(len(done.workload)))
        return most

    three = talk("a", (0, 1, 2))
    assert max(seen(three, memory=None)) == 3
    assert max(seen(three, memory=1000 + 2 * 2580)) == 2
    assert max(seen(three, memory=1000 + 2580)) == 1
    assert max(seen(talk("a", (0, 1, 2), concurrent=1), memory=None)) == 1
    assert max(seen(talk("a", (0, 1, 2), concurrent=1), talk("b", (3,)), memory=None)) == 2
    with pytest.raises(ValueError, match=r"needs a cache of 2,580 bytes and the weights leave 2,579"):
        seen(three, memory=1000 + 2579)


def test_a_dropped_request_frees_its_place() -> None:
    talk = llm([phase(0, 256, 50)], [phase(0, 1, 7)], (0, 1), droppable=True, concurrent=1)

    def decide(state: State) -> Decision:
        job = state.ready[0]
        return Drop(job) if job.index == 0 and job.kind is Kind.DECODE else Start(job, job.options[0])

    done = simulate(setting(talk), Scripted(decide))
    assert (done.dropped, done.finished) == ([50, NEVER], [NEVER, 114])
    assert done.tokens == {0: [50], 1: [100, 107, 114]}


def test_requests_after_frames_run_from_the_frame_on() -> None:
    heard = Stream("heard", (Option(0, 30),), 1000, 1000, count=2)
    done = simulate(setting(heard, llm([phase(0, 256, 50)], [phase(0, 1, 7)], after="heard"), duration=3000))
    assert done.submitted == {1: 30, 3: 1030}
    assert done.tokens[3] == [1080, 1087, 1094]


def test_waking_is_at_the_time_or_at_the_next_event() -> None:
    asked: list[int] = []

    def wait(state: State) -> Decision:
        asked.append(state.now)
        job = state.ready[0]
        return Start(job, job.options[0]) if state.now >= 9 else Wake(9)

    case = setting(one("x", 5, 50), Stream("y", (Option(0, 5),), 100, 90, offset=4, count=1))
    assert spans(simulate(case, Scripted(wait))) == {"x0": (9, 14), "y0": (14, 19)}
    assert asked == [0, 4, 9, 14]


def test_the_end_cuts_steps_off() -> None:
    case = setting(one("x", 60, 70), Stream("y", (Option(0, 50),), 500, 90, count=1), duration=100)
    done = simulate(case)
    assert [done.fate(0), done.fate(1)] == [Fate.DONE, Fate.UNFINISHED]
    assert [row[:3] for row in done.cut] == [(60, 100, 1)]
    assert done.events == 2 + 2 + 1  # two arrivals, a start and a finish, a start
    # What finishes with the end is finished.
    assert simulate(setting(one("x", 100, 70), duration=100)).finished == [100]


def refusing(decision: Callable[[State], Decision], *streams: Stream) -> None:
    simulate(setting(*(streams or (one("x", 5, 9), one("y", 5, 9))), units=2), Scripted(decision))


@pytest.mark.parametrize(
    ("decision", "fault"),
    [
        (lambda state: Wake(state.now), "use Start, Drop, None, or Wake at a later time"),
        (lambda state: "x", "use Start, Drop, None"),
        (lambda state: Start(state.ready[0], Option(1, 5)), "choose from its options"),
        (
            lambda state: Start(state.ready[-1], state.ready[0].options[0]),
            "choose from its options|choose an idle unit",
        ),
        (lambda state: Drop(state.ready[0]), "drop only what is droppable"),
    ],
)
def test_decisions_that_cannot_be_are_refused(decision: Callable[[State], Decision], fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as error:
        refusing(decision)
    assert "policy 'scripted' decided" in str(error.value)
    assert gc.isenabled()


def test_a_job_that_has_started_cannot_start_again() -> None:
    kept = []

    def twice(state: State) -> Decision:
        kept.append(state.ready[0])
        return Start(kept[0], kept[0].options[len(kept) - 1])

    both = Stream("x", (Option(0, 5), Option(1, 5)), 1000, 9, count=1)
    with pytest.raises(ValueError, match="which is not ready"):
        refusing(twice, both, one("y", 5, 9))


def test_upcoming_frames_have_nominal_times() -> None:
    found = []

    def look(state: State) -> Decision:
        found.append([(frame.arrival, frame.stream, frame.deadline) for frame in state.upcoming(20)])
        return Start(state.ready[0], state.ready[0].options[0])

    case = setting(
        Stream("a", (Option(0, 2),), 10, 7, count=4),
        Stream("b", (Option(1, 2),), 10, 5, offset=3),
        units=2,
        duration=23,
    )
    simulate(case, Scripted(look))
    assert found[0] == [(3, 1, 8), (10, 0, 17), (13, 1, 18), (20, 0, 27)]
    assert found[-1] == []


# What holds in any run.

DEMANDS = st.sampled_from([0.0, 0.3, 0.6, 1.0])


@st.composite
def scenes(draw: st.DrawFn) -> Setting:
    """Two units, two to four streams with dependencies, and perhaps a language model."""

    def costs() -> tuple[Option, ...]:
        units = draw(st.sampled_from([(0,), (1,), (0, 1)]))
        return tuple(Option(unit, draw(st.integers(1, 60)), draw(DEMANDS)) for unit in units)

    streams: list[Stream | Llm] = []
    for index in range(draw(st.integers(2, 4))):
        chained = index > 0 and draw(st.booleans())
        chance, late = draw(st.sampled_from([0.5, 1.0])), draw(st.sampled_from(list(Late)))
        period = 40 if chained or index == 0 else draw(st.integers(10, 80))
        after = "s0" if chained else ""
        jitter = draw(st.integers(0, 10))
        streams.append(
            Stream(
                f"s{index}",
                costs(),
                period,
                draw(st.integers(10, 90)),
                jitter=jitter,
                late=late,
                after=after,
                probability=chance,
            )
        )
    if draw(st.booleans()):
        demand = draw(DEMANDS)
        chunks = [phase(unit, 128, 30, 40, demand=demand) for unit in (0, 1)]
        times = draw(st.lists(st.integers(0, 900), max_size=4))
        extra = {
            "concurrent": draw(st.integers(0, 2)),
            "move_ns": ((0, 5), (5, 0)),
            "load_ns": (9, 9),
            "switch_ns": (1, 1),
        }
        streams.append(llm(chunks, [phase(unit, 1, 6, 7, 8, demand=demand) for unit in (0, 1)], times, **extra))
    return setting(*streams, units=2, duration=1000)


@settings(max_examples=30, deadline=None)
@given(scenes(), st.sampled_from(sorted(STAND_INS)), st.integers(0, 5))
def test_what_holds_in_any_run(case: Setting, policy: str, seed: int) -> None:
    done = simulate(case, policy, seed)
    load = done.workload
    again = simulate(case, policy, seed)
    assert (done.steps, done.dropped, done.tokens) == (again.steps, again.dropped, again.tokens)
    for unit in range(2):
        rows = sorted(row for row in (*done.rows, *done.cut) if row[3].unit == unit)
        assert all(before[1] <= after[0] for before, after in pairwise(rows))
    for start, finish, number, option in done.rows:
        assert finish - start >= option.ns and start >= load.arrivals[number]
        parent = load.parents[number]
        assert parent < 0 or NEVER < done.finished[parent] <= start
    assert not any(finish != NEVER and gone != NEVER for finish, gone in zip(done.finished, done.dropped, strict=True))
    frames = [number for _, _, number, option in done.rows if not option.units]
    assert sorted(frames) == [n for n, f in enumerate(done.finished) if f != NEVER and not load.prompts[n]]
    for number, times in done.tokens.items():
        made = [option.units for *_, ran, option in done.rows if ran == number]
        assert times == sorted(times) and len(times) <= load.outputs[number]
        assert (done.finished[number] != NEVER) == (len(times) == load.outputs[number])
        assert sum(made) == (load.prompts[number] + len(times) - 1 if times else sum(made))


@settings(max_examples=20, deadline=None)
@given(scenes(), st.sampled_from(sorted(STAND_INS)))
def test_without_demand_the_width_of_the_memory_is_all_one(case: Setting, policy: str) -> None:
    def calm(stream: Stream | Llm) -> bool:
        return all(option.demand == 0.0 for option in stream.options)

    quiet = tuple(stream for stream in case.streams if calm(stream) and not stream.after)
    if quiet:
        wide, narrow = (Setting("quiet", case.units, quiet, case.duration, cap=cap) for cap in (1.0, 1e-9))
        assert simulate(wide, policy).steps == simulate(narrow, policy).steps


def test_gaming_is_of_the_size_that_is_timed() -> None:
    done = run(expand(gaming(seconds=15), 1), STAND_INS["edf"]())
    frames = sum(not prompt for prompt in done.workload.prompts)
    assert 140 * 15 < frames < 160 * 15
    assert done.events == len(done.workload) + 2 * len(done.rows) + len(done.cut) + sum(t >= 0 for t in done.dropped)
    assert sum(map(len, done.tokens.values())) > 50
