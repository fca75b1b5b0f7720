"""The space of schedules of a scenario: unit assignments x rate factors x policies x seeds, all simulated and compared.

An assignment says which units may run which model (`vary.py`). Each is put on the device anew, so its weights and
memory are counted for the units that it uses; one that does not fit is left out, with the reason. After the sweep,
`rounds` times, the best assignment of each policy at each rate is varied in one model at a time, and the best one kept.

Simulations run wherever the `Farm` is (`farm.py`): what comes out is the same, and what was done is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rlkit.profiles.scheduling import comparison, vary
from rlkit.profiles.scheduling.comparison import READING, percent
from rlkit.profiles.scheduling.costs import Costs
from rlkit.profiles.scheduling.farm import Farm, Task, simulate
from rlkit.profiles.scheduling.metrics import spread
from rlkit.profiles.scheduling.outcome import Outcome, Summary, summarize
from rlkit.profiles.scheduling.policies import FIVE
from rlkit.profiles.scheduling.scenario import Scenario
from rlkit.profiles.scheduling.settings import Prepared, prepare
from rlkit.profiles.scheduling.vary import Assignment
from rlkit.profiles.table import Table
from rlkit.recover.progress import Tell, silent

SCHEMA_VERSION = 1
MOST_RUNS = 1_000_000


@dataclass(frozen=True, slots=True)
class Space:
    """What is swept. `most`: assignments in the sweep; `rounds` of improvement after it."""

    policies: tuple[str, ...]
    seeds: int
    factors: tuple[float, ...] = (1.0,)
    most: int = 1
    rounds: int = 0

    def __post_init__(self) -> None:
        if not self.policies or not self.factors or min(self.seeds, self.most) < 1 or self.rounds < 0:
            raise ValueError("a sweep of nothing: give a policy, a rate, a seed and an assignment at least")
        if len(set(self.factors)) < len(self.factors) or len(set(self.policies)) < len(self.policies):
            raise ValueError("a sweep that names a policy or a rate twice: name each once")
        if (count := self.runs) > MOST_RUNS:
            raise ValueError(f"{count:,} simulations are more than {MOST_RUNS:,}; sweep fewer seeds or assignments")

    @property
    def swept(self) -> bool:
        """Whether there is more than one assignment and rate to compare."""
        return self.most > 1 or len(self.factors) > 1

    @property
    def runs(self) -> int:
        """Simulations of the sweep, without the rounds."""
        return self.most * len(self.factors) * len(self.policies) * self.seeds


@dataclass(frozen=True, slots=True)
class Point:
    """One policy on one assignment at one rate, over all seeds."""

    assignment: Assignment
    factor: float
    summary: Summary

    @property
    def policy(self) -> str:
        """Its name."""
        return self.summary.policy

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; streams are left out, as they can be simulated again."""
        one = self.summary
        figures: dict[str, Any] = {
            "rate": one.rate,
            "deviation": one.deviation,
            "pooled": one.pooled,
            "dropped": one.dropped,
        }
        figures |= {name: value and asdict(value) for name, value in (("ttft", one.ttft), ("tpot", one.tpot))}
        figures |= {"tokens_per_s": one.tokens_per_s, "xrbench": one.xrbench, "without_energy": one.without_energy}
        figures |= {"utilization": one.utilization, "energy_joules": one.energy_joules}
        units = {model: list(names) for model, names in self.assignment.units}
        return {"assignment": units, "rate_factor": self.factor, "policy": self.policy, **figures}


@dataclass(frozen=True, slots=True)
class Explored:
    """A sweep's points, in the order of assignments, rates, policies; what was left out, with the reasons."""

    scenario: Scenario
    device: str
    space: Space
    points: tuple[Point, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()
    about: tuple[str, ...] = ()

    def at(self, factor: float, policy: str | None = None) -> list[Point]:
        """The points at a rate, of a policy or of all."""
        return [one for one in self.points if one.factor == factor and policy in (None, one.policy)]

    def free(self, factor: float) -> dict[str, float]:
        """Violation rates by policy with every model on any unit."""
        return {one.policy: one.summary.rate for one in self.at(factor) if not one.assignment.units}

    def best(self, factor: float, policy: str) -> Point:
        """The assignment with the fewest violations, the freest of equals."""
        return min(self.at(factor, policy), key=_order)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        policies = self.space.policies
        best = [self.best(factor, policy).to_json() for factor in self.space.factors for policy in policies]
        spreads = {f"{factor:g}": comparison.spread_json(self.free(factor)) for factor in self.space.factors}
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "schedule-sweep",
            "scenario": self.scenario.name,
            "title": self.scenario.title,
            "device": self.device,
            "duration_s": self.scenario.duration / 1e9,
            "space": asdict(self.space),
            "points": [one.to_json() for one in self.points],
            "best": best,
            "spread": spreads,
            "paper_spread": comparison.PAPER,
            "left_out": list(self.left_out),
            "notes": [*self.notes, READING],
        }


def _order(one: Point) -> tuple[float, float, int]:
    """By violations; of equals the one that leaves models most of their units."""
    return one.summary.rate, one.summary.pooled, len(one.assignment.units)


