"""A scenario changed for a sweep: busier or calmer, longer or shorter, its models kept to some of the units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from random import Random

from rlkit.profiles.scheduling.scenario import MOST_FRAMES, MOST_MS, MS, Comings, Frames, Process, Scenario
from rlkit.profiles.scheduling.settings import Prepared
from rlkit.profiles.scheduling.workload import Llm, Setting

LEAST_FACTOR, MOST_FACTOR = 0.01, 100.0
FREE = "free"


def faster(scenario: Scenario, factor: float) -> Scenario:
    """Frames and requests come `factor` times as often; targets stay.

    A deadline that is the next frame's time moves with it. Requests that follow frames follow more of them.
    """
    if not LEAST_FACTOR <= factor <= MOST_FACTOR:
        raise ValueError(f"rate factor {factor:g} is outside {LEAST_FACTOR:g} to {MOST_FACTOR:g}")
    if factor == 1.0:
        return scenario
    streams = tuple(_faster(each, factor) for each in scenario.streams)
    requests = tuple(replace(each, arrivals=_often(each.arrivals, factor)) for each in scenario.requests)
    return _counted(replace(scenario, streams=streams, requests=requests), f"a rate factor of {factor:g}")


def _faster(frames: Frames, factor: float) -> Frames:
    interval = max(round(frames.interval / factor), 1)
    deadline = interval if frames.deadline == frames.interval else frames.deadline
    return replace(frames, interval=interval, deadline=deadline, jitter=min(frames.jitter, interval))


def _often(comings: Comings, factor: float) -> Comings:
    if comings.process is Process.AFTER:
        return comings
    return replace(comings, interval=max(round(comings.interval / factor), 1))


def lasting(scenario: Scenario, seconds: float) -> Scenario:
    """The scenario for so long. ValueError: no time, more than a day, or less than one frame of a stream."""
    if not (math.isfinite(seconds) and 1e-3 <= seconds <= MOST_MS / 1e3):
        raise ValueError(f"a duration of {seconds:g} s is outside 0.001 to {MOST_MS / 1e3:g}")
    return _counted(replace(scenario, duration=round(seconds * 1e3 * MS)), f"a duration of {seconds:g} s")


def _counted(scenario: Scenario, what: str) -> Scenario:
    """As many frames as fit into the duration now."""
    streams = []
    for each in scenario.streams:
        count = max(scenario.duration - each.offset, 0) // each.interval
        if not 1 <= count <= MOST_FRAMES:
            raise ValueError(f"{scenario.where}: streams.{each.name} has {count} frames with {what}; use another")
        streams.append(replace(each, count=count))
    return replace(scenario, streams=tuple(streams))


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which units may run which model, as (model, names of units); models that are not named stay free."""

    units: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def name(self) -> str:
        """`free`, or "yolov8n, ritnet on npu; modnet on cpu/igpu"."""
        there: dict[tuple[str, ...], list[str]] = {}
        for model, names in self.units:
            there.setdefault(names, []).append(model)
        return "; ".join(f"{', '.join(models)} on {'/'.join(names)}" for names, models in there.items()) or FREE


def assigned(scenario: Scenario, assignment: Assignment) -> Scenario:
    """The scenario with its models kept to these units."""
    units = dict(assignment.units)
    streams = tuple(replace(each, units=units.get(each.model, each.units)) for each in scenario.streams)
    requests = tuple(replace(each, units=units.get(each.model, each.units)) for each in scenario.requests)
    return replace(scenario, streams=streams, requests=requests)


def choices(setting: Setting) -> dict[str, tuple[str, ...]]:
    """By model: the units that can run it here, for all its streams."""
    found: dict[str, list[str]] = {}
    for stream in setting.streams:
        here = [name for index, name in enumerate(setting.units) if any(one.unit == index for one in stream.options)]
        model = stream.model or stream.name
        found[model] = [name for name in found.get(model, here) if name in here]
    return {model: tuple(names) for model, names in found.items() if names}


def assignments(prepared: Prepared, most: int, seed: int = 0) -> tuple[Assignment, ...]:
    """What to try, `most` at most: free; language models on one unit, the rest free or on the others; fixed ones.

    Fixed: every model on one unit, all of those that there are, or as many as fit, drawn with `seed`.
    """
    if most < 1:
        raise ValueError(f"{most} assignments: use at least 1")
    where = choices(prepared.base)
    language = {stream.model or stream.name for stream in prepared.base.streams if isinstance(stream, Llm)}
    made = [Assignment(), *_apart(where, language)]
    many = math.prod(len(names) for names in where.values())
    if many <= most - len(made):
        made += [_fixed(where, chosen) for chosen in product(*where.values())]
    else:
        rng = Random(seed)
        drawn = (_fixed(where, [rng.choice(names) for names in where.values()]) for _ in range(20 * most))
        made += islice(dict.fromkeys(drawn), max(most, 1))
    return tuple(dict.fromkeys(_plain(each, where) for each in made))[:most]


def _apart(where: dict[str, tuple[str, ...]], language: set[str]) -> list[Assignment]:
    """Language models on one unit; frames anywhere, or anywhere else."""
    made = []
    shared = [set(names) for model, names in where.items() if model in language]
    for unit in sorted(set.intersection(*shared)) if shared else ():
        held = tuple((model, (unit,)) for model in where if model in language)
        rest = tuple((model, tuple(name for name in names if name != unit) or names) for model, names in where.items())
        made += [Assignment(held), Assignment((*(each for each in rest if each[0] not in language), *held))]
    return made


def _fixed(where: dict[str, tuple[str, ...]], chosen: Sequence[str]) -> Assignment:
    return Assignment(tuple((model, (unit,)) for model, unit in zip(where, chosen, strict=True)))


def _plain(assignment: Assignment, where: dict[str, tuple[str, ...]]) -> Assignment:
    """Without models that keep all their units, in the order of the models."""
    units = dict(assignment.units)
    return Assignment(
        tuple((model, units[model]) for model in where if model in units and units[model] != where[model])
    )


def neighbours(assignment: Assignment, where: dict[str, tuple[str, ...]]) -> tuple[Assignment, ...]:
    """Those that differ in one model: free, or on one unit."""
    units = dict(assignment.units)
    made = []
    for model, names in where.items():
        for chosen in (names, *((name,) for name in names)):
            other = _plain(Assignment(tuple({**units, model: chosen}.items())), where)
            if other != assignment:
                made.append(other)
    return tuple(dict.fromkeys(made))
