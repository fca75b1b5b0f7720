"""Real execution: the rules of the simulator by the clock, workers, and steps on real sessions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import nodes
import simulated
import test_scheduling_simpy as random_settings
import tiny
from rlkit.export.build import export_bundle
from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.policies import POLICIES
from rlkit.profiles.scheduling.realrun import lengths, planned
from rlkit.profiles.scheduling.record import Fate, Run
from rlkit.profiles.scheduling.workload import Late, Lengths, Setting, Stream, Workload
from rlkit.runtime.crew import Threads
from rlkit.runtime.dispatch import dispatch
from rlkit.runtime.jobs import Decision, Drop, Job, Kind, Option, Policy, Start, State, Wake
from rlkit.runtime.realsteps import Model, Place, RealWork, Reply, prompt_ids
from rlkit.runtime.request import Event, Finished, Prefilled, Reason, Request, Token
from rlkit.runtime.session import Session, open_bundle
from rlkit.runtime.workplan import Finish


class Timed:
    """A crew and its work in time of their own: a step takes what its option says, times `slower`."""

    def __init__(self, slower: Callable[[Job], float] = lambda job: 1.0, late: int = 0) -> None:
        self.time, self.slower, self.late = 0, slower, late
        self.until: dict[int, int] = {}
        self.errors: dict[int, BaseException] = {}
        self.left: list[int] = []

    def now(self) -> int:
        return self.time

    def start(self, unit: int, task: Callable[[], object]) -> None:
        try:
            task()
        except ValueError as error:
            self.until[unit], self.errors[unit] = self.time, error

    def step(self, job: Job, option: Option) -> None:
        assert option.unit not in self.until
        if self.slower(job) < 0:
            raise ValueError("the accelerator\nis gone")
        self.until[option.unit] = self.time + round((option.ns + job.setup[option.unit]) * self.slower(job))

    def leave(self, job: Job) -> None:
        self.left.append(job.number)

    def wait(self, until: int) -> Sequence[Finish]:
        first = min(self.until.values(), default=until + 1)
        self.time = max(self.time, min(first, until)) + (self.late if first > until else 0)
        return [self.gone(unit) for unit in sorted(self.until) if self.until[unit] <= self.time]

    def rest(self) -> Sequence[Finish]:
        self.time = max([self.time, *self.until.values()])
        return [self.gone(unit) for unit in sorted(self.until)]

    def gone(self, unit: int) -> Finish:
        return Finish(unit, self.until.pop(unit), self.errors.pop(unit, None))


def execute(load: Workload, policy: Policy, crew: Timed | None = None) -> Run:
    timed = crew or Timed()
    plan, record = planned(load, policy.name)
    dispatch(plan, policy, timed, timed)
    return record


def case(*streams: Any, **more: Any) -> Workload:
    return expand(simulated.setting(*streams, **more), 0)


@pytest.mark.parametrize("seed", range(12))
def test_by_an_exact_clock_it_is_the_simulator(seed: int) -> None:
    """Chains, chance, late frames, requests, setups and moves: the same rows, drops and tokens at the same times."""
    load = expand(replace(random_settings.scenario(seed), cap=1e9), seed)  # steps do not slow each other
    for name in ("fcfs", "llf", "hetero-eft", "round-robin"):
        assert execute(load, POLICIES[name]()) == run(load, POLICIES[name]())


def test_a_policy_that_looks_ahead_sees_what_it_sees_in_the_simulator() -> None:
    load = expand(replace(simulated.gaming(1), cap=1e9), 0)
    assert execute(load, POLICIES["lookahead"]()) == run(load, POLICIES["lookahead"]())


def test_planned_finishes_move_as_in_the_simulator() -> None:
    """Two steps that ask for all of the memory take twice as long, until one is done."""
    one = simulated.one("one", 100, 900)
    load = case(
        replace(one, options=(Option(0, 100, 1.0),)),
        replace(one, name="two", options=(Option(1, 300, 1.0),)),
        replace(one, name="three", options=(Option(2, 10),), offset=100),
        units=3,
    )
    seen: list[tuple[int, list[int]]] = []

    class Watching(simulated.Least):
        def decide(self, state: State) -> Decision:
            seen.append((state.now, [unit.until for unit in state.units]))
            return super().decide(state)

    execute(load, Watching("watching", lambda job, now: job.number), Timed(lambda job: 2.0))
    assert seen == [(0, [0, 0, 0]), (0, [100, 0, 0]), (100, [200, 600, 0])]


def test_steps_that_take_longer_are_seen_to() -> None:
    """Overdue steps may end any moment; what they hold up is late, dropped, or cut off by the end."""
    frames = Stream("f", (Option(0, 10),), period=20, deadline=20)
    follower = Stream("g", (Option(1, 5),), period=20, deadline=60, after="f")
    load = case(frames, follower, units=2, duration=100)
    untils: list[int] = []

    class Watching(simulated.Least):
        def decide(self, state: State) -> Decision:
            untils.extend(unit.until - state.now for unit in state.units if unit.running is not None)
            return super().decide(state)

    done = execute(load, Watching("watching", lambda job, now: job.number), Timed(lambda job: 4.5 - 3.5 * job.stream))
    spans = simulated.spans(done)
    assert spans["f0"] == (0, 45) and spans["g0"] == (45, 50) and done.finished[0] == 45
    assert spans["f2"] == (45, 90)  # f1 was due at 40, and dropped with what comes after it
    fates = [done.fate(number) for number in range(len(load))]
    assert fates.count(Fate.DROPPED) == 4 and done.cut == [(90, 100, 8, frames.options[0])]
    assert min(untils) == 1


def test_a_coordinator_that_wakes_late_counts_from_arrivals() -> None:
    """Arrival and time to the first token are those of the workload; starts are when they were."""
    model = simulated.llm([simulated.phase(0, 256, 100)], [simulated.phase(0, 1, 10)], times=(50,))
    load = case(model, Stream("f", (Option(0, 10),), period=1000, deadline=900, offset=500), duration=1000)
    done = execute(load, POLICIES["fcfs"](), Timed(late=7))
    assert done.rows[0][:2] == (57, 157) and done.submitted == {0: 50} and done.tokens == {0: [157, 167, 177]}
    assert simulated.spans(done)["f0"] == (507, 517)


def test_requests_that_are_given_up_leave() -> None:
    class Dropper(simulated.Least):
        def decide(self, state: State) -> Decision:
            old = [job for job in state.ready if job.droppable and job.kind is Kind.DECODE]
            return Drop(old[0]) if old else super().decide(state)

    model = simulated.llm([simulated.phase(0, 256, 100)], [simulated.phase(0, 1, 10)], droppable=True)
    timed = Timed()
    done = execute(case(model), Dropper("dropper", lambda job, now: 0), timed)
    assert timed.left == [0] and done.dropped == [100] and done.tokens == {0: [100]}


@pytest.mark.parametrize(
    ("decide", "said"),
    [
        (lambda state: Wake(state.now), "use Start, Drop, None, or Wake at a later time"),
        (lambda state: Start(state.ready[0], Option(0, 10)), "choose from its options"),
        (lambda state: Drop(state.ready[0]), "drop only what is droppable"),
    ],
)
def test_decisions_that_cannot_be_carried_out_are_refused(decide: Callable[[State], Decision], said: str) -> None:
    class Wrong:
        name = "wrong"

        def decide(self, state: State) -> Decision:
            return decide(state)

    with pytest.raises(ValueError, match=f"policy 'wrong' decided .*{said}"):
        execute(case(simulated.one("one", 10, 90)), Wrong())


def test_a_step_that_fails_ends_the_run_in_one_line() -> None:
    load = case(simulated.one("one", 10, 90))
    with pytest.raises(ValueError) as caught:
        execute(load, POLICIES["fcfs"](), Timed(lambda job: -1.0))
    assert str(caught.value) == "one[0] on unit 'u0' failed: the accelerator is gone; the run has ended"
    assert str(caught.value.__cause__) == "the accelerator\nis gone"


# Workers


def test_workers_run_beside_each_other_and_tell_when_they_finished() -> None:
    """Each waits for the other, so both must run; the clock is ours."""
    times = iter(range(0, 10**6, 10))
    both = threading.Barrier(2)
    with Threads([(), ()], lambda: next(times)) as crew:
        crew.begin()
        assert list(crew.wait(0)) == []
        for unit in (0, 1):
            crew.start(unit, lambda: both.wait(60))
        found = crew.rest()
        assert {finish.unit for finish in found} == {0, 1} and found[0].at < found[1].at
        assert crew.call(1, threading.get_ident) not in (threading.get_ident(), crew.call(0, threading.get_ident))
        with pytest.raises(ZeroDivisionError):
            crew.call(0, lambda: 1 / 0)
        crew.start(0, lambda: 1 / 0)
        (finish,) = crew.wait(1 << 40)
        assert isinstance(finish.error, ZeroDivisionError) and crew.rest() == []
    assert not any(thread.name.startswith("unit ") for thread in threading.enumerate())


def test_workers_stop_when_the_run_is_interrupted() -> None:
    """Control-C: the step that runs ends, the threads are gone, and Python's lock is as it was."""
    before, release = sys.getswitchinterval(), threading.Event()
    with pytest.raises(KeyboardInterrupt), Threads([()]) as crew:
        crew.start(0, lambda: release.wait(60))
        release.set()
        raise KeyboardInterrupt
    assert sys.getswitchinterval() == before
    assert not any(thread.name.startswith("unit ") for thread in threading.enumerate())