@dataclass(slots=True)
class _Sweep:
    """A sweep under way: outcomes by (assignment, factor, policy), by seed."""

    scenario: Scenario
    costs: Costs
    space: Space
    farm: Farm
    tell: Tell
    found: dict[tuple[Assignment, float, str], Summary] = field(default_factory=dict)
    left_out: dict[str, None] = field(default_factory=dict)

    def add(self, stage: str, asked: Sequence[tuple[Assignment, float, tuple[str, ...]]]) -> None:
        """Add what is not there yet."""
        places: list[tuple[Assignment, float, str]] = []
        tasks: list[Task] = []
        for assignment, factor, policies in asked:
            missing = [name for name in policies if (assignment, factor, name) not in self.found]
            made = self.prepared(assignment, factor) if missing else None
            if made is not None:  # runs with the same arrivals one after the other
                tasks += [Task(made, seed, name) for seed in range(self.space.seeds) for name in missing]
                places += [(assignment, factor, name) for _seed in range(self.space.seeds) for name in missing]
        if not tasks:
            return
        runs: dict[tuple[Assignment, float, str], list[Outcome]] = {}
        for place, found in zip(places, simulate(self.farm, tasks, stage, self.tell), strict=True):
            runs.setdefault(place, []).append(found)
        self.found |= {place: summarize(outcomes) for place, outcomes in runs.items()}

    def prepared(self, assignment: Assignment, factor: float) -> Prepared | None:
        """The scenario so assigned on the device; None if it does not fit."""
        changed = vary.assigned(vary.faster(self.scenario, factor), assignment)
        try:
            return prepare(changed, self.costs)
        except ValueError as error:
            if not assignment.units:
                raise
            self.left_out[f"{assignment.name}: {error}"] = None
            return None

    def points(self) -> Iterator[Point]:
        """All points, in order."""
        order = {assignment: None for assignment, _factor, _policy in self.found}
        for assignment in order:
            for factor in self.space.factors:
                for policy in self.space.policies:
                    if (summary := self.found.get((assignment, factor, policy))) is not None:
                        yield Point(assignment, factor, summary)


def explore(
    scenario: Scenario, costs: Costs, space: Space, farm: Farm, *, tell: Tell = silent, about: tuple[str, ...] = ()
) -> Explored:
    """Sweep, then improve. ValueError for a scenario that the device cannot run as it is."""
    base = prepare(scenario, costs)
    # The scenario's own models once for all, and not for each assignment.
    sweep = _Sweep(replace(scenario, models={}), costs.having(scenario.models), space, farm, tell)
    tried = vary.assignments(base, space.most)
    sweep.add("sweep", [(one, factor, space.policies) for one in tried for factor in space.factors])
    where = vary.choices(base.base)
    made = _explored(sweep, base, about)
    for number in range(space.rounds):
        before = len(sweep.found)
        asked = [
            (near, factor, (policy,))
            for factor in space.factors
            for policy in space.policies
            for near in vary.neighbours(made.best(factor, policy).assignment, where)
            if made.best(factor, policy).summary.rate > 0.0
        ]
        sweep.add(f"round {number + 1} of {space.rounds}", asked)
        made = _explored(sweep, base, about)
        if len(sweep.found) == before:
            break
    return made


def _explored(sweep: _Sweep, base: Prepared, about: tuple[str, ...]) -> Explored:
    points, left_out = tuple(sweep.points()), tuple(sweep.left_out)
    return Explored(sweep.scenario, sweep.costs.name, sweep.space, points, left_out, base.notes, about)


def tables(found: Explored) -> Iterator[Table]:
    """The best of each policy, and the spread at each rate."""
    count = len({one.assignment for one in found.points})
    for factor in found.space.factors:
        rows = tuple(_best(found, factor, policy) for policy in found.space.policies)
        columns = ("policy", "free, %", "best, %", "worst, %", "best assignment")
        title = f"{found.scenario.title}: {found.device}, rate x {factor:g}, {count} assignments"
        yield Table(title, columns, rows, "Violated, mean over streams and seeds. Free: every model on any unit.")
    if len(found.space.policies) > 1:
        yield _spreads(found)


def _best(found: Explored, factor: float, policy: str) -> tuple[str, ...]:
    best = found.best(factor, policy)
    worst = max(one.summary.rate for one in found.at(factor, policy))
    free = found.free(factor)[policy]
    return policy, percent(free), percent(best.summary.rate), percent(worst), best.assignment.name


def _spreads(found: Explored) -> Table:
    """How far policies differ: as they are, each with its best assignment."""
    rows = []
    for factor in found.space.factors:
        best = {policy: found.best(factor, policy).summary.rate for policy in found.space.policies}
        for how, rates in (("free", found.free(factor)), ("best assignment of each", best)):
            some = comparison.five(rates)
            made = spread(some)
            who = "the five" if set(some) == set(FIVE) else f"{len(some)} policies"
            ends = (f"{percent(made.lowest)} ({made.best})", f"{percent(made.highest)} ({made.worst})")
            rows.append((f"{factor:g}", how, who, *ends, f"{made.points:.1f}", percent(made.relative)))
    columns = ("rate", "assignment", "of", "lowest, %", "highest, %", "points", "of the highest, %")
    return Table("Spread between policies", columns, tuple(rows), READING)


def findings(found: Explored) -> Iterator[str]:
    """What the numbers say, in sentences."""
    for factor in found.space.factors:
        best = min(found.at(factor), key=_order)
        at = f"rate x {factor:g}: " if len(found.space.factors) > 1 else ""
        yield f"{at}the fewest violations, {percent(best.summary.rate)} %: {best.policy}, {best.assignment.name}"
        if len(found.space.policies) > 1:
            yield from (f"{at}{line}" for line in comparison.spread_lines(found.free(factor)))
    if found.left_out:
        yield f"{len(found.left_out)} assignments were left out, the first: {found.left_out[0]}"
