"""Frontiers by halving against those of the whole grid, on made-up landscapes; what it costs, what jobs are asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlkit.profiles.frontier import pareto, search
from rlkit.profiles.frontier.result import accuracy_of, complete, nbytes_of
from rlkit.profiles.frontier.search import Evaluated, Found, Job, Measure, Measured, Totals, grid, halving, one_by_one
from rlkit.profiles.frontier.space import Point
from rlkit.profiles.frontier.store import Store, kept
from rlkit.profiles.needs import Memory
from rlkit.recover.progress import Progress

WEIGHTS = {"float": (270, 0.0), "w8": (140, 0.002), "w4": (75, 0.02), "w4:awq": (76, 0.03), "w4w2": (60, 0.12)}
CACHES = {
    "k16v16": (46, 0.0), "k8v8": (24, 0.001), "k8v4": (18, 0.006), "k8v2": (15, 0.08), "k4v4:smooth": (13, 0.01),
    "k4v2": (10, 0.1), "k2v2": (7, 0.6), "k4v4": (13, 0.5), "kivi4": (14, 0.008), "kivi2": (8, 0.2),
}  # fmt: skip
CHUNKS = {None: 60, 256: 20, 64: 8}
ITEMS = 96


class World:
    """Points that take megabytes and do damage, which KL shows roughly and items show with noise of their own."""

    def __init__(self, seed: int, contexts: Sequence[int] = (1024,)) -> None:
        rng = np.random.default_rng(seed)
        self.points = [
            Point(weights, kv, chunk, context)
            for context in contexts
            for weights in WEIGHTS
            for kv in CACHES
            for chunk in CHUNKS
        ]
        self.totals = Totals(dict.fromkeys(contexts, ITEMS), screen=2.0)
        self.asked: list[Job] = []
        self._known: dict[Point, tuple[Memory, float, tuple[float, ...]]] = {}
        hard = rng.normal(0, 0.9, ITEMS)
        for point in self.points:
            (weights, a), (cache, b) = WEIGHTS[point.weights], CACHES[point.kv]
            damage = a + b + (0.0005 if point.chunk else 0.0)
            able = 0.9 - 2.2 * math.sqrt(damage) - hard + rng.normal(0, 0.12, ITEMS)
            memory = Memory(weights, cache * point.context // 1024, CHUNKS[point.chunk])
            self._known[point] = (memory, damage * math.exp(rng.normal(0, 0.15)), tuple((able > 0).astype(float)))

    def measure(self, point: Point, items: range) -> Measured:
        self.asked.append(Job(point, items.start, items.stop))
        memory, kl, scores = self._known[point]
        return Measured(scores[items.start : items.stop]) if items else Measured((), memory, kl)


def best(found: Found) -> list[Evaluated]:
    return pareto.frontier(complete(found.points), nbytes_of, accuracy_of)


def test_halving_finds_the_frontier_with_two_fifths_of_the_evaluations() -> None:
    shares, recalls, distances = [], [], []
    for seed in range(8):
        world = World(seed)
        whole = grid(world.points, world.totals, one_by_one(world.measure))
        found = halving(world.points, world.totals, one_by_one(world.measure))
        assert whole.evaluations == whole.grid_evaluations == found.grid_evaluations == 150 * (ITEMS + 2)
        theirs, mine = ({one.point for one in best(each)} for each in (whole, found))
        assert len(theirs) > 5
        shares.append(found.evaluations / found.grid_evaluations)
        recalls.append(len(theirs & mine) / len(theirs))
        distances.append(pareto.distance(best(whole), best(found), nbytes_of, accuracy_of))
    assert max(shares) <= 0.4
    assert np.mean(recalls) >= 0.93 and min(recalls) >= 0.75
    assert max(distances) <= 0.05  # accuracy, where a point of the grid's was missed
    assert np.mean(distances) <= 0.01


def test_jobs_do_nothing_twice_and_go_on_where_they_ended() -> None:
    world = World(1, contexts=(1024, 4096))
    seen: list[Progress] = []
    found = halving(world.points, world.totals, one_by_one(world.measure), seen.append)
    spent = sum(len(job.items) or world.totals.screen for job in world.asked)
    assert spent == found.evaluations == search.planned(world.points, world.totals, whole=False)
    assert len(set(world.asked)) == len(world.asked)
    for one in found.points:
        mine = [job for job in world.asked if job.point == one.point]
        assert mine[0].items == range(0)
        assert sorted(item for job in mine[1:] for item in job.items) == list(one.items)
        assert len(one.items) == len(one.scores) and (len(one.scores) == ITEMS) == (not one.why)
    assert found.points[0].why == found.points[150].why == ""  # each context's reference
    assert seen[-1].done == seen[-1].total
    weights = [job.point.weights for job in world.asked]
    assert sum(a != b for a, b in itertools.pairwise(weights)) <= 5 * len(WEIGHTS)  # few are loaded anew


def test_texts_that_the_reference_solves_come_first() -> None:
    world = World(5)
    found = halving(world.points, world.totals, one_by_one(world.measure))
    reference, *others = found.points
    scores = world.measure(reference.point, range(ITEMS)).scores
    assert reference.scores == scores
    solved = [sum(scores[start : start + 4]) for start in range(0, ITEMS, 4)]
    partly = [one for one in others if 0 < len(one.scores) < ITEMS]
    assert partly
    for one in partly:
        known = {item // 4 for item in one.items}
        assert one.scores == tuple(world.measure(one.point, range(ITEMS)).scores[item] for item in one.items)
        assert min(solved[unit] for unit in known) >= max(solved[unit] for unit in set(range(ITEMS // 4)) - known)


def test_a_few_points_are_all_measured() -> None:
    world = World(0)
    few = world.points[:4]
    found = halving(few, world.totals, one_by_one(world.measure))
    assert [one.why for one in found.points] == [""] * 4 and found.evaluations == found.grid_evaluations


def test_few_items_have_fewer_rungs() -> None:
    assert [search.rungs(total) for total in (4, 8, 30, 96)] == [(4,), (4, 8), (4, 8, 16, 30), (12, 24, 48, 96)]
    world = World(2)
    found = halving(world.points, Totals({1024: 8}), one_by_one(world.measure))
    assert {len(one.scores) for one in found.points} == {0, 4, 8}


def test_without_kl_items_decide() -> None:
    world = World(3)

    def blind(point: Point, items: range) -> Measured:
        one = world.measure(point, items)
        return Measured(one.scores, one.memory)

    found = halving(world.points, world.totals, one_by_one(blind))
    assert all(one.kl is None for one in found.points) and len(best(found)) > 3


def test_measures_that_do_not_answer_are_told() -> None:
    world = World(0)
    with pytest.raises(ValueError, match=r"whole prompts: 0 scores for 4 items"):
        grid(world.points, world.totals, one_by_one(lambda _point, _items: Measured((), Memory(1, 1, 1))))
    with pytest.raises(ValueError, match="its bytes were not measured"):
        grid(world.points, world.totals, one_by_one(lambda _point, _items: Measured()))
    with pytest.raises(ValueError, match="there is no point to measure"):
        grid([], world.totals, one_by_one(world.measure))


def resumed(world: World, folder: Path) -> tuple[Measure, Store]:
    store = Store(folder, lambda job: f"{job.point.key}{job.start:04x}{job.stop:04x}")
    return kept(world.measure, store), store


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    world = World(4)
    measure, store = resumed(world, tmp_path)

    def failing(point: Point, items: range) -> Measured:
        if len(world.asked) == 200:
            raise KeyboardInterrupt
        return measure(point, items)

    with pytest.raises(KeyboardInterrupt):
        halving(world.points, world.totals, one_by_one(failing))
    first = list(world.asked)
    torn = store.path(first[-1])
    torn.write_text(torn.read_text()[:20])  # as a crash of the machine may leave it
    found = halving(world.points, world.totals, one_by_one(measure))
    again = world.asked[len(first) :]
    assert set(again) & set(first) == {first[-1]}
    fresh = World(4)
    assert found == halving(fresh.points, fresh.totals, one_by_one(fresh.measure))
    before = len(world.asked)
    grid(world.points, world.totals, one_by_one(measure))  # what halving measured is part of the grid
    more = sum(len(job.items) for job in world.asked[before:])
    assert more == 150 * ITEMS - sum(len(one.scores) for one in found.points)


def test_frontiers_and_what_is_within_a_budget() -> None:
    points = [(5, 0.5), (3, 0.2), (4, 0.2), (9, 0.9), (9, 0.8), (7, 0.4), (9, 0.9)]
    cost, gain = (lambda one: one[0]), (lambda one: one[1])
    best = pareto.frontier(points, cost, gain)
    assert best == [(3, 0.2), (5, 0.5), (9, 0.9)]
    assert pareto.within(points, cost, gain, 8) == (5, 0.5) and pareto.within(points, cost, gain, 2) is None
    assert pareto.cheapest(points, cost, gain, 0.3) == (5, 0.5) and pareto.cheapest(points, cost, gain, 1) is None
    assert pareto.distance(points, best, cost, gain) == 0.0
    assert pareto.shortfall([(3, 0.2), (9, 0.9)], best, cost, gain) == pytest.approx(0.3)
    assert pareto.shortfall(best, [(3, 0.2), (9, 0.9)], cost, gain) == 0.0
    assert pareto.shortfall([(4, 0.9)], best, cost, gain) == math.inf and pareto.shortfall(best, [], cost, gain) == 0.0
