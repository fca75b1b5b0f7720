"""The file that a per-device benchmark script leaves: what was measured where, what was left out, and why.

Times are in seconds, sizes in bytes, and the file says so. A row is known by its model, recipe, test and versions: the
same is not measured twice, and a newer runtime's results stand beside the older one's. A row holds the rounds
themselves (`profiles.bench.Series`), so that other statistics can be made of them, and what had been forecast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rlkit.profiles.bench import Series
from rlkit.profiles.benchfile import Host
from rlkit.recover.source import read_json

SCHEMA_VERSION = 1
KIND = "device-bench"
UNITS = {"time": "s", "size": "B"}
RANDOM = "random weights"
HOW = "run python -m rlkit.apps.benchmarks.devices.FAMILY -o FILE"

Key = tuple[str, str, str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Part:
    """What ran the models: a family of devices (cpu, webgpu, directml, npu), its provider, chip and driver.

    `software` marks a driver that computes on the CPU: its speed says nothing of a GPU. `notes` are for readers.
    """

    family: str
    provider: str
    name: str
    driver: str = ""
    software: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Promise:
    """What was forecast for a test: seconds to the first token, or per token; at which place, calibrated or not."""

    seconds: float
    place: str
    label: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"a forecast of {self.seconds} seconds is none; measure again")


@dataclass(frozen=True, slots=True)
class Row:
    """One test of one model: what it was, when and with what it ran, the rounds, the forecast if there was one.

    `weights` is RANDOM or the name of the bundle's folder; `threads` None where the runtime chooses.
    """

    model: str
    recipe: str
    weights: str
    architecture: str
    parameters: int
    nbytes: int
    bits_per_weight: float
    threads: int | None
    date: str
    versions: Mapping[str, str]
    series: Series
    forecast: Promise | None = None

    @property
    def key(self) -> Key:
        """What it is a result of; a second result of the same takes its place."""
        return self.model, self.recipe, self.series.test.name, tuple(sorted(self.versions.items()))

    @property
    def seconds(self) -> float:
        """The median time to the first token, or per token."""
        found = self.series.ttft or self.series.token_seconds
        assert found is not None  # a series is of prefill or of decode
        return found.p50

    @property
    def error(self) -> float | None:
        """The forecast over what was measured, less 1: negative where it was slower than forecast."""
        return None if self.forecast is None else self.forecast.seconds / self.seconds - 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the error of the forecast for readers."""
        kept = {name: getattr(self, name) for name in Row.__slots__}
        told = {"versions": dict(self.versions), "series": self.series.to_json()}
        promise = None if self.forecast is None else {**asdict(self.forecast), "error": self.error}
        return {**kept, **told, "forecast": promise}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Row:
        """The inverse of `to_json`."""
        kept = {name: table[name] for name in cls.__slots__}
        promise = table["forecast"]
        if promise is not None:
            kept["forecast"] = Promise(**{name: promise[name] for name in Promise.__slots__})
        return cls(**{**kept, "series": Series.from_json(table["series"])})


@dataclass(frozen=True, slots=True)
class Skip:
    """What was not measured, and why; an empty test means all of the model's, an empty model everything."""

    model: str
    recipe: str
    test: str
    reason: str

    @property
    def what(self) -> str:
        """In words: "qwen3-4b, w8, tg128 @ d4096", or "everything"."""
        return ", ".join(part for part in (self.model, self.recipe, self.test) if part) or "everything"


@dataclass(frozen=True, slots=True)
class Run:
    """The content of a result file; `forecasts` says what the forecasts were made with, or why there are none."""

    date: str
    host: Host
    part: Part
    versions: Mapping[str, str]
    forecasts: str = ""
    rows: tuple[Row, ...] = ()
    skips: tuple[Skip, ...] = field(default=())

    def with_row(self, row: Row) -> Run:
        """With one more result; an older one of the same goes, and so does the reason why there was none."""
        rows = (*(other for other in self.rows if other.key != row.key), row)
        return replace(self, date=row.date, rows=rows, skips=tuple(_still(self.skips, row)))

    def with_skip(self, skip: Skip) -> Run:
        """With one more reason; an older one for the same goes."""
        place = skip.model, skip.recipe, skip.test
        others = (other for other in self.skips if (other.model, other.recipe, other.test) != place)
        return replace(self, skips=(*others, skip))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        about = {"schema_version": SCHEMA_VERSION, "kind": KIND, "units": UNITS, "date": self.date}
        where = {"machine": asdict(self.host), "part": {**asdict(self.part), "notes": list(self.part.notes)}}
        told = {"versions": dict(self.versions), "forecasts": self.forecasts}
        rows = {"rows": [row.to_json() for row in self.rows], "skips": [asdict(skip) for skip in self.skips]}
        return {**about, **where, **told, **rows}

    @classmethod
    def from_json(cls, table: dict[str, Any], where: str = "the result") -> Run:
        """The inverse of `to_json`; ValueError for another schema version, other units, and what is no such file."""
        if table.get("kind") != KIND:
            raise ValueError(f"{where} is no result of a device script; {HOW}")
        found = table.get("schema_version")
        if found != SCHEMA_VERSION:
            raise ValueError(f"{where} has schema_version {found!r}, this rlkit reads {SCHEMA_VERSION}; measure again")
        if table.get("units") != UNITS:
            raise ValueError(
                f"{where} is in units {table.get('units')!r}, not {UNITS!r}; measure again with this rlkit"
            )
        try:
            part = {**table["part"], "notes": tuple(table["part"]["notes"])}
            return cls(
                date=str(table["date"]),
                host=Host(**table["machine"]),
                part=Part(**part),
                versions=dict(table["versions"]),
                forecasts=str(table["forecasts"]),
                rows=tuple(Row.from_json(row) for row in table["rows"]),
                skips=tuple(Skip(**row) for row in table["skips"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where} is no complete result ({error}); measure again") from error


def _still(skips: Iterable[Skip], row: Row) -> Iterable[Skip]:
    """The reasons that a result does not refute."""
    for skip in skips:
        pairs = (skip.model, row.model), (skip.recipe, row.recipe), (skip.test, row.series.test.name)
        if not all(mine in ("", theirs) for mine, theirs in pairs):
            yield skip


def read_run(path: Path) -> Run:
    """Read a result file; FileNotFoundError where there is none."""
    return Run.from_json(read_json(path), str(path))
