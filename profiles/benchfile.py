"""The file that `rlkit bench` leaves: what was measured, on which machine, with which versions; its renderings.

It says nothing about where the bundles lie. Seconds of every token are kept, so that other statistics can be made of
them; means and percentiles are repeated for readers.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from rlkit.profiles.bench import Measurement, Plan, Series, ratios
from rlkit.profiles.bundle import MANIFEST, read_size
from rlkit.profiles.machine import cpu_name
from rlkit.profiles.table import Table, csv_text
from rlkit.profiles.timing import milliseconds
from rlkit.recover.source import read_json

SCHEMA_VERSION = 2
KIND = "bench"
PACKAGES = ("rlkit-edge", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True, slots=True)
class Host:
    """The machine that was measured, as far as others need it."""

    cpu: str
    system: str
    cores: int
    memory_nbytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One bundle's measurement, and what its manifest says; `target` is what it was exported for."""

    recipe: str
    target: str
    architecture: str
    parameters: int
    nbytes: int
    bits_per_weight: float
    measurement: Measurement


@dataclass(frozen=True, slots=True)
class Result:
    """The content of a result file."""

    date: str
    host: Host
    versions: dict[str, str]
    repeats: int
    warm_ups: int
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the ratios to the first bundle are included for readers."""
        entries = [
            {**{name: getattr(entry, name) for name in Entry.__slots__}, "measurement": entry.measurement.to_json()}
            for entry in self.entries
        ]
        kept = {name: getattr(self, name) for name in ("date", "versions", "repeats", "warm_ups")}
        found = [ratio.to_json() for ratio in ratios([entry.measurement for entry in self.entries])]
        about = {"schema_version": SCHEMA_VERSION, "kind": KIND, **kept, "machine": asdict(self.host)}
        return {**about, "entries": entries, "ratios": found}

    @classmethod
    def from_json(cls, table: dict[str, Any], where: str = "the result") -> Result:
        """The inverse of `to_json`; refuses another schema version and what is no result of bench."""
        found = table.get("schema_version")
        if table.get("kind", KIND) != KIND or (found == SCHEMA_VERSION and "entries" not in table):
            raise ValueError(f"{where} is no result of rlkit bench; make one with: rlkit bench BUNDLE -o FILE")
        if found != SCHEMA_VERSION:
            raise ValueError(f"{where} has schema_version {found!r}, this rlkit reads {SCHEMA_VERSION}; measure again")
        try:
            host = Host(**table["machine"])
            entries = tuple(_entry(row) for row in table["entries"])
            kept = {name: table[name] for name in ("date", "versions", "repeats", "warm_ups")}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where} is no complete result ({error}); measure again") from error
        if not entries:
            raise ValueError(f"{where} holds no measurement; measure again")
        return cls(host=host, entries=entries, **kept)


def _entry(row: dict[str, Any]) -> Entry:
    kept = {name: row[name] for name in Entry.__slots__}
    return Entry(**{**kept, "measurement": Measurement.from_json(row["measurement"])})


def read_result(path: Path) -> Result:
    """Read a result file; ValueError for another schema version, FileNotFoundError where there is none."""
    return Result.from_json(read_json(path), str(path))


def result_of(measured: Sequence[Measurement], bundles: Sequence[Path], plan: Plan) -> Result:
    """What was measured of these folders here and now."""
    entries = tuple(_entry_of(found, folder) for found, folder in zip(measured, bundles, strict=True))
    versions = {name: version(name) for name in PACKAGES}
    return Result(datetime.date.today().isoformat(), this_host(), versions, plan.repeats, plan.warm_ups, entries)


def _entry_of(found: Measurement, folder: Path) -> Entry:
    size, target = read_size(folder), read_json(folder / MANIFEST).get("target")
    shape = size.shape.architecture, size.shape.parameters
    return Entry(size.recipe, str(target or ""), *shape, size.nbytes, size.bits_per_weight, found)


def this_host() -> Host:
    """The machine this runs on."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return Host(cpu_name(), f"{platform.system()} {platform.machine()}", cores, int(psutil.virtual_memory().total))


