"""A forecast beside a measurement, operator class by operator class, and what the largest difference suggests.

    forecast    what every operator of a step takes by itself (`rates.Rates.spent`), the starts of all of them apart
    measured    medians of kernels in a plain session with the runtime's profiler (`profiles.opprofile`), brought to
                what a step takes without it; genai's own time per token, or of a prompt (`profiles.worker`)

The profiler writes down every kernel within its time, some microseconds each. A start is what an operator takes that
does next to nothing, so the shortest kernels' time is taken off all of them, as the forecast has its starts apart; what
remains of a step without the profiler is "starts", up to what the profile can hold of them, and "unexplained" beyond
that: the machine was busy. Kernels that are still longer than the step, as clocks change, are scaled down to it.
"beside the model" is genai's time less the graph's; making a generator, which a forecast of TTFT counts, is not in it.
All rows together are the step: what is forecast, and what genai takes.

A difference is forecast less measured, negative where the forecast was too fast; its share is its size over that of all
rows' differences, since differences of both signs hide each other. Rates count the bytes and FLOPs of the forecast over
the measured time. What this does not know: which kernel waited for another's data, and how far a median is from the
next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlkit.profiles.account import LOOP, Model
from rlkit.profiles.needs import cached_nbytes
from rlkit.profiles.opprofile import OperatorSeconds
from rlkit.profiles.parts import Part, expected
from rlkit.profiles.rates import UNCALIBRATED
from rlkit.profiles.step import Kind, Step
from rlkit.profiles.timing import milliseconds

SCHEMA_VERSION = 1
STARTS, UNEXPLAINED = "starts", "unexplained"
DISPATCH, AROUND = "dispatch", "loop"  # classes beside those of step.Kind


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a comparison; seconds of None: the forecast, or the graph, has no such operator.

    `count` is how many kernels ran, of the forecast where none did.
    """

    kind: str
    name: str
    bits: int
    count: int
    forecast_seconds: float | None
    measured_seconds: float | None
    flops: float = 0.0
    nbytes: float = 0.0

    @property
    def difference(self) -> float:
        """Seconds, forecast less measured."""
        return (self.forecast_seconds or 0.0) - (self.measured_seconds or 0.0)

    @property
    def error(self) -> float | None:
        """The difference as a share of what was measured."""
        if self.forecast_seconds is None or not self.measured_seconds or self.measured_seconds < 0:
            return None
        return self.forecast_seconds / self.measured_seconds - 1.0

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes that the forecast counts, over the measured time."""
        return self._rate(self.nbytes)

    @property
    def flops_per_s(self) -> float | None:
        """FLOPs that the forecast counts, over the measured time."""
        return self._rate(self.flops)

    def _rate(self, amount: float) -> float | None:
        return amount / self.measured_seconds if amount and self.measured_seconds else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what follows from the numbers is included for readers."""
        derived = {name: getattr(self, name) for name in ("difference", "error", "bytes_per_s", "flops_per_s")}
        return {**asdict(self), **derived}


