"""The file that `rlkit profile-models` writes: what frames of models and steps of bundles take on this machine.

{"schema_version": 1, "kind": "model-profiles", "date", "machine": facts that make it this one, "bytes_per_s": read
bandwidth, "memory_nbytes", "models": [entries]}

An entry is a model in one form with its runs, one for each provider and number of threads. Seconds are medians and
95th percentiles over frames, or over steps of one size at one depth. It holds for the machine that it was measured on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rlkit.recover.atomic import write_json
from rlkit.recover.source import read_json
from rlkit.runtime import tuned

SCHEMA_VERSION = 1
KIND = "model-profiles"
FRAME, LANGUAGE = "frame", "language"


@dataclass(frozen=True, slots=True)
class Step:
    """Steps of `tokens` after `past` tokens: how many were timed, their median and 95th percentile."""

    tokens: int
    past: int
    count: int
    seconds: float
    p95_seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """One provider with so many threads. `steps`: a frame has one of 0 tokens; bundles have prefill and decode steps.

    memory_nbytes: what the process grew by while it opened and ran the model.
    """

    provider: str
    threads: int
    load_seconds: float
    memory_nbytes: int | None
    steps: tuple[Step, ...]

    def rows(self, tokens: int) -> tuple[Step, ...]:
        """The steps of one size, by depth."""
        return tuple(sorted((each for each in self.steps if each.tokens == tokens), key=lambda each: each.past))

    @property
    def chunks(self) -> tuple[int, ...]:
        """Sizes of prompt chunks that were timed."""
        return tuple(sorted({each.tokens for each in self.steps if each.tokens > 1}))


@dataclass(frozen=True, slots=True)
class Entry:
    """A model: where it is from, what it weighs, its runs.

    work: of a frame, as runtime.framebench counts it. recipe, context, kv_nbytes (of the cache per token): of a bundle.
    """

    name: str
    kind: str
    origin: str
    license: str
    sha256: str
    nbytes: int
    runs: tuple[Run, ...]
    recipe: str = ""
    context: int = 0
    kv_nbytes: int = 0
    inputs: dict[str, list[int]] = field(default_factory=dict)
    work: dict[str, Any] | None = None

    def run(self, provider: str, threads: int) -> Run | None:
        """The run with this provider and number of threads; None where it was not made."""
        found = (run for run in self.runs if (run.provider, run.threads) == (provider, threads))
        return next(found, None)


@dataclass(frozen=True, slots=True)
class Profile:
    """The content of a file."""

    date: str
    machine: dict[str, Any]
    bytes_per_s: float
    memory_nbytes: int
    models: tuple[Entry, ...] = ()

    def entry(self, name: str, recipe: str = "") -> Entry | None:
        """A model, of a bundle the one of this recipe."""
        return next((one for one in self.models if (one.name, one.recipe) == (name, recipe)), None)

    def having(self, entry: Entry) -> Profile:
        """This profile with an entry in place of the one of its name and recipe, or at the end."""
        same = [(one.name, one.recipe) == (entry.name, entry.recipe) for one in self.models]
        kept = tuple(entry if here else one for one, here in zip(self.models, same, strict=True))
        return replace(self, models=kept if any(same) else (*kept, entry))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema_version": SCHEMA_VERSION, "kind": KIND, **asdict(self)}

    @classmethod
    def from_json(cls, table: Any, where: str = "the profile") -> Profile:
        """The inverse of `to_json`; ValueError naming `where` for anything else."""
        if not isinstance(table, dict) or table.get("kind") != KIND:
            raise ValueError(f"{where} is no profile of models; make one with: rlkit profile-models -o FILE")
        if table.get("schema_version") != SCHEMA_VERSION:
            found = table.get("schema_version")
            raise ValueError(f"{where}: schema_version = {found!r}, this rlkit reads {SCHEMA_VERSION}; measure again")
        try:
            kept = {name: table[name] for name in ("date", "machine", "bytes_per_s", "memory_nbytes")}
            made = cls(**kept, models=tuple(_entry(row) for row in table["models"]))
            steps = [step for one in made.models for run in one.runs for step in run.steps]
            numbers = [made.bytes_per_s, *(step.seconds for step in steps)]
            if not all(isinstance(number, int | float) and 0 < number < math.inf for number in numbers):
                raise ValueError("a time or bandwidth is no positive number")
            if not isinstance(made.machine, dict):
                raise ValueError("its machine is not described")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where} is no complete profile ({error}); measure again") from error
        return made


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(**{**row, "runs": tuple(_run(each) for each in row["runs"])})


def _run(row: dict[str, Any]) -> Run:
    return Run(**{**row, "steps": tuple(Step(**each) for each in row["steps"])})


def read(path: Path, *, here: bool = True) -> Profile:
    """Read a file. `here`: raise ValueError naming file and key if it is of another machine than this one."""
    if not path.is_file():
        raise FileNotFoundError(f"no profile {path}; make one with: rlkit profile-models -o {path}")
    made = Profile.from_json(read_json(path), str(path))
    if here:
        check_here(made, str(path))
    return made


def check_here(profile: Profile, where: str) -> None:
    """ValueError naming the first fact by which the profile's machine is not this one."""
    facts = tuned.machine_facts()
    for name in dict.fromkeys((*facts, *profile.machine)):
        there, own = profile.machine.get(name), facts.get(name)
        if there != own:
            why = f"= {there!r} there, {own!r} here: a profile of another machine"
            raise ValueError(f"{where}: machine.{name} {why}; measure here: rlkit profile-models -o FILE")


def write(path: Path, profile: Profile) -> None:
    """Write a file, complete or not at all."""
    write_json(path, profile.to_json())


def summed(rows: Sequence[tuple[int, int, float]]) -> tuple[Step, ...]:
    """Steps (tokens, past, seconds) of equal size and depth together, depths in bins of 64 tokens."""
    bins: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for tokens, past, seconds in rows:
        bins.setdefault((tokens, past // 64), []).append((past, seconds))
    return tuple(_step(tokens, found) for (tokens, _bin), found in sorted(bins.items()))


def _step(tokens: int, found: list[tuple[int, float]]) -> Step:
    seconds = sorted(each for _past, each in found)
    past = sum(each for each, _seconds in found) // len(found)
    return Step(tokens, past, len(seconds), percentile(seconds, 0.5), percentile(seconds, 0.95))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which that share lies, between the two nearest."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