def notes(result: Result) -> Iterator[str]:
    """What a reader has to know beside the numbers: what ran elsewhere than it was made for, and ratios."""
    for entry in result.entries:
        ran, made_for = entry.measurement.provider, entry.target
        if ran == "cpu" and made_for not in ("cpu", ""):
            yield f"{entry.measurement.name} was made for {made_for} and ran on the CPU; --provider asks for another"
    for ratio in ratios([entry.measurement for entry in result.entries]):
        yield f"{ratio.test.name}: {ratio.name} takes {ratio.time:.2f} times the time of {ratio.against}, side by side"


_BUNDLE = ("recipe", "MB", "bits/w", "on")
_SPEED = ("test", "tokens/s", "TTFT ms", "TPOT ms", "p50", "p95", "MB/token", "GB/s", "peak MB")


def table(result: Result) -> Table:
    """One row per bundle and test, as llama-bench prints them, with bytes beside speeds; wide."""
    rows = [
        (entry.measurement.name, *_about(entry), *_speeds(series))
        for entry in result.entries
        for series in entry.measurement.series
    ]
    return Table(_title(result), ("bundle", *_BUNDLE, *_SPEED), tuple(rows), _note(result))


def tables(result: Result) -> tuple[Table, Table]:
    """The same as two tables that a terminal has room for: bundles, and their speeds."""
    bundles = [(entry.measurement.name, *_about(entry)) for entry in result.entries]
    speeds = [
        (entry.measurement.name, *_speeds(series)) for entry in result.entries for series in entry.measurement.series
    ]
    first = Table(_title(result), ("bundle", *_BUNDLE), tuple(bundles))
    return first, Table("", ("bundle", *_SPEED), tuple(speeds), _note(result))


def _title(result: Result) -> str:
    return f"{result.host.cpu}, {result.host.cores} cores, {result.date}"


def _note(result: Result) -> str:
    return (
        f"Mean ± standard deviation of {result.repeats} rounds after {result.warm_ups} that did not count. p50 and p95 "
        "are of single tokens, in ms. GB/s: weights and cache that a token reads, over its time."
    )


def _about(entry: Entry) -> tuple[str, ...]:
    ran = entry.measurement.provider
    if entry.measurement.threads:
        ran += f", {entry.measurement.threads} threads"
    return entry.recipe, f"{entry.nbytes / 1e6:.1f}", f"{entry.bits_per_weight:.2f}", ran


def _speeds(series: Series) -> tuple[str, ...]:
    tokens, times = series.token_seconds, (series.ttft, series.tpot)
    return (
        series.test.name,
        series.tokens_per_s.text(2 if series.tokens_per_s.mean < 10 else 1),
        *("" if summary is None else milliseconds(summary.mean) for summary in times),
        *(("", "") if tokens is None else (milliseconds(tokens.p50), milliseconds(tokens.p95))),
        _scaled(series.nbytes_per_token, 1e6),
        _scaled(series.bytes_per_s, 1e9),
        _scaled(series.peak_nbytes, 1e6, 0),
    )


def _scaled(value: float | None, unit: float, digits: int = 1) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def to_csv(result: Result) -> str:
    """The same as numbers in SI units, a line per bundle and test, each with its machine and date."""
    rows = [_numbers(result, entry, series) for entry in result.entries for series in entry.measurement.series]
    return csv_text(list(rows[0]), [list(row.values()) for row in rows])


def _numbers(result: Result, entry: Entry, series: Series) -> dict[str, object]:
    found, tokens, rate = entry.measurement, series.token_seconds, series.tokens_per_s
    return {
        "name": found.name,
        "recipe": entry.recipe,
        "architecture": entry.architecture,
        "parameters": entry.parameters,
        "nbytes": entry.nbytes,
        "bits_per_weight": entry.bits_per_weight,
        "provider": found.provider,
        "threads": found.threads,
        "test": series.test.name,
        "tokens": series.test.tokens,
        "depth": series.test.depth,
        "repeats": len(series.rounds),
        "tokens_per_s": rate.mean,
        "tokens_per_s_std": rate.std,
        "ttft_seconds": series.ttft and series.ttft.mean,
        "tpot_seconds": series.tpot and series.tpot.mean,
        "token_p50_seconds": tokens and tokens.p50,
        "token_p95_seconds": tokens and tokens.p95,
        "nbytes_per_token": series.nbytes_per_token,
        "bytes_per_s": series.bytes_per_s,
        "peak_nbytes": series.peak_nbytes,
        "cpu": result.host.cpu,
        "date": result.date,
    }
