"""Forecast of time to first token, time per token, memory and energy from a model's architecture: no weights, no run.

Two formulas, named wherever a number is printed (`profiles.account`):

    roofline   each operator takes max(FLOPs / peak, bytes / bandwidth) + launches * dispatch; a step is their sum
    life       the LIFE paper's (arXiv 2508.00904), over totals: TTFT = max(FLOPs / peak, bytes / bandwidth) + dispatch;
               TPOT = bytes / bandwidth + dispatch, memory alone

and a baseline with one parameter that either should beat: (weights + cache) / bandwidth. Peak and bandwidth are those
of the place (`profiles.rates`), in full unless it was calibrated. A prompt may be read at one place and continued at
another of the same memory. What this does not know: caches that keep small models, clocks that fall under load, other
work on the same memory, and what a runtime does besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlkit.profiles.account import (
    NOTHING,
    Account,
    Amounts,
    Cost,
    Model,
    beside,
    costs,
    life_tpot_seconds,
    life_ttft_seconds,
    roofline_seconds,
    summed,
)
from rlkit.profiles.architecture import Architecture, of_shape
from rlkit.profiles.needs import Memory, activations_nbytes, cached_nbytes
from rlkit.profiles.operators import Adapters, cache_nbytes
from rlkit.profiles.places import Place, of_rates
from rlkit.profiles.rates import CALIBRATED, UNCALIBRATED, Band, Peaks, Rates
from rlkit.profiles.step import MOST_TOKENS
from rlkit.profiles.timing import Basis, Timing
from rlkit.recover.recipe import Recipe
from rlkit.recover.source import ModelShape

__all__ = [
    "FORMULAS",
    "Adapters",
    "Energy",
    "Forecast",
    "Model",
    "Peaks",
    "Phase",
    "Place",
    "Workload",
    "forecast",
    "forecast_model",
]

SCHEMA_VERSION = 1
FORMULAS = {
    "roofline": "the sum over operators of the larger of FLOPs / peak and bytes / bandwidth, and their starts",
    "life": "LIFE (arXiv 2508.00904): first token = the larger of both totals; per token = bytes / bandwidth",
    "baseline": "weights and cache over bandwidth, one parameter",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """What is generated: a prompt, read in chunks of at most `chunk` tokens, and new tokens; `batch` times at once.

    `all_logits` says whether prefill computes the logits of every prompt token, or of each chunk's last one alone, as
    bundles do.
    """

    prompt_tokens: int
    new_tokens: int
    all_logits: bool = False
    chunk: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        counts = {"prompt tokens": self.prompt_tokens, "new tokens": self.new_tokens, "sequences": self.batch}
        if self.chunk is not None:
            counts["tokens a chunk"] = self.chunk
        for name, count in counts.items():
            if type(count) is not int or not 1 <= count <= MOST_TOKENS:
                raise ValueError(f"{count} {name}: use a whole number of at least 1, and at most {MOST_TOKENS:,}")


@dataclass(frozen=True, slots=True)
class Phase:
    """Prefill, or a decode step right after the prompt, operator by operator, and where it runs."""

    place: Place
    costs: tuple[Cost, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rates = self.place.rates
        peaks = {"bytes_per_s": rates.bytes_per_s, "roofs": dict(rates.roofs), "label": rates.label}
        stored = {"storage": asdict(self.place.storage), "options": asdict(self.place.options)}
        return {"place": self.place.name, **peaks, **stored, "operators": [cost.to_json() for cost in self.costs]}


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of reading the prompts and of a decode step, None where no power is known, and what the watts are."""

    prefill_joules: float | None
    step_joules: float | None
    basis: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """Both formulas and the baseline for one workload, with the operators behind them."""

    model: str
    recipe: str
    workload: Workload
    prefill: Phase
    decode: Phase
    roofline: Timing
    life: Timing
    baseline: Timing
    memory: Memory
    energy: Energy
    band: Band
    assumptions: tuple[str, ...]

    @property
    def label(self) -> str:
        """Calibrated only if both places are."""
        labels = {self.prefill.place.rates.label, self.decode.place.rates.label}
        return CALIBRATED if labels == {CALIBRATED} else UNCALIBRATED

    @property
    def tokens_per_s(self) -> float:
        """Decode speed of all sequences together, by the roofline."""
        return self.workload.batch * self.roofline.tokens_per_s

    def interval(self, name: str) -> tuple[float, float]:
        """Seconds between which "ttft" or "tpot" is expected, from the roofline and the band."""
        low, high = getattr(self.band, name)
        seconds = getattr(self.roofline, f"{name}_seconds")
        return low * seconds, high * seconds

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        timings = {name: getattr(self, name).to_json() for name in FORMULAS}
        intervals = {f"{name}_seconds": list(self.interval(name)) for name in ("ttft", "tpot")}
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "recipe": self.recipe,
            "label": self.label,
            "workload": asdict(self.workload),
            **timings,
            "tokens_per_s": self.tokens_per_s,
            "expected": {**intervals, "basis": self.band.basis},
            "memory": self.memory.to_json(),
            "energy": asdict(self.energy),
            "prefill": self.prefill.to_json(),
            "decode": self.decode.to_json(),
            "formulas": dict(FORMULAS),
            "assumptions": list(self.assumptions),
        }


