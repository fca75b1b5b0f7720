"""The bound that policies are measured by: schedules made in full knowledge of a run, of all that is random in it.

`exhaustive` tries every sequence of decisions on the simulator: at each event every step that could start on each idle
unit, in each variant, or waiting for the next event. It therefore counts all that the simulator does (shared bandwidth,
setups, moves, requests, what follows what), and its optimum is one among schedules whose steps start at events. Without
shared bandwidth no schedule is better: each start could be moved forward to an arrival or to the end of a step. With
it, starting between events could be, in principle.

`search` is for the rest: it starts from the best policy's schedule and changes order, unit and omission of some jobs
around a violated one, again and again, keeping what is not worse (large-neighbourhood search). It is never worse than
any policy, and has proven nothing unless it reaches `unavoidable`, what no schedule can meet.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from random import Random

from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.metrics import measure
from rlkit.profiles.scheduling.policies import POLICIES
from rlkit.profiles.scheduling.record import NEVER, Run
from rlkit.profiles.scheduling.workload import Llm, Stream, Workload
from rlkit.runtime.jobs import Decision, Drop, Job, Kind, Option, Start, State

__all__ = ["Bound", "exhaustive", "search", "unavoidable", "violations"]

TRIES = 200_000  # runs of an exhaustive search
ROUNDS = 400  # of a search
FREE = -1  # the quickest idle unit
NEAR = 30  # jobs before and after a violated one that a search may change with it


@dataclass(frozen=True, slots=True)
class Bound:
    """The best schedule found: its violations and run, how many runs it took, whether nothing can be better."""

    violations: int
    run: Run
    tried: int
    proven: bool

    @property
    def rate(self) -> float:
        """Violated among all frames and targets, 0 to 1."""
        return measure(self.run).violation_rate


def violations(done: Run) -> int:
    """What `Metrics.violation_rate` counts; without the rest of the metrics where there are only frames."""
    load = done.workload
    if any(isinstance(stream, Llm) for stream in load.setting.streams):
        return sum(stream.violations for stream in measure(done).streams)
    end, lost = load.setting.duration, 0
    for finish, due, gone in zip(done.finished, load.deadlines, done.dropped, strict=True):
        lost += finish > due or gone != NEVER or (finish == NEVER and due <= end)
    return lost


def unavoidable(load: Workload) -> list[int]:
    """By stream: frames and targets that no schedule meets.

    They take longer alone, on the quickest unit in any variant, than there is time; a model's first job, with its
    loading. Of requests it counts first tokens only, and no times per token.
    """
    streams = load.setting.streams
    quickest = [
        min(option.ns for option in stream.options) if isinstance(stream, Stream) else _least_per_token(stream)
        for stream in streams
    ]
    starts: list[int] = []  # by number: when it can begin; what it comes after has a lower number
    soonest: list[int] = []  # and be done, its model being loaded
    first: dict[str, int] = {}
    for number, (place, arrival, parent) in enumerate(zip(load.streams, load.arrivals, load.parents, strict=True)):
        starts.append(max(arrival, soonest[parent]) if parent >= 0 else arrival)
        work = quickest[place] * (1 if isinstance(streams[place], Stream) else load.prompts[number])
        soonest.append(starts[number] + ceil(work))
        model = streams[place].model or streams[place].name
        if starts[number] < starts[first.setdefault(model, number)]:
            first[model] = number
    for number in first.values():
        stream = streams[load.streams[number]]
        loads = [stream.load_ns[option.unit] for option in stream.options if stream.load_ns]
        soonest[number] += min(loads, default=0)
    lost = [0] * len(streams)
    for number, (place, done) in enumerate(zip(load.streams, soonest, strict=True)):
        stream = streams[place]
        due = load.deadlines[number] if isinstance(stream, Stream) else starts[number] + stream.ttft
        lost[place] += done > due and due <= load.setting.duration
    return lost


def _least_per_token(llm: Llm) -> float:
    """Of a prompt, in the quickest chunks wherever they begin."""
    return min(
        min(option.ns / option.units, *phase.least_ns[place : place + 1], option.ns)
        for phase in llm.prefill
        for place, option in enumerate(phase.options)
    )


class _Cut(Exception):
    """This branch cannot be better."""


class _Script:
    """Takes given choices, then the first one each time; notes how many there were."""

    name = "exhaustive"

    def __init__(self, choices: list[int], best: int, parents: set[int]) -> None:
        self.choices, self.counts = choices, [0] * len(choices)
        self._best, self._parents = best, parents
        self._place = 0
        self._now, self._unit = -1, -1
        self._lost: set[int] = set()

    def decide(self, state: State) -> Decision:
        """The choice in turn."""
        if state.now != self._now:
            self._now, self._unit = state.now, -1
        moves = list(self._moves(state))
        if len(self._lost) >= self._best:
            raise _Cut
        # At one time units are served in order, or the same schedule would be tried in every order.
        if self._place == len(self.choices):
            self.choices.append(0)
            self.counts.append(0)
        choice = self.choices[self._place]
        self.counts[self._place] = len(moves) + 1
        self._place += 1
        if choice == len(moves):
            return None
        start = moves[choice]
        self._unit = start.option.unit
        if start.job.kind == Kind.FRAME:
            setup = start.job.setup[start.option.unit]
            self._note(start.job, state.now + setup + start.option.ns)
        return start

    def _note(self, job: Job, soonest: int) -> None:
        if soonest > job.deadline:
            self._lost.add(job.number)

    def _moves(self, state: State) -> Iterator[Start]:
        """What could start; of a stream's frames the first, and none that is lost, unless something follows it."""
        seen = set()
        for job in state.ready:
            if job.kind == Kind.FRAME:
                self._note(job, state.now + min(ns for ns in job.remaining if ns is not None))
                if job.stream in seen or (job.number in self._lost and job.stream not in self._parents):
                    continue
                seen.add(job.stream)
            for option in job.options:
                if option.unit > self._unit and state.units[option.unit].running is None:
                    yield Start(job, option)


