"""Discrete-event simulation of a workload under a policy.

What happens, in this order at equal times: steps finish (units in order), jobs arrive (in order of number), then the
policy is asked until it has nothing more to start. The rules:

- A step runs to its end on one unit; a unit runs one step at a time. Between steps of a request anything may run.
- Steps share the memory's bandwidth (`contention.py`): whenever the set of running steps changes, speeds change, work
  done so far is kept, and finishes are planned anew, rounded up to whole nanoseconds.
- Before the policy is asked, frames whose stream drops late ones and whose deadline has passed are dropped. With a
  dropped frame goes everything that was to come after it.
- A step pays its job's `setup` first: the model's first load on that unit, a switch from another model, or the move of
  the request's cache from the unit of its step before. It counts as work of the step, with the step's demand.
- A request waits unseen until its cache fits beside those under way and its stream has a place; in order of arrival.
- The run ends at the setting's duration: what finishes then or before is finished, everything else is not.

Nothing here is random. The loop keeps arrivals presorted and looks at units in a short list instead of a heap; a run
switches the cyclic garbage collector off, since it makes many small objects and no cycles.
"""

from __future__ import annotations

import gc
from functools import partial
from math import ceil

from rlkit.profiles.scheduling.contention import rates
from rlkit.profiles.scheduling.record import NEVER, Run
from rlkit.profiles.scheduling.requests import Request, Requests, Setups
from rlkit.profiles.scheduling.workload import Late, Llm, Stream, Workload, foresee
from rlkit.runtime.jobs import Drop, Job, Kind, Option, Policy, Start, State, Unit, Wake

__all__ = ["run"]

ENDLESS = 1 << 62  # later than any run
ROUNDING = 1e-6  # ns: what floating point may add to a finish without moving it to the next nanosecond
FRAME = Kind.FRAME


