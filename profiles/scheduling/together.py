"""From measured slowdowns to demands: what steps ask of that which units share, so that the simulator slows them so.

Steps on units of one processor share more than the bandwidth of the memory: caches, clocks, Python's lock. Their
demands are chosen so that `contention.rates` says, for every two kinds that were run beside each other, about what was
measured: the least sum of squares of log(said / measured), by coordinate descent over hundredths. Beyond pairs, and
where one kind slows another but not the other way round, the model of one shared good does not reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rlkit.profiles.scheduling.contention import rates
from rlkit.profiles.scheduling.workload import Llm, Phase, Setting, Stream
from rlkit.runtime.jobs import Option
from rlkit.runtime.rehearse import Beside

__all__ = ["adjusted", "fitted", "said"]

STEPS = 100  # of a demand from 0 to 1
SWEEPS = 8
Change = Callable[[int, Option], Option]  # of an option of a stream


def said(demands: Mapping[str, float], pair: Beside, cap: float = 1.0) -> tuple[float, float]:
    """The slowdowns of a pair by these demands."""
    one, other = rates((demands[pair.one], demands[pair.other]), cap)
    return 1.0 / one, 1.0 / other


def fitted(pairs: Sequence[Beside], cap: float = 1.0) -> dict[str, float]:
    """Demands by kind, 0 to 1."""
    kinds = list(dict.fromkeys(kind for pair in pairs for kind in (pair.one, pair.other)))
    demands = dict.fromkeys(kinds, 0.5)
    for _ in range(SWEEPS):
        before = dict(demands)
        for kind in kinds:
            mine = [pair for pair in pairs if kind in (pair.one, pair.other)]
            tried = [step / STEPS for step in range(STEPS + 1)]
            errors = [round(_error({**demands, kind: value}, mine, cap), 12) for value in tried]
            demands[kind] = tried[errors.index(min(errors))]
        if demands == before:
            break
    return demands


def _error(demands: Mapping[str, float], pairs: Sequence[Beside], cap: float) -> float:
    total = 0.0
    for pair in pairs:
        one, other = said(demands, pair, cap)
        total += math.log(one / max(pair.one_slower, 1.0)) ** 2 + math.log(other / max(pair.other_slower, 1.0)) ** 2
    return total


def adjusted(setting: Setting, change: Change, switch: Mapping[int, tuple[int, ...]]) -> Setting:
    """The setting with every option changed, and streams' costs of switching to their model, by unit."""
    streams = [
        replace(_changed(place, stream, change), switch_ns=switch.get(place, stream.switch_ns))
        for place, stream in enumerate(setting.streams)
    ]
    return replace(setting, streams=tuple(streams))


def _changed(place: int, stream: Stream | Llm, change: Change) -> Stream | Llm:
    if isinstance(stream, Stream):
        return replace(stream, options=tuple(change(place, option) for option in stream.options))
    return replace(
        stream,
        prefill=tuple(_phase(place, phase, change) for phase in stream.prefill),
        decode=tuple(_phase(place, phase, change) for phase in stream.decode),
    )


def _phase(place: int, phase: Phase, change: Change) -> Phase:
    """Least times change as the full chunk's do."""
    options = tuple(change(place, option) for option in phase.options)
    least = tuple(
        max(round(ns * new.ns / old.ns), 1)
        for ns, old, new in zip(phase.least_ns, phase.options, options, strict=False)
    )
    return Phase(options, tuple(min(ns, option.ns) for ns, option in zip(least, options, strict=False)))
