"""A stored forecast beside a stored measurement: TTFT and TPOT of the workloads that both have.

A forecast (`rlkit forecast --json`, or a sweep of it) is for a prompt and for tokens after it; `rlkit bench` times
prompts (pp512) and tokens at a depth (tg128 @ d512). A prompt of the same length is the same work, and so are tokens
after as many others; how many are generated changes their mean depth alone, so it need not be the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit.profiles import benchfile, forecast, sweeps
from rlkit.profiles.account import LOOP
from rlkit.profiles.architecture import Architecture
from rlkit.profiles.bench import Kind, Series
from rlkit.profiles.table import Table, csv_text
from rlkit.profiles.timing import milliseconds
from rlkit.recover.source import read_json

SCHEMA_VERSION = 1
ALIKE = 0.02  # models whose parameters differ by more are two
AGAIN = "make it with `rlkit forecast MODEL -o FILE`"


@dataclass(frozen=True, slots=True)
class Told:
    """What a forecast says of one workload, by formula: (TTFT, TPOT) in seconds.

    `generator_seconds`: what TTFT counts for starting a reply, which bench does not time.
    """

    model: str
    recipe: str
    place: str
    label: str
    prompt_tokens: int
    new_tokens: int
    chunk: int | None
    batch: int
    parameters: int | None
    seconds: Mapping[str, tuple[float, float]]
    generator_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """One number of both: "ttft" or "tpot" of a test of a bundle; errors by formula, forecast / measured - 1."""

    bundle: str
    recipe: str
    test: str
    name: str
    measured_seconds: float
    forecast_seconds: Mapping[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """How far each formula is off."""
        return {name: seconds / self.measured_seconds - 1.0 for name, seconds in self.forecast_seconds.items()}


@dataclass(frozen=True, slots=True)
class Pairs:
    """All that two files have in common, and what a reader has to know of them."""

    place: str
    label: str
    machine: str
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        kept = {name: getattr(self, name) for name in ("place", "label", "machine")}
        pairs = [{**asdict(pair), "errors": pair.errors} for pair in self.pairs]
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "compare-stored",
            **kept,
            "pairs": pairs,
            "notes": list(self.notes),
        }


def compare_files(first: Path, second: Path) -> Pairs:
    """A forecast and a result of bench, in either order.

    Raises FileNotFoundError, or ValueError for files of another kind or schema version and for what shares no work.
    """
    tables = {path: read_json(path) for path in (first, second)}
    measured = [path for path, table in tables.items() if _is_bench(table)]
    if first == second or len(measured) != 1:
        both = f"{first} and {second} are {'two results' if measured else 'no result'} of rlkit bench"
        raise ValueError(f"{both}; name a forecast and a result: rlkit compare FORECAST.json MEASURED.json")
    other = second if measured[0] == first else first
    told = tuple(read_told(tables[other], str(other)))
    return pairs_of(told, benchfile.Result.from_json(tables[measured[0]], str(measured[0])))


def _is_bench(table: Mapping[str, Any]) -> bool:
    return table.get("kind") == benchfile.KIND or "entries" in table


def read_told(table: Mapping[str, Any], where: str = "the forecast") -> Iterator[Told]:
    """The workloads of a forecast or a sweep as JSON; ValueError for another schema version, or for what is neither."""
    if table.get("kind") or not {"roofline", "columns"} & set(table):
        raise ValueError(f"{where} is no forecast; {AGAIN}")
    if "columns" in table:
        yield from _of_sweep(sweeps.Sweep.from_json(dict(table), where))
        return
    if table.get("schema_version") != forecast.SCHEMA_VERSION:
        why = f"schema_version {table.get('schema_version')!r}, this rlkit reads {forecast.SCHEMA_VERSION}"
        raise ValueError(f"{where} has {why}; {AGAIN}")
    try:
        work = table["workload"]
        yield Told(
            model=table["model"],
            recipe=table["recipe"],
            place=table["decode"]["place"],
            label=table["label"],
            **{name: work[name] for name in ("prompt_tokens", "new_tokens", "chunk", "batch")},
            parameters=Architecture.from_json(table["architecture"]).parameters if "architecture" in table else None,
            seconds={
                name: (float(table[name]["ttft_seconds"]), float(table[name]["tpot_seconds"]))
                for name in forecast.FORMULAS
            },
            generator_seconds=sum(row["seconds"] for row in table["prefill"]["operators"] if row["name"] == LOOP),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no complete forecast ({error}); {AGAIN}") from error


def _of_sweep(found: sweeps.Sweep) -> Iterator[Told]:
    for point in found.points:
        both = {"roofline": (point.ttft_seconds, point.tpot_seconds)}
        both["life"] = point.life_ttft_seconds, point.life_tpot_seconds
        seconds = {name: (a, b) for name, (a, b) in both.items() if a is not None and b is not None}
        if seconds:
            about = found.model, point.recipe, found.decode_place, found.label
            work = point.context, found.new_tokens, point.chunk, found.batch
            yield Told(*about, *work, None, seconds)


def pairs_of(told: tuple[Told, ...], result: benchfile.Result) -> Pairs:
    """Every workload that was measured, too; ValueError where there is none, saying what there is."""
    found: dict[tuple[str, str, str], Pair] = {}
    notes: dict[str, None] = {}
    for entry in result.entries:
        fitting = [each for each in told if _same_model(each, entry) and each.recipe == entry.recipe]
        if not fitting and len(result.entries) == 1:
            fitting = [each for each in told if _same_model(each, entry)]
            for each in fitting:
                notes[f"the forecast is of {each.recipe}, what was measured is {entry.recipe}"] = None
        for each in fitting:
            for pair in _pairs(each, entry):
                found.setdefault((pair.bundle, pair.test, pair.name), pair)
    if not found:
        raise ValueError(_nothing(told, result))
    lengths = {each.new_tokens for each in told}
    notes |= dict.fromkeys(_about_lengths(lengths, result))
    around = max(each.generator_seconds for each in told)
    if around:
        more = f"{milliseconds(around)} ms for making a generator and choosing a token"
        notes[f"the forecast of TTFT counts {more}; bench times the choice alone"] = None
    if told[0].label != "calibrated":
        notes["the forecast is of peaks, which no kernel reaches; `rlkit calibrate` and --device here make it one"] = (
            None
        )
    machine = f"{result.host.cpu}, {result.date}"
    return Pairs(told[0].place, told[0].label, machine, tuple(found.values()), tuple(notes))


def _same_model(told: Told, entry: benchfile.Entry) -> bool:
    if told.model != entry.architecture:
        return False
    return told.parameters is None or abs(told.parameters / entry.parameters - 1.0) <= ALIKE


def _pairs(told: Told, entry: benchfile.Entry) -> Iterator[Pair]:
    for series in entry.measurement.series:
        test, name = series.test, "ttft" if series.test.kind is Kind.PREFILL else "tpot"
        if _fits(told, series):
            seconds = series.ttft or series.tpot
            assert seconds is not None
            each = {formula: both[name == "tpot"] for formula, both in told.seconds.items()}
            yield Pair(entry.measurement.name, entry.recipe, test.name, name, seconds.p50, each)


def _fits(told: Told, series: Series) -> bool:
    """Whether a test is the prompt of a forecast, read at once, or its tokens; a forecast has one token of prompt."""
    test = series.test
    if told.batch != 1:
        return False
    if test.kind is Kind.DECODE:
        return max(test.depth, 1) == told.prompt_tokens
    whole = told.chunk is None or told.chunk >= told.prompt_tokens
    return test.depth == 0 and test.tokens == told.prompt_tokens and whole


def _about_lengths(lengths: set[int], result: benchfile.Result) -> Iterator[str]:
    tests = {s.test.tokens for entry in result.entries for s in entry.measurement.series if s.test.kind is Kind.DECODE}
    for tokens in sorted(tests - lengths):
        said = ", ".join(str(length) for length in sorted(lengths))
        yield f"{said} new tokens are forecast and {tokens} were measured: their mean depths differ by half of that"


def _nothing(told: tuple[Told, ...], result: benchfile.Result) -> str:
    if not told:
        return "the forecast has no point with numbers; make it again with fewer tokens"
    first, entry = told[0], result.entries[0]
    if not any(_same_model(each, entry) for each in told for entry in result.entries):
        sizes = ["" if n is None else f" of {n / 1e9:.2f} billion" for n in (first.parameters, entry.parameters)]
        return f"the forecast is of {first.model}{sizes[0]}, measured was {entry.architecture}{sizes[1]}; name the same"
    tests = sorted({series.test.name for each in result.entries for series in each.measurement.series})
    batch = f" for {first.batch} sequences" if first.batch != 1 else ""
    work = f"{first.prompt_tokens} prompt tokens{batch} as {first.recipe}"
    remedy = f"run `rlkit bench BUNDLE --prompt {first.prompt_tokens} --depth {first.prompt_tokens}`"
    return f"the forecast is of {work}, measured were {', '.join(tests)} of {entry.recipe}; {remedy}"


def table(found: Pairs) -> Table:
    """One row per number."""
    formulas = list(dict.fromkeys(name for pair in found.pairs for name in pair.forecast_seconds))
    columns = [f"{name}{what}" for name in formulas for what in (", ms", ", error")]
    rows = [
        (pair.bundle, pair.test, pair.name.upper(), milliseconds(pair.measured_seconds), *_cells(pair, formulas))
        for pair in found.pairs
    ]
    title = f"forecast of {found.place} ({found.label}) against {found.machine}"
    note = "Errors: forecast / measured - 1, of the median of rounds; negative where the forecast was too fast."
    return Table(title, ("bundle", "test", "", "measured, ms", *columns), tuple(rows), note)


def _cells(pair: Pair, formulas: list[str]) -> Iterator[str]:
    for name in formulas:
        told = pair.forecast_seconds.get(name)
        yield "" if told is None else milliseconds(told)
        yield "" if told is None else f"{pair.errors[name]:+.0%}"


def to_csv(found: Pairs) -> str:
    """A line per number and formula, in seconds."""
    columns = ("bundle", "recipe", "test", "name", "measured_seconds", "formula", "forecast_seconds", "error")
    rows = [
        (p.bundle, p.recipe, p.test, p.name, p.measured_seconds, formula, told, p.errors[formula])
        for p in found.pairs
        for formula, told in p.forecast_seconds.items()
    ]
    return csv_text(columns, rows)