def forecast(
    model: ModelShape | Architecture,
    recipe: Recipe | None,
    where: Place | Rates,
    workload: Workload,
    *,
    prefill_at: Place | None = None,
    adapters: Adapters | None = None,
) -> Forecast:
    """Forecast one workload at a place, or at rates alone with the CPU bundle; the prompt at another if that is given.

    Raises ValueError for a context that the model does not have, for what does not fit, and for two places that share
    no memory.
    """
    architecture = of_shape(model) if isinstance(model, ModelShape) else model
    place = where if isinstance(where, Place) else of_rates(where)
    made = Model(architecture, recipe, place, adapters)
    first = None if prefill_at is None else Model(architecture, recipe, prefill_at, adapters)
    return forecast_model(made, workload, prefill=first)


def forecast_model(model: Model, workload: Workload, *, prefill: Model | None = None) -> Forecast:
    """`forecast` of a model that is prepared, for many workloads of it."""
    first = prefill or model
    _check(model, workload, first)
    memory = _memory(model, first, workload)
    memory.check(f"{model.architecture.name} as {model.recipe}", model.place.name)
    read = _prefill(first, workload)
    prompt, batch = workload.prompt_tokens, workload.batch
    pasts = range(prompt, prompt + max(workload.new_tokens - 1, 1))
    decoded = model.once(("decoding", pasts, batch), lambda: _decoding(model, pasts, batch))
    mean, moved = decoded.mean, decoded.nbytes_per_token

    def timing(ttft_seconds: float, tpot_seconds: float) -> Timing:
        return Timing(Basis.FORECAST, prompt, workload.new_tokens, ttft_seconds, tpot_seconds, moved, memory.nbytes)

    roofline = timing(roofline_seconds(read), roofline_seconds(mean))
    return Forecast(
        model=model.architecture.name,
        recipe=model.recipe,
        workload=workload,
        prefill=Phase(first.place, costs(read)),
        decode=Phase(model.place, decoded.first),
        roofline=roofline,
        life=timing(life_ttft_seconds(read), life_tpot_seconds(mean)),
        baseline=timing(_prefill_baseline(first, workload), moved / model.place.rates.bytes_per_s),
        memory=memory,
        energy=_energy(roofline, first.place, model.place),
        band=_band(first.place, model.place),
        assumptions=tuple(_assumptions(model, first, workload)),
    )


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What does not depend on how the prompt is read: a token's mean costs, the first one's, and what it reads."""

    mean: Account
    first: tuple[Cost, ...]
    nbytes_per_token: int


def _decoding(model: Model, pasts: range, batch: int) -> _Decoding:
    around = beside(model.rates.token_seconds)
    steps = model.account(1, pasts, 1, batch)
    mean = {name: Amounts(*(amount / len(pasts) for amount in row)) for name, row in steps.items()}
    first = costs({**model.account(1, pasts[:1], 1, batch), **around})
    moved = model.streamed_nbytes(batch) + _read_of_cache(model, pasts, batch)
    return _Decoding({**mean, **around}, first, moved)


def _check(model: Model, workload: Workload, first: Model) -> None:
    prompt, new, most = workload.prompt_tokens, workload.new_tokens, model.architecture.max_context
    if prompt + new > most:
        asked = f"{prompt} prompt + {new} new tokens = {prompt + new}"
        raise ValueError(f"{asked} exceed the model's context of {most}; ask for fewer")
    if first.place.shared != model.place.shared:
        why = f"{first.place.name} and {model.place.name} are not one device, so the cache would have to travel"
        raise ValueError(f"{why}; name two units of one device")


def _prefill(model: Model, workload: Workload) -> Account:
    """The whole prompt: equal chunks together, and what is left."""
    prompt, size = workload.prompt_tokens, min(workload.chunk or workload.prompt_tokens, workload.prompt_tokens)
    whole, rest = divmod(prompt, size)
    every, batch = workload.all_logits, workload.batch
    found = model.account(size, range(0, whole * size, size), size if every else 1, batch)
    if rest:
        last = model.account(rest, (whole * size,), rest if every else 1, batch)
        found = {name: row.times(1, last[name]) for name, row in found.items()}
    return {**found, **beside(model.rates.prompt_seconds)}


def _prefill_baseline(model: Model, workload: Workload) -> float:
    size = min(workload.chunk or workload.prompt_tokens, workload.prompt_tokens)
    passes = -(-workload.prompt_tokens // size)
    streamed = passes * model.streamed_nbytes(size * workload.batch)
    cached = cached_nbytes(model.architecture, model.place, workload.prompt_tokens, workload.batch)
    return (streamed + cached) / model.place.rates.bytes_per_s


def _read_of_cache(model: Model, pasts: range, batch: int) -> int:
    """Bytes of the cache that a step reads on average; windows are read alone, even where more is kept."""
    cache = replace(model.place.storage.kv, windowed=True)

    def read(past: int) -> dict[str, Amounts]:
        return {"cache": NOTHING._replace(nbytes=cache_nbytes(model.architecture, cache, past + 1, batch))}

    return int(summed(read, pasts)["cache"].nbytes / len(pasts))


def _memory(model: Model, first: Model, workload: Workload) -> Memory:
    architecture, batch = model.architecture, workload.batch
    alike = first is model or first.weights == model.weights  # units that store weights alike share them
    tokens = workload.prompt_tokens + workload.new_tokens
    size = min(workload.chunk or workload.prompt_tokens, workload.prompt_tokens)
    logits = batch * (size if workload.all_logits else 1)
    seen = batch * size * workload.prompt_tokens
    limits = [place.memory_nbytes for place in (model.place, first.place) if place.memory_nbytes is not None]
    return Memory(
        weights_nbytes=model.stored_nbytes + (0 if alike else first.stored_nbytes),
        cache_nbytes=cached_nbytes(architecture, model.place, tokens, batch),
        activations_nbytes=activations_nbytes(architecture, first.place, batch * size, logits, seen),
        limit_nbytes=min(limits, default=None),
    )


def _energy(timing: Timing, first: Place, place: Place) -> Energy:
    prefill, decode = first.power.prefill, place.power.decode
    return Energy(
        None if prefill is None else prefill * timing.ttft_seconds,
        None if decode is None else decode * timing.tpot_seconds,
        "; ".join(dict.fromkeys(power.basis for power in (first.power, place.power) if power.basis))
        or "no power is known",
    )


def _band(first: Place, place: Place) -> Band:
    why = "; ".join(dict.fromkeys((first.rates.band.basis, place.rates.band.basis)))
    return Band(first.rates.band.ttft, place.rates.band.tpot, why)


def _assumptions(model: Model, first: Model, workload: Workload) -> Iterator[str]:
    for place in dict.fromkeys((first.place.name, model.place.name)):
        rates = (model if place == model.place.name else first).rates
        yield from (f"{place}: {line}" for line in rates.assumptions())
    stored = model.place.storage
    zeros = "as many bits as a code" if stored.zero_bits is None else f"{stored.zero_bits} bits"
    yield (
        f"scales {stored.scale_bits} bits, zero points {zeros}, unquantized weights {stored.float_bits} bits, "
        f"activations {stored.activation_bits} bits, adapters {stored.adapter_bits}-bit blocks, cache {stored.kv.bits} "
        "bits"
    )
    for bits, field in model.place.widened.items():
        yield f"{bits}-bit codes are stored in {field}-bit fields there, as no kernel takes {bits} bits"
    if model.place.options.attention == "eager":
        yield "attention is eager: every score is stored, and the cache is repeated for every head"
    else:
        yield "attention is fused: scores never reach memory"
    yield "activations always go to memory; the embedding reads its rows alone"
    logits = "every prompt token" if workload.all_logits else "the last token of the prompt, or of each chunk"
    yield f"prefill computes the logits of {logits}"
    if any(layer.window for layer in model.architecture.layers):
        yield "layers with a window keep and read the window alone"
    if any(layer.experts for layer in model.architecture.layers):
        yield "tokens choose experts evenly and independently; real texts touch fewer of them"
    if first is not model:
        again = "" if first.weights == model.weights else "; weights are held in the forms of both"
        yield f"the cache stays in the memory that {first.place.name} and {model.place.name} share{again}"
    yield "memory is weights, cache, live activations and logits; the runtime's own and packed copies come on top"
