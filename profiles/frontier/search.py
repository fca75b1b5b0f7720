"""Which points to measure on how many items: all of them on all, or successive halving with KL as the first screen.

    found = halving(points, totals, one_by_one(measure))     # or grid(...)

A point's bytes and its KL to the original cost little, so every point gets them first. Then those that look best are
measured on an eighth of the items, the best of these on a quarter, on half, on all: KEEP says how many stay. What looks
best is no single point but whatever may lie on the frontier: a point's regret is how clearly the best of those that
take no more bytes is better, in standard errors of the difference on the same items,

    regret(p) = max over q, bytes(q) <= bytes(p), of mean(d) / sqrt(var(d) / n + 1 / n^2),    d = scores(q) - scores(p)

and points of equal regret are ordered by the same question asked of KL. The 1 / n^2 keeps a few items that all agree
from being sure. Contexts do not compete with each other.

A context's reference is measured first and to the end. The texts of which it solves most come first for all others,
since what the whole model cannot do tells little of what a cache destroys. So scores of points that were left out are
of the easier items.

What it does not know: a point that does worse than others on the first items and better on all may be lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.profiles.frontier.space import Point
from rlkit.profiles.needs import Memory
from rlkit.recover.progress import Progress, Tell, silent

UNIT = 4  # items that share a text and are measured together
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the items, rung by rung
KEEP = (0.6, 0.7, 0.7, 0.7)  # of the points of a context: after the screen, after each rung but the last
FEWEST = 4  # points that stay in any case
SMALLEST_KL = 1e-6  # nats: less is rounding


@dataclass(frozen=True, slots=True)
class Measured:
    """What a job found: a score for each of its items, 0 to 1; bytes, KL and seconds where it was asked for them."""

    scores: tuple[float, ...] = ()
    memory: Memory | None = None
    kl: float | None = None
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        memory = None if self.memory is None else _parts(self.memory)
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"memory": memory}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Measured:
        """The inverse of `to_json`; KeyError or TypeError for what is none."""
        found = {item.name: table[item.name] for item in fields(cls)}
        memory = None if found["memory"] is None else Memory(**found["memory"])
        return cls(**found | {"scores": tuple(float(score) for score in found["scores"]), "memory": memory})


def _parts(memory: Memory) -> dict[str, int]:
    names = ("weights_nbytes", "cache_nbytes", "activations_nbytes")
    return {name: int(getattr(memory, name)) for name in names}


@dataclass(frozen=True, slots=True)
class Job:
    """A point on some of its context's items; none is the screen: bytes, KL, and seconds where they can be had."""

    point: Point
    start: int = 0
    stop: int = 0

    @property
    def items(self) -> range:
        """The numbers of the items."""
        return range(self.start, self.stop)


Measure = Callable[[Point, range], Measured]
"""Measure a point on items by number; an empty range is the screen."""

Run = Callable[[Sequence[Job]], Iterable[Measured]]
"""Do jobs, wherever, and give what they found in their order."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What is known of a point; `why` says why it was not measured on all items, if it was not.

    `scores` are those of the items with these numbers, the first ones unless told.
    """

    point: Point
    memory: Memory
    kl: float | None = None
    scores: tuple[float, ...] = ()
    why: str = ""
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    items: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.items:
            object.__setattr__(self, "items", tuple(range(len(self.scores))))

    @property
    def accuracy(self) -> float:
        """The mean score; NaN where nothing was scored."""
        return float(np.mean(self.scores)) if self.scores else math.nan

    @property
    def nbytes(self) -> int:
        """Weights, cache and the peak of activations."""
        return self.memory.nbytes


@dataclass(frozen=True, slots=True)
class Found:
    """Every point with what is known of it; what that took, and what the whole grid takes, in items."""

    points: tuple[Evaluated, ...]
    evaluations: float
    grid_evaluations: float


@dataclass(frozen=True, slots=True)
class Totals:
    """How many items each context has, and what a screen takes, counted in items."""

    items: Mapping[int, int]
    screen: float = 0.0


