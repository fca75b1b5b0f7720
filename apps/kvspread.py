"""Points of a KV frontier measured by several processes: of this machine, or of a Ray cluster (profiles/spread.py).

What is known is read, and what is found written, by the process that asks; the others only measure. Each opens a
`Bench` of its own, so each holds a model. Bundles are timed by the process that asks, before the others have anything
to do, as seconds of a busy machine mean nothing; so on a cluster they are this machine's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from rlkit.apps.kvpoints import Bench, Setup
from rlkit.profiles import spread
from rlkit.profiles.frontier import search
from rlkit.profiles.frontier.search import Job, Measured, Run
from rlkit.profiles.frontier.store import Store, kept
from rlkit.profiles.spread import Do, Team
from rlkit.recover import cores
from rlkit.recover.source import SourceKind, resolve

PACKAGE = "rlkit-edge"


@dataclass(frozen=True, slots=True)
class Where:
    """Who measures: `workers` processes of this machine, or a Ray cluster. Raises ValueError as `spread.check`."""

    workers: int = 1
    ray: str | None = None

    def __post_init__(self) -> None:
        spread.check(self.workers, self.ray)

    @property
    def alone(self) -> bool:
        """Whether this process measures itself."""
        return self.workers == 1 and self.ray is None


@contextlib.contextmanager
def measuring(bench: Bench, store: Store, where: Where) -> Iterator[Run]:
    """What does jobs for a search, but for those that the store knows; its processes end with the block.

    Raises as `spread.team`.
    """
    if where.alone:
        yield search.one_by_one(kept(bench.measure, store))
        return
    opening = functools.partial(opened, _movable(bench.setup, where), version(PACKAGE))
    with spread.team(opening, where.workers, where.ray) as team:
        yield functools.partial(_run, bench, store, team)


def opened(setup: Setup, wanted: str) -> Do:
    """In a process: what measures a job, and prepares for all of them if it is None.

    Raises ValueError where another version of rlkit is installed.
    """
    found = version(PACKAGE)
    if found != wanted:
        raise ValueError(f"a machine of the cluster has rlkit {found}, this one {wanted}; install the same everywhere")
    bench = Bench(setup)

    def measure(job: Job | None) -> Measured | None:
        if job is None:
            bench.prepare()
            return None
        return bench.measure(job.point, job.items)

    return measure


def _run(bench: Bench, store: Store, team: Team, jobs: Sequence[Job]) -> Iterator[Measured]:
    """What jobs found, in their order."""
    timed = kept(bench.measure, store)
    early = {number: timed(job.point, job.items) for number, job in enumerate(jobs) if _is_timed(bench.setup, job)}
    others = [job for number, job in enumerate(jobs) if number not in early]
    if any(not job.items and store.read(job) is None for job in others):
        list(team([None]))  # by one of them, what all would do at the same time
    spreaded = spread.in_order(spread.kept(team, store))(others)
    with contextlib.closing(spreaded):
        for number in range(len(jobs)):
            yield early[number] if number in early else next(spreaded)


def _is_timed(setup: Setup, job: Job) -> bool:
    return not job.items and resolve(setup.weights[job.point.weights]).kind is SourceKind.BUNDLE


def _movable(setup: Setup, where: Where) -> Setup:
    """The same setup for another process: paths from the root, and its share of the cores."""
    share = 1 if where.ray else max(1, cores.default_threads() // where.workers)
    weights = {name: _absolute(given) for name, given in setup.weights.items()}
    return replace(setup, weights=weights, text=_absolute(setup.text), threads=setup.threads or share)


def _absolute(given: str) -> str:
    path = Path(given).expanduser()
    return str(path.resolve()) if path.exists() else given