def run(workload: Workload, policy: Policy) -> Run:
    """Simulate. ValueError: a decision that cannot be carried out, naming the policy and the decision."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _Simulation(workload, policy).run()
    finally:
        if collecting:
            gc.enable()


class _Simulation:
    """The state of one run; see the module."""

    __slots__ = (
        "_began",
        "_cap",
        "_children",
        "_contended",
        "_decide",
        "_demands",
        "_due",
        "_has_setups",
        "_idle",
        "_last",
        "_policy",
        "_ready",
        "_record",
        "_requests",
        "_setup_lists",
        "_setups",
        "_shared",
        "_soonest",
        "_speeds",
        "_state",
        "_templates",
        "_units",
        "_until",
        "_updated",
        "_wake",
        "_work",
        "_workload",
    )

    def __init__(self, workload: Workload, policy: Policy) -> None:
        setting = workload.setting
        count = len(setting.units)
        self._workload, self._policy, self._decide = workload, policy, policy.decide
        self._record = Run(workload, policy.name, [NEVER] * len(workload), [NEVER] * len(workload))
        self._units = [Unit(index, name) for index, name in enumerate(setting.units)]
        self._state = State(self._units, setting.cap, partial(foresee, setting))
        self._ready = self._state.ready
        self._cap = setting.cap
        self._idle = count
        self._soonest, self._wake = ENDLESS, ENDLESS
        self._due = ENDLESS  # no frame in `ready` that is dropped when late is due before
        self._contended = False
        # By unit: of the step that runs there.
        self._until = [ENDLESS] * count
        self._began, self._updated, self._last = [0] * count, [0] * count, [-1] * count
        self._work, self._demands, self._speeds = [0.0] * count, [0.0] * count, [1.0] * count
        self._shared: dict[tuple[float, ...], tuple[float, ...]] = {}
        self._children: dict[int, list[int]] = {}  # by the number of what they wait for
        self._setups = Setups(workload)
        self._setup_lists = self._setups.lists
        self._has_setups = any(any(stream.load_ns) or any(stream.switch_ns) for stream in setting.streams)
        self._requests = Requests(workload, self._record, self._ready, self._setups)
        self._templates = [_template(stream, count) for stream in setting.streams]

    def run(self) -> Run:
        """From the start to the end."""
        times = [*self._workload.arrivals, ENDLESS]
        end = self._workload.setting.duration
        state, ready = self._state, self._ready
        number, arrival = 0, times[0]
        while True:
            now = self._soonest
            if arrival < now:
                now = arrival
            if self._wake < now:
                now = self._wake
            if now > end:
                break
            state.now = now
            if now == self._soonest:
                self._finish(now)
            while arrival == now:
                self._arrive(number, now)
                number += 1
                arrival = times[number]
            self._wake = ENDLESS
            if ready and self._idle:
                self._dispatch(now)
        return self._ended(end)

    def _ended(self, end: int) -> Run:
        cut = self._record.cut
        for unit, began in zip(self._units, self._began, strict=True):
            if unit.running is not None and unit.option is not None and began < end:
                cut.append((began, end, unit.running.number, unit.option))
        return self._record

    # Jobs come.

    def _arrive(self, number: int, now: int) -> None:
        parent = self._workload.parents[number]
        if parent >= 0 and self._record.finished[parent] == NEVER:
            if self._record.dropped[parent] == NEVER:
                self._children.setdefault(parent, []).append(number)
            else:
                self._drop(number, now)
            return
        self._release(number, now)

    def _release(self, number: int, now: int) -> None:
        """Nothing holds it back any more."""
        workload = self._workload
        place = workload.streams[number]
        name, period, priority, late, droppable, options, remaining = self._templates[place]
        if options is None:
            self._requests.submit(number, now)
            return
        deadline = workload.deadlines[number]
        self._ready.append(
            Job(
                number,
                place,
                name,
                FRAME,
                workload.indices[number],
                now,
                deadline,
                period,
                priority,
                droppable,
                options,
                remaining,
                self._setup_lists[place],
            )
        )
        if late and deadline < self._due:
            self._due = deadline

    # Steps start and finish.

    def _dispatch(self, now: int) -> None:
        """Ask the policy until it has nothing more to start."""
        if self._due < now:
            self._drop_late(now)
        decide, state, ready = self._decide, self._state, self._ready
        while ready and self._idle:
            decision = decide(state)
            if type(decision) is Start:
                self._start(decision.job, decision.option, now)
            elif decision is None:
                return
            elif type(decision) is Drop:
                self._give_up(decision.job, now)
            elif type(decision) is Wake and decision.at > now:
                self._wake = decision.at
                return
            else:
                raise self._refused(f"{decision} at {now}: use Start, Drop, None, or Wake at a later time")

    def _refused(self, what: str) -> ValueError:
        return ValueError(f"policy {self._policy.name!r} decided {what}")

    def _start(self, job: Job, option: Option, now: int) -> None:
        index = option.unit
        unit = self._units[index]
        self._take(job, option, unit)
        ns = option.ns + job.setup[index]
        if self._last[index] != job.stream:
            self._last[index] = job.stream
            if self._has_setups:
                self._setups.switch(index, job.stream)
                self._requests.switched()
        if job.kind is not FRAME:
            job.home = index
        demand = option.demand
        until = now + ns
        unit.running, unit.option, unit.demand, unit.until = job, option, demand, until
        self._idle -= 1
        self._began[index] = self._updated[index] = now
        self._work[index], self._speeds[index] = ns, 1.0
        self._until[index] = until
        if demand:
            self._demands[index] = demand
            if sum(self._demands) > self._cap:
                self._share(now)
                return
        if until < self._soonest:
            self._soonest = until

    def _take(self, job: Job, option: Option, unit: Unit) -> None:
        """Take a job out of what is ready, if it can start this way."""
        if unit.running is not None:
            raise self._refused(f"to start {job} on unit {unit.name!r}, which runs {unit.running}: choose an idle unit")
        try:
            self._ready.remove(job)
        except ValueError:
            raise self._refused(f"to start {job}, which is not ready: choose from State.ready") from None
        for known in job.options:
            if known is option:
                return
        raise self._refused(f"to start {job} as {option}: choose from its options")

    def _finish(self, now: int) -> None:
        """Every step that ends now."""
        until, record = self._until, self._record
        while self._soonest == now:
            index = until.index(now)
            unit = self._units[index]
            job, option = unit.running, unit.option
            assert job is not None and option is not None
            unit.running = unit.option = None
            unit.demand = 0.0
            self._demands[index] = 0.0
            until[index] = ENDLESS
            self._soonest = min(until)
            self._idle += 1
            record.rows.append((self._began[index], now, job.number, option))
            job.steps_done += 1
            if job.kind is FRAME:
                record.finished[job.number] = now
                if self._children:
                    self._follow(job.number, now)
            else:
                assert type(job) is Request
                if self._requests.advance(job, option, now):
                    record.finished[job.number] = now
        if self._contended:
            self._share(now)

    def _share(self, now: int) -> None:
        """Plan the finishes of all running steps anew."""
        demands, cap = self._demands, self._cap
        key = tuple(demands)
        found = self._shared.get(key)
        if found is None:
            found = self._shared[key] = rates(key, cap)
        self._contended = sum(demands) > cap
        speeds, work, updated, until = self._speeds, self._work, self._updated, self._until
        for unit in self._units:
            index = unit.index
            speed = found[index]
            if unit.running is None or speed == speeds[index]:
                continue
            left = work[index] - (now - updated[index]) * speeds[index]
            work[index], speeds[index], updated[index] = left, speed, now
            unit.until = until[index] = max(now, now + ceil(left / speed - ROUNDING))
        self._soonest = min(until)

    # Jobs go.

    def _drop_late(self, now: int) -> None:
        ready, streams, due = self._ready, self._workload.setting.streams, ENDLESS
        for job in list(ready):
            stream = streams[job.stream]
            if job.kind is FRAME and isinstance(stream, Stream) and stream.late is Late.DROP:
                if job.deadline < now:
                    ready.remove(job)
                    self._drop(job.number, now)
                elif job.deadline < due:
                    due = job.deadline
        self._due = due

    def _give_up(self, job: Job, now: int) -> None:
        if not job.droppable or job not in self._ready:
            raise self._refused(f"to drop {job}: drop only what is droppable and in State.ready")
        self._ready.remove(job)
        self._drop(job.number, now)
        if type(job) is Request:
            self._requests.leave(job)

    def _drop(self, number: int, now: int) -> None:
        """And with it what was to come after."""
        self._record.dropped[number] = now
        for child in self._children.pop(number, ()):
            self._drop(child, now)

    def _follow(self, number: int, now: int) -> None:
        for child in self._children.pop(number, ()):
            self._release(child, now)


Template = tuple[str, int, int, bool, bool, tuple[Option, ...] | None, tuple[int | None, ...]]


def _template(stream: Stream | Llm, units: int) -> Template:
    """What all jobs of a stream have in common: name, period, priority, late ones go, droppable, options, remaining."""
    if isinstance(stream, Llm):
        return stream.name, 0, stream.priority, False, stream.droppable, None, ()
    remaining: list[int | None] = [None] * units
    for option in stream.options:
        if remaining[option.unit] is None:  # the first option of a unit is the one as asked
            remaining[option.unit] = option.ns
    drops = stream.late is Late.DROP
    return stream.name, stream.period, stream.priority, drops, drops, stream.options, tuple(remaining)
