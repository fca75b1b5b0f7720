"""Runs a workload for real: steps on units of this machine as a policy decides, by the clock.

The same rules as the simulator's (`profiles/scheduling/engine.py`), with the same `State` and the same policies: what
happens at one time happens in the order finishes, arrivals, decisions; late frames are dropped before the policy is
asked; the run ends at its duration, and steps that are still running then count as cut off. Differences: a step takes
as long as it takes, and everything here takes time as well (decisions, threads that wake up).

One thread, the caller's, does all of it: workers (`runtime/crew.py`) run steps and say when they finished, and touch
nothing else, so jobs, units and the state need no lock. Costs are what the policy goes by; `Unit.until` is planned with
them and with the bandwidth that running steps share, and a step that is overdue may finish any moment.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial

from rlkit.runtime.jobs import Drop, Job, Kind, Option, Policy, Start, State, Unit, Wake
from rlkit.runtime.workplan import Crew, Finish, Frames, Plan, Work

__all__ = ["Effort", "dispatch"]

ENDLESS = 1 << 62  # later than any run
NEVER = -1  # the time of what has not happened


@dataclass(slots=True)
class Effort:
    """What deciding took: how often, ns in all, ns of the longest."""

    decisions: int = 0
    ns: int = 0
    longest: int = 0


def dispatch(plan: Plan, policy: Policy, crew: Crew, work: Work) -> Effort:
    """Run the plan; its record holds what happened. Returns when nothing runs any more, unless something failed.

    Raises ValueError in one line for a decision that cannot be carried out, and for a step that failed (the cause is
    attached). Workers may still run then: close the crew.
    """
    collecting = gc.isenabled()
    gc.disable()  # a collection stops every thread
    try:
        return _Run(plan, policy, crew, work).run()
    finally:
        if collecting:
            gc.enable()


@dataclass(slots=True)
class _Running:
    """By unit: when its step began, and the speed that its planned finish assumes."""

    began: int = 0
    speed: float = 1.0
    last: int = NEVER  # the stream that ran there before


class _Run:
    """The state of one run; see the module."""

    def __init__(self, plan: Plan, policy: Policy, crew: Crew, work: Work) -> None:
        self._plan, self._policy, self._crew, self._work = plan, policy, crew, work
        self._units = [Unit(index, name) for index, name in enumerate(plan.units)]
        self._state = State(self._units, plan.cap, plan.foresee)
        self._state.ready = self._ready = plan.ready
        self._running = [_Running() for _ in plan.units]
        self._children: dict[int, list[int]] = {}  # by the number of what they wait for
        self._remaining = [None if each is None else _remaining(each, len(plan.units)) for each in plan.streams]
        self._wake = ENDLESS
        self._effort = Effort()

    def run(self) -> Effort:
        """From the start to the end."""
        crew, end = self._crew, self._plan.duration
        times = [*self._plan.workload.arrivals, ENDLESS]
        number, now = 0, crew.now()
        while now <= end:
            while times[number] <= now:
                self._arrive(number)
                number += 1
            self._wake = ENDLESS
            self._dispatch(now)
            for finish in crew.wait(min(times[number], self._wake, end + 1)):
                self._finish(finish)
            now = crew.now()
        for finish in crew.rest():
            self._finish(finish)
        self._cut()
        return self._effort

    def _cut(self) -> None:
        """What the end of the run has cut off."""
        end, cut = self._plan.duration, self._plan.record.cut
        for unit, running in zip(self._units, self._running, strict=True):
            if unit.running is not None and unit.option is not None and running.began < end:
                cut.append((running.began, end, unit.running.number, unit.option))

    # Jobs come.

    def _arrive(self, number: int) -> None:
        parent, record = self._plan.workload.parents[number], self._plan.record
        time = self._plan.workload.arrivals[number]
        if parent >= 0 and record.finished[parent] == NEVER:
            if record.dropped[parent] == NEVER:
                self._children.setdefault(parent, []).append(number)
            else:
                self._drop(number, time)
            return
        self._release(number, time)

    def _release(self, number: int, time: int) -> None:
        """Nothing holds it back any more, since `time`: that may be a little before now."""
        plan, workload = self._plan, self._plan.workload
        place = workload.streams[number]
        frames, remaining = plan.streams[place], self._remaining[place]
        if frames is None or remaining is None:
            plan.requests.submit(number, time)
            return
        job = Job(
            number,
            place,
            frames.name,
            Kind.FRAME,
            workload.indices[number],
            time,
            workload.deadlines[number],
            frames.period,
            frames.priority,
            frames.drops,
            frames.options,
            remaining,
            plan.setups.lists[place],
        )
        at = len(self._ready)
        while at and self._ready[at - 1].arrival > time:
            at -= 1
        self._ready.insert(at, job)

    # Steps start and finish.

    def _dispatch(self, now: int) -> None:
        """Ask the policy until it has nothing more to start."""
        state, ready, crew = self._state, self._ready, self._crew
        if ready and state.idle():
            self._drop_late(now)
        while ready and state.idle():
            state.now = began = crew.now()
            self._overdue(began)
            decision = self._policy.decide(state)
            self._note(crew.now() - began)
            if type(decision) is Start:
                self._start(decision.job, decision.option)
            elif decision is None:
                return
            elif type(decision) is Drop:
                self._give_up(decision.job, began)
            elif type(decision) is Wake and decision.at > state.now:
                self._wake = decision.at
                return
            else:
                raise self._refused(f"{decision} at {state.now}: use Start, Drop, None, or Wake at a later time")

    def _note(self, ns: int) -> None:
        self._effort.decisions += 1
        self._effort.ns += ns
        self._effort.longest = max(self._effort.longest, ns)

    def _overdue(self, now: int) -> None:
        for unit in self._units:
            if unit.running is not None and unit.until <= now:
                unit.until = now + 1

    def _refused(self, what: str) -> ValueError:
        return ValueError(f"policy {self._policy.name!r} decided {what}")

    def _start(self, job: Job, option: Option) -> None:
        unit, running = self._units[option.unit], self._running[option.unit]
        self._take(job, option, unit)
        running.began = now = self._crew.now()
        ns = option.ns + job.setup[option.unit]
        self._crew.start(option.unit, partial(self._work.step, job, option))
        if running.last != job.stream:
            running.last = job.stream
            self._plan.setups.switch(option.unit, job.stream)
            self._plan.requests.switched()
        if job.kind is not Kind.FRAME:
            job.home = option.unit
        unit.running, unit.option, unit.demand, unit.until = job, option, option.demand, now + ns
        running.speed = 1.0
        self._share(now)

    def _take(self, job: Job, option: Option, unit: Unit) -> None:
        """Take a job out of what is ready, if it can start this way."""
        if unit.running is not None:
            raise self._refused(f"to start {job} on unit {unit.name!r}, which runs {unit.running}: choose an idle unit")
        if job not in self._ready:
            raise self._refused(f"to start {job}, which is not ready: choose from State.ready")
        if not any(known is option for known in job.options):
            raise self._refused(f"to start {job} as {option}: choose from its options")
        self._ready.remove(job)

    def _finish(self, finish: Finish) -> None:
        unit, running, record = self._units[finish.unit], self._running[finish.unit], self._plan.record
        job, option = unit.running, unit.option
        assert job is not None and option is not None
        if finish.error is not None:
            why = " ".join(str(finish.error).split())[:300] or type(finish.error).__name__
            what = f"{job.name}[{job.index}] on unit {unit.name!r} failed: {why}; the run has ended"
            raise ValueError(what) from finish.error
        if finish.at > self._plan.duration:
            return  # it is among what was cut off
        unit.running = unit.option = None
        unit.demand = 0.0
        record.rows.append((running.began, finish.at, job.number, option))
        job.steps_done += 1
        if job.kind is Kind.FRAME:
            record.finished[job.number] = finish.at
            for child in self._children.pop(job.number, ()):
                self._release(child, finish.at)
        elif self._plan.requests.advance(job, option, finish.at):
            record.finished[job.number] = finish.at
        self._share(finish.at)

    def _share(self, now: int) -> None:
        """Plan the finishes of running steps anew, by the speeds that they have beside each other."""
        speeds = self._plan.speeds([unit.demand for unit in self._units])
        for unit, running, speed in zip(self._units, self._running, speeds, strict=True):
            if unit.running is not None and speed != running.speed:
                unit.until = now + round((unit.until - now) * running.speed / speed)
                running.speed = speed

    # Jobs go.

    def _drop_late(self, now: int) -> None:
        for job in list(self._ready):
            frames = self._plan.streams[job.stream]
            if frames is not None and frames.drops and job.deadline < now:
                self._ready.remove(job)
                self._drop(job.number, now)

    def _give_up(self, job: Job, now: int) -> None:
        if not job.droppable or job not in self._ready:
            raise self._refused(f"to drop {job}: drop only what is droppable and in State.ready")
        self._ready.remove(job)
        self._drop(job.number, now)
        if job.kind is not Kind.FRAME:
            self._plan.requests.leave(job)
            self._work.leave(job)

    def _drop(self, number: int, now: int) -> None:
        """And with it what was to come after."""
        self._plan.record.dropped[number] = now
        for child in self._children.pop(number, ()):
            self._drop(child, now)


def _remaining(frames: Frames, units: int) -> tuple[int | None, ...]:
    found: list[int | None] = [None] * units
    for option in frames.options:
        if found[option.unit] is None:  # the first option of a unit is the one as asked
            found[option.unit] = option.ns
    return tuple(found)
