"""Total memory of every point of a space from a model's architecture alone: no weights, nothing run.

    weights       as stored: codes, scales and zero points in 16 bit and as wide as codes, all else two bytes a number
    cache         kvformat's exact count over all layers; windows are not cut, as in the simulation; latent attention
                  as transformers keeps it, keys and values of every head
    activations   what lives at once in the widest part of a layer while the last chunk is read, of R = chunk rows,
                  S = context keys, H hidden, F inner size, Q = heads x key size, K = the same of the KV heads

    16-bit numbers of a chunk, its cosines and positions, the mask, and the logits of the chunk before
        MLP             R (4 H + 3 F)              the first input, the layer's, its residual, its normed one, gate, up
        turning         R (3 H + 4 Q + 2 K)        while queries are rotated
        attention       R (3 H + 2 Q)  or, by its kind, if that is more,
          flash         nothing: scores stay in the kernel, heads share their keys
          sdpa          R (3 H + 2 Q) + 2 S Q + R S      keys and values repeated for every head, the mask as numbers;
                                                         only where a chunk follows another, as torch does with a mask
          eager         R (3 H + Q) + 2 S Q + 3 R S heads      scores in 16 bit with their softmax in float32

They are those of transformers' Llama in torch, where the count of kvpeak.py finds the same for flash and sdpa. Eager on
the CPU takes more: its softmax copies the scores to float32 first.

Saved is against the first weights in 16 bit with the prompt read at once, at the same context and kind of attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.profiles.architecture import Architecture
from rlkit.profiles.frontier import render
from rlkit.profiles.frontier.space import FLOAT, Point, Space
from rlkit.profiles.layer import Layer
from rlkit.profiles.needs import Memory
from rlkit.profiles.storage import Storage
from rlkit.profiles.table import Table
from rlkit.profiles.weights import weigh
from rlkit.recover import kvformat, recipe
from rlkit.recover.recipe import Recipe, Rule, Scheme

SCHEMA_VERSION = 1
KIND = "kv-analytic"
ATTENTION = ("flash", "sdpa", "eager")
AWQ = "w4a16"  # KV Pareto's weights: 4 bit in groups of 128, embedding and lm_head in 16 bit
HALF = 2  # bytes of a number
WEIGHTS = (FLOAT, AWQ, "w4")
KV = ("k8v8", "k8v4", "k8v2", "k4v4", "k4v2", "k2v2")
NOTE = (
    "Total = weights + cache + peak of activations, with attention that keeps no scores (flash). Saved is against the "
    "first weights with everything in 16 bit and the prompt read at once, at the same context."
)


def recipe_of(name: str) -> Recipe | None:
    """How weights of a name are stored: float as None, w4a16, or a recipe; what follows a colon changes no bytes.

    Raises ValueError or FileNotFoundError for a name that is none.
    """
    base = name.split(":")[0]
    if base == FLOAT:
        return None
    if base == AWQ:
        whole = Rule(("lm_head", "model.embed_tokens"), Scheme(16, 32))
        return Recipe(AWQ, (whole, Rule(("*",), Scheme(4, 128))))
    return recipe.load(base)


def weights_nbytes(model: Architecture, name: str) -> int:
    """Bytes of weights by a name. Raises as `recipe_of`, and ValueError where no group fits."""
    return weigh(model, recipe_of(name), Storage(scale_bits=16, float_bits=16)).stored_nbytes


def cache_nbytes(model: Architecture, kv: str, context: int) -> int:
    """Bytes of a cache after so many tokens. Raises ValueError for a scheme that is none or does not fit the heads."""
    scheme = kvformat.parse(kv)
    return sum(
        kvformat.nbytes(scheme, count, _kept_heads(layer), layer.key_size, context, value_dim=layer.value_size)
        for layer, count in model.kinds
    )


def activations_nbytes(model: Architecture, context: int, chunk: int | None, attention: str = ATTENTION[0]) -> int:
    """The peak of activations while a prompt of `context` tokens is read in chunks: see the module."""
    rows = min(chunk or context, context)
    layers = (_layer_numbers(model.hidden, layer, rows, context, attention) for layer, _count in model.kinds)
    beside = rows * (2 * max(layer.key_size for layer, _count in model.kinds) + 4)  # cosines, sines; positions, 8 bytes
    if attention != ATTENTION[0] and not _unmasked(attention, rows, context):
        beside += rows * context // (1 if attention == "eager" else 2)  # the mask; in sdpa's a byte each
    logits = model.vocab if rows < context else 0
    return HALF * (max(*layers, rows * 3 * model.hidden + model.vocab) + beside + logits)


def _unmasked(attention: str, rows: int, context: int) -> bool:
    """Whether torch is told that a prompt is causal, instead of a mask."""
    return attention == "sdpa" and rows == context


def _kept_heads(layer: Layer) -> int:
    return layer.heads if layer.latent else layer.kv_heads


def _layer_numbers(hidden: int, layer: Layer, rows: int, context: int, attention: str) -> int:
    queries, keys = layer.heads * layer.key_size, _kept_heads(layer) * layer.key_size
    widest = layer.ffn
    if layer.experts is not None:
        widest = max(widest, layer.experts.shared, layer.experts.active * layer.experts.ffn)
    inner = 3 if layer.gated else 2
    attending = rows * (3 * hidden + 2 * queries)
    if attention == "eager":
        scores = 3 * rows * context * layer.heads
        attending = rows * (3 * hidden + queries) + 2 * context * queries + scores
    elif attention == "sdpa" and not _unmasked(attention, rows, context):
        attending += 2 * context * queries + rows * context
    return max(
        rows * (4 * hidden + inner * widest),
        rows * (3 * hidden + 4 * queries + 2 * keys),
        attending,
    )


@dataclass(frozen=True, slots=True)
class Estimate:
    """A point's bytes with flash attention, its peak with each kind, and the shares saved."""

    point: Point
    memory: Memory
    activations: dict[str, int]
    saved: dict[str, float]

    def nbytes(self, attention: str = ATTENTION[0]) -> int:
        """All of it, with a kind of attention."""
        return self.memory.weights_nbytes + self.memory.cache_nbytes + self.activations[attention]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        parts = {"weights_nbytes": self.memory.weights_nbytes, "cache_nbytes": self.memory.cache_nbytes}
        totals = {kind: self.nbytes(kind) for kind in self.activations}
        return {
            **self.point.to_json(),
            **parts,
            "activations_nbytes": self.activations,
            "nbytes": totals,
            "saved": self.saved,
        }