@pytest.mark.skipif(not hasattr(__import__("os"), "sched_getaffinity"), reason="threads are not bound here")
def test_workers_are_bound_to_their_processors() -> None:
    import os

    mine = os.sched_getaffinity(0)
    last = max(mine)
    with Threads([(last,), ()]) as crew:
        assert crew.call(0, lambda: os.sched_getaffinity(0)) == {last}
        assert crew.call(1, lambda: os.sched_getaffinity(0)) == mine
    assert os.sched_getaffinity(0) == mine


# Steps


class Scripted:
    """A session that makes token 7, 8, ... and notes what it was asked."""

    vocab_size = 100

    def __init__(self, *, whole: bool = False) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.whole = whole

    def stream(self, request: Request, *, chunk_tokens: Callable[[], int]) -> Generator[Event, None, None]:
        self.asked.append(("prompt", request.prompt_ids))
        total, done = len(request.prompt_ids), 0
        try:
            while done < total:
                chunk = total if self.whole else chunk_tokens()
                done = min(done + chunk, total)
                self.asked.append(("chunk", chunk))
                yield Prefilled(done, total, 0.0)
            for index in range(request.max_new_tokens):
                yield Token(7 + index, "", 0.0, index)
            yield Finished(Reason.LENGTH)
        finally:
            self.asked.append(("closed", done))


