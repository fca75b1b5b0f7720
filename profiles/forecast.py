"""Forecast of time to first token, time per token and memory from a model's shape: no weights, no run.

Two formulas, named wherever a number is printed:

    roofline   each operator takes max(FLOPs / peak, bytes / bandwidth) + launches * dispatch; a step is their sum
    life       the LIFE paper's (arXiv 2508.00904), over totals: TTFT = max(FLOPs / peak, bytes / bandwidth) + dispatch;
               TPOT = bytes / bandwidth + dispatch, memory alone

and a baseline with one parameter that either should beat: (weights + cache) / bandwidth. Every number is a bound with
all efficiencies at 1 and is labelled uncalibrated. What this does not know: how much of the peaks a kernel reaches, the
int8 rate that low-bit kernels compute with, caches that keep small models, and memory that the runtime itself takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rlkit.profiles.architecture import Architecture, of_shape
from rlkit.profiles.machine import Machine
from rlkit.profiles.operators import Matrix, Operator, Step, Storage, cache_nbytes, operators, weigh
from rlkit.profiles.timing import Basis, Timing
from rlkit.recover.recipe import Recipe
from rlkit.recover.source import ModelShape

LABEL = "uncalibrated"


@dataclass(frozen=True, slots=True)
class Peaks:
    """The rates a forecast divides by, and where they come from."""

    bytes_per_s: float
    flops_per_s: float
    dispatch_seconds: float = 0.0
    source: str = "given"

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.flops_per_s > 0 and self.dispatch_seconds >= 0):
            raise ValueError(f"{self} cannot be divided by; bandwidth and FLOP/s must be positive")

    @classmethod
    def of(cls, machine: Machine) -> Peaks:
        """The measured peaks of a machine; the cost of starting an operator is unknown and counted as 0."""
        source = f"{machine.cpu}, {machine.source} {machine.date}"
        return cls(machine.read_bytes_per_s, machine.flops_per_s, 0.0, source)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is generated: a prompt, and how many tokens after it.

    `all_logits` says whether prefill computes the logits of every prompt token (the CPU export does: its lm_head is not
    cut down to the last token) or of the last one alone.
    """

    prompt_tokens: int
    new_tokens: int
    all_logits: bool = True

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 1:
            raise ValueError(f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens: each must be at least 1")


@dataclass(frozen=True, slots=True)
class Cost:
    """What the operators of one name cost in one step, together."""

    name: str
    flops: int
    nbytes: int
    seconds: float
    bound: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """Both formulas and the baseline for one workload, with the operators behind them."""

    recipe: str
    workload: Workload
    peaks: Peaks
    storage: Storage
    weights: tuple[Matrix, ...]
    prefill: tuple[Cost, ...]
    decode: tuple[Cost, ...]
    roofline: Timing
    life: Timing
    baseline: Timing
    stored_nbytes: int
    kv_nbytes: int

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the numbers rest on, as sentences."""
        return tuple(_assumptions(self))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        timings = {name: getattr(self, name).to_json() for name in ("roofline", "life", "baseline")}
        plain = {name: asdict(getattr(self, name)) for name in ("workload", "peaks", "storage")}
        costs = {name: [asdict(cost) for cost in getattr(self, name)] for name in ("weights", "prefill", "decode")}
        sizes = {"stored_nbytes": self.stored_nbytes, "kv_nbytes": self.kv_nbytes}
        said = {"label": LABEL, "assumptions": list(self.assumptions)}
        return {"schema_version": 1, "recipe": self.recipe, **plain, **costs, **timings, **sizes, **said}


def forecast(
    model: ModelShape | Architecture,
    recipe: Recipe,
    peaks: Peaks,
    workload: Workload,
    storage: Storage | None = None,
) -> Forecast:
    """Forecast one workload; refuses a context that the model does not have."""
    shape = of_shape(model) if isinstance(model, ModelShape) else model
    stored = storage or Storage()
    prompt, new = workload.prompt_tokens, workload.new_tokens
    if prompt + new > shape.max_context:
        asked = f"{prompt} prompt + {new} new tokens = {prompt + new}"
        raise ValueError(f"{asked} exceed the model's context of {shape.max_context}; ask for fewer")
    weights = weigh(shape, recipe, stored)
    prefill = operators(shape, weights, stored, Step(prompt, 0, prompt if workload.all_logits else 1))
    # Bytes and FLOPs grow linearly with depth, so the mean of the first and the last decode step is the mean of all.
    first, last = (operators(shape, weights, stored, Step(1, past)) for past in (prompt, prompt + max(new - 2, 0)))
    streamed = sum(matrix.streamed_nbytes for matrix in weights.matrices)
    at_mean = (
        cache_nbytes(shape, stored.kv, prompt + 1) + cache_nbytes(shape, stored.kv, prompt + max(new - 1, 1))
    ) // 2
    moved = streamed + at_mean  # weights, and the cache at mean depth
    prompt_cached, cached = (cache_nbytes(shape, stored.kv, tokens) for tokens in (prompt, prompt + new))
    kept = weights.stored_nbytes
    peak = kept + cached + _scratch_nbytes(shape, stored, workload)

    def timing(ttft_seconds: float, tpot_seconds: float) -> Timing:
        return Timing(Basis.FORECAST, prompt, new, ttft_seconds, tpot_seconds, moved, peak)

    return Forecast(
        recipe=recipe.name,
        workload=workload,
        peaks=peaks,
        storage=stored,
        weights=weights.matrices,
        prefill=costs(prefill, peaks),
        decode=costs(first, peaks),
        roofline=timing(roofline_seconds(prefill, peaks), _mean(roofline_seconds(ops, peaks) for ops in (first, last))),
        life=timing(life_ttft_seconds(prefill, peaks), _mean(life_tpot_seconds(ops, peaks) for ops in (first, last))),
        baseline=timing((streamed + prompt_cached) / peaks.bytes_per_s, moved / peaks.bytes_per_s),
        stored_nbytes=kept,
        kv_nbytes=cached,
    )


def roofline_seconds(ops: Iterable[Operator], peaks: Peaks) -> float:
    """The per-operator roofline: the sum of each operator's larger bound, and its launches."""
    return sum(op.count * _operator_seconds(op, peaks) for op in ops)


def life_ttft_seconds(ops: Iterable[Operator], peaks: Peaks) -> float:
    """The LIFE paper's time to first token: the larger of the total compute and the total memory time."""
    flops, nbytes, launches = _totals(ops)
    return max(flops / peaks.flops_per_s, nbytes / peaks.bytes_per_s) + launches * peaks.dispatch_seconds


def life_tpot_seconds(ops: Iterable[Operator], peaks: Peaks) -> float:
    """The LIFE paper's time per token: memory time alone."""
    _flops, nbytes, launches = _totals(ops)
    return nbytes / peaks.bytes_per_s + launches * peaks.dispatch_seconds


def costs(ops: Iterable[Operator], peaks: Peaks) -> tuple[Cost, ...]:
    """The roofline's operators, added up by name; `bound` is what limits the larger part of the time."""
    groups: dict[str, list[Operator]] = {}
    for op in ops:
        groups.setdefault(op.name, []).append(op)
    return tuple(_cost(name, group, peaks) for name, group in groups.items())


def _cost(name: str, group: list[Operator], peaks: Peaks) -> Cost:
    flops, nbytes, launches = _totals(group)
    parts = {
        "memory": nbytes / peaks.bytes_per_s,
        "compute": flops / peaks.flops_per_s,
        "dispatch": launches * peaks.dispatch_seconds,
    }
    return Cost(name, flops, nbytes, roofline_seconds(group, peaks), max(parts, key=lambda part: parts[part]))


def _operator_seconds(op: Operator, peaks: Peaks) -> float:
    return max(op.flops / peaks.flops_per_s, op.nbytes / peaks.bytes_per_s) + op.launches * peaks.dispatch_seconds


def _totals(ops: Iterable[Operator]) -> tuple[int, int, int]:
    flops = nbytes = launches = 0
    for op in ops:
        flops += op.count * op.flops
        nbytes += op.count * op.nbytes
        launches += op.count * op.launches
    return flops, nbytes, launches


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


def _scratch_nbytes(shape: Architecture, storage: Storage, workload: Workload) -> int:
    """Prefill's live activations: the residual and the widest layer's, and the logits."""
    logits = (workload.prompt_tokens if workload.all_logits else 1) * shape.vocab
    widest = max(
        layer.ffn or (layer.experts.active * layer.experts.ffn if layer.experts else 0) for layer in shape.layers
    )
    live = workload.prompt_tokens * (2 * shape.hidden + 3 * widest)
    return (logits + live) * storage.activation_bits // 8


def _assumptions(given: Forecast) -> Iterable[str]:
    peaks, stored = given.peaks, given.storage
    yield (
        f"{LABEL}: every operator is taken to reach {peaks.bytes_per_s / 1e9:.1f} GB/s or "
        f"{peaks.flops_per_s / 1e9:.0f} GFLOP/s (float32; {peaks.source}); what share kernels really reach is unknown"
    )
    yield "low-bit kernels compute in int8, whose peak is not measured: where compute bounds, they may be faster"
    if not peaks.dispatch_seconds:
        yield "the cost of starting an operator is unknown and counted as 0: small models will be slower than forecast"
    zeros = "as many bits as a code" if stored.zero_bits is None else f"{stored.zero_bits} bits"
    yield (
        f"scales {stored.scale_bits} bits, zero points {zeros}, unquantized weights {stored.float_bits} bits, "
        f"adapters {stored.adapter_bits}-bit blocks, cache {stored.kv.bits} bits"
    )
    yield "attention is fused; activations always go to memory; the embedding reads its rows alone"
    if given.workload.all_logits:
        yield "prefill computes the logits of every prompt token, as the CPU export does; --last-logits counts one"
    else:
        yield "prefill computes the logits of the last prompt token alone"
    yield "memory is weights, cache, live activations and logits; the runtime's own and packed copies come on top"