def one_by_one(measure: Measure) -> Run:
    """Do jobs here, one after the other."""
    return lambda jobs: (measure(job.point, job.items) for job in jobs)


def rungs(total: int) -> tuple[int, ...]:
    """How many items are known after each rung, in units that share a text; the last is all."""
    cuts = (min(total, math.ceil(total * share / UNIT) * UNIT) for share in SHARES)
    return tuple(dict.fromkeys(cuts))


def survivors(count: int) -> tuple[int, ...]:
    """How many of `count` points stay after the screen and after each rung but the last."""
    found = []
    share = 1.0
    for keep in KEEP:
        share *= keep
        found.append(min(count, max(FEWEST, math.ceil(share * count))))
    return tuple(found)


def planned(points: Sequence[Point], totals: Totals, *, whole: bool) -> float:
    """The items that a search takes, screens included; `whole` for the grid, which needs them as well."""
    spent = totals.screen * len(points)
    for context, some in _by_context(points).items():
        cuts = rungs(totals.items[context])
        left = survivors(len(some) - 1)
        for rung, (start, stop) in enumerate(zip((0, *cuts), cuts, strict=False)):
            spent += (stop - start) * (len(some) if whole else 1 + left[rung])
    return spent


def grid(points: Sequence[Point], totals: Totals, run: Run, tell: Tell = silent) -> Found:
    """Every point on every item."""
    return _Search(points, totals, run, tell, whole=True).found()


def halving(points: Sequence[Point], totals: Totals, run: Run, tell: Tell = silent) -> Found:
    """The frontier from as few items as it takes: see the module. The first point of a context is its reference."""
    return _Search(points, totals, run, tell, whole=False).found()


def _units(total: int) -> Iterator[range]:
    return (range(start, min(start + UNIT, total)) for start in range(0, total, UNIT))


def _in_order(one: Evaluated) -> Evaluated:
    """Scores in the order of the items' numbers."""
    both = sorted(zip(one.items, one.scores, strict=True))
    return replace(one, items=tuple(item for item, _ in both), scores=tuple(score for _, score in both))


def _by_context(points: Iterable[Point]) -> dict[int, list[Point]]:
    found: dict[int, list[Point]] = {}
    for point in points:
        found.setdefault(point.context, []).append(point)
    return found


