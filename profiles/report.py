"""The report of a run: what was done to a model, how accurate, large and fast it became, and what follows from it.

`Report` is the content of report.json (schema_version 1); terminal, markdown and HTML are renderings of it
(`profiles/render.py`). `findings` puts the numbers into sentences; none of them is written in advance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlkit.profiles.bench import Kind, Measurement, ratios
from rlkit.profiles.bundle import BundleSize
from rlkit.profiles.divergence import Divergence
from rlkit.profiles.machine import Machine
from rlkit.profiles.timing import Timing
from rlkit.recover.source import read_json

SCHEMA_VERSION = 1
EQUAL = 0.02  # time ratios this close to 1 are called equal


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of recovery: how far the model is from the original after it, and how long it took."""

    name: str
    divergence: Divergence | None
    seconds: float


@dataclass(frozen=True, slots=True)
class BundleResult:
    """One exported bundle: size, accuracy and speed.

    `divergence` is against the original, `agreement` against the checkpoint it was exported from; `tpot_ratio` is the
    time per token over the first bundle's, the median over rounds that ran side by side.
    """

    name: str
    recipe: str
    lowest_bits: int
    nbytes_by_kind: dict[str, int]
    bits_per_weight: float
    divergence: Divergence | None
    agreement: Divergence | None
    forecast: Timing
    measurement: Timing
    tpot_ratio: float | None = None

    @property
    def nbytes(self) -> int:
        """All tensors together."""
        return sum(self.nbytes_by_kind.values())


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An exported file against the original, and against the checkpoint it was made from."""

    divergence: Divergence | None = None
    agreement: Divergence | None = None


def bundle_results(
    sizes: Sequence[BundleSize],
    measured: Sequence[Measurement],
    forecasts: Sequence[Timing],
    accuracy: Sequence[Accuracy],
) -> tuple[BundleResult, ...]:
    """Bundles measured together, in one order in every argument; the first prefill and decode are reported."""
    decodes = [ratio for ratio in ratios(measured) if ratio.test.kind is Kind.DECODE]
    slower = {ratio.name: ratio.time for ratio in reversed(decodes)}  # reversed: the first test is kept
    return tuple(
        BundleResult(
            name=timed.name,
            recipe=size.recipe,
            lowest_bits=size.lowest_bits,
            nbytes_by_kind=dict(size.nbytes_by_kind),
            bits_per_weight=size.bits_per_weight,
            divergence=found.divergence,
            agreement=found.agreement,
            forecast=made,
            measurement=timed.timing(),
            tpot_ratio=slower.get(timed.name),
        )
        for size, timed, made, found in zip(sizes, measured, forecasts, accuracy, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Chat:
    """A sample of the talk, and the bundle that spoke."""

    prompt: str
    reply: str
    bundle: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a run has to say; `reference_format` is how the original's weights came, such as "GGUF Q4_1"."""

    model: str
    parameters: int
    reference_format: str
    held_out_text: str
    machine: Machine
    command: str
    date: str
    provenance: tuple[str, ...]
    stages: tuple[Stage, ...]
    bundles: tuple[BundleResult, ...]
    chat: Chat | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the findings for readers."""
        bundles = [_bundle_to_json(bundle) for bundle in self.bundles]
        kept = {**asdict(self), "machine": self.machine.to_json(), "bundles": bundles}
        said = {"provenance": list(self.provenance), "stages": list(kept["stages"]), "findings": list(findings(self))}
        return {"schema_version": SCHEMA_VERSION, **kept, **said}

    @classmethod
    def from_json(cls, table: dict[str, Any], where: str = "report.json") -> Report:
        """The inverse of `to_json`; refuses another schema version."""
        version = table.get("schema_version")
        if version != SCHEMA_VERSION:
            why = f"schema_version {version!r}, this rlkit reads {SCHEMA_VERSION}"
            raise ValueError(f"{where} has {why}; make it again")
        try:
            kept = {name: table[name] for name in cls.__slots__}
            stages = tuple(_stage_from_json(stage) for stage in table["stages"])
            bundles = tuple(_bundle_from_json(bundle) for bundle in table["bundles"])
            chat = Chat(**table["chat"]) if table["chat"] else None
            read = {"machine": Machine.from_json(table["machine"]), "provenance": tuple(table["provenance"])}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} is no complete report ({error}); make it again") from error
        return cls(**{**kept, **read, "stages": stages, "bundles": bundles, "chat": chat})


def _bundle_to_json(bundle: BundleResult) -> dict[str, Any]:
    timings = {"forecast": bundle.forecast.to_json(), "measurement": bundle.measurement.to_json()}
    return {**asdict(bundle), "nbytes": bundle.nbytes, **timings}


def _stage_from_json(table: dict[str, Any]) -> Stage:
    return Stage(table["name"], _divergence(table["divergence"]), table["seconds"])


def _bundle_from_json(table: dict[str, Any]) -> BundleResult:
    kept = {name: table[name] for name in BundleResult.__slots__}
    timings = {name: Timing.from_json(table[name]) for name in ("forecast", "measurement")}
    divergences = {name: _divergence(table[name]) for name in ("divergence", "agreement")}
    return BundleResult(**{**kept, **timings, **divergences})


def _divergence(table: dict[str, Any] | None) -> Divergence | None:
    return None if table is None else Divergence.from_json(table)


def read_report(path: Path) -> Report:
    """Read a report.json."""
    return Report.from_json(read_json(path), str(path))


def findings(report: Report) -> tuple[str, ...]:
    """What the numbers say, in sentences."""
    return tuple(_findings(report))


def _findings(report: Report) -> Iterator[str]:
    yield from _recovery(report)
    first, *others = report.bundles or (None,)
    for other in others:
        if first is not None and other is not None:
            yield _speed(first, other)
            yield _size(first, other)
    for bundle in report.bundles:
        yield from _faithful(bundle)
        yield _forecast(bundle)
    yield _reference(report)


def _recovery(report: Report) -> Iterator[str]:
    measured = [(stage.name, stage.divergence) for stage in report.stages if stage.divergence is not None]
    if len(measured) < 2:
        return
    (begin, before), (end, after) = measured[0], measured[-1]
    text = f"After {begin}: KL {before.kl_mean:.3f} nats per token, perplexity {before.perplexity_other:.1f}; "
    text += f"after {end}: KL {after.kl_mean:.3f}, perplexity {after.perplexity_other:.1f}; "
    share = 1.0 - after.kl_mean / before.kl_mean if before.kl_mean else 0.0
    change = f"{share:.0%} of the divergence is gone" if share >= 0 else f"the divergence grew by {-share:.0%}"
    yield f"{text}{change}. The original's perplexity is {after.perplexity_original:.1f}."


def time_ratio(first: BundleResult, other: BundleResult) -> float:
    """Time per token of `other` over that of `first`: from paired rounds if known, else from the medians."""
    if other.tpot_ratio is not None:
        return other.tpot_ratio
    return other.measurement.tpot_seconds / first.measurement.tpot_seconds


def _speed(first: BundleResult, other: BundleResult) -> str:
    ratio = time_ratio(first, other)
    word = "as fast as" if abs(ratio - 1.0) <= EQUAL else "slower than" if ratio > 1.0 else "faster than"
    names = f"{other.lowest_bits}-bit ({other.name}) is {word} {first.lowest_bits}-bit ({first.name}) on this machine"
    mine, theirs = 1e3 * other.measurement.tpot_seconds, 1e3 * first.measurement.tpot_seconds
    how = "the median of rounds side by side" if other.tpot_ratio is not None else "by these medians"
    text = f"{names}: {mine:.2f} ms per token against {theirs:.2f} ms; {ratio:.2f} times the time, {how}"
    return text + _bytes_against_time(first, other, ratio) + _doubt(first.measurement, other.measurement)


def _bytes_against_time(first: BundleResult, other: BundleResult, ratio: float) -> str:
    moved, base = other.measurement.nbytes_per_token, first.measurement.nbytes_per_token
    if moved is None or base is None:
        return "."
    less = f"{abs(1 - moved / base):.0%} {'fewer' if moved < base else 'more'} bytes"
    if (moved < base) == (ratio < 1.0):
        return f", reading {less} per token."
    return f", although it reads {less} per token: on this model, bytes are not what decides the time."


def _doubt(first: Timing, other: Timing) -> str:
    """A warning where the middle 80 % of both times overlap."""
    a, b = first.spread, other.spread
    if a is None or b is None:
        return ""
    apart = a.tpot_p90_seconds < b.tpot_p10_seconds or b.tpot_p90_seconds < a.tpot_p10_seconds
    return "" if apart else " Their times overlap from round to round, so another run may say otherwise."


def _size(first: BundleResult, other: BundleResult) -> str:
    sizes = f"{other.nbytes / 1e6:.1f} MB against {first.nbytes / 1e6:.1f} MB"
    return (
        f"{other.name} takes {sizes}: {other.bits_per_weight:.2f} against {first.bits_per_weight:.2f} bits per weight."
    )


def _faithful(bundle: BundleResult) -> Iterator[str]:
    found = bundle.agreement
    if found is not None:
        same = f"{found.top1_agreement:.1%} the same first choice"
        yield f"The exported {bundle.name} differs from its checkpoint by KL {found.kl_mean:.4f} nats, {same}."


def _forecast(bundle: BundleResult) -> str:
    gap = bundle.forecast.minus(bundle.measurement)
    forecast, measured = 1e3 * bundle.forecast.tpot_seconds, 1e3 * bundle.measurement.tpot_seconds
    said = f"forecast {forecast:.2f} ms per token, measured {measured:.2f} ms ({gap.tpot_relative:+.0%})"
    return f"{bundle.name}: {said}; first token {gap.ttft_relative:+.0%}. The forecast is uncalibrated."


def _reference(report: Report) -> str:
    if report.reference_format.upper().startswith("GGUF"):
        return (
            f"The full-precision reference is what the {report.reference_format} file's codes dequantize to, not the "
            "weights that its makers trained: every divergence here is measured against those dequantized weights."
        )
    return f"The full-precision reference is the model as it came ({report.reference_format})."