@dataclass(frozen=True, slots=True)
class Analytic:
    """A model's points, by context; the first of a context is its reference."""

    name: str
    model: Architecture
    estimates: tuple[Estimate, ...]

    @property
    def contexts(self) -> tuple[int, ...]:
        """The contexts, in order."""
        return tuple(dict.fromkeys(one.point.context for one in self.estimates))

    def at(self, context: int) -> list[Estimate]:
        """The points of a context, its reference first."""
        return [one for one in self.estimates if one.point.context == context]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "architecture": self.model.to_json(),
            "parameters": self.model.parameters,
            "points": [one.to_json() for one in self.estimates],
        }


def analyse(name: str, model: Architecture, space: Space) -> Analytic:
    """Every point of a space. Raises ValueError for weights and caches that do not fit the model."""
    weights = {given: weights_nbytes(model, given) for given in space.weights}
    references: dict[int, Estimate] = {}
    found = []
    for point in space.points():
        one = estimate(model, point, weights[point.weights], references.get(point.context))
        references.setdefault(point.context, one)
        found.append(one)
    return Analytic(name, model, tuple(found))


def estimate(model: Architecture, point: Point, weights: int, reference: Estimate | None = None) -> Estimate:
    """One point, beside its reference; without one it is that itself."""
    cache = cache_nbytes(model, point.kv, point.context)
    peaks = {kind: activations_nbytes(model, point.context, point.chunk, kind) for kind in ATTENTION}
    of = reference or Estimate(point, Memory(weights, cache, peaks[ATTENTION[0]]), peaks, {})
    saved = {kind: 1 - (weights + cache + peaks[kind]) / of.nbytes(kind) for kind in ATTENTION}
    return Estimate(point, Memory(weights, cache, peaks[ATTENTION[0]]), peaks, saved)


def table(found: Analytic) -> Table:
    """A row for each way to run the model, a column for each context."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for one in found.estimates:
        point = one.point
        cells = rows.setdefault((point.weights, point.kv, str(point.chunk or "whole")), [])
        cells.append(f"{render.size(one.nbytes())}, {one.saved[ATTENTION[0]]:.0%}")
    columns = ("weights", "kv", "chunk", *(f"{context:,}" for context in found.contexts))
    beyond = [context for context in found.contexts if context > found.model.max_context]
    note = f"{NOTE} Beyond the model's {found.model.max_context:,} tokens: {_listed(beyond)}." if beyond else NOTE
    return Table(f"{found.name}: total, saved", columns, tuple((*key, *cells) for key, cells in rows.items()), note)


def _listed(contexts: Sequence[int]) -> str:
    return ", ".join(f"{context:,}" for context in contexts)


def findings(found: Analytic, max_bytes: int | None = None) -> Iterator[str]:
    """What the numbers say: what each part takes at both ends, and what fits a budget."""
    for context in dict.fromkeys((found.contexts[0], found.contexts[-1])):
        reference, *others = found.at(context)
        best = min((reference, *others), key=lambda one: one.nbytes())
        of = f"{render.parts(reference.memory)} of {render.size(reference.nbytes())}"
        scores = render.size(reference.nbytes("eager"))
        yield f"at {context:,} tokens the reference takes w + kv + act = {of}; with eager attention {scores}"
        yield f"at {context:,} tokens the least is {best.point.name}: {render.parts(best.memory)}, {_saved(best)} saved"
    if max_bytes is not None:
        for context in found.contexts:
            fit = [one for one in found.at(context) if one.nbytes() <= max_bytes]
            most = f", the largest {max(fit, key=Estimate.nbytes).point.name}" if fit else ""
            yield f"at {context:,} tokens {len(fit)} of {len(found.at(context))} fit {render.size(max_bytes)}{most}"


def _saved(one: Estimate) -> str:
    return ", ".join(f"{one.saved[kind]:.0%} ({kind})" for kind in ATTENTION)
