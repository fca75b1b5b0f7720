"""The policies that schedules are compared by: five online ones, three baselines, and the names of all.

They are our own choice: the RTGen paper (arXiv 2507.14715) compares five policies that it does not name in public. All
decide between steps only, and run every step as asked (no variants):

    fcfs            oldest arrival first, on the first idle unit in the order of its options
    edf             earliest deadline first, on the idle unit where it finishes first
    greedy-latency  the quickest step first (XRBench's default), less an eighth of the time it has waited (ageing)
    llf             least laxity first: deadline - now - the least work left; drops frames that cannot make it any more
    hetero-eft      by deadline, each on the unit where it finishes first, the queue of busy units, shared bandwidth
                    and setup counted (HEFT's rule); prompts only where they are computed fastest, tokens where they
                    are read fastest (a cache is moved for that if it pays back within 32 tokens)
    static          language models on the GPU, else from the last unit on; the rest on the NPU, else from the first on
    round-robin     streams take turns, one step each, on the quickest idle unit
    rate-monotonic  shortest period first, on the quickest idle unit; requests last

`lookahead` is ours, meant to beat them: see `rlkit.profiles.scheduling.lookahead`.
"""

from __future__ import annotations

from collections.abc import Callable

from rlkit.profiles.scheduling.lookahead import Lookahead
from rlkit.runtime.jobs import Decision, Drop, Job, Kind, Option, Policy, Start, State, Unit

__all__ = ["BASELINES", "FIVE", "POLICIES"]

AGEING = 8  # a wait of so many ns outweighs 1 ns of work: a frame of 5 ms passes a step of 50 ms for 0.36 s
PAYBACK = 32  # tokens within which moving a cache must pay
NEVER = 1 << 62


def is_variant(option: Option, job: Job) -> bool:
    """Whether its unit has an option before it: the first of a unit is the one as asked, or the nearest to it there."""
    return option.unit in [other.unit for other in job.options[: job.options.index(option)]]


def quickest(job: Job, units: list[Unit]) -> Option | None:
    """The way to run a job's next step as asked that ends first of those on idle units; None if there is none."""
    setup = job.setup
    best, least = None, NEVER
    for option in job.options:
        unit = option.unit
        if units[unit].running is None and not (option.variant and is_variant(option, job)):
            ns = option.ns + setup[unit]
            if ns < least:
                best, least = option, ns
    return best


class Fcfs:
    """First come, first served."""

    name = "fcfs"

    def decide(self, state: State) -> Decision:
        """Start the oldest job that has an idle unit."""
        units = state.units
        for job in state.ready:
            for option in job.options:
                if units[option.unit].running is None:  # the first one of its unit
                    return Start(job, option)
        return None


class Ranked:
    """The job with the least rank among those that have an idle unit, on the unit where its step ends first."""

    __slots__ = ("name", "rank")

    def __init__(self, name: str, rank: Callable[[Job], int]) -> None:
        self.name = name
        self.rank = rank

    def decide(self, state: State) -> Decision:
        """Start the job with the least rank; the older one of equals."""
        rank, units = self.rank, state.units
        chosen, how, least = None, None, NEVER + 1
        for job in state.ready:
            here = rank(job)
            if here < least:
                option = quickest(job, units)
                if option is not None:
                    chosen, how, least = job, option, here
        return None if chosen is None or how is None else Start(chosen, how)


class GreedyLatency:
    """The quickest step first, with ageing."""

    __slots__ = ("_since",)
    name = "greedy-latency"

    def __init__(self) -> None:
        self._since: dict[
            int, tuple[int, int]
        ] = {}  # by request: its steps done, and when its next step was first seen

    def decide(self, state: State) -> Decision:
        """Start the pair of job and idle unit with the least time, less what the job has waited / AGEING."""
        now, units = state.now, state.units
        chosen, how, least = None, None, NEVER
        for job in state.ready:
            option = quickest(job, units)
            if option is not None:
                age = now - (job.arrival if job.kind == Kind.FRAME else self._waiting_since(job, now))
                key = (option.ns + job.setup[option.unit]) * AGEING - age
                if key < least:
                    chosen, how, least = job, option, key
        return None if chosen is None or how is None else Start(chosen, how)

    def _waiting_since(self, job: Job, now: int) -> int:
        """When this step of a request was first seen: a request that is served does not grow old."""
        steps, since = self._since.get(job.number, (-1, 0))
        if steps != job.steps_done:
            since = now if job.steps_done else job.arrival
            self._since[job.number] = job.steps_done, since
        return since


