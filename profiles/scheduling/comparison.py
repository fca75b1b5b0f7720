"""Policies on one scenario and device, side by side: means over seeds, how far they differ, as tables and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.profiles.scheduling.metrics import Percentiles, Spread, spread
from rlkit.profiles.scheduling.outcome import Outcome, StreamSummary, Summary, summarize
from rlkit.profiles.scheduling.policies import FIVE
from rlkit.profiles.scheduling.settings import Prepared
from rlkit.profiles.scheduling.workload import Llm, Setting, Stream
from rlkit.profiles.table import Table

SCHEMA_VERSION = 1
OURS = "lookahead"
PAPER = 0.417  # RTGen, arXiv 2507.14715, abstract
READING = (
    "The RTGen paper's abstract (arXiv 2507.14715) says that its five policies, which it does not name in public, "
    f"differ by {100 * PAPER:.1f} % in violation rate on average, and not how that is computed; we read it as "
    "(highest - lowest) / highest of a scenario, and then the mean over scenarios. Policies and scenarios are ours."
)
NOTE = (
    "Violated: late, dropped, or not done when due. The first figure is the mean over streams, so each model counts "
    "alike, as in XRBench's score; the second counts every frame and target alike. Latencies: p50 / p95 over the "
    "requests of a run. Every figure is a mean over seeds; ± is the standard deviation between them."
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was simulated, and each policy's summary. `factor`: how many times as often things come as in the file."""

    prepared: Prepared
    device: str
    factor: float
    seeds: tuple[int, ...]
    summaries: tuple[Summary, ...]
    about: tuple[str, ...] = ()

    @property
    def rates(self) -> dict[str, float]:
        """Violation rates by policy."""
        return {one.policy: one.rate for one in self.summaries}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        base, scenario = self.prepared.base, self.prepared.scenario
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "schedule",
            "scenario": scenario.name,
            "title": scenario.title,
            "device": self.device,
            "units": list(base.units),
            "duration_s": base.duration / 1e9,
            "rate_factor": self.factor,
            "seeds": list(self.seeds),
            "policies": [one.to_json() for one in self.summaries],
            "spread": spread_json(self.rates),
            "paper_spread": PAPER,
            "skipped": list(self.prepared.skipped),
            "notes": [*self.prepared.notes, NOTE, READING],
        }


def compared(outcomes: Mapping[str, Sequence[Outcome]]) -> tuple[Summary, ...]:
    """Outcomes by policy, over seeds, as summaries."""
    return tuple(summarize(runs) for runs in outcomes.values())


def five(rates: Mapping[str, float]) -> dict[str, float]:
    """The five online policies among these, or all if some of the five are missing."""
    return {name: rates[name] for name in FIVE} if FIVE.keys() <= rates.keys() else dict(rates)


def spread_json(rates: Mapping[str, float]) -> dict[str, Any]:
    """Spreads of the five and of all."""
    found = {"five" if FIVE.keys() <= rates.keys() else "chosen": five(rates), "all": rates}
    return {name: _spread(spread(some)) for name, some in found.items()}


def _spread(made: Spread) -> dict[str, Any]:
    ends = {"best": made.best, "worst": made.worst, "lowest": made.lowest, "highest": made.highest}
    return {**ends, "points": made.points, "relative": made.relative}


def percent(value: float | None) -> str:
    """12.3, or nothing."""
    return "" if value is None else f"{100 * value:.1f}"


def seconds(times: Percentiles | None, scale: float = 1.0, digits: int = 2) -> str:
    """p50 / p95."""
    return "" if times is None else f"{scale * times.p50:.{digits}f} / {scale * times.p95:.{digits}f}"


def findings(found: Comparison) -> Iterator[str]:
    """What the numbers say, in sentences."""
    rates = found.rates
    if len(rates) > 1:
        yield from spread_lines(rates)
    names = five(rates)
    if OURS in rates and len(names) == len(FIVE) and OURS not in names:
        best = min(names, key=names.__getitem__)
        yield f"{OURS} {percent(rates[OURS])} %, the best of the five ({best}) {percent(names[best])} %"
    if all(one.energy_joules is None for one in found.summaries):
        yield "energy is not known of every unit; the XRBench column leaves it out of the score"


def spread_lines(rates: Mapping[str, float]) -> Iterator[str]:
    """The spread, beside the paper's."""
    some = five(rates)
    made = spread(some)
    if not made.highest:
        yield f"no violations under {', '.join(some)}"
        return
    who = "the five" if len(some) < len(rates) or set(some) == set(FIVE) else "these policies"
    ends = f"{percent(made.lowest)} % ({made.best}) to {percent(made.highest)} % ({made.worst})"
    apart = f"{made.points:.1f} points, {percent(made.relative)} % of the highest (the paper's: {percent(PAPER)} %)"
    yield f"violations of {who}: {ends}, {apart}"


def tables(found: Comparison) -> Iterator[Table]:
    """All tables of a comparison."""
    yield overview(found)
    if len(found.prepared.base.streams) > 1:
        yield by_stream(found)
    if any(isinstance(stream, Llm) for stream in found.prepared.base.streams):
        yield by_request(found)