def test_a_request_is_read_in_chunks_and_goes_on_by_tokens() -> None:
    session = Scripted()
    reply = Reply((1, 2, 3, 4, 5), 3)
    reply.read(session, 4)
    reply.read(session, 1)
    assert not reply.over
    reply.say(session)
    reply.say(session)
    assert reply.over
    assert session.asked == [("prompt", (1, 2, 3, 4, 5)), ("chunk", 4), ("chunk", 1), ("closed", 5)]


def test_on_another_session_the_text_is_read_again() -> None:
    one, two, three = Scripted(), Scripted(), Scripted()
    reply = Reply((1, 2, 3, 4, 5), 3)
    reply.read(one, 3)
    reply.read(two, 2)
    assert one.asked[-1] == ("closed", 3)
    assert two.asked == [("prompt", (1, 2, 3, 4, 5)), ("chunk", 3), ("chunk", 2)]
    reply.say(three)  # with the first token, and a reply that is one shorter
    assert three.asked == [("prompt", (1, 2, 3, 4, 5, 7)), ("chunk", 6)]
    reply.say(three)
    assert reply.over and three.asked[-1] == ("closed", 6)


def test_a_device_that_reads_prompts_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts are read at once there, not in chunks"):
        Reply((1, 2, 3), 2).read(Scripted(whole=True), 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    return nodes.save(path, [node], {"w": np.ones((16, 4), np.float32)}, {"x": (TensorProto.FLOAT, ["rows", 16])})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4W2), root / "bundle")


