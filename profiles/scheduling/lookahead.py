"""Our own policy: before a step starts, futures with and without it are played forward, and the cheapest one begins.

Steps cannot be interrupted, so what a start does to frames that come a few milliseconds later is decided at the start.
The default future serves by deadline in the style that did best so far (`foresight`). If that loses nothing within the
horizon, its first step starts. If it does, others are played too: the other styles; each step that could start now, on
each idle unit, in each variant (smaller chunks of a prompt, weights of fewer bits); and each idle unit left idle until
a frame comes. Frames that can no longer be in time are dropped before they cost a unit's time. What the best future
loses is accepted: the search begins again when something else would be lost, and while nothing unforeseen happens, the
default is trusted for half a horizon.

A token's deadline here is the request's: the first token's time and a target for each token since, so that what a
request has saved can be spent.

What is known: the jobs, periodic frames to come at their nominal times. What is learned as it goes: which stream
follows which (its frames appear when the other's finish), how long tokens take. What is not: when requests come, how
long answers are. Decisions are bounded: so many frames ahead, so many futures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rlkit.profiles.scheduling.foresight import ENDLESS, Claim, Mode, Play, Style, Ways, World, frame_number
from rlkit.profiles.scheduling.habits import Habits, ways_of
from rlkit.runtime.jobs import Decision, Drop, Job, Kind, Option, Start, State, Wake

__all__ = ["Lookahead"]

SHORTEST, LONGEST = 50e6, 300e6  # ns, of the horizon
STEPS_AHEAD = 2.0  # horizon in the longest steps that could start now
FRAMES = 32  # frames to come that a future holds at most
CLAIMS = 6  # jobs of which alternatives are played
BETTER = 0.02  # violations: what an alternative must save
DEGRADED = 0.5  # of a violation: a step of quality 0 instead of 1
LATE = 1e-3  # of a violation: a frame that is late already and must be run some time
REQUEST, TOKEN = 1.0, 0.2  # weight of a first token, of a further one
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
        "_world",
    )
    name = "lookahead"

    def __init__(self) -> None:
        self._habits = Habits()
        self._world: World | None = None
        self._accepted: frozenset[int] = frozenset()
        self._trusted = -1.0
        self._style = Style.PATIENT
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
        claims = [self._claim(job, now) for job in state.ready]
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
            play.serve()
            future = self._first(play, 0.0)
            if future.job is None or future.job.kind == Kind.FRAME:
                return self._decision(future, int(self._trusted) + 1)
        longest = max(claim.ways[-1][1] for claim in claims)
        horizon = min(max(STEPS_AHEAD * longest, SHORTEST), LONGEST)
        self._end = now + horizon
        self._coming, self._times = self._habits.coming(state, self._end, FRAMES)
        self._world.prices = self._habits.prices
        best, barred = self._search(state)
        if not barred:
            self._trusted = now + TRUSTED * horizon
        return self._decision(best, int(min(self._times[0], self._end)) + 1)

    def _decision(self, future: Future, again: int) -> Decision:
        if future.job is not None and future.option is not None:
            self._last[future.option.unit] = future.job.stream
            return Start(future.job, future.option)
        return Wake(again)

    def _search(self, state: State) -> tuple[Future, bool]:
        """The best future, and whether it leaves a unit idle that could run something."""
        best, barred = self._run(self._play(state)), False
        if best.lost <= self._accepted:
            return best, False
        style = self._style
        for other in Style:
            if other is not style:
                future = self._run(self._play(state, style=other), best.cost)
                if future.cost < best.cost - BETTER:
                    best, self._style = future, other
        least = best.cost - BETTER
        idle = [unit.index for unit in state.units if unit.running is None]
        for future in self._others(state, idle, least):
            if future.cost < least:
                best, least = future, future.cost
        if self._times[0] < ENDLESS:
            for unit in idle:
                play = self._play(state)
                play.bar(unit, self._times[0] + 1)
                future = self._run(play, least)
                if future.cost < least:
                    best, least, barred = future, future.cost, True
        soon = frame_number(0, int(state.now + TRUSTED * (self._end - state.now)))
        self._accepted = frozenset(number for number in best.lost if number < soon)
        return best, barred

    def _others(self, state: State, idle: list[int], limit: float) -> Iterator[Future]:
        """Futures that begin with another step."""
        for claim in self._claims[:CLAIMS]:
            job = self._jobs[claim.number]
            for option in job.options:
                if option.unit in idle:
                    play = self._play(state, claim)
                    changed, extra = _changed(claim, job, option)
                    play.start(changed, option.unit, float(option.ns + job.setup[option.unit]), option.demand)
                    cost = play.run(self._coming, self._times, self._end, limit) + extra
                    limit = min(limit, cost)
                    yield Future(cost, frozenset(play.lost), job, option)

    def _run(self, play: Play, limit: float = ENDLESS) -> Future:
        return self._first(play, play.run(self._coming, self._times, self._end, limit))

    def _first(self, play: Play, cost: float) -> Future:
        lost = frozenset(play.lost)
        if play.first is None:
            return Future(cost, lost, None, None)
        claim, unit = play.first
        job = self._jobs[claim.number]
        option = next(option for option in job.options if option.unit == unit)
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
            return Claim(due, number, due, ways, TOKEN, stream, None, Mode(-1.0, ways, token or ways, target))
        plain = ways_of(job.options)
        unit, ns, _ = plain[0]
        left = max(0.0, (job.remaining[unit] or 0) / ns - 1.0)
        mode = Mode(left if left > 1e-3 else 0.0, plain, token, target)
        return Claim(job.deadline, number, job.deadline, ways, REQUEST, stream, None, mode)

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


def _changed(claim: Claim, job: Job, option: Option) -> tuple[Claim, float]:
    """A claim whose step runs as this option, and what the loss of quality costs."""
    extra = (1.0 - option.quality) * DEGRADED * claim.weight
    if job.kind != Kind.PREFILL or claim.mode is None:
        return claim, extra
    asked = next(other for other in job.options if other.unit == option.unit)
    left = claim.mode.left + 1.0 - option.units / max(asked.units, 1)
    return claim._replace(mode=claim.mode._replace(left=max(left, 0.0))), extra


def _least(job: Job) -> int:
    return min(ns for ns in job.remaining if ns is not None)
