"""The words of scheduling: jobs, options, units, what a policy sees and what it answers.

One vocabulary for the simulator (`profiles/scheduling/engine.py`) and for real execution (`runtime/dispatch.py`), so
one policy's code runs in both. A **job** is a frame of a stream or a request to a language model; it runs in steps
that nothing interrupts: a frame is one step, a request is chunks of its prompt, then one step per token. An **option**
is one way to run a job's next step. All times are whole nanoseconds from the start of the run.

The engine alone changes jobs, units and the state; a policy reads them and keeps what else it needs in itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

__all__ = ["Decision", "Drop", "Job", "Kind", "Option", "Policy", "Start", "State", "Unit", "Upcoming", "Wake"]


class Kind(IntEnum):
    """What a job's next step is."""

    FRAME = 0
    PREFILL = 1
    DECODE = 2


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a job's next step.

    `ns` is its time alone on the unit, without `Job.setup`; `demand` the share of the shared memory bandwidth that it
    then asks for, 0 to 1; `variant` what differs from the step as asked ("chunk=128", "w2"; "" = nothing), `quality`
    what that is worth (1 = as asked); `units` the tokens that the step advances (0 for a frame).
    """

    unit: int
    ns: int
    demand: float = 0.0
    millijoule: float | None = None
    variant: str = ""
    quality: float = 1.0
    units: int = 0

    def __post_init__(self) -> None:
        if self.unit < 0 or self.units < 0:
            raise ValueError(f"unit {self.unit}, {self.units} tokens in an option: use numbers of at least 0")
        if type(self.ns) is not int or self.ns < 1:
            raise ValueError(f"{self.ns} ns for a step: use a whole number of at least 1")
        if not 0.0 <= self.demand <= 1.0:
            raise ValueError(f"demand {self.demand} of the memory bandwidth: use a share of 0 to 1")
        if self.millijoule is not None and not 0.0 <= self.millijoule < float("inf"):
            raise ValueError(f"{self.millijoule} mJ for a step: use a number of at least 0, or None if unknown")
        if not 0.0 <= self.quality <= 1.0:
            raise ValueError(f"quality {self.quality} of a variant: use a share of 0 to 1")


class Job:
    """A frame or a request that has arrived, and what its next step can be.

    number      unique; the place in the order of nominal arrival over all streams
    stream      index of its stream; `name` is the stream's
    index       number of the frame or request within its stream
    arrival     when it could first run: for a job that depends on another, when that one finished
    deadline    of its next result: frame, its own; prefill, the first token's; decode, the last token + the target
    period      of its stream, 0 if it has none
    priority    larger = more important
    droppable   whether a policy may `Drop` it
    options     the ways to run the next step, over all units
    remaining   by unit: ns of work until `deadline` is met if it ran there alone, without setup (frame: its ns;
                prefill: all chunks left; decode: the next token), None where it cannot run
    home        the unit that holds its cache (-1: none yet)
    setup       by unit: ns on top if its next step starts there now (loading or switching the model, moving the cache)
    steps_done  steps finished so far
    """

    __slots__ = (
        "arrival",
        "deadline",
        "droppable",
        "home",
        "index",
        "kind",
        "name",
        "number",
        "options",
        "period",
        "priority",
        "remaining",
        "setup",
        "steps_done",
        "stream",
    )

    def __init__(  # noqa: PLR0913, one value of each kind, made by engines alone
        self,
        number: int,
        stream: int,
        name: str,
        kind: Kind,
        index: int,
        arrival: int,
        deadline: int,
        period: int,
        priority: int,
        droppable: bool,
        options: tuple[Option, ...],
        remaining: tuple[int | None, ...],
        setup: Sequence[int],
        home: int = -1,
    ) -> None:
        self.number = number
        self.stream = stream
        self.name = name
        self.kind = kind
        self.index = index
        self.arrival = arrival
        self.deadline = deadline
        self.period = period
        self.priority = priority
        self.droppable = droppable
        self.options = options
        self.remaining = remaining
        self.setup = setup
        self.home = home
        self.steps_done = 0

    def __repr__(self) -> str:
        return f"Job({self.number}: {self.name}[{self.index}] {self.kind.name}, deadline {self.deadline})"


class Unit:
    """A compute unit: what runs on it, as which option, its demand, and when it will finish if nothing else starts."""

    __slots__ = ("demand", "index", "name", "option", "running", "until")

    def __init__(self, index: int, name: str) -> None:
        self.index = index
        self.name = name
        self.running: Job | None = None
        self.option: Option | None = None
        self.until = 0  # moves while others share the memory
        self.demand = 0.0

    def __repr__(self) -> str:
        return f"Unit({self.index}: {self.name}, {self.running}, until {self.until})"


class Upcoming(NamedTuple):
    """A frame that a periodic stream will bring, at its nominal time: jitter and chance are not foreseen."""

    arrival: int
    stream: int
    deadline: int
    options: tuple[Option, ...]


class State:
    """What a policy sees: the time, the jobs that could start (in order of arrival), the units, the bandwidth."""

    __slots__ = ("_foresee", "cap", "now", "ready", "units")

    def __init__(
        self,
        units: list[Unit],
        cap: float = 1.0,
        foresee: Callable[[int, int], Sequence[Upcoming]] = lambda now, until: (),
    ) -> None:
        """`foresee(now, until)` gives the frames with nominal times after `now` and up to `until`, in order."""
        self.now = 0
        self.ready: list[Job] = []
        self.units = units
        self.cap = cap
        self._foresee = foresee

    def idle(self) -> list[Unit]:
        """The units that run nothing."""
        return [unit for unit in self.units if unit.running is None]

    def upcoming(self, horizon_ns: int) -> Sequence[Upcoming]:
        """Frames of periodic streams that will come within a horizon, in order of time, then of stream."""
        return self._foresee(self.now, self.now + horizon_ns)


# One of these is made per step: plain slots, because frozen ones take three times as long to make.
@dataclass(slots=True)
class Start:
    """Run a ready job's next step this way; the option's unit must be idle."""

    job: Job
    option: Option


@dataclass(slots=True)
class Drop:
    """Give a ready droppable job up."""

    job: Job


@dataclass(slots=True)
class Wake:
    """Leave what is idle idle, and ask again at this time, or when something happens before."""

    at: int


Decision = Start | Drop | Wake | None


class Policy(Protocol):
    """Decides what runs next. A fresh one is made for every run, so it may remember.

    Asked whenever something happened, some unit is idle and some job is ready, and again after each `Start` and `Drop`;
    None or `Wake` ends the round.
    """

    @property
    def name(self) -> str:
        """What tables call it."""

    def decide(self, state: State) -> Decision:
        """What to do now."""
