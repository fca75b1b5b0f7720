"""Sweeps: scenarios changed, assignments of units, kept and continued results, the same wherever they run."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlkit.apps import scenariofiles
from rlkit.profiles import device
from rlkit.profiles.scheduling import explore, farm, vary
from rlkit.profiles.scheduling.costs import Forecast
from rlkit.profiles.scheduling.explore import Explored, Space
from rlkit.profiles.scheduling.farm import Task
from rlkit.profiles.scheduling.scenario import Scenario
from rlkit.profiles.scheduling.settings import Prepared, prepare
from rlkit.profiles.scheduling.vary import Assignment
from rlkit.recover.progress import Progress

NO_RAY = importlib.util.find_spec("ray") is None
SPACE = Space(("fcfs", "edf"), seeds=2, factors=(1.0, 2.0), most=5, rounds=1)


@functools.cache
def scenario(name: str = "xrbench-vr-gaming") -> Scenario:
    return scenariofiles.load(name)


@functools.cache
def costs() -> Forecast:
    return Forecast(device.find("hx370")[0])


@functools.cache
def prepared(name: str = "xrbench-vr-gaming") -> Prepared:
    return prepare(scenario(name), costs())


@functools.cache
def swept() -> Explored:
    with farm.farm() as farmed:
        return explore.explore(scenario(), costs(), SPACE, farmed)


def test_faster_means_more_of_everything_with_the_same_targets() -> None:
    base, twice = scenario("gaming"), vary.faster(scenario("gaming"), 2.0)
    for one, other in zip(base.streams, twice.streams, strict=True):
        assert other.interval == round(one.interval / 2) and other.count == base.duration // other.interval
        own = one.deadline != one.interval
        assert other.deadline == (one.deadline if own else other.interval)
    for mine, theirs in zip(base.requests, twice.requests, strict=True):
        assert theirs.arrivals.interval == round(mine.arrivals.interval / 2) and theirs.ttft == mine.ttft
    assert vary.faster(base, 1.0) is base
    short = vary.lasting(base, 1.5)
    assert short.duration == 1_500_000_000 and short.streams[0].count == 89  # 60 a second are 16,666,667 ns apart


@pytest.mark.parametrize("factor", [0.0, -1.0, 1000.0, float("nan")])
def test_bad_factors(factor: float) -> None:
    with pytest.raises(ValueError, match=r"rate factor .* is outside 0\.01 to 100"):
        vary.faster(scenario(), factor)


@pytest.mark.parametrize(
    ("seconds", "says"), [(0.0, "duration of 0 s"), (1e9, "outside"), (0.005, "streams.* 0 frames")]
)
def test_bad_durations(seconds: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        vary.lasting(scenario(), seconds)


def test_assignments_are_named_and_put_to_work() -> None:
    chosen = Assignment((("ritnet", ("npu",)), ("fbnet-c", ("npu",)), ("hand-graph-cnn", ("cpu", "igpu"))))
    assert chosen.name == "ritnet, fbnet-c on npu; hand-graph-cnn on cpu/igpu" and Assignment().name == "free"
    base = prepare(vary.assigned(scenario(), chosen), costs()).base
    where = vary.choices(base)
    assert where == {"ritnet": ("npu",), "fbnet-c": ("npu",), "hand-graph-cnn": ("cpu", "igpu")}


def test_a_small_space_of_assignments_is_complete() -> None:
    everything = vary.assignments(prepared(), 100)
    models = vary.choices(prepared().base)
    count = 1
    for names in models.values():
        count *= len(names)
    assert len(everything) == 1 + count and everything[0] == Assignment() and len(set(everything)) == len(everything)
    some = vary.assignments(prepared("gaming"), 12)
    assert len(set(some)) == 12 and some == vary.assignments(prepared("gaming"), 12)
    assert any(dict(one.units).get("llama-3.2-3b") == ("npu",) and len(one.units) < 4 for one in some)
    assert all(set(names) <= set(vary.choices(prepared("gaming").base)[m]) for one in some for m, names in one.units)


def test_neighbours_differ_in_one_model() -> None:
    where = {"a": ("cpu", "npu"), "b": ("npu",)}
    start = Assignment((("a", ("npu",)),))
    assert set(vary.neighbours(start, where)) == {Assignment(), Assignment((("a", ("cpu",)),))}


def test_a_sweep_finds_the_best_and_never_less_than_free() -> None:
    found = swept()
    assert {one.policy for one in found.points} == {"fcfs", "edf"}
    for factor in SPACE.factors:
        for policy in SPACE.policies:
            best = found.best(factor, policy)
            assert best.summary.rate <= found.free(factor)[policy]
            assert best.summary.rate == min(one.summary.rate for one in found.at(factor, policy))
    assert found.best(1.0, "fcfs").summary.rate < found.free(1.0)["fcfs"]  # it pays to keep models apart
    assert len({one.assignment for one in found.points}) > SPACE.most  # the round has tried neighbours
    told = found.to_json()
    assert len(told["points"]) == len(found.points) and [row["policy"] for row in told["best"]] == ["fcfs", "edf"] * 2
    assert told["spread"]["2"]["chosen"]["highest"] == max(found.free(2.0).values())
    titles = [table.title for table in explore.tables(found)]
    assert len(titles) == 3 and titles[-1] == "Spread between policies"


def test_memory_and_units_of_the_scenario_bind_a_sweep() -> None:
    tight = Forecast(device.find("max395@4GB")[0])
    with pytest.raises(ValueError, match="over the memory"), farm.farm() as farmed:
        explore.explore(scenario("gaming"), tight, Space(("edf",), 1), farmed)
    hostile = replace(scenario(), streams=tuple(replace(each, units=("cpu", "npu")) for each in scenario().streams))
    with farm.farm() as farmed:
        found = explore.explore(hostile, costs(), Space(("edf",), 1, most=4), farmed)
    assert found.left_out == () and not any(
        "igpu" in names for one in found.points for _, names in one.assignment.units
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"policies": ()},
        {"seeds": 0},
        {"factors": (1.0, 1.0)},
        {"policies": ("edf", "edf")},
        {"most": 0},
        {"seeds": 10_000, "most": 1000},
    ],
)
def test_bad_spaces(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a sweep|simulations are more than"):
        Space(**({"policies": ("edf",), "seeds": 1} | wrong))


def tasks() -> list[Task]:
    return [Task(prepared(), seed, name) for seed in range(2) for name in ("fcfs", "lookahead")]


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with farm.farm(folder=tmp_path) as farmed:
        under_way = farmed(tasks())
        next(under_way)
        next(under_way)
        under_way.close()  # type: ignore[attr-defined]  # killed here
    assert len(list(tmp_path.rglob("*.json"))) == 2
    with farm.farm() as farmed:
        expected = farm.simulate(farmed, tasks())
    asked: list[Task] = []
    opened = farm.opened

    def counted(version: str) -> Any:
        do = opened(version)
        return lambda task: (asked.append(task), do(task))[1]

    monkeypatch.setattr(farm, "opened", counted)
    events: list[Progress] = []
    with farm.farm(folder=tmp_path) as farmed:
        assert farm.simulate(farmed, tasks(), "again", events.append) == expected
    assert asked == tasks()[2:] and (events[-1].stage, events[-1].done, events[-1].total) == ("again", 4, 4)
    for path in tmp_path.rglob("*.json"):
        path.write_text('{"schema_version": 1, "found": {"policy": "edf"}}')  # JSON, but no outcome
    with farm.farm(folder=tmp_path) as farmed:
        assert farm.simulate(farmed, tasks()) == expected
    assert len(asked) == 2 + 4


def test_keys_tell_settings_seeds_policies_and_sources_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = prepare(vary.faster(scenario(), 2.0), costs())
    others = [Task(prepared(), 1, "edf"), Task(prepared(), 0, "llf"), Task(faster, 0, "edf")]

    def keys() -> list[str]:
        return list(map(farm._identify(), [Task(prepared(), 0, "edf"), *others]))

    first = keys()
    assert len(set(first)) == 4 and keys() == first
    monkeypatch.setattr(farm, "sources", lambda: "others")
    assert set(keys()).isdisjoint(first)
    with pytest.raises(ValueError, match="another version"):
        farm.opened("mine")


@pytest.mark.skipif(NO_RAY, reason="ray is not installed")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:99999", "[::1]:1"])
def test_a_cluster_that_is_not_there_is_said_at_once(address: str) -> None:
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at .*:"), farm.farm(ray=address):
        pass


def same_as_here(outcomes: Sequence[Any]) -> bool:
    with farm.farm() as farmed:
        return farm.simulate(farmed, tasks()) == outcomes


@pytest.mark.slow
def test_two_processes_find_the_same() -> None:
    with farm.farm(workers=2) as farmed:
        assert same_as_here(farm.simulate(farmed, tasks()))


@pytest.mark.slow
@pytest.mark.skipif(NO_RAY, reason='ray is not installed: pip install "rlkit-edge[ray]"')
def test_a_local_ray_finds_the_same(tmp_path: Path) -> None:
    with farm.farm(workers=2, ray="local", folder=tmp_path) as farmed:
        assert same_as_here(farm.simulate(farmed, tasks()))
        made = explore.explore(scenario(), costs(), SPACE, farmed)
    assert made.to_json() == swept().to_json()
