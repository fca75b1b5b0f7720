"""Simulations as tasks that processes or a Ray cluster share (`profiles/spread.py`); what was done is kept by content.

A simulation depends on nothing but its task, so the results are the same wherever it ran. A kept one is known by the
setting, the seed, the policy and the simulator's own sources, so an interrupted sweep goes on and another one reuses
what it shares with it, and nothing is reused that another version of the policies has done.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlkit.profiles import spread
from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.outcome import Outcome, outcome
from rlkit.profiles.scheduling.policies import POLICIES
from rlkit.profiles.scheduling.settings import Prepared
from rlkit.profiles.scheduling.workload import Workload
from rlkit.recover.progress import Tell, silent
from rlkit.runtime import jobs

__all__ = ["Farm", "Task", "farm", "simulate", "sources"]


class Task(NamedTuple):
    """One run: a scenario on a device, the seed of its arrivals, a policy by its name in `policies.POLICIES`."""

    prepared: Prepared
    seed: int
    policy: str


Farm = Callable[[Sequence[Task]], Iterator[tuple[int, dict[str, Any]]]]
"""Tasks -> (number of the task, its `Outcome` as JSON values), in any order."""


@contextlib.contextmanager
def farm(workers: int = 1, ray: str | None = None, folder: Path | None = None) -> Iterator[Farm]:
    """Who simulates: as `spread.team` says; with `folder`, results are kept there."""
    with spread.team(functools.partial(opened, sources()), workers, ray) as team:
        yield team if folder is None else spread.kept(team, _Kept(folder, _identify()))


def simulate(farmed: Farm, tasks: Sequence[Task], stage: str = "simulate", tell: Tell = silent) -> list[Outcome]:
    """The outcomes of all tasks, in their order."""
    done = spread.in_order(spread.told(farmed, stage, tell))(tasks)
    return [Outcome.from_json(found) for found in done]


def opened(version: str) -> Callable[[Task], dict[str, Any]]:
    """What does tasks in a process. ValueError: it has other sources than `version`, that of the one who asks."""
    if version != sources():
        raise ValueError(
            "a machine of the cluster has another version of rlkit's simulator; install the same one there"
        )
    return _Simulator()


class _Simulator:
    """Tasks of one scenario and seed come one after the other: their arrivals are drawn once."""

    def __init__(self) -> None:
        self._prepared: Prepared | None = None
        self._load: Workload | None = None

    def __call__(self, task: Task) -> dict[str, Any]:
        load = self._load
        if load is None or load.seed != task.seed or self._prepared != task.prepared:
            load = self._load = expand(task.prepared.setting(task.seed), task.seed)
            self._prepared = task.prepared
        return outcome(run(load, POLICIES[task.policy]())).to_json()


class _Kept(spread.Folder):
    """A folder of outcomes; a file that is none, whoever put it there, is not known."""

    def read(self, task: Task) -> Any:
        """What is known."""
        found = spread.Folder.read(self, task)
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            Outcome.from_json(found)
            return found
        return None


def _identify() -> Callable[[Task], str]:
    """Makes keys of all that decides an outcome."""
    digests: dict[tuple[int, int], tuple[Prepared, str]] = {}

    def key(task: Task) -> str:
        place = id(task.prepared), task.seed
        if place not in digests:  # with the scenario itself, so that nothing else gets its id
            whole = repr((sources(), task.prepared.setting(task.seed), task.seed))
            digests[place] = task.prepared, hashlib.sha256(whole.encode()).hexdigest()
        return hashlib.sha256(f"{digests[place][1]} {task.policy}".encode()).hexdigest()

    return key


@functools.cache
def sources() -> str:
    """A digest of the simulator and the policies: other sources may give other outcomes."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(jobs.__file__)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
