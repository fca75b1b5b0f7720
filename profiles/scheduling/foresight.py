"""What would happen: a schedule played forward from now over a short horizon, and what it costs.

The world is simplified: jobs that are there, frames that periodic streams will bring at their nominal times, frames
that follow others, requests that go on as they are; steps share the memory's bandwidth as in the simulator. **Claims**
(steps that want a unit) are served in order, and a frame that can no longer be in time is given up, at its weight.
Where a claim runs is the `Style`: patient ones go where they finish first, the queue of busy units counted, and wait
for that; eager frames take an idle unit; yielding ones, of the units where they are in time, the one that others need
least.

Costs are in violations: a frame not in time its weight; a prompt its weight times 1 + its lateness in targets, so that
what is late anyway is not put off for ever; a token its weight times what it adds to the lateness, in targets.
"""

from __future__ import annotations

from bisect import insort
from enum import IntEnum
from typing import NamedTuple, Optional

from rlkit.profiles.scheduling.contention import rates

__all__ = [
    "ENDLESS",
    "REQUEST",
    "TOKEN",
    "Claim",
    "Mode",
    "Play",
    "Style",
    "Ways",
    "World",
    "frame_number",
    "token_dues",
]

ENDLESS = float(1 << 62)
REMEMBERED = 20_000  # sets of demands whose speeds are kept
NS_PER_MS = 1e6
REQUEST, TOKEN = 4.0, 0.2  # violations: weight of a first token (there are few), of a further one
PRESSURE = 0.3  # of a violation: a prompt that needs all the time it has
PROGRESS = 0.1  # of a token's weight: what a token is worth beyond its target
OVERHANG = 200.0  # times as bad if it runs already and so keeps a unit from what comes
BACKLOG = 1e-5  # violations per ms of work left at the end: between equals, what is done sooner

Ways = tuple[tuple[int, float, float], ...]  # of a step: (unit, ns with setup, demand)


class Style(IntEnum):
    """How claims choose their units."""

    PATIENT = 0
    YIELDING = 1
    EAGER = 2


class Mode(NamedTuple):
    """How a request goes on: `left` chunks of its prompt after this step (the last may be a share; of a token: -1)."""

    left: float
    chunk: Ways
    token: Ways  # () = not known yet
    target: float  # ns per token
    patience: float  # ns: so much lateness costs another violation
    due: float = 0.0  # of a token: when it is due if the mean of all is to meet the target
    variant: str = ""


class Claim(NamedTuple):
    """A step that wants a unit; `deadline` absolute. A frame brings `child` with it, if another stream follows its own.

    `number` is unique and the same before and after a frame has come (`frame_number`).
    """

    order: float
    number: int
    deadline: float
    ways: Ways
    weight: float
    stream: int
    child: Optional[Claim] = None  # noqa: UP045, a name that is not there yet
    mode: Mode | None = None


def frame_number(stream: int, deadline: int) -> int:
    """What identifies a frame, come or not."""
    return deadline << 8 | stream & 255


def token_dues(due: float, last: float, target: float) -> tuple[float, float]:
    """Of a token that is due then, after one made at `last`: its order, and from when on it adds to the lateness."""
    return max(due, last + target), max(due, last)


class World:
    """Units and the memory between them. By unit: `prices`, how much others need it; `switch`, ns to another model."""

    __slots__ = ("_known", "cap", "prices", "switch")

    def __init__(self, cap: float, units: int) -> None:
        self.cap = cap
        self.prices = [1.0] * units
        self.switch = [0.0] * units
        self._known: dict[tuple[float, ...], tuple[float, ...]] = {}

    def speeds(self, demands: list[float]) -> tuple[float, ...]:
        """Share of its speed alone of the step on each unit."""
        key = tuple(demands)
        found = self._known.get(key)
        if found is None:
            if len(self._known) > REMEMBERED:
                self._known.clear()
            found = self._known[key] = rates(key, self.cap)
        return found


