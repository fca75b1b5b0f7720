"""Our own policy: before a step starts, futures with and without it are played forward, and the cheapest one begins.

Steps cannot be interrupted, so what a start does to frames that come a few milliseconds later is decided at the start.
The default future serves by deadline in the style that did best so far (`foresight`). If that loses nothing within the
horizon, its first step starts. If it does, others are played too: the other styles; each step that could start now, on
each idle unit, in each variant (smaller chunks of a prompt, weights of fewer bits); and each idle unit left idle until
a frame comes. Frames that can no longer be in time are dropped before they cost a unit's time. What the best future
loses is accepted: the search begins again when something else would be lost, and while nothing unforeseen happens, the
default is trusted for half a horizon.

Frames of rarer streams and first tokens weigh more than frames of which there are many, between counting all alike and
counting every stream alike. A token's deadline here is the request's: the first token's time and a target for each
token since, so that what a request has saved can be spent.

What is known: the jobs, periodic frames to come at their nominal times. What is learned as it goes: which stream
follows which (its frames appear when the other's finish), how long tokens take. What is not: when requests come, how
long answers are. Decisions are bounded: so many frames ahead, so many futures.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from rlkit.profiles.scheduling.foresight import (
    ENDLESS,
    REQUEST,
    TOKEN,
    Claim,
    Mode,
    Play,
    Style,
    Ways,
    World,
    frame_number,
    token_dues,
)
from rlkit.profiles.scheduling.habits import Habits, ways_of
from rlkit.runtime.jobs import Decision, Drop, Job, Kind, Option, Start, State, Wake

__all__ = ["Lookahead"]

SHORTEST, LONGEST = 50e6, 300e6  # ns, of the horizon
STEPS_AHEAD = 2.0  # horizon in the longest steps that could start now
STEPS_AT_MOST = 600  # horizon in the shortest steps of requests, which nothing else ends
FRAMES = 32  # frames to come that a future holds at most
CLAIMS = 6  # jobs of which alternatives are played
BETTER = 0.02  # violations: what an alternative must save
DEGRADED = 0.5  # of a violation: a step of quality 0 instead of 1
MARGIN = 0.05  # of the time that a prompt has: kept back for what cannot be foreseen
LATE = 1e-3  # of a violation: a frame that is late already and must be run some time
TRUSTED = 0.5  # of the horizon


class Future(NamedTuple):
    """A future played: its cost, what it loses, and what it starts now, if anything."""

    cost: float
    lost: frozenset[int]
    job: Job | None
    option: Option | None


class Lookahead:
    """See the module."""

    __slots__ = (
        "_accepted",
        "_claims",
        "_coming",
        "_end",
        "_habits",
        "_held",
        "_jobs",
        "_last",
        "_style",
        "_times",
        "_trusted",
        "_variants",
        "_world",
    )
    name = "lookahead"

    def __init__(self) -> None:
        self._habits = Habits()
        self._world: World | None = None
        self._accepted: frozenset[int] = frozenset()
        self._trusted = -1.0
        self._style = Style.PATIENT
        self._variants: dict[int, str] = {}  # by request: as what it goes on, if not as asked
        self._last: list[int] = []  # by unit: the stream that ran there last
        # Of the decision under way:
        self._jobs: dict[int, Job] = {}
        self._claims: list[Claim] = []
        self._held: list[tuple[int, float, float, Claim]] = []
        self._coming: list[Claim] = []
        self._times: list[float] = []
        self._end = 0.0

    def decide(self, state: State) -> Decision:
        """Drop what is hopeless, else begin the best future found."""
        now = state.now
        if self._habits.observe(state):
            self._trusted = -1.0
        if self._world is None:
            self._world, self._last = World(state.cap, len(state.units)), [-1] * len(state.units)
        for job in state.ready:
            if job.droppable and job.kind == Kind.FRAME and job.deadline < now + _least(job):
                return Drop(job)
        claims = [_as(self._claim(job, now), job, self._variants.get(job.number, "")) for job in state.ready]
        self._jobs = {claim.number: job for claim, job in zip(claims, state.ready, strict=True)}
        claims.sort()
        self._claims = claims
        self._held = [
            (unit.index, float(max(unit.until, now)), unit.demand, self._claim(unit.running, now, running=True))
            for unit in state.units
            if unit.running is not None
        ]
        if now < self._trusted:
            play = self._play(state)
            play.coming, play.arrivals, play.place = self._coming, self._times, bisect_right(self._times, now)
            play.serve()
            future = self._first(play, 0.0)
            if future.job is None or future.job.kind == Kind.FRAME:
                return self._decision(future, int(self._trusted) + 1)
        longest = max(claim.ways[-1][1] for claim in claims)
        horizon = min(max(STEPS_AHEAD * longest, SHORTEST), LONGEST, STEPS_AT_MOST * self._shortest(claims))
        self._end = now + horizon
        self._coming, self._times = self._habits.coming(state, self._end, FRAMES)
        self._world.prices = self._habits.prices
        best = self._search(state)
        self._trusted = self._safe_until(now, best)
        return self._decision(best, int(min(self._times[0], self._end)) + 1)

    def _shortest(self, claims: list[Claim]) -> float:
        """The shortest chunk or token of what waits and what runs."""
        modes = [claim.mode for claim in (*claims, *(held[-1] for held in self._held)) if claim.mode is not None]
        return min((ways[0][1] for mode in modes for ways in (mode.chunk, mode.token) if ways), default=ENDLESS)

    def _safe_until(self, now: int, best: Future) -> float:
        """How long the default needs no second thought: not up to where what is lost may be lost to a decision."""
        until = now + TRUSTED * (self._end - now)
        lost = [number >> 8 for number in best.lost if number > 0]
        if not lost:
            return until
        assert self._world is not None
        longest = max(claim.ways[0][1] for claim in (*self._claims, *self._coming)) + max(self._world.switch)
        return min(until, min(lost) - 2 * longest)

    def _decision(self, future: Future, again: int) -> Decision:
        if future.job is not None and future.option is not None:
            self._last[future.option.unit] = future.job.stream
            self._habits.started(future.job, future.option.unit)
            return Start(future.job, future.option)
        return Wake(again)

    def _search(self, state: State) -> Future:
        """The best future."""
        best = self._run(self._play(state))
        if not best.lost:
            return self._restored(state, best)
        if best.lost <= self._accepted:
            # What is lost may be lost to the step that is about to start.
            return best if best.option is None else self._waiting(state, best, [best.option.unit])
        style = self._style
        for other in Style:
            if other is not style:
                future = self._run(self._play(state, style=other), best.cost)
                if future.cost < best.cost - BETTER:
                    best, self._style = future, other
        best = self._varied(state, best)
        idle = [unit.index for unit in state.units if unit.running is None]
        best = self._waiting(state, self._started(state, best, idle), idle)
        best = self._pinned(state, best)
        soon = frame_number(0, int(state.now + TRUSTED * (self._end - state.now)))
        self._accepted = frozenset(number for number in best.lost if number < soon)
        return best

    def _restored(self, state: State, best: Future) -> Future:
        """Requests go on as asked again if that loses nothing."""
        for claim in self._claims:
            job = self._jobs[claim.number]
            if claim.mode is not None and claim.mode.variant:
                before = self._claims
                self._put(claim, self._claim(job, state.now))
                future = self._run(self._play(state))
                if future.lost:
                    self._claims = before
                else:
                    best = future
                    self._variants.pop(job.number, None)
        return best

    def _varied(self, state: State, best: Future) -> Future:
        """The best future, or a better one in which a request goes on as another variant."""
        for claim in self._claims[:CLAIMS]:
            job = self._jobs[claim.number]
            if claim.mode is None:
                continue
            now = claim.mode.variant
            plain = self._claim(job, state.now)
            for variant, option in {option.variant: option for option in job.options}.items():
                if variant == now:
                    continue
                before = self._claims
                self._put(claim, _as(plain, job, variant))
                future = self._run(self._play(state), best.cost)
                if future.cost + _worse(claim, option) < best.cost - BETTER:
                    best, self._variants[job.number] = future, variant
                    break
                self._claims = before
        return best

    def _pinned(self, state: State, best: Future) -> Future:
        """The best future, or a better one in which the request that would go on now does so on one unit only."""
        claim = next((each for each in self._claims if best.job is self._jobs[each.number]), None)
        if claim is None or claim.mode is None:
            return best
        before = self._claims
        for way in claim.ways:
            self._put(claim, claim._replace(ways=(way,)))
            future = self._run(self._play(state), best.cost - BETTER)
            if future.cost < best.cost - BETTER:
                best = future
            self._claims = before
        return best

    def _put(self, claim: Claim, other: Claim) -> None:
        """One claim instead of another."""
        self._claims = sorted([other, *(each for each in self._claims if each is not claim)])

    def _started(self, state: State, best: Future, idle: list[int]) -> Future:
        """The best future, or a better one that begins with another step."""
        for claim in self._claims[:CLAIMS]:
            job = self._jobs[claim.number]
            for option in job.options:
                if option.unit in idle:
                    play = self._play(state, claim)
                    changed = _as(claim, job, option.variant)
                    play.start(changed, option.unit, float(option.ns + job.setup[option.unit]), option.demand)
                    limit = best.cost - BETTER
                    cost = play.run(self._coming, self._times, self._end, limit) + _worse(claim, option)
                    if cost < limit:
                        best = Future(cost, frozenset(play.lost), job, option)
        return best

    def _waiting(self, state: State, best: Future, units: list[int]) -> Future:
        """The best future, or a better one in which one of these units waits for a frame that is lost otherwise."""
        assert self._world is not None
        if best.job is None or best.option is None:
            return best
        ends = state.now + best.option.ns + best.job.setup[best.option.unit]
        for place, claim in enumerate(self._coming):
            if self._times[place] >= ends:
                return best
            if claim.number in best.lost or (claim.child is not None and claim.child.number in best.lost):
                break
        else:
            return best
        coming = self._coming[:place] + self._coming[place + 1 :]
        times = self._times[:place] + self._times[place + 1 :]
        for unit, ns, demand in claim.ways:
            if unit in units:
                play = self._play(state)
                play.start(claim, unit, self._times[place] - state.now + ns + self._world.switch[unit], demand)
                future = self._first(play, play.run(coming, times, self._end, best.cost - BETTER))
                if future.cost < best.cost - BETTER:
                    best = future
        return best

    def _run(self, play: Play, limit: float = ENDLESS) -> Future:
        return self._first(play, play.run(self._coming, self._times, self._end, limit))

    def _first(self, play: Play, cost: float) -> Future:
        lost = frozenset(play.lost)
        if play.first is None:
            return Future(cost, lost, None, None)
        claim, unit = play.first
        job = self._jobs[claim.number]
        variant = claim.mode.variant if claim.mode else ""
        there = [option for option in job.options if option.unit == unit]
        option = next((option for option in there if option.variant == variant), there[0])
        return Future(cost, lost, job, option)

    def _play(self, state: State, without: Claim | None = None, style: Style | None = None) -> Play:
        """A future as things are, perhaps without a claim that is about to start."""
        assert self._world is not None
        waiting = self._claims.copy()
        if without is not None:
            waiting.remove(without)
        play = Play(self._world, state.now, waiting, self._style if style is None else style, self._last.copy())
        for held in self._held:
            play.hold(*held)
        play.settle()
        return play

    def _claim(self, job: Job, now: int, running: bool = False) -> Claim:
        habits, stream = self._habits, job.stream
        if job.kind == Kind.FRAME:
            self._learn_switch(job)
            ways = self._ways(job) if any(job.setup) else habits.ways(stream, job.options)
            claim = habits.frame(stream, job.deadline, ways)
            if not running and job.deadline < now + ways[0][1] and not job.droppable:
                return claim._replace(order=ENDLESS / 2, deadline=ENDLESS / 2, weight=LATE)
            return claim
        ways = self._ways(job)
        target = habits.target(job)
        token = habits.tokens.get(stream, ())
        number = -1 - job.number
        if job.kind == Kind.DECODE:
            due = habits.token_due(job)
            order, deadline = token_dues(due, job.deadline - target, target)
            mode = Mode(-1.0, ways, token or ways, target, target, due)
            return Claim(order, number, deadline, ways, TOKEN, stream, None, mode)
        plain = ways_of(job.options)
        unit, ns, _ = plain[0]
        left = max(0.0, (job.remaining[unit] or 0) / ns - 1.0)
        patience = float(job.deadline - job.arrival)
        mode = Mode(left if left > 1e-3 else 0.0, plain, token, target, patience)
        early = job.deadline - MARGIN * patience
        deadline = early if now + ways[0][1] + mode.left * ns <= early else float(job.deadline)
        return Claim(deadline, number, deadline, ways, REQUEST, stream, None, mode)

    def _ways(self, job: Job) -> Ways:
        """With the setup, less the switch that a play adds by itself."""
        assert self._world is not None
        switch, last = self._world.switch, self._last
        setup = [ns - (switch[unit] if last[unit] != job.stream else 0.0) for unit, ns in enumerate(job.setup)]
        return ways_of(job.options, setup)

    def _learn_switch(self, job: Job) -> None:
        """The least setup that a frame had to pay on a unit is a switch; a load is longer."""
        assert self._world is not None
        switch = self._world.switch
        for unit, ns in enumerate(job.setup):
            if ns and (not switch[unit] or ns < switch[unit]):
                switch[unit] = float(ns)


def _worse(claim: Claim, option: Option) -> float:
    """What the loss of quality costs."""
    return (1.0 - option.quality) * DEGRADED * claim.weight


def _as(claim: Claim, job: Job, variant: str) -> Claim:
    """A claim whose request goes on as a variant."""
    mode = claim.mode
    if mode is None or not variant:
        return claim
    options = [other for other in job.options if other.variant == variant]
    if not options:  # chunks, once the prompt is read
        return claim
    ways = ways_of(options)
    if job.kind == Kind.DECODE:
        return claim._replace(ways=ways_of(options, job.setup), mode=mode._replace(token=ways, variant=variant))
    asked = next(other for other in job.options if other.unit == options[0].unit)
    chunks = (mode.left + 1.0) * asked.units / options[0].units  # so many of this size are left
    mode = mode._replace(left=max(chunks - 1.0, 0.0), chunk=ways, variant=variant)
    return claim._replace(ways=ways_of(options, job.setup), mode=mode)


def _least(job: Job) -> int:
    return min(ns for ns in job.remaining if ns is not None)
