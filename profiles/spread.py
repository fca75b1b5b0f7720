"""Work spread over processes of this machine, or over a Ray cluster; what was done is kept by its content.

    with team(functools.partial(opened, settings), workers=4) as some:       # or ray="auto"
        for number, found in kept(some, store)(tasks):
            ...

`opening` is called once in every process and returns what does a task: there a model is loaded. It, tasks and results
must be picklable. A team takes tasks and yields (number of the task, its result) as they are done, in any order; it may
be asked again, and its processes stay what they are until it is closed.

A process that ends, killed or for want of memory, is replaced, and the task it was at is given out again: a few times
at most, as a task that ends its process would do so for ever. A task's result is taken once, from whoever did it to the
end. So results are the same whichever way, as long as a task's result depends on nothing but the task.

A store has one result for each key, which is made of all that decides it; `Folder` keeps them as files, complete or
absent. It is written by the process that asks, so a cluster needs no common disk for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlkit.profiles.crew import Do, Opening, Processes, Rays
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import Progress, Tell
from rlkit.recover.source import read_json

__all__ = ["Do", "Farm", "Folder", "Opening", "Store", "Team", "check", "in_order", "kept", "team", "told"]

T = TypeVar("T")
R = TypeVar("R")
Task = TypeVar("Task", contravariant=True)

Farm = Callable[[Sequence[T]], Iterator[tuple[int, R]]]
"""Tasks -> (number of the task, its result), in any order."""

SCHEMA_VERSION = 1
MOST_WORKERS = 1024
CONNECT_SECONDS = 5.0
ADDRESS = re.compile(r"auto|local|(ray://)?[A-Za-z0-9_.\-\[\]:]+:\d{1,5}")


class Team(Protocol):
    """Does tasks wherever it is; a `Farm`."""

    def __call__(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (number of the task, its result) as they are done. Raises what a task raised, and ValueError."""

    def close(self) -> None:
        """End processes and give memory back."""


@contextlib.contextmanager
def team(opening: Opening, workers: int = 1, ray: str | None = None) -> Iterator[Team]:
    """Who does tasks: this process, `workers` of this machine if they are several, or those of a Ray cluster.

    `ray` is "auto", HOST:PORT, ray://HOST:PORT, or "local" for one of `workers` processes started here; of another one
    as many processes are used as it has processors, or `workers` if that is more than 1. Its machines need this
    version of rlkit, and what `opening` reads at the same place.

    Raises ValueError for a number of workers or an address that is none, ConnectionError where no cluster answers,
    ImportError if ray is not installed.
    """
    check(workers, ray)
    if ray is not None:
        made: Team = Rays(opening, workers, ray)
    else:
        made = _Here(opening) if workers == 1 else Processes(opening, workers)
    try:
        yield made
    finally:
        made.close()


def check(workers: int, ray: str | None) -> None:
    """Raise as `team` does for a number of workers or an address that is none, a cluster or ray that is missing."""
    if not 1 <= workers <= MOST_WORKERS:
        raise ValueError(f"{workers} workers are not 1 to {MOST_WORKERS}; give one for each core or two")
    if ray is None:
        return
    if not ADDRESS.fullmatch(ray):
        raise ValueError(f"Ray address {ray!r} must be auto, local, HOST:PORT or ray://HOST:PORT")
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")
    if ray not in ("auto", "local"):
        _reach(ray)


def _reach(address: str) -> None:
    """Raise ConnectionError where nobody listens: ray itself would try for minutes."""
    host, _colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); start one, or use --ray local"
        ) from error


class _Here:
    """One task after the other, in this process."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._do: Do | None = None

    def __call__(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for number, task in enumerate(tasks):
            self._do = self._do or self._opening()
            yield number, self._do(task)

    def close(self) -> None:
        self._do = None


class Store(Protocol[Task, R]):
    """Results by key."""

    @property
    def identify(self) -> Callable[[Any], str]:
        """Makes keys."""

    def read(self, task: Task) -> R | None:
        """What is known; None for nothing."""

    def write(self, task: Task, found: R) -> None:
        """Keep a result, complete or not at all."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of JSON values, <folder>/<first two of the key>/<key>.json; `identify` makes keys, in hexadecimal."""

    folder: Path
    identify: Callable[[Any], str]

    def path(self, task: Any) -> Path:
        """A task's file."""
        key = self.identify(task)
        return self.folder / key[:2] / f"{key}.json"

    def read(self, task: Any) -> Any:
        """What is known; None for nothing, and for what cannot be read."""
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            table = read_json(self.path(task))
            return table["found"] if table["schema_version"] == SCHEMA_VERSION else None
        return None

    def write(self, task: Any, found: Any) -> None:
        """Keep a result."""
        write_json(self.path(task), {"schema_version": SCHEMA_VERSION, "found": found})


def kept(farm: Farm[T, R], store: Store[T, R]) -> Farm[T, R]:
    """The same, but for what is in the store already; what is new is added as soon as it is done.

    Tasks of one key are done once.
    """

    def farmed(tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        alike: dict[str, list[int]] = {}
        for number, task in enumerate(tasks):
            alike.setdefault(store.identify(task), []).append(number)
        asked: list[list[int]] = []
        for numbers in alike.values():
            known = store.read(tasks[numbers[0]])
            if known is None:
                asked.append(numbers)
            else:
                yield from ((number, known) for number in numbers)
        for place, found in farm([tasks[numbers[0]] for numbers in asked]):
            store.write(tasks[asked[place][0]], found)
            yield from ((number, found) for number in asked[place])

    return farmed


def in_order(farm: Farm[T, R]) -> Callable[[Sequence[T]], Generator[R, None, None]]:
    """Results alone, in the order of the tasks."""

    def ordered(tasks: Sequence[T]) -> Generator[R, None, None]:
        early: dict[int, R] = {}
        following = 0
        for number, found in farm(tasks):
            early[number] = found
            while following in early:
                yield early.pop(following)
                following += 1

    return ordered


def told(farm: Farm[T, R], stage: str, tell: Tell) -> Farm[T, R]:
    """The same, saying how many tasks are done; who listens knows how long the rest takes."""

    def farmed(tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        tell(Progress(stage, 0, len(tasks)))
        for done, one in enumerate(farm(tasks), 1):
            tell(Progress(stage, done, len(tasks)))
            yield one

    return farmed