def exhaustive(load: Workload, tries: int = TRIES) -> Bound:
    """The optimum of a small workload (about eight steps on two units), by branch and bound on the simulator.

    A branch ends when as much is lost for certain as in the best schedule so far, which is the best policy's at first.
    Unless `tries` runs suffice, the best of them comes back unproven.
    """
    best = _best_policy(load)
    least = sum(unavoidable(load))
    parents = {load.streams[parent] for parent in load.parents if parent >= 0}
    choices: list[int] = []
    tried = 0
    while best.violations > least:
        if tried == tries:
            return Bound(best.violations, best.run, tried, proven=False)
        tried += 1
        script = _Script(choices, best.violations, parents)
        try:
            done = run(load, script)
        except _Cut:
            pass
        else:
            found = violations(done)
            if found < best.violations:
                best = Bound(found, done, tried, proven=False)
        choices, counts = script.choices, script.counts
        while choices and choices[-1] + 1 >= counts[-1]:
            choices.pop()
            counts.pop()
        if not choices:
            break
        choices[-1] += 1
    return Bound(best.violations, best.run, tried, proven=True)


def _best_policy(load: Workload) -> Bound:
    runs = [run(load, make()) for make in POLICIES.values()]
    counts = [violations(done) for done in runs]
    place = counts.index(min(counts))
    return Bound(counts[place], runs[place], 0, proven=False)


@dataclass(frozen=True, slots=True)
class _Gene:
    """What a plan says of a frame, of a prompt or of a request's tokens.

    Its turn (`shift` ns after the deadline), its unit, the variant there, and whether it is left out.
    """

    shift: int = 0
    unit: int = FREE
    variant: str = ""
    left_out: bool = False


NEUTRAL = _Gene()
Plan = dict[tuple[int, bool], _Gene]  # by number, and whether it is of tokens