def replied(session: Session, prompt: int, number: int, count: int) -> list[int]:
    return [token.id for token in session.generate(prompt_ids(session.vocab_size, prompt, number), count)]


def test_a_workload_runs_on_real_sessions(model: Path, bundle: Path) -> None:
    """Frames and two requests at once on two units, every step where the policy put it; costs are of no account."""
    hour = 3_600 * 10**9  # no deadline depends on how fast the machine is
    frames = Stream("f", (Option(0, 10**6), Option(1, 10**6)), period=10**6, deadline=hour, count=20, late=Late.RUN)
    talk = simulated.llm(
        [simulated.phase(unit, 16, 10**6) for unit in (0, 1)],
        [simulated.phase(unit, 1, 10**6) for unit in (0, 1)],
        times=(0, 0),
        prompt=Lengths(40, 40),
        output=Lengths(6, 6),
    )
    setting = Setting("real", ("a", "b"), (frames, talk), hour)
    load = expand(setting, 0)

    work = RealWork([Place("cpu", 1), Place("cpu", 1)], [Model(model), Model(bundle)], lengths(load))
    with Threads([(), ()]) as threads:
        work.open(threads, [frames.options, talk.options])
        assert len(work.frames) == 2 and work.frames[0, 0] is not work.frames[0, 1]
        assert work.sessions[1, 0] is work.sessions[1, 1]
        crew = Impatient(threads, hour)
        plan, done = planned(load, "fcfs")
        threads.begin()
        dispatch(plan, POLICIES["fcfs"](), crew, work)
        work.close()
    assert all(done.fate(number) is Fate.DONE for number in range(len(load))) and not done.cut
    assert len(done.rows) == 20 + 2 * (3 + 5) and {row[3].unit for row in done.rows} == {0, 1}
    for unit in (0, 1):
        rows = sorted(row[:2] for row in done.rows if row[3].unit == unit)
        assert all(start < finish for start, finish in rows)
        assert all(before[1] <= after[0] for before, after in pairwise(rows))


class Impatient:
    """A crew whose time jumps to the end when there is nothing to wait for but that."""

    def __init__(self, crew: Threads, end: int) -> None:
        self.crew, self.end, self.running, self.over = crew, end, 0, False

    def now(self) -> int:
        return self.end + 1 if self.over else self.crew.now()

    def start(self, unit: int, task: Callable[[], object]) -> None:
        self.running += 1
        self.crew.start(unit, task)

    def wait(self, until: int) -> Sequence[Finish]:
        self.over = not self.running and until > self.end
        found = [] if self.over else self.crew.wait(until)
        self.running -= len(found)
        return found

    def rest(self) -> Sequence[Finish]:
        return self.crew.rest()


def test_requests_beside_each_other_say_what_they_say_alone(bundle: Path) -> None:
    """One session, two threads at once: tokens are those of one after the other."""
    session = open_bundle(bundle, threads=1)
    session.keep_caches(0)
    alone = [replied(session, 20, number, 8) for number in (1, 2)]
    replies = [Reply(prompt_ids(session.vocab_size, 20, number), 8) for number in (1, 2)]

    def whole(reply: Reply) -> None:
        reply.read(session, 16)
        reply.read(session, 4)
        while not reply.over:
            reply.say(session)

    with Threads([(), ()]) as crew:
        for unit, reply in enumerate(replies):
            crew.start(unit, lambda reply=reply: whole(reply))
        assert [finish.error for finish in crew.rest()] == [None, None]
    assert [reply._ids[20:] for reply in replies] == alone
