"""Results of several machines as one value: every test a line, every machine a column (`merge.py` makes it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlkit.profiles import devicerun
from rlkit.profiles.bench import Case
from rlkit.profiles.benchfile import Host
from rlkit.profiles.changes import significant
from rlkit.profiles.devicerun import Part, Promise
from rlkit.profiles.timing import Summary

SCHEMA_VERSION = 1
KIND = "device-report"


@dataclass(frozen=True, slots=True)
class Machine:
    """A column: a host and the part of it that ran; `threads` of a CPU alone. `label` tells it from the others."""

    label: str
    host: Host
    part: Part
    threads: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        part = {**asdict(self.part), "notes": list(self.part.notes)}
        return {"label": self.label, "machine": asdict(self.host), "part": part, "threads": self.threads}


@dataclass(frozen=True, slots=True)
class Cell:
    """What one machine did in one test: tokens/s over rounds, seconds of the first or of each token, and whence."""

    tokens_per_s: Summary
    seconds: Summary
    bytes_per_s: float | None
    nbytes_per_token: int | None
    peak_nbytes: int | None
    forecast: Promise | None
    weights: str
    date: str
    versions: Mapping[str, str]
    file: str

    @property
    def error(self) -> float | None:
        """The forecast's time over the measured median, less 1."""
        return None if self.forecast is None else self.forecast.seconds / self.seconds.p50 - 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        kept = {name: getattr(self, name) for name in Cell.__slots__}
        rates = {"tokens_per_s": asdict(self.tokens_per_s), "seconds": asdict(self.seconds)}
        promise = None if self.forecast is None else asdict(self.forecast)
        return {**kept, **rates, "forecast": promise, "error": self.error, "versions": dict(self.versions)}


@dataclass(frozen=True, slots=True)
class Line:
    """One test of one model and recipe; `cells` by the labels of machines that ran it."""

    model: str
    recipe: str
    test: Case
    parameters: int
    cells: Mapping[str, Cell]

    @property
    def name(self) -> str:
        """In words: "qwen3-4b w4, tg128 @ d1024"."""
        return f"{self.model} {self.recipe}, {self.test.name}"

    @property
    def best(self) -> tuple[str, ...]:
        """The fastest machine and those that do not differ from it beyond their rounds' scatter; none of a single one.

        The scatter is judged by Welch's t test at 95 %, where there are rounds enough.
        """
        if len(self.cells) < 2:
            return ()
        first = max(self.cells, key=lambda label: self.cells[label].tokens_per_s.mean)
        top = self.cells[first].tokens_per_s
        others = (label for label in self.cells if label != first)
        return (first, *(label for label in others if significant(top, self.cells[label].tokens_per_s) is False))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        test = {
            "name": self.test.name,
            "kind": str(self.test.kind),
            "tokens": self.test.tokens,
            "depth": self.test.depth,
        }
        about = {"model": self.model, "recipe": self.recipe, "parameters": self.parameters, "test": test}
        return {**about, "best": list(self.best), "cells": {name: cell.to_json() for name, cell in self.cells.items()}}


@dataclass(frozen=True, slots=True)
class Left:
    """What a machine did not measure, and why."""

    machine: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Merged:
    """Machines, lines and skips, and what a reader has to know beside them."""

    machines: tuple[Machine, ...]
    lines: tuple[Line, ...]
    skips: tuple[Left, ...]
    notes: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def date(self) -> str:
        """Of the newest result; empty if there is none."""
        return max((cell.date for line in self.lines for cell in line.cells.values()), default="")[:10]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = {
            "machines": [each.to_json() for each in self.machines],
            "lines": [each.to_json() for each in self.lines],
        }
        told = {"skips": [asdict(left) for left in self.skips], "notes": list(self.notes), "files": list(self.files)}
        return {"schema_version": SCHEMA_VERSION, "kind": KIND, "units": devicerun.UNITS, **rows, **told}
