"""Costs on this machine from a measured profile: units are providers, and the processor's threads parted among units.

    frame    the median of its run with the unit's provider and threads
    step     medians of chunks and tokens by depth, straight lines between depths; beyond them the nearest one's
    demand   bytes of the weights / seconds / read bandwidth: what frames move beside that is not known, and a model
             that the caches hold asks for less
    energy   not measured: None

A unit is written NAME=PROVIDER:THREADS, as in small=cpu:1. Where two units together have more threads than the machine,
runs of one slow the other beyond what is counted here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlkit.profiles.scheduling.costs import Cost, FrameCost, LanguageCost, UnitFacts
from rlkit.profiles.scheduling.modelsizes import ModelSize
from rlkit.profiles.scheduling.profile import FRAME, LANGUAGE, Entry, Profile, Run, Step
from rlkit.profiles.scheduling.workload import CONTEXT


@dataclass(frozen=True, slots=True)
class Part:
    """A unit: a provider with so many threads."""

    name: str
    provider: str
    threads: int


def parts(texts: Sequence[str]) -> tuple[Part, ...]:
    """Units from NAME=PROVIDER:THREADS; ValueError for another form or a name that is there twice."""
    found = []
    for text in texts:
        match = re.fullmatch(r"([A-Za-z0-9_-]{1,20})=([a-z0-9]+):([1-9]\d{0,3})", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no unit; write one as NAME=PROVIDER:THREADS, for example small=cpu:1")
        found.append(Part(match[1], match[2], int(match[3])))
    if len({part.name for part in found}) < len(found) or not found:
        raise ValueError(f"units {', '.join(texts) or 'of nothing'} must have different names, one at least")
    return tuple(found)


def parts_of(profile: Profile) -> tuple[Part, ...]:
    """Units where nobody named any: two halves of the processor's threads if they were measured, and other providers.

    ValueError for a profile without runs.
    """
    runs = [(run.provider, run.threads) for entry in profile.models for run in entry.runs]
    if not runs:
        raise ValueError("the profile holds no run; make one with: rlkit profile-models -o FILE")
    threads = sorted({number for provider, number in runs if provider == "cpu"})
    most = threads[-1] if threads else 0
    half = max((number for number in threads if 2 * number <= most), default=0)
    made = [Part(f"cpu{index}", "cpu", half) for index in range(2)] if half else []
    made = made or [Part("cpu", "cpu", number) for number in threads[-1:]]
    others = dict.fromkeys(provider for provider, _number in runs if provider != "cpu")
    return (*made, *(Part(provider, provider, 1) for provider in others))


class Measured:
    """Costs of a profile; `units` says how its providers and threads are parted."""

    def __init__(self, profile: Profile, units: Sequence[Part] = ()) -> None:
        self.profile = profile
        self._parts = {part.name: part for part in units or parts_of(profile)}
        self.name = "here"
        self.units = tuple(
            UnitFacts(part.name, f"{part.provider}, threads: {part.threads}", 0, self._load(part), 0)
            for part in self._parts.values()
        )
        self.bytes_per_s, self.memory_nbytes = profile.bytes_per_s, profile.memory_nbytes

    def _load(self, part: Part) -> float:
        """Bytes per second at which a model was opened there, the fastest: small ones only take their time."""
        rates = [
            entry.nbytes / run.load_seconds
            for entry in self.profile.models
            if (run := entry.run(part.provider, part.threads)) is not None and run.load_seconds > 0
        ]
        return max(rates, default=1e9)

    def having(self, models: Mapping[str, ModelSize]) -> Measured:
        """The same: sizes are no measurements."""
        return self

    def known(self, model: str) -> bool:
        """Whether it was measured."""
        return any(entry.name == model for entry in self.profile.models)

    def names(self) -> tuple[str, ...]:
        """What was measured."""
        return tuple(dict.fromkeys(entry.name for entry in self.profile.models))

    def context(self, model: str) -> int | None:
        """The shortest context of the bundles of that name; None for other models."""
        return min(
            (one.context for one in self.profile.models if one.name == model and one.kind == LANGUAGE), default=None
        )

    def frame(self, model: str, unit: str) -> FrameCost:
        """The median of the frames there."""
        entry = self.profile.entry(model)
        if entry is None or entry.kind != FRAME:
            raise ValueError(f"{model} is a language model; use it in [requests]")
        run = self._run(entry, unit)
        cost = self._cost(run.steps[0].seconds, entry.nbytes)
        return FrameCost(cost, entry.nbytes, f"measured {self.profile.date}")

    def language(self, model: str, unit: str, recipe: str, chunks: Sequence[int], tokens: int) -> LanguageCost:
        """Medians by depth."""
        entry = self.profile.entry(model, recipe)
        if entry is None:
            have = ", ".join(one.recipe for one in self.profile.models if one.name == model and one.kind == LANGUAGE)
            raise ValueError(f"{model} with {recipe} was not measured; there is {have or 'no bundle of that name'}")
        run = self._run(entry, unit)
        pasts = [past + CONTEXT // 2 for past in range(0, max(tokens, 1), CONTEXT)]
        missing = [str(chunk) for chunk in chunks if not run.rows(chunk)]
        if missing or not run.rows(1):
            have = ", ".join(map(str, run.chunks))
            raise ValueError(f"{model}: chunks of {', '.join(missing) or '1'} were not measured on {unit}, but {have}")

        def row(size: int) -> tuple[Cost, ...]:
            return tuple(self._cost(seconds, entry.nbytes) for seconds in _at(run.rows(size), pasts))

        decode = row(1)
        return LanguageCost(
            weights_nbytes=entry.nbytes,
            kv_nbytes=entry.kv_nbytes,
            prefill={chunk: row(chunk) for chunk in chunks},
            least=tuple(cost.ns for cost in decode),
            decode=decode,
            source=f"measured {self.profile.date}",
        )

    def notes(self) -> tuple[str, ...]:
        """What was measured where."""
        facts = self.profile.machine
        return (f"medians measured on {self.profile.date}: {facts.get('cpu')}, onnxruntime {facts.get('onnxruntime')}",)

    def _run(self, entry: Entry, unit: str) -> Run:
        part = self._parts[unit]
        run = entry.run(part.provider, part.threads)
        if run is None:
            have = ", ".join(f"{one.provider}:{one.threads}" for one in entry.runs) or "nothing"
            asked = f"{part.provider}:{part.threads}"
            raise ValueError(f"{entry.name} was not measured on {unit} ({asked}), but on {have}")
        return run

    def _cost(self, seconds: float, nbytes: int) -> Cost:
        return Cost(max(round(1e9 * seconds), 1), min(nbytes / seconds / self.bytes_per_s, 1.0), None)


def _at(rows: Sequence[Step], pasts: Sequence[int]) -> list[float]:
    """Seconds behind each of `pasts` tokens."""
    found: list[float] = np.interp(pasts, [row.past for row in rows], [row.seconds for row in rows]).tolist()
    return found