class _Planned:
    """Follows a plan: jobs in their turn on their units, the quickest idle one where the plan names none."""

    name = "search"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def decide(self, state: State) -> Decision:
        """The first in turn whose unit is idle."""
        for job in sorted(state.ready, key=self._turn):
            gene = self._gene(job)
            if gene.left_out:
                if job.droppable:
                    return Drop(job)
                continue
            ways = [option for option in job.options if state.units[option.unit].running is None]
            if gene.unit != FREE:
                ways = [option for option in ways if option.unit == gene.unit]
            named = [option for option in ways if option.variant == gene.variant]
            if ways:
                return Start(job, min(named or ways, key=_ns))
        return None

    def _gene(self, job: Job) -> _Gene:
        return self._plan.get((job.number, job.kind == Kind.DECODE), NEUTRAL)

    def _turn(self, job: Job) -> int:
        return job.deadline + self._gene(job).shift


def _ns(option: Option) -> int:
    return option.ns


def search(load: Workload, rounds: int = ROUNDS, seed: int = 0) -> Bound:
    """The best schedule found in so many runs; the same for the same seed."""
    rng = Random(seed)
    best = _best_policy(load)
    least = sum(unavoidable(load))
    plan = _plan_of(best.run)
    now = run(load, _Planned(plan))
    current = violations(now)
    tried = 0
    while True:
        if current < best.violations:
            best = Bound(current, now, tried, proven=False)
        if tried >= rounds or best.violations <= least:
            return Bound(best.violations, best.run, tried, proven=best.violations <= least)
        tried += 1
        changed = plan | _changed(plan, now, rng)
        done = run(load, _Planned(changed))
        found = violations(done)
        if found <= current:
            plan, now, current = changed, done, found


def _plan_of(done: Run) -> Plan:
    """A plan that runs frames when and where a run did; requests by their deadlines, where and how it mostly did."""
    load = done.workload
    plan: Plan = {}
    used: dict[tuple[int, bool], Counter[tuple[int, str]]] = defaultdict(Counter)
    for start, finish, number, option in done.rows:
        if isinstance(load.setting.streams[load.streams[number]], Stream):
            plan[number, False] = _Gene(start - load.deadlines[number], option.unit, option.variant)
        else:
            times = done.tokens[number]
            used[number, bool(times) and finish > times[0]][option.unit, option.variant] += option.units
    return plan | {key: _Gene(0, *count.most_common(1)[0][0]) for key, count in used.items()}


def _changed(plan: Plan, done: Run, rng: Random) -> Plan:
    """Other genes for something violated and for some jobs around it."""
    load = done.workload
    at = rng.choice([number for number in range(len(load)) if _late(done, number)] or range(len(load)))
    begin, end = load.arrivals[at], load.deadlines[at]
    near = [
        number
        for number in range(max(0, at - NEAR), min(len(load), at + NEAR))
        if load.arrivals[number] <= end and load.deadlines[number] >= begin - 2 * (end - begin)
    ]
    chosen = {at, *rng.sample(near, min(len(near), rng.randint(1, 4)))}
    made: Plan = {}
    for number in sorted(chosen):
        stream = load.setting.streams[load.streams[number]]
        key = number, isinstance(stream, Llm) and rng.random() < 0.5
        span = max(load.deadlines[number] - load.arrivals[number], 1)
        made[key] = _mutated(plan.get(key, NEUTRAL), stream, span, rng)
    return made


def _late(done: Run, number: int) -> bool:
    """Whether a frame or a first token was not in time."""
    load = done.workload
    if isinstance(load.setting.streams[load.streams[number]], Llm):
        at = done.tokens.get(number, [NEVER])[:1] or [NEVER]
        return not NEVER < at[0] <= load.deadlines[number]
    return not NEVER < done.finished[number] <= load.deadlines[number]


def _mutated(gene: _Gene, stream: Stream | Llm, span: int, rng: Random) -> _Gene:
    """Another turn, another unit or variant, or left out."""
    kind = rng.random()
    if kind < 0.45:
        return replace(gene, shift=gene.shift + round(rng.uniform(-1, 1) * span))
    if kind < 0.9:
        ways = sorted({(option.unit, option.variant) for option in stream.options})
        unit, variant = rng.choice([(FREE, ""), *ways])
        return replace(gene, unit=unit, variant=variant)
    return replace(gene, left_out=not gene.left_out)
