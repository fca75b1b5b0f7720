"""The policies: hand-checked schedules, what sets each apart, and that none breaks the simulator's rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.policies import BASELINES, FIVE, POLICIES
from rlkit.profiles.scheduling.record import Fate, Run
from rlkit.profiles.scheduling.workload import Late, Lengths, Setting, Stream
from rlkit.runtime.jobs import Job, Kind, Option, Policy, Start, State, Unit
from simulated import gaming, llm, one, phase, setting, spans


def under(case: Setting, policy: str, seed: int = 0) -> Run:
    return run(expand(case, seed), POLICIES[policy]())


def missed(done: Run) -> int:
    return sum(not 0 <= at <= due for at, due in zip(done.finished, done.workload.deadlines, strict=True))


def frames(name: str, period: int, *ns: int, **more: object) -> Stream:
    """Frames that take ns[i] on unit i."""
    options = tuple(Option(unit, time) for unit, time in enumerate(ns))
    base: dict[str, object] = {"deadline": period, "late": Late.RUN}
    return Stream(name, options, period, **(base | more))  # type: ignore[arg-type]


CASE_A = setting(one("B", 7, 30), frames("A", 10, 4, count=3))
CASE_B = setting(one("X", 3, 12), one("Y", 6, 7))
CASE_C = setting(one("P", 8, 10), one("Q", 2, 9))
EARLY = {"A0": (0, 4), "B0": (4, 11), "A1": (11, 15), "A2": (20, 24)}


@pytest.mark.parametrize(
    ("case", "policies", "expected", "misses"),
    [
        (CASE_A, "fcfs", {"B0": (0, 7), "A0": (7, 11), "A1": (11, 15), "A2": (20, 24)}, 1),
        (CASE_A, "edf greedy-latency llf hetero-eft rate-monotonic", EARLY, 0),
        (CASE_B, "edf hetero-eft lookahead", {"Y0": (0, 6), "X0": (6, 9)}, 0),
        (CASE_B, "greedy-latency", {"X0": (0, 3), "Y0": (3, 9)}, 1),
        (CASE_C, "edf lookahead", {"Q0": (0, 2), "P0": (2, 10)}, 0),
        (CASE_C, "llf", {"P0": (0, 8), "Q0": (8, 10)}, 1),
    ],
)
def test_hand_checks_on_one_unit(case: Setting, policies: str, expected: object, misses: int) -> None:
    for policy in policies.split():
        done = under(case, policy)
        assert (spans(done), missed(done)) == (expected, misses), policy


def test_hand_check_of_affinity_and_earliest_finish() -> None:
    first, second = frames("M1", 1000, 4, 10, count=1), frames("M2", 1000, 5, 6, count=1)
    case = Setting("d", ("npu", "gpu"), (first, second), 1000)
    assert spans(under(case, "static")) == {"M10": (0, 4), "M20": (4, 9)}
    for policy in ("hetero-eft", "lookahead"):
        assert spans(under(case, policy)) == {"M10": (0, 4), "M20": (0, 6)}


def ready(*jobs: Job, units: int = 2, running: tuple[int, ...] = (), now: int = 0) -> State:
    """A state as an engine would show it; `running` units are busy until 100."""
    made = [Unit(index, f"u{index}") for index in range(units)]
    for index in running:
        made[index].running, made[index].until = jobs[0], 100
    state = State(made)
    state.ready += jobs
    state.now = now
    return state


def job(number: int, kind: Kind, *ns: int, deadline: int = 1000, setup: tuple[int, ...] = (0, 0), **more: int) -> Job:
    options = tuple(Option(unit, time) for unit, time in enumerate(ns))
    period = more.pop("period", 0)
    made = Job(number, number, f"j{number}", kind, 0, 0, deadline, period, 0, True, options, ns, setup)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def decided(policy: str, state: State) -> tuple[int, int] | None:
    """(number, unit) of what starts."""
    decision = POLICIES[policy]().decide(state)
    assert decision is None or isinstance(decision, Start)
    return (decision.job.number, decision.option.unit) if decision else None


def test_fcfs_takes_the_first_idle_unit_in_the_order_of_options_and_edf_the_quickest() -> None:
    state = ready(job(0, Kind.FRAME, 9, 5, deadline=50), job(1, Kind.FRAME, 7, 8, deadline=40))
    assert decided("fcfs", state) == (0, 0)
    assert decided("edf", state) == (1, 0)


def test_setup_counts_where_a_step_is_placed() -> None:
    state = ready(job(0, Kind.FRAME, 5, 7, setup=(3, 0)))
    assert [decided(policy, state) for policy in ("edf", "hetero-eft", "lookahead")] == [(0, 1)] * 3


def test_hetero_eft_waits_for_a_busy_unit_that_finishes_sooner_and_edf_does_not() -> None:
    def state(slow: int) -> State:
        return ready(job(0, Kind.FRAME, 10, slow), running=(0,))

    assert decided("edf", state(200)) == (0, 1)
    assert decided("hetero-eft", state(200)) is None
    assert decided("hetero-eft", state(90)) == (0, 1)


def test_hetero_eft_counts_shared_bandwidth() -> None:
    """Beside a step that asks for 0.9 of the memory, the quicker unit is not where all data are read from it."""
    greedy = Job(
        1, 1, "j", Kind.FRAME, 0, 0, 1000, 0, 0, True, (Option(0, 10, 1.0), Option(1, 12, 0.0)), (10, 12), (0,) * 3
    )
    state = ready(greedy, units=3)
    state.units[2].running, state.units[2].until, state.units[2].demand = job(0, Kind.FRAME, 1), 100, 0.9
    assert decided("hetero-eft", state) == (1, 1)
    assert decided("edf", state) == (1, 0)


def test_hetero_eft_keeps_prompts_and_tokens_on_their_own_units() -> None:
    prompt, token = job(0, Kind.PREFILL, 30, 80), job(1, Kind.DECODE, 9, 6)
    assert decided("hetero-eft", ready(prompt)) == (0, 0)
    assert decided("hetero-eft", ready(prompt, running=(0,))) is None
    assert decided("hetero-eft", ready(token)) == (1, 1)
    # A move pays within 32 tokens, or not at all.
    assert decided("hetero-eft", ready(job(1, Kind.DECODE, 9, 6, setup=(0, 95)))) == (1, 1)
    assert decided("hetero-eft", ready(job(1, Kind.DECODE, 9, 6, setup=(0, 97)))) == (1, 0)


def test_llf_drops_what_cannot_be_in_time_any_more() -> None:
    tight = setting(one("B", 9, 9), frames("A", 10, 8, count=2, late=Late.DROP))
    assert spans(under(tight, "llf")) == {"B0": (0, 9), "A1": (10, 18)}
    assert spans(under(tight, "edf"))["A0"] == (9, 17)  # dropped only when its deadline has passed


def test_ageing_lets_a_long_step_through() -> None:
    stream = frames("short", 10, 10)
    case = setting(stream, one("long", 100, 100_000), duration=10_000)
    assert "long0" in spans(under(case, "greedy-latency"))
    assert "long0" not in spans(under(case, "rate-monotonic"))


def test_a_request_that_is_served_does_not_grow_old() -> None:
    """Otherwise its tokens would pass every frame once it has been there for a while."""
    request = llm([phase(0, 256, 50)], [phase(0, 1, 50)], output=Lengths(20, 20), tpot=1000)
    case = setting(request, frames("short", 100, 30, deadline=60), duration=3000)
    first, second = (under(case, policy) for policy in ("greedy-latency", "fcfs"))
    assert missed(first) < missed(second)


def test_static_keeps_requests_and_frames_apart() -> None:
    request = llm([phase(0, 256, 50), phase(1, 256, 90)], [phase(0, 1, 5), phase(1, 1, 9)])
    case = Setting("s", ("npu", "igpu"), (request, frames("A", 100, 9, 5)), 2000)
    done = under(case, "static")
    assert {(unit, number == 0) for _, _, unit, number, _ in done.steps} == {(0, False), (1, True)}


def test_round_robin_gives_streams_turns() -> None:
    request = llm([phase(0, 256, 10)], [phase(0, 1, 10)], output=Lengths(9, 9))
    case = setting(request, frames("A", 10, 5), frames("B", 10, 5), duration=100)
    streams = [
        done.workload.streams[number] for done in [under(case, "round-robin")] for _, _, _, number, _ in done.steps
    ]
    assert streams == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_rate_monotonic_prefers_short_periods_and_serves_requests_last() -> None:
    state = ready(job(0, Kind.DECODE, 5), job(1, Kind.FRAME, 5, period=33), job(2, Kind.FRAME, 5, period=16), units=1)
    assert decided("rate-monotonic", state) == (2, 0)
    state.ready.pop()
    assert decided("rate-monotonic", state) == (1, 0)


def test_variants_are_for_lookahead_alone_but_a_unit_that_has_nothing_else_is_used() -> None:
    for policy in {**FIVE, **BASELINES}:
        asked = llm(
            [phase(0, 256, 50), phase(0, 64, 2, variant="chunk=64")], [phase(0, 1, 5), phase(0, 1, 3, variant="w2")]
        )
        assert {variant for *_, variant in under(setting(asked), policy).steps} == {""}, policy
        only = llm([phase(0, 64, 50, variant="w2")], [phase(0, 1, 5, variant="w2")])
        assert under(setting(only), policy).fate(0) is Fate.DONE, policy


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_finishes_light_work_and_is_the_same_twice(name: str) -> None:
    case = gaming(2)
    runs = [under(case, name, seed=3) for _ in range(2)]
    assert runs[0].rows == runs[1].rows and runs[0].rows
    assert runs[0].policy == POLICIES[name]().name == name


def test_the_table_has_five_three_baselines_and_our_own() -> None:
    made: dict[str, Callable[[], Policy]] = POLICIES
    assert list(made) == [*FIVE, *BASELINES, "lookahead"] and (len(FIVE), len(BASELINES)) == (5, 3)