class _Search:
    """One search; `alive` are the points of each context that are measured further, the reference first."""

    def __init__(self, points: Sequence[Point], totals: Totals, run: Run, tell: Tell, *, whole: bool) -> None:
        if not points:
            raise ValueError("there is no point to measure; give at least one")
        self._points, self._totals, self._run, self._tell, self._whole = points, totals, run, tell, whole
        self._alive = _by_context(points)
        self._known: dict[Point, Evaluated] = {}
        self._done, self._total = 0.0, planned(points, totals, whole=whole)
        self._stays = {context: survivors(len(some) - 1) for context, some in self._alive.items()}

    def found(self) -> Found:
        self._screen()
        cuts = {context: rungs(self._totals.items[context]) for context in self._alive}
        units = {context: list(_units(self._totals.items[context])) for context in self._alive}
        if not self._whole:
            self._measure({context: [some[0]] for context, some in self._alive.items()}, units, "reference")
            units = {context: self._telling(some[0], units[context]) for context, some in self._alive.items()}
        count = max(map(len, cuts.values()))
        for rung in range(count):
            on = {context: cut[rung] for context, cut in cuts.items() if rung < len(cut)}
            if not self._whole:
                for context in on:
                    self._drop(context, rung)
            asked = {context: units[context][: -(-stop // UNIT)] for context, stop in on.items()}
            self._measure({context: self._alive[context] for context in on}, asked, f"{rung + 1} of {count}")
        grid = planned(self._points, self._totals, whole=True)
        return Found(tuple(_in_order(self._known[point]) for point in self._points), self._done, grid)

    def _measure(self, points: Mapping[int, Sequence[Point]], units: Mapping[int, Sequence[range]], note: str) -> None:
        """Measure each context's points on its units that they do not know yet, in the order of the units."""
        jobs = [
            Job(point, unit.start, unit.stop)
            for context, some in points.items()
            for point in some
            for unit in units[context]
            if unit.start not in self._known[point].items
        ]
        for job, measured in self._results(jobs, note):
            known = self._known[job.point]
            self._known[job.point] = replace(
                known, scores=known.scores + measured.scores, items=(*known.items, *job.items)
            )

    def _telling(self, reference: Point, units: Sequence[range]) -> list[range]:
        """The units in the order of what the reference solves of them; one that is not whole stays the last."""
        scores = self._known[reference].scores
        return sorted(units, key=lambda unit: (len(unit) < UNIT, -sum(scores[item] for item in unit)))

    def _screen(self) -> None:
        for job, one in self._results([Job(point) for point in self._points], "screen"):
            if one.memory is None:
                raise ValueError(f"{job.point.name}: its bytes were not measured, so it has no place on a frontier")
            self._known[job.point] = Evaluated(
                job.point, one.memory, one.kl, ttft_seconds=one.ttft_seconds, tpot_seconds=one.tpot_seconds
            )

    def _results(self, jobs: Sequence[Job], note: str) -> Iterator[tuple[Job, Measured]]:
        """Jobs with what they found, those of the same weights together, as loading those takes long."""
        order = {name: place for place, name in enumerate(dict.fromkeys(job.point.weights for job in jobs))}
        ordered = sorted(jobs, key=lambda job: order[job.point.weights])
        for job, measured in zip(ordered, self._run(ordered), strict=True):
            if len(measured.scores) != len(job.items):
                why = f"{len(measured.scores)} scores for {len(job.items)} items"
                raise ValueError(f"{job.point.name}: {why}; what measures must answer each")
            self._done += len(job.items) or self._totals.screen
            self._tell(Progress("frontier", round(self._done), max(1, round(self._total)), note))
            yield job, measured

    def _drop(self, context: int, rung: int) -> None:
        """Leave the points of a context that may lie on the frontier, as many as there is room for."""
        reference, *others = self._alive[context]
        room = self._stays[context][rung]
        ranked = [others[place] for place in regrets([self._known[point] for point in others])]
        for point in ranked[room:]:
            known = self._known[point]
            after = f"after {len(known.scores)} items" if known.scores else "by KL"
            self._known[point] = replace(known, why=f"left out {after}")
        kept = set(ranked[:room])
        self._alive[context] = [reference, *(point for point in others if point in kept)]


def regrets(found: Sequence[Evaluated]) -> list[int]:
    """The places of points of one context in the order of their regret: by scores on the same items, then by KL."""
    if not found:
        return []
    nbytes = np.array([one.nbytes for one in found])
    rival = (nbytes[:, None] <= nbytes[None]) & ~np.eye(len(found), dtype=bool)  # (q, p): q takes no more than p
    nearer = np.array([math.nan if one.kl is None else math.log(max(one.kl, SMALLEST_KL)) for one in found])
    by_kl = np.nan_to_num(nearer[None] - nearer[:, None])  # 0 where one is not known
    worst = [np.where(rival, each, -np.inf).max(axis=0) for each in (_clearly(found), by_kl)]
    return [int(place) for place in np.lexsort((worst[1], worst[0].round(9)))]


def _clearly(found: Sequence[Evaluated]) -> NDArray[np.float64]:
    """(q, p): by how many standard errors q is better than p on the items that both know; 0 where there are none."""
    scores = np.array([one.scores for one in found], np.float64)  # (P, n)
    count = scores.shape[1]
    if not count:
        return np.zeros((len(found), len(found)))
    mean = scores.mean(axis=1)
    apart = mean[:, None] - mean[None]
    squares = (scores**2).mean(axis=1)
    variance = squares[:, None] + squares[None] - 2 * scores @ scores.T / count - apart**2
    return np.asarray(apart / np.sqrt(np.maximum(variance, 0.0) / count + 1 / count**2))
