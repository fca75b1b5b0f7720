"""The oracle: its optimum against schedules enumerated without the simulator, its counts, no policy that beats it."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.metrics import measure
from rlkit.profiles.scheduling.oracle import exhaustive, search, unavoidable, violations
from rlkit.profiles.scheduling.policies import POLICIES
from rlkit.profiles.scheduling.workload import Late, Lengths, Setting, Stream
from rlkit.runtime.jobs import Option
from simulated import gaming, llm, one, phase, setting

Frame = tuple[int, int, tuple[int, ...]]  # arrival, deadline, ns by unit


def brute_force(frames: list[Frame], units: int) -> int:
    """The fewest late frames over all orders and units: each starts as early as its order on its unit allows."""
    best = len(frames)
    for order in permutations(frames):
        for places in product(range(units), repeat=len(frames)):
            free, late = [0] * units, 0
            for (arrival, due, ns), unit in zip(order, places, strict=True):
                free[unit] = max(free[unit], arrival) + ns[unit]
                late += free[unit] > due
            best = min(best, late)
    return best


def case_of(frames: list[Frame], units: int, **more: object) -> Setting:
    streams = [
        Stream(
            f"s{index}",
            tuple(Option(unit, time) for unit, time in enumerate(ns)),
            1000,
            due - arrival,
            arrival,
            count=1,
        )
        for index, (arrival, due, ns) in enumerate(frames)
    ]
    return setting(*streams, units=units, duration=900, **more)


@st.composite
def few_frames(draw: st.DrawFn) -> tuple[list[Frame], int]:
    units = draw(st.integers(1, 2))
    count = draw(st.integers(2, 5 if units == 1 else 4))
    frames = []
    for _ in range(count):
        arrival = draw(st.integers(0, 12))
        ns = tuple(draw(st.lists(st.integers(1, 9), min_size=units, max_size=units)))
        frames.append((arrival, arrival + draw(st.integers(2, 16)), ns))
    return frames, units


@settings(max_examples=60, deadline=None, derandomize=True)
@given(few_frames())
def test_the_optimum_is_that_of_all_orders_and_units(drawn: tuple[list[Frame], int]) -> None:
    frames, units = drawn
    load = expand(case_of(frames, units), 0)
    found = exhaustive(load)
    assert found.proven
    assert found.violations == brute_force(frames, units) == violations(found.run)
    assert sum(unavoidable(load)) <= found.violations <= search(load, rounds=20).violations


def test_waiting_on_purpose_is_found() -> None:
    """The frame that comes at 1 fits only if the long one does not start first: who never waits does not get there."""
    load = expand(case_of([(0, 30, (10,)), (1, 5, (3,))], 1), 0)
    assert min(violations(run(load, POLICIES[name]())) for name in ("fcfs", "edf", "llf", "hetero-eft")) == 1
    found = exhaustive(load)
    assert (found.violations, found.proven) == (0, True)


def shared(demand: float) -> Setting:
    """Two frames on two units, and one more beside each, which are in time only if the greedy ones do not meet."""
    greedy = [Stream(f"g{unit}", (Option(unit, 10, demand),), 1000, 21, count=1) for unit in range(2)]
    light = [Stream(f"l{unit}", (Option(unit, 10, 0.0),), 1000, 21, count=1) for unit in range(2)]
    return setting(*greedy, *light, units=2, duration=900)


def test_shared_bandwidth_counts() -> None:
    """Side by side the greedy steps take 20 each, and what comes after them is late; staggered nothing is."""
    load = expand(shared(1.0), 0)
    assert violations(run(load, POLICIES["edf"]())) > 0
    found = exhaustive(load)
    assert (found.violations, found.proven) == (0, True)
    greedy = [(start, finish) for start, finish, _, number, _ in found.run.steps if number < 2]
    assert max(start for start, _ in greedy) >= min(finish for _, finish in greedy)


def test_requests_and_what_follows_count() -> None:
    """Whole prompts make the frames late; chunks let them through."""
    chunks = [phase(0, 256, 60), phase(0, 64, 16, variant="chunk=64")]
    request = llm(chunks, [phase(0, 1, 5)], output=Lengths(1, 1), ttft=200)
    frame = Stream("A", (Option(0, 4),), 30, 20, count=3)
    after = replace(frame, name="B", options=(Option(0, 1),), after="A")
    load = expand(setting(request, frame, after, duration=300), 0)
    assert violations(run(load, POLICIES["fcfs"]())) > 0
    found = exhaustive(load)
    assert (found.violations, found.proven) == (0, True)
    assert {variant for *_, number, variant in found.run.steps if number == 0} >= {"chunk=64"}


def test_an_optimum_that_is_not_reached_is_not_called_one() -> None:
    load = expand(case_of([(0, 9, (5,)), (0, 9, (5,)), (0, 9, (5,)), (0, 12, (5,))], 1), 0)
    few = exhaustive(load, tries=2)
    assert (few.proven, few.tried) == (False, 2)
    assert exhaustive(load).proven and exhaustive(load).violations == 2


def test_unavoidable_counts_what_no_unit_can_do_in_time() -> None:
    slow = Stream("slow", (Option(0, 20), Option(1, 11)), 50, 10, count=3)
    child = Stream("child", (Option(0, 2),), 50, 10, after="parent", count=3)
    parent = Stream("parent", (Option(0, 9),), 50, 10, count=3)
    assert unavoidable(expand(setting(slow, units=2, duration=200), 0)) == [3]
    assert unavoidable(expand(setting(parent, child, duration=200), 0)) == [0, 3]
    request = llm([phase(0, 256, 60), phase(0, 64, 20, variant="chunk=64")], [phase(0, 1, 5)], ttft=59)
    assert unavoidable(expand(setting(request, duration=900), 0)) == [1]
    assert unavoidable(expand(setting(replace(request, ttft=60), duration=900), 0)) == [0]


def test_unavoidable_counts_the_loading_of_a_model_once() -> None:
    late = Stream("late", (Option(0, 5),), 50, 10, count=3, load_ns=(6,))
    assert unavoidable(expand(setting(late, duration=200), 0)) == [1]
    assert unavoidable(expand(setting(replace(late, load_ns=(5,)), duration=200), 0)) == [0]
    shared = replace(late, name="other", model="late", offset=20)
    assert unavoidable(expand(setting(late, shared, duration=200), 0)) == [1, 0]
    quick = replace(late, options=(Option(0, 5), Option(1, 9)), load_ns=(6, 0))
    assert unavoidable(expand(setting(quick, units=2, duration=200), 0)) == [0]


def test_search_is_repeatable_and_no_worse_than_any_policy() -> None:
    case = gaming(1)
    streams = tuple(
        replace(stream, options=tuple(replace(option, ns=option.ns * 3) for option in stream.options))
        for stream in case.streams
        if isinstance(stream, Stream)
    )
    load = expand(replace(case, streams=streams), 1)
    found, again = search(load, rounds=40), search(load, rounds=40)
    assert found.run.rows == again.run.rows
    assert 0 < found.violations <= min(violations(run(load, make())) for make in POLICIES.values())
    assert found.rate == pytest.approx(found.violations / sum(each.targets for each in measure(found.run).streams))


@pytest.mark.parametrize("late", list(Late))
def test_violations_are_those_of_the_metrics(late: Late) -> None:
    frames = [Stream(f"s{n}", (Option(0, 7 + n),), 10 + n, 9 + n, late=late) for n in range(3)]
    done = run(expand(setting(*frames, one("last", 5, 2000), duration=150), 0), POLICIES["edf"]())
    assert violations(done) == sum(each.violations for each in measure(done).streams) > 0
