"""What a policy learns of streams while it watches: what comes when, which stream follows which, how tokens go."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence

from rlkit.profiles.scheduling.foresight import ENDLESS, Claim, Ways, frame_number
from rlkit.runtime.jobs import Job, Kind, Option, State, Upcoming

__all__ = ["Habits", "as_asked", "ways_of"]

FETCHED = 1_000_000_000  # ns: frames to come are asked for once a second
UNKNOWN = 1e8  # ns per token, until a target has been seen
WITNESSED, MOSTLY = 2, 0.5  # times, and share of times, that a frame appears as another ends, to count as a rule
AT_ONCE = 100_000  # ns between an end and what it brings
ENOUGH = 0.8  # of the time until its deadline: a unit that takes no more is an alternative for a frame
FLEXIBLE = 0.25  # need of a frame that has an alternative which takes endlessly longer
CHEAP = 0.02  # price of a unit that nobody needs
RARITY, RAREST = 0.5, 4.0  # frames of rarer streams weigh more: by their rate's root, at most so much
UNBEGUN = 0.0, -1


def as_asked(options: Sequence[Option]) -> Iterator[Option]:
    """The first option of each unit: the step as asked, or the nearest to it there."""
    seen = 0
    for option in options:
        if not seen >> option.unit & 1:
            seen |= 1 << option.unit
            yield option


def ways_of(options: Sequence[Option], setup: Sequence[float] = ()) -> Ways:
    """The ways to run a step as asked, quickest first."""
    ways = [
        (option.unit, float(option.ns + (setup[option.unit] if setup else 0)), option.demand)
        for option in as_asked(options)
    ]
    return tuple(sorted(ways, key=lambda way: way[1]))


class Habits:
    """Of one run; `observe` is called at every decision."""

    __slots__ = (
        "_arrivals",
        "_begun",
        "_came",
        "_children",
        "_claims",
        "_coming",
        "_due",
        "_ended",
        "_frames",
        "_newest",
        "_parents",
        "_running",
        "_targets",
        "_until",
        "_votes",
        "_ways",
        "prices",
        "tokens",
        "weights",
    )

    def __init__(self) -> None:
        self._until = -1  # frames to come are known up to here
        self._coming: list[Upcoming] = []
        self._arrivals: list[int] = []
        self._claims: dict[int, Claim | None] = {}  # by place in what is to come
        self._due: dict[int, int] = {}  # by stream: from nominal time to deadline
        self._frames: dict[int, tuple[Option, ...]] = {}
        self._ways: dict[int, tuple[object, Ways]] = {}
        self._newest: dict[int, int] = {}  # by stream: the last frame seen
        self._running: list[Job | None] = []
        self._came: dict[int, int] = defaultdict(int)  # by stream: frames seen to come
        self._ended: dict[int, int] = defaultdict(int)  # by stream: frames seen to end
        self._votes: dict[tuple[int, int], int] = defaultdict(int)  # (stream, the one before): times witnessed
        self._parents: dict[int, int] = {}
        self._children: dict[int, int] = {}
        self._targets: dict[int, float] = {}
        self._begun: dict[int, tuple[float, int]] = {}  # by request: its first token's time, and steps done then
        self.weights: dict[int, float] = {}  # by stream of frames: violations that one counts as
        self.prices: list[float] = []  # by unit: the share of its time that frames need it for, and no other
        self.tokens: dict[int, Ways] = {}  # by stream of requests: of its latest token

    def observe(self, state: State) -> bool:
        """See what is new; True if it is a request, or one that has begun to answer."""
        ended = self._see_ends(state)
        surprise = False
        for job in state.ready:
            if job.kind != Kind.FRAME:
                surprise |= self._see_request(job, state.now)
            elif job.index > self._newest.get(job.stream, -1):
                self._newest[job.stream] = job.index
                self._came[job.stream] += 1
                if ended and state.now - job.arrival <= AT_ONCE:
                    self._witness(job, ended)
        return surprise

    def _see_ends(self, state: State) -> list[Job]:
        """Frames that ran when last looked at and do no more."""
        ended = []
        for job, unit in zip(self._running, state.units, strict=False):
            if job is not None and unit.running is not job and job.kind == Kind.FRAME:
                ended.append(job)
                self._ended[job.stream] += 1
        self._running = [unit.running for unit in state.units]
        return ended

    def started(self, job: Job, unit: int) -> None:
        """A step begins."""
        self._running[unit] = job

    def _witness(self, job: Job, ended: list[Job]) -> None:
        """A frame came later than its time: as the one of the same number of another stream ended, and mostly so?"""
        due = self._due.get(job.stream)
        if due is None or job.arrival <= job.deadline - due or job.stream in self._parents:
            return
        for other in ended:
            if (other.index, other.period) == (job.index, job.period) and job.stream not in self._before(other.stream):
                pair = job.stream, other.stream
                self._votes[pair] += 1
                if self._votes[pair] >= max(WITNESSED, MOSTLY * self._came[job.stream]):
                    self._parents[job.stream] = other.stream
                    self._children[other.stream] = job.stream
                    self._claims.clear()

    def _before(self, stream: int) -> Iterator[int]:
        """A stream and those that it comes after."""
        yield stream
        while stream in self._parents:
            stream = self._parents[stream]
            yield stream

    def _see_request(self, job: Job, now: int) -> bool:
        steps = self._begun.get(job.number, (0.0, -2))[1]
        if job.kind == Kind.PREFILL:
            self._begun.setdefault(job.number, UNBEGUN)
            return steps == -2
        # The target is what is left of it when a token has just been made.
        left = float(job.deadline - now)
        if left > self._targets.get(job.stream, 0.0):
            self._targets[job.stream] = left
        self.tokens[job.stream] = self.ways(job.stream, job.options)
        if steps >= 0:
            return False
        self._begun[job.number] = job.deadline - self._targets[job.stream], job.steps_done
        return True

    def target(self, job: Job) -> float:
        """Ns per token of a request."""
        return self._targets.get(job.stream, UNKNOWN)

    def token_due(self, job: Job) -> float:
        """When a request's next token is due if the mean of all is to meet the target."""
        first, steps = self._begun.get(job.number, UNBEGUN)
        if steps < 0:
            return job.deadline
        return first + self._targets[job.stream] * (job.steps_done - steps + 1)

    def ways(self, stream: int, options: tuple[Option, ...]) -> Ways:
        """Of options without setup; the latest of each stream are kept."""
        known = self._ways.get(stream)
        if known is not None and known[0] is options:
            return known[1]
        ways = ways_of(options)
        self._ways[stream] = options, ways
        return ways

    def frame(self, stream: int, deadline: int, ways: Ways) -> Claim:
        """A frame's claim: in turn early enough for what follows it."""
        number = frame_number(stream, deadline)
        child = self._child(stream, deadline)
        if child is None:
            return Claim(deadline, number, deadline, ways, self.weights.get(stream, 1.0), stream)
        order = min(float(deadline), child.order - child.ways[0][1])
        return Claim(order, number, deadline, ways, self.weights.get(stream, 1.0), stream, child)

    def _child(self, parent: int, deadline: int) -> Claim | None:
        """What comes after a frame of a stream with this deadline; its weight is how often that has happened."""
        stream = self._children.get(parent)
        if stream is None:
            return None
        due = deadline - self._due[parent] + self._due[stream]
        chance = min(1.0, self._came[stream] / max(1, self._ended[parent]))
        claim = self.frame(stream, due, self.ways(stream, self._frames[stream]))
        return claim._replace(weight=chance * claim.weight)

    def coming(self, state: State, end: float, most: int) -> tuple[list[Claim], list[float]]:
        """Frames that will come by the end: claims, and their times with one more after all of them."""
        if end > self._until:
            self._fetch(state, int(end))
        place = bisect_right(self._arrivals, state.now)
        claims: list[Claim] = []
        times: list[float] = []
        for at in range(place, min(place + most, len(self._coming))):
            arrival, stream, _, _ = self._coming[at]
            if arrival > end:
                break
            if stream not in self._parents and (claim := self._coming_claim(at)) is not None:
                claims.append(claim)
                times.append(arrival)
        times.append(ENDLESS)
        return claims, times

    def _coming_claim(self, at: int) -> Claim | None:
        """Of a frame to come, None if nobody can serve it in time; kept until more is known."""
        if at not in self._claims:
            arrival, stream, deadline, options = self._coming[at]
            ways = self.ways(stream, options)
            self._claims[at] = self.frame(stream, deadline, ways) if arrival + ways[0][1] <= deadline else None
        return self._claims[at]

    def _fetch(self, state: State, end: int) -> None:
        self._until = end + FETCHED
        self._claims.clear()
        self._coming = list(state.upcoming(self._until - state.now))
        self._arrivals = [upcoming.arrival for upcoming in self._coming]
        for upcoming in self._coming:
            self._due[upcoming.stream] = upcoming.deadline - upcoming.arrival
            self._frames[upcoming.stream] = upcoming.options
        self._price(len(state.units))

    def _price(self, units: int) -> None:
        """A frame needs the unit where it is quickest, as far as no other is as quick or quick enough."""
        self.prices = [CHEAP] * units
        counts: dict[int, int] = defaultdict(int)
        for upcoming in self._coming:
            counts[upcoming.stream] += 1
        span = max(self._arrivals[-1] - self._arrivals[0], 1) if self._arrivals else 1
        most = max(counts.values(), default=1)
        self.weights = {stream: min((most / count) ** RARITY, RAREST) for stream, count in counts.items()}
        for stream, count in counts.items():
            (unit, ns, _), *others = self.ways(stream, self._frames[stream])
            ample = [other for _, other, _ in others if other <= ENOUGH * self._due[stream]]
            need = FLEXIBLE * (1.0 - ns / ample[0]) if ample else 1.0
            self.prices[unit] += need * ns * count / span