class LeastLaxity:
    """The job with the least time to spare first; what has none left is dropped."""

    name = "llf"

    def decide(self, state: State) -> Decision:
        """Drop a hopeless droppable job, else start the one with the least laxity."""
        now, units = state.now, state.units
        chosen, how, least = None, None, NEVER
        for job in state.ready:
            work = NEVER
            for left in job.remaining:
                if left is not None and left < work:
                    work = left
            laxity = job.deadline - now - work
            if laxity < 0 and job.droppable:
                return Drop(job)
            if laxity < least:
                option = quickest(job, units)
                if option is not None:
                    chosen, how, least = job, option, laxity
        return None if chosen is None or how is None else Start(chosen, how)


class HeteroEft:
    """By deadline, each job where it would finish first, waiting for a busy unit if that is sooner."""

    name = "hetero-eft"

    def decide(self, state: State) -> Decision:
        """Start the first job whose best unit is idle; the best unit of a job before it is taken."""
        now, units, cap = state.now, state.units, state.cap
        free, total = [], 0.0
        for unit in units:
            busy = unit.running is not None
            free.append(unit.until if busy else now)
            if busy:
                total += unit.demand
        for job in sorted(state.ready, key=_deadline):
            pinned, setup = _pinned(job), job.setup
            best, least = None, NEVER
            for option in job.options:
                place = option.unit
                if (pinned >= 0 and place != pinned) or (option.variant and is_variant(option, job)):
                    continue
                ns, demand = option.ns, option.demand
                load = (total - (units[place].demand if units[place].running is not None else 0.0) + demand) / cap
                if load > 1.0:
                    ns = int(ns * (1.0 - demand + demand * load))
                finish = free[place] + setup[place] + ns
                if finish < least:
                    best, least = option, finish
            if best is None:
                continue
            if free[best.unit] <= now and units[best.unit].running is None:
                return Start(job, best)
            free[best.unit] = least
        return None


def _pinned(job: Job) -> int:
    """The unit for a request's phase: least work left for a prompt, the fastest token otherwise; -1 for frames."""
    if job.kind == Kind.FRAME:
        return -1
    pinned, least = -1, NEVER
    for option in job.options:
        unit = option.unit
        if option.variant and is_variant(option, job):
            continue
        left = option.ns * PAYBACK if job.kind == Kind.DECODE else job.remaining[unit]
        if left is not None and left + job.setup[unit] < least:
            pinned, least = unit, left + job.setup[unit]
    return pinned


class Static:
    """Every kind of work has its unit, whatever happens."""

    __slots__ = ("_order",)
    name = "static"

    def __init__(self) -> None:
        self._order: tuple[list[int], list[int]] = ([], [])

    def decide(self, state: State) -> Decision:
        """Start the oldest job whose own unit is idle."""
        units = state.units
        if not self._order[0]:
            places = range(len(units))
            requests = sorted(reversed(places), key=lambda place: "gpu" not in units[place].name)
            frames = sorted(places, key=lambda place: ("npu" not in units[place].name, "gpu" in units[place].name))
            self._order = frames, requests
        for job in state.ready:
            option = self._own(job)
            if option is not None and units[option.unit].running is None:
                return Start(job, option)
        return None

    def _own(self, job: Job) -> Option | None:
        for place in self._order[job.kind != Kind.FRAME]:
            for option in job.options:
                if option.unit == place:
                    return option
        return None


class RoundRobin:
    """Streams take turns."""

    __slots__ = ("_last",)
    name = "round-robin"

    def __init__(self) -> None:
        self._last = -1

    def decide(self, state: State) -> Decision:
        """Start the oldest job of the next stream, after the last one served, that can start."""
        units, last = state.units, self._last
        chosen, how, least = None, None, NEVER
        for job in state.ready:
            turn = job.stream - last
            if turn <= 0:
                turn += NEVER >> 1
            if turn < least:
                option = quickest(job, units)
                if option is not None:
                    chosen, how, least = job, option, turn
        if chosen is None or how is None:
            return None
        self._last = chosen.stream
        return Start(chosen, how)


def _deadline(job: Job) -> int:
    return job.deadline


def _period(job: Job) -> int:
    return job.period or NEVER


def _edf() -> Policy:
    return Ranked("edf", _deadline)


def _rate_monotonic() -> Policy:
    return Ranked("rate-monotonic", _period)


FIVE: dict[str, Callable[[], Policy]] = {
    "fcfs": Fcfs,
    "edf": _edf,
    "greedy-latency": GreedyLatency,
    "llf": LeastLaxity,
    "hetero-eft": HeteroEft,
}
BASELINES: dict[str, Callable[[], Policy]] = {
    "static": Static,
    "round-robin": RoundRobin,
    "rate-monotonic": _rate_monotonic,
}
POLICIES: dict[str, Callable[[], Policy]] = {**FIVE, **BASELINES, "lookahead": Lookahead}
