"""What a real run is made of, as plain values and protocols: units, streams, books, workers, and what steps do.

The books (which job comes when, what is written down, requests to language models) are kept by whoever made the
workload; those of the simulator fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rlkit.runtime.jobs import Job, Option, Upcoming

__all__ = ["Crew", "Finish", "Frames", "Plan", "Record", "Requests", "Setups", "Work", "Workload"]


class Finish(NamedTuple):
    """A unit has finished its step, or failed at it."""

    unit: int
    at: int
    error: BaseException | None = None


class Crew(Protocol):
    """A clock, and a worker per unit."""

    def now(self) -> int:
        """Ns since the start of the run."""

    def start(self, unit: int, task: Callable[[], object]) -> None:
        """Run a task on an idle unit; returns at once."""

    def wait(self, until: int) -> Sequence[Finish]:
        """What has finished, in order of time; returns with nothing at `until` at the latest."""

    def rest(self) -> Sequence[Finish]:
        """Wait until nothing runs any more."""


class Work(Protocol):
    """What steps do."""

    def step(self, job: Job, option: Option) -> None:
        """Run a job's next step; called by the worker of the option's unit."""

    def leave(self, job: Job) -> None:
        """A job that had begun, or not, was given up."""


class Workload(Protocol):
    """Jobs by number: when they come, their streams, numbers within them, deadlines, and what must finish before."""

    @property
    def arrivals(self) -> list[int]: ...
    @property
    def streams(self) -> list[int]: ...
    @property
    def indices(self) -> list[int]: ...
    @property
    def deadlines(self) -> list[int]: ...
    @property
    def parents(self) -> list[int]: ...


class Record(Protocol):
    """What is written down: rows (start, finish, number, option), those cut off, times by number."""

    @property
    def rows(self) -> list[tuple[int, int, int, Option]]: ...
    @property
    def cut(self) -> list[tuple[int, int, int, Option]]: ...
    @property
    def finished(self) -> list[int]: ...
    @property
    def dropped(self) -> list[int]: ...


class Requests(Protocol):
    """Requests to language models: those that wait, and the next step of those under way."""

    def submit(self, number: int, now: int) -> None:
        """It could run from `now` on; puts it into the list of ready jobs when there is a place for it."""

    def advance(self, request: Any, option: Option, now: int) -> bool:
        """A step is done; the request is ready again, or over, which True says."""

    def leave(self, request: Any) -> None:
        """It was given up."""

    def switched(self) -> None:
        """Setups have changed."""


class Setups(Protocol):
    """By stream and unit, ns until its model could begin there."""

    @property
    def lists(self) -> Sequence[list[int]]:
        """Kept up to date."""

    def switch(self, index: int, stream: int) -> None:
        """A stream's model runs on a unit now."""


@dataclass(frozen=True, slots=True)
class Frames:
    """A stream of frames; `drops`: those that nothing started by their deadline are dropped, and a policy may."""

    name: str
    period: int
    priority: int
    drops: bool
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A run: names of the units, its length in ns, its streams (None: requests), and what keeps the books.

    `ready` is the list into which `requests` puts its jobs. `speeds` says how fast steps with these demands run beside
    each other, `foresee(now, until)` which frames will come.
    """

    units: tuple[str, ...]
    duration: int
    streams: tuple[Frames | None, ...]
    workload: Workload
    record: Record
    requests: Requests
    setups: Setups
    ready: list[Job]
    cap: float = 1.0
    speeds: Callable[[list[float]], Sequence[float]] = lambda demands: (1.0,) * len(demands)
    foresee: Callable[[int, int], Sequence[Upcoming]] = lambda now, until: ()