@dataclass(frozen=True, slots=True)
class Compared:
    """A step of `prompt_tokens` new tokens after `past_tokens`, row by row.

    `plain_seconds` is a step of the graph alone, without the profiler; `genai_seconds` what generation takes for it,
    None where it was not measured; `baseline_seconds` bytes over bandwidth.
    """

    prompt_tokens: int
    past_tokens: int
    rows: tuple[Row, ...]
    plain_seconds: float
    genai_seconds: float | None
    baseline_seconds: float

    @property
    def title(self) -> str:
        """ "prompt of 512" or "token after 1024"."""
        if self.prompt_tokens == 1:
            return f"token after {self.past_tokens}"
        return f"prompt of {self.prompt_tokens}" + (f" after {self.past_tokens}" if self.past_tokens else "")

    @property
    def forecast_seconds(self) -> float:
        """The whole step as forecast."""
        return sum(row.forecast_seconds or 0.0 for row in self.rows)

    @property
    def measured_seconds(self) -> float:
        """The whole step as measured: genai's time, or the graph's alone where there is none."""
        return self.plain_seconds if self.genai_seconds is None else self.genai_seconds

    @property
    def error(self) -> float:
        """Of the whole step."""
        return self.forecast_seconds / self.measured_seconds - 1.0

    @property
    def baseline_error(self) -> float:
        """Of bytes over bandwidth."""
        return self.baseline_seconds / self.measured_seconds - 1.0

    def share(self, row: Row) -> float:
        """How much of all rows' differences is this one's, 0 to 1."""
        whole = sum(abs(each.difference) for each in self.rows)
        return abs(row.difference) / whole if whole else 0.0

    @property
    def ordered(self) -> tuple[Row, ...]:
        """The rows by the size of their difference, the largest first."""
        return tuple(sorted(self.rows, key=lambda row: -abs(row.difference)))

    @property
    def largest(self) -> Row:
        """The row with the largest difference."""
        return self.ordered[0]

    def classes(self) -> tuple[Row, ...]:
        """The rows of each class together, in the order of their first."""
        found: dict[str, Row] = {}
        for row in self.rows:
            before = found.get(row.kind, Row(row.kind, row.kind, 0, 0, None, None))
            found[row.kind] = replace(
                before,
                count=before.count + row.count,
                forecast_seconds=_plus(before.forecast_seconds, row.forecast_seconds),
                measured_seconds=_plus(before.measured_seconds, row.measured_seconds),
                flops=before.flops + row.flops,
                nbytes=before.nbytes + row.nbytes,
            )
        return tuple(found.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what follows from the numbers is included for readers."""
        plain = ("prompt_tokens", "past_tokens", "plain_seconds", "genai_seconds", "baseline_seconds")
        derived = ("title", "forecast_seconds", "measured_seconds", "error", "baseline_error")
        rows = [{**row.to_json(), "share": self.share(row)} for row in self.rows]
        return {**{name: getattr(self, name) for name in (*plain, *derived)}, "rows": rows}


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None and b is None else (a or 0.0) + (b or 0.0)


def compared(
    parts: Sequence[Part],
    profile: OperatorSeconds,
    *,
    loop_seconds: float = 0.0,
    genai_seconds: float | None = None,
    baseline_seconds: float = 0.0,
) -> Compared:
    """A forecast's parts beside a profile of the same step; `loop_seconds`: forecast for what genai does beside it."""
    left = {(part.name, part.bits): part for part in parts}
    kernels, starts, unexplained = _without_profiler(profile)
    rows: list[Row] = []
    for (kind, name, bits), (count, seconds) in kernels.items():
        part = left.pop((name, bits), None)
        told = (None, 0.0, 0.0) if part is None else (part.seconds, part.flops, part.nbytes)
        rows.append(Row(kind, name, bits, count, told[0], seconds, *told[1:]))
    rows += [
        Row(part.kind, part.name, part.bits, part.count, part.seconds, None, part.flops, part.nbytes)
        for part in left.values()
        if part.seconds or part.nbytes
    ]
    told_starts = sum(part.start_seconds for part in parts) or None  # 0: not known
    rows.append(Row(DISPATCH, STARTS, 0, profile.launches, told_starts, starts))
    if unexplained:
        rows.append(Row(DISPATCH, UNEXPLAINED, 0, 0, None, unexplained))
    if genai_seconds is not None:
        rows.append(Row(AROUND, LOOP, 0, 1, loop_seconds or None, genai_seconds - profile.wall_seconds))
    sizes = profile.prompt_tokens, profile.past_tokens
    return Compared(*sizes, tuple(rows), profile.wall_seconds, genai_seconds, baseline_seconds)


def _without_profiler(profile: OperatorSeconds) -> tuple[dict[tuple[str, str, int], tuple[int, float]], float, float]:
    """(kind, name, bits) -> (kernels, seconds) as in a step without the profiler; its starts; and what is left of it.

    Bits are those of linears alone.
    """
    written = 2 * profile.gap_seconds / profile.launches  # the most that is taken for the profiler's writing
    shortest = min(min(row.seconds / row.count for row in profile.rows), written)
    whole = profile.kernel_seconds - profile.launches * shortest
    scale = min(1.0, profile.wall_seconds / whole) if whole > 0 else 1.0
    found: dict[tuple[str, str, int], tuple[int, float]] = {}
    for row in profile.rows:
        key = row.kind, row.name, row.bits if row.kind == Kind.LINEAR else 0
        count, seconds = found.get(key, (0, 0.0))
        found[key] = count + row.count, seconds + scale * max(row.seconds - row.count * shortest, 0.0)
    rest = max(profile.wall_seconds - scale * whole, 0.0)
    starts = min(rest, profile.gap_seconds + profile.launches * shortest)
    return found, starts, rest - starts


def compare_step(
    model: Model, profile: OperatorSeconds, genai_seconds: float | None = None, *, all_logits: bool = False
) -> Compared:
    """The forecast of a model for the step that was profiled, beside it.

    `genai_seconds`: TTFT of that prompt, or TPOT at that depth, as `rlkit bench` measures them.
    """
    tokens, past = profile.prompt_tokens, profile.past_tokens
    rates = model.rates_at(past)  # those of the loop are the same for a prompt: a choice, and caches that are bound
    read = model.streamed_nbytes(tokens) + cached_nbytes(model.architecture, model.place, past + tokens, 1)
    return compared(
        expected(model, Step(tokens, past, tokens if all_logits else 1)),
        profile,
        loop_seconds=rates.token_seconds,
        genai_seconds=genai_seconds,
        baseline_seconds=read / rates.bytes_per_s,
    )


@dataclass(frozen=True, slots=True)
class Where:
    """What the forecast was for, as far as sentences need it; `calibrated_threads` of None: unknown."""

    place: str
    label: str
    bytes_per_s: float
    flops_per_s: float
    calibrated_threads: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every step that was compared of one bundle on one machine.

    `generator_seconds`: what a forecast of TTFT counts for making a generator, which is in no row.
    """

    bundle: str
    recipe: str
    where: Where
    threads: int
    steps: int
    compared: tuple[Compared, ...]
    generator_seconds: float = 0.0
    assumptions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the sentences."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "compare",
            "bundle": self.bundle,
            "recipe": self.recipe,
            **asdict(self.where),
            "threads": self.threads,
            "steps": self.steps,
            "generator_seconds": self.generator_seconds,
            "compared": [each.to_json() for each in self.compared],
            "findings": list(findings(self)),
            "assumptions": list(self.assumptions),
        }


def findings(found: Comparison) -> Iterator[str]:
    """Every step in a sentence, its largest gap in another, and what to do about both."""
    for step in found.compared:
        yield f"{step.title}: {_whole(step)}"
        yield f"{step.title}: {gap(step, found.where)}"
    if found.where.label == UNCALIBRATED:
        yield "this forecast is of peaks, which no kernel reaches: run `rlkit calibrate` and compare again"
    if found.generator_seconds and any(step.prompt_tokens > 1 for step in found.compared):
        said = f"a forecast of TTFT counts {_ms(found.generator_seconds)} more for making a generator"
        yield f"{said}, which neither `rlkit bench` nor this times"
    threads = found.where.calibrated_threads
    if threads is not None and threads != found.threads:
        said = f"{found.where.place} was calibrated with {threads} threads, and the bundle ran with {found.threads}"
        yield f"{said}: calibrate again, or name the same with --threads"


def _whole(step: Compared) -> str:
    errors = f"{step.error:+.0%}; bytes over bandwidth {step.baseline_error:+.0%}"
    said = f"forecast {_ms(step.forecast_seconds)}, measured {_ms(step.measured_seconds)} ({errors})"
    if step.genai_seconds is None:
        return said
    return f"{said}; the graph alone takes {_ms(step.plain_seconds)}"


def gap(step: Compared, where: Where) -> str:
    """The largest gap of a step, in a sentence made from its numbers, and what it suggests."""
    said = _of_row(step.largest, step, where)
    if step.largest.name == UNEXPLAINED and len(step.rows) > 1:
        said += f"; after it comes {_of_row(step.ordered[1], step, where)}"
    return f"the largest gap is {said}"


def _of_row(row: Row, step: Compared, where: Where) -> str:
    name = row.name + (f" ({row.bits} bits)" if row.bits else "")
    told, took = row.forecast_seconds, row.measured_seconds
    measured = "not run" if took is None else f"{_ms(took)} measured"
    forecast = "not forecast" if told is None else f"{_ms(told)} forecast"
    share = f"{step.share(row):.0%} of all differences"
    return f"{name}, {measured} and {forecast}, {share}: {_why(row, step, where)}"


def _why(row: Row, step: Compared, where: Where) -> str:
    told, took, slower = row.forecast_seconds, row.measured_seconds, row.difference < 0
    if row.name == UNEXPLAINED:
        return "other work on the machine, as neither kernels nor their starts took it; repeat when it is quiet"
    if row.name == LOOP and (took or 0.0) < 0:
        return (
            f"the graph alone took longer, {_ms(step.plain_seconds)}, as the machine changed; repeat when it is quiet"
        )
    if row.name == LOOP:
        return f"what generation does beside the graph, which alone takes {_ms(step.plain_seconds)}"
    if took is None:
        return "the graph holds it in another operator, or it was optimized away"
    each = 1e6 * took / max(row.count, 1)
    if row.name == STARTS:
        waits = "threads wake up late or follow each other slowly" if slower else "kernels follow each other at once"
        return f"{each:.2f} us for each of {row.count} kernels; {waits}"
    if told is None or not row.nbytes or not took:
        return f"{row.count} kernels of {each:.1f} us each, of which a forecast knows the starts at most"
    return _rate(row, where, told, took, slower=slower)


def _rate(row: Row, where: Where, told: float, took: float, *, slower: bool) -> str:
    """What bytes or FLOPs per second say, whichever bounds the operator."""
    moves = row.nbytes / where.bytes_per_s >= row.flops / where.flops_per_s
    amount, peak, unit = (row.nbytes, where.bytes_per_s, "GB/s") if moves else (row.flops, where.flops_per_s, "GFLOP/s")
    said = f"it reaches {amount / took / 1e9:.1f} {unit}" + (
        f", {amount / told / 1e9:.1f} were forecast" if told else ""
    )
    if where.label == UNCALIBRATED:
        why = "a peak is not what kernels reach" if slower else f"more than the {peak / 1e9:.1f} taken as the peak"
    elif slower:
        why = "slower than alone: data farther away than in calibration, or threads that wait for each other"
        why = why if moves else "slower than alone: threads that wait for each other, or a clock that falls under load"
    elif moves and amount / took > peak:
        why = f"more than the {peak / 1e9:.1f} of memory: what it reads is still in the caches"
    else:
        why = "faster than alone: calibrate again on a quiet machine"
    return f"{said}; {why}"


def _ms(seconds: float) -> str:
    return f"{milliseconds(seconds)} ms"