def overview(found: Comparison) -> Table:
    """A row per policy."""
    units = found.prepared.base.units
    known = any(one.energy_joules is not None for one in found.summaries)
    energy = ("energy, J",) if known else ()
    score = "XRBench" if all(one.xrbench is not None for one in found.summaries) else "XRBench, no energy"
    columns = (
        "policy",
        "violated, %",
        "of all, %",
        "TTFT, s",
        "TPOT, ms",
        "tokens/s",
        "dropped",
        "busy, %",
        *energy,
        score,
    )
    rows = tuple(_row(one, known, score) for one in found.summaries)
    return Table(titled(found), *_without_empty(columns, rows), f"{NOTE} Busy: {'/'.join(units)}.")


def titled(found: Comparison) -> str:
    """Scenario, device, how long, how often."""
    seeds = f"{len(found.seeds)} seed{'s' * (len(found.seeds) > 1)}"
    faster = "" if found.factor == 1.0 else f", rate x {found.factor:g}"
    return f"{found.prepared.scenario.title}: {found.device}, {found.prepared.base.duration / 1e9:g} s, {seeds}{faster}"


def _without_empty(
    columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Without columns that are empty in every row."""
    kept = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    return tuple(columns[place] for place in kept), tuple(tuple(row[place] for place in kept) for row in rows)


def _row(one: Summary, energy: bool, score: str) -> tuple[str, ...]:
    joules = ("" if one.energy_joules is None else f"{one.energy_joules:.0f}",) if energy else ()
    value = one.xrbench if score == "XRBench" else one.without_energy
    return (
        one.policy,
        percent(one.rate) + ("" if one.deviation is None else f" ±{percent(one.deviation)}"),
        percent(one.pooled),
        seconds(one.ttft),
        seconds(one.tpot, 1e3, 0),
        "" if one.tokens_per_s is None else f"{one.tokens_per_s:.1f}",
        f"{one.dropped:.0f}",
        "/".join(f"{100 * share:.0f}" for share in one.utilization.values()),
        *joules,
        "" if value is None else f"{value:.1f}",
    )


def by_stream(found: Comparison) -> Table:
    """Violations of each stream under each policy."""
    columns = ("policy", *(stream.name for stream in found.prepared.base.streams))
    rows = tuple((one.policy, *(percent(stream.rate) for stream in one.streams)) for one in found.summaries)
    return Table("Violated by stream, %", columns, rows, "Empty where nothing was due within the run.")


def by_request(found: Comparison) -> Table:
    """Latencies of every stream of requests under every policy."""
    rows = []
    for place, stream in enumerate(found.prepared.base.streams):
        if isinstance(stream, Llm):
            rows += [_latencies(stream, one.policy, one.streams[place]) for one in found.summaries]
    columns = ("requests", "policy", "violated, %", "TTFT, s", "TPOT, ms", "tokens/s", "quality")
    note = "TTFT and TPOT: p50 / p95. Quality: what the variants that ran are worth to the scenario."
    return Table("Requests", columns, tuple(row for row in rows if any(row[2:])), note)


def _latencies(stream: Llm, policy: str, one: StreamSummary) -> tuple[str, ...]:
    speed = "" if one.tokens_per_s is None else f"{one.tokens_per_s:.1f}"
    quality = "" if one.quality is None else f"{one.quality:.2f}"
    return stream.name, policy, percent(one.rate), seconds(one.ttft), seconds(one.tpot, 1e3, 0), speed, quality


def costs(base: Setting) -> Table:
    """What is asked of every stream, and its steps' times on every unit."""
    rows = tuple(
        (stream.name, stream.model, asked(stream), *(_cost(stream, unit) for unit in range(len(base.units))))
        for stream in base.streams
    )
    columns = ("stream", "model", "asked", *(f"{unit}, ms" for unit in base.units))
    note = "A frame; of requests a chunk of the prompt and a token, both at the start of a context. Empty: cannot run."
    return Table("Streams and what their steps take alone", columns, rows, note)


def _cost(stream: Stream | Llm, unit: int) -> str:
    if isinstance(stream, Stream):
        return next((f"{one.ns / 1e6:.3g}" for one in stream.options if one.unit == unit), "")
    firsts = [
        next((phase.options[0] for phase in phases if phase.options[0].unit == unit), None)
        for phases in (stream.prefill, stream.decode)
    ]
    return " + ".join(f"{one.ns / 1e6:.3g}" for one in firsts if one is not None)


def asked(stream: Stream | Llm) -> str:
    """What is due, in short."""
    if isinstance(stream, Llm):
        return f"TTFT {stream.ttft / 1e9:g} s, TPOT {stream.tpot / 1e6:g} ms"
    rate = f"{1e9 / stream.period:.4g}/s"
    return rate if stream.deadline == stream.period else f"{rate}, due in {stream.deadline / 1e6:.4g} ms"
