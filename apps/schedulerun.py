"""What `rlkit schedule` asks for, and doing it: scenario and costs by their names, the farm, comparison and sweep."""

from __future__ import annotations

import difflib
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rlkit.apps import scenariofiles
from rlkit.profiles import device as devices
from rlkit.profiles.scheduling import explore, farm, measured, vary
from rlkit.profiles.scheduling import profile as profiles
from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.comparison import Comparison
from rlkit.profiles.scheduling.costs import Costs, Forecast
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.explore import Explored, Space
from rlkit.profiles.scheduling.farm import Farm, Task, simulate
from rlkit.profiles.scheduling.outcome import summarize
from rlkit.profiles.scheduling.policies import FIVE, POLICIES
from rlkit.profiles.scheduling.record import Run
from rlkit.profiles.scheduling.scenario import Scenario
from rlkit.profiles.scheduling.settings import Prepared, prepare
from rlkit.recover import cache, cores
from rlkit.recover.progress import Tell

ALL, THE_FIVE = "all", "five"
ENOUGH = 600_000  # frames simulated from which on further processes are worth their start


@dataclass(frozen=True, slots=True)
class Where:
    """Where it runs, as the command line names it."""

    device: str | None = None
    profile: Path | None = None
    units: str | None = None
    file: Path | None = None

    def costs(self) -> Costs:
        """What steps cost there. ValueError for a device that is not known, or a profile of another machine."""
        if self.profile is not None:
            if self.device not in (None, devices.HERE):
                raise ValueError(f"--profile is of this machine and not of {self.device}; leave --device away")
            parts = () if self.units is None else measured.parts(self.units.split(","))
            return measured.Measured(profiles.read(self.profile), parts)
        if self.units is not None:
            raise ValueError("--units part the processor of a measured profile; give one with --profile")
        if self.device is None:
            raise ValueError(
                "no device to schedule on; give --device, for example hx370 (see rlkit devices), or --profile"
            )
        if ":" in self.device:
            raise ValueError(f"--device {self.device!r}: schedules use all units of a device; leave the unit away")
        found, _unit = devices.find(self.device, devices.load(self.file))
        return Forecast(found)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is simulated, and with how many processes (None: as many as are worth it) or on which Ray."""

    scenario: Scenario
    names: tuple[str, ...]
    seeds: int
    where: Where
    workers: int | None = None
    ray: str | None = None

    def prepared(self, factor: float = 1.0) -> Prepared:
        """The scenario on the device."""
        return prepare(vary.faster(self.scenario, factor), self.where.costs())

    def farm(self, runs: int) -> AbstractContextManager[Farm]:
        """What simulates so many runs; it keeps what it did."""
        folder = cache.cache_folder() / "schedules"
        if self.ray is None:
            return farm.farm(self.workers or self._worthwhile(runs), folder=folder)
        return farm.farm(self.workers or (_cores() if self.ray == "local" else 1), self.ray, folder)

    def _worthwhile(self, runs: int) -> int:
        return _cores() if runs * sum(each.count for each in self.scenario.streams) > ENOUGH else 1


def _cores() -> int:
    return max(len(cores.allowed()), 1)


def load(reference: str, seconds: float | None) -> Scenario:
    """A scenario by name or path, for so many seconds if they are given."""
    found = scenariofiles.load(reference)
    return found if seconds is None else vary.lasting(found, seconds)


def policies(text: str) -> tuple[str, ...]:
    """The names of policies; ValueError naming near ones."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    if names == (ALL,):
        return tuple(POLICIES)
    if THE_FIVE in names:
        names = tuple(dict.fromkeys(one for name in names for one in (FIVE if name == THE_FIVE else (name,))))
    for name in names:
        if name not in POLICIES:
            near = difflib.get_close_matches(name, POLICIES, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"use all, five, or some of {', '.join(POLICIES)}"
            raise ValueError(f"no policy {name!r}; {hint}")
    return names


def factors(text: str) -> tuple[float, ...]:
    """Rate factors, in order; ValueError for what is none."""
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = (math.nan,)
    if not all(vary.LEAST_FACTOR <= one <= vary.MOST_FACTOR for one in found):
        ends = f"{vary.LEAST_FACTOR:g} to {vary.MOST_FACTOR:g}"
        raise ValueError(f"--rates {text!r} must be factors from {ends} with commas between them, as in 1,1.25,1.5")
    return found


def compared(asked: Asked, factor: float, tell: Tell) -> Comparison:
    """Every policy on every seed."""
    costs = asked.where.costs()
    prepared = prepare(vary.faster(asked.scenario, factor), costs)
    tasks = [Task(prepared, seed, name) for seed in range(asked.seeds) for name in asked.names]
    with asked.farm(len(tasks)) as farmed:
        found = simulate(farmed, tasks, tell=tell)
    count = len(asked.names)
    summaries = tuple(summarize(found[place::count]) for place in range(count))
    return Comparison(prepared, costs.name, factor, tuple(range(asked.seeds)), summaries, about())


def swept(asked: Asked, space: Space, tell: Tell) -> Explored:
    """Every point of a space."""
    costs = asked.where.costs()
    with asked.farm(space.runs) as farmed:
        return explore.explore(asked.scenario, costs, space, farmed, tell=tell, about=about())


def runs(asked: Asked, factor: float) -> Iterator[Run]:
    """The first seed's run of every policy, step by step: for traces and charts."""
    load_of = expand(asked.prepared(factor).setting(0), 0)
    yield from (run(load_of, POLICIES[name]()) for name in asked.names)


def about() -> tuple[str, ...]:
    """How a result was made."""
    return (f"rlkit {version('rlkit-edge')}: rlkit {shlex.join(sys.argv[1:])}",)