class Play:
    """One future. Give it what runs (`hold`, `settle`), then perhaps a first `start`, then `run` it."""

    __slots__ = (
        "arrivals",
        "begun",
        "coming",
        "cost",
        "demands",
        "first",
        "held",
        "idle",
        "last",
        "lost",
        "now",
        "place",
        "speeds",
        "style",
        "until",
        "waiting",
        "world",
    )

    def __init__(self, world: World, now: float, waiting: list[Claim], style: Style, last: list[int]) -> None:
        """`waiting` in order; `last` by unit the stream that ran there last; both are changed."""
        units = len(last)
        self.style = style
        self.last = last
        self.world = world
        self.now = self.begun = now
        self.waiting = waiting
        self.coming: list[Claim] = []
        self.arrivals: list[float] = [ENDLESS]
        self.place = 0  # in what is coming
        self.cost = 0.0
        self.lost: list[int] = []  # numbers of what is violated
        self.idle = units
        self.until = [ENDLESS] * units
        self.demands = [0.0] * units
        self.speeds: tuple[float, ...] = (1.0,) * units
        self.held: list[Claim | None] = [None] * units
        self.first: tuple[Claim, int] | None = None  # what was started first, and on which unit

    def hold(self, unit: int, until: float, demand: float, claim: Claim | None) -> None:
        """A step that runs already; `until` at the speed that it has among all that are held."""
        self.until[unit], self.demands[unit], self.held[unit] = until, demand, claim
        self.idle -= 1

    def settle(self) -> None:
        """Everything that runs is held."""
        self.speeds = self.world.speeds(self.demands)

    def start(self, claim: Claim, unit: int, ns: float, demand: float) -> None:
        """Run a claim's step on an idle unit from now on."""
        self.held[unit] = claim
        self.last[unit] = claim.stream
        self.until[unit] = self.now + ns
        self.idle -= 1
        if demand:
            self.demands[unit] = demand
            self._share()

    def _share(self) -> None:
        """Plan the finishes anew for the demands there are."""
        before = self.speeds
        after = self.world.speeds(self.demands)
        if after is not before and after != before:
            now, until = self.now, self.until
            for unit, speed in enumerate(after):
                if speed != before[unit] and until[unit] < ENDLESS:
                    until[unit] = now + (until[unit] - now) * before[unit] / speed
        self.speeds = after

    def run(self, coming: list[Claim], arrivals: list[float], end: float, limit: float = ENDLESS) -> float:
        """Play to the end, or until it costs more than `limit`, and give the cost.

        `coming[i]` comes at `arrivals[i]`, in order of time; one more time is after the end.
        """
        self.coming, self.arrivals, self.place = coming, arrivals, 0
        until, waiting = self.until, self.waiting
        while True:
            if self.idle and waiting:
                self.serve()
            soonest, arrival = min(until), arrivals[self.place]
            now = min(soonest, arrival)
            if now > end:
                self.now = end
                self._close(end)
                break
            if self.cost > limit:
                break
            self.now = now
            if soonest <= now:
                self._finish(until.index(soonest))
            while arrivals[self.place] <= now:
                insort(waiting, coming[self.place])
                self.place += 1
        return self.cost

    def serve(self) -> None:
        """Start what is in turn and has its best unit idle."""
        now, waiting, held, last = self.now, self.waiting, self.held, self.last.copy()
        free = [now if time == ENDLESS else time for time in self.until]
        place = 0
        while place < len(waiting) and self.idle:
            claim = waiting[place]
            unit, ns, demand, finish = self._where(claim, free, last)
            if finish > claim.deadline and claim.mode is None:
                if now + claim.ways[0][1] > claim.deadline:
                    self._lose(claim, 1.0)
                    del waiting[place]
                else:
                    place += 1
            elif claim.mode is not None and self._breaks(claim, claim.mode, unit, finish, free):
                place += 1
            elif free[unit] <= now and held[unit] is None:
                del waiting[place]
                if self.first is None and now == self.begun:
                    self.first = claim, unit
                self.start(claim, unit, ns, demand)
                free[unit], last[unit] = finish, claim.stream
            else:
                free[unit], last[unit] = finish, claim.stream
                place += 1

    def _breaks(self, claim: Claim, mode: Mode, unit: int, finish: float, free: list[float]) -> bool:
        """Whether a token could wait and would make a frame late that comes before it is done."""
        if mode.left >= 0 or claim.weight * (self.now - claim.deadline) / mode.target >= 1.0:
            return False
        place = self.place
        while (arrival := self.arrivals[place]) < finish:
            frame = self.coming[place]
            for other, ns, _ in frame.ways:
                if max(arrival, finish if other == unit else free[other]) + ns <= frame.deadline:
                    break
            else:
                return True
            place += 1
        return False

    def _where(self, claim: Claim, free: list[float], last: list[int]) -> tuple[int, float, float, float]:
        """(unit, ns with the switch, demand, finish) of the way to run a step; `last` as it will be by then."""
        world, demands, stream = self.world, self.demands, claim.stream
        room = world.cap - sum(demands)
        yielding, eager = self.style is Style.YIELDING, self.style is Style.EAGER and claim.mode is None
        left = 0.0 if claim.mode is None else max(claim.mode.left, 0.0)
        best, least, cheapest = (0, 0.0, 0.0, ENDLESS), ENDLESS, ENDLESS
        for unit, alone, demand in claim.ways:
            if eager and self.until[unit] < ENDLESS:
                continue
            ns = alone if last[unit] == stream else alone + world.switch[unit]
            finish = free[unit] + ns
            if demand > room + demands[unit]:
                kept = demands[unit]
                demands[unit] = demand
                finish = free[unit] + ns / world.speeds(demands)[unit]
                demands[unit] = kept
            if yielding and finish + left * alone <= claim.deadline:
                price = ns * world.prices[unit]
                if price < cheapest:
                    best, cheapest = (unit, ns, demand, finish), price
            elif finish < least and cheapest == ENDLESS:
                best, least = (unit, ns, demand, finish), finish
        return best

    def _finish(self, unit: int) -> None:
        claim, now = self.held[unit], self.now
        self.held[unit] = None
        self.until[unit] = ENDLESS
        self.idle += 1
        if self.demands[unit]:
            self.demands[unit] = 0.0
            self._share()
        if claim is None:
            return
        if claim.mode is not None:
            self._go_on(claim, claim.mode)
            return
        if now > claim.deadline:
            self._lose(claim, 1.0)
        if claim.child is not None:
            insort(self.waiting, claim.child)

    def _go_on(self, claim: Claim, mode: Mode) -> None:
        """The next step of a request."""
        now = self.now
        if mode.left > 0:
            left = max(mode.left - 1.0, 0.0)
            ways = mode.chunk
            if mode.left < 1.0:
                ways = tuple((unit, ns * mode.left, demand) for unit, ns, demand in ways)
            insort(self.waiting, claim._replace(ways=ways, mode=mode._replace(left=left)))
            return
        due = now + mode.target
        if mode.left < 0:
            self.cost -= claim.weight * PROGRESS
            self._delay(claim, mode, now)
            due = mode.due + mode.target
        elif now > claim.deadline:
            self._lose(claim, 1.0 + (now - claim.deadline) / mode.patience)
        if mode.token:
            mode = mode._replace(left=-1.0, patience=mode.target, due=due)
            order, deadline = token_dues(due, now, mode.target)
            insort(
                self.waiting,
                claim._replace(order=order, deadline=deadline, ways=mode.token, weight=TOKEN, mode=mode),
            )

    def _delay(self, claim: Claim, mode: Mode, finish: float) -> None:
        """A token: only what it adds to how late the request is already."""
        late = (finish - claim.deadline) / mode.patience
        if late > 0:
            self.cost += claim.weight * late
            if late > 1.0:
                self.lost.append(claim.number)

    def _lose(self, claim: Claim, times: float) -> None:
        self.cost += claim.weight * times
        self.lost.append(claim.number)

    def _close(self, end: float) -> None:
        """Count what is under way at the end."""
        left = 0.0
        for claim, until in zip(self.held, self.until, strict=True):
            if until < ENDLESS:
                left += (until - end) * OVERHANG
                if claim is not None:
                    self._judge(claim, until)
        for claim in self.waiting:
            left += claim.ways[0][1]
            self._judge(claim, end + claim.ways[0][1])
        self.cost += left / NS_PER_MS * BACKLOG

    def _judge(self, claim: Claim, finish: float) -> None:
        """What a step costs that will finish then at the earliest, after the end."""
        mode, deadline = claim.mode, claim.deadline
        if mode is None:
            if finish > deadline:
                self._lose(claim, 1.0)
            return
        if mode.left < 0:
            self._delay(claim, mode, finish)
            return
        finish += mode.left * mode.chunk[0][1]
        if finish > deadline:
            self._lose(claim, 1.0 + (finish - deadline) / mode.patience)
        else:
            self.cost += claim.weight * PRESSURE * ((finish - self.now) / max(deadline - self.now, 1.0)) ** 2
