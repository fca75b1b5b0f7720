"""Attention of one layer in one step: pairs, FLOPs, what it reads of the cache.

T new tokens after P past ones, H query heads, Hkv vectors of keys (and values) of size d (dv) per token, window w:

    pairs    causal T P + T (T + 1) / 2;  windowed: sum of min(p + 1, w) over positions p = P .. P + T - 1
    FLOPs    QK 2 H d pairs, PV 2 H dv pairs, softmax 5 H pairs, rotary embedding 3 T (H + Hkv) d
    cache    reads T + P tokens once, of a window T + min(P, w - 1); writes T. Hkv counts, never H
    eager    every score of T x (tokens read) is computed, written, read, written and read again

Latent attention reads one vector of kv_lora + rope numbers per token. Absorbed, queries are taken into the latent space
(kv_b for T tokens) and scores span kv_lora + rope, values kv_lora numbers; expanded, keys and values of all T + P
tokens are made (kv_b for T + P tokens), of nope + rope and v numbers. Source: the published description of DeepSeek-V2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlkit.profiles.architecture import Architecture
from rlkit.profiles.layer import Layer
from rlkit.profiles.step import Kind, Operator, Options, Step
from rlkit.profiles.storage import Cache, Storage


def causal_pairs(new_tokens: int, past_tokens: int = 0, window: int | None = None) -> int:
    """How many (query, key) pairs `new_tokens` attend to after `past_tokens`: each sees itself and what is before."""
    if window is None or past_tokens + new_tokens <= window:
        return new_tokens * past_tokens + new_tokens * (new_tokens + 1) // 2
    growing = max(0, window - past_tokens)  # queries that do not see a whole window yet
    return growing * past_tokens + growing * (growing + 1) // 2 + (new_tokens - growing) * window


def read_tokens(step: Step, window: int | None = None) -> int:
    """Tokens of the cache that a step reads, its own included, each once."""
    past = step.past_tokens if window is None else min(step.past_tokens, window - 1)
    return step.new_tokens + past


def score_flops(architecture: Architecture, step: Step) -> int:
    """FLOPs of QK and PV together, over all layers, keys and values being read as they are cached or made."""
    return step.batch * sum(
        count * 2 * layer.heads * (layer.key_size + layer.value_size) * _pairs(layer, step)
        for layer, count in architecture.kinds
    )


def cache_nbytes(architecture: Architecture, cache: Cache, tokens: int, batch: int = 1) -> int:
    """Bytes of keys and values after `tokens` tokens, over all layers; a window's layers may keep the window alone."""
    return batch * sum(
        count * cache.layer_nbytes(layer, layer.visible(tokens) if cache.windowed else tokens)
        for layer, count in architecture.kinds
    )


def is_absorbed(layer: Layer, step: Step, options: Options) -> bool:
    """Whether latent attention works on the latent vectors in this step."""
    latent = layer.latent
    if latent is None or options.latent != "cheaper":
        return options.latent == "absorbed"
    pairs, kv_b = _pairs(layer, step), 2 * layer.heads * (latent.nope + latent.v) * latent.kv_lora
    absorbed = 2 * layer.heads * (2 * latent.kv_lora + latent.rope) * pairs + step.new_tokens * kv_b
    expanded = 2 * layer.heads * (layer.key_size + latent.v) * pairs + read_tokens(step, layer.window) * kv_b
    return absorbed <= expanded


def attention(layer: Layer, storage: Storage, step: Step, options: Options) -> Iterator[Operator]:
    """The operators between the products that make queries and the one that takes values; `count` is 1."""
    found = _sizes(layer, step, options)
    name = "attention" if layer.window is None else f"attention in a window of {layer.window}"
    rows, width = step.batch * step.new_tokens, storage.activation_bits
    scores, softmax, values = _products(layer, step, options, found)
    turned, turned_nbytes = _rotary(layer, rows, width)
    moved = rows * found.input_size * width // 8 + _copied_nbytes(layer, storage, step, options, found)
    cache = step.batch * _cache_traffic(layer, storage.kv, step)
    kept = layer.heads * layer.sinks
    extra, extra_nbytes = (turned, turned_nbytes) if options.fused_rotary else (0, 0)
    if not options.fused_rotary:
        yield Operator("rotary", Kind.ELEMENTWISE, 1, turned, 0, 2 * rows * _turned(layer) * width // 8, 0, 2, 0, rows)
    if options.fused_qk_norm and layer.qk_norm:
        extra += 4 * rows * (layer.heads + layer.kv_heads) * layer.head_dim
        kept += layer.qk_norm_size
    weights = kept * storage.float_bits // 8
    bits = storage.kv.bits
    if options.attention == "fused":
        flops, moved = scores + softmax + values + extra, moved + extra_nbytes
        shape = _shape(layer, step, found)
        yield Operator(name, Kind.ATTENTION, 1, flops, weights, moved, cache, 1, bits, rows, shape)
        return
    common = Operator(name, Kind.ATTENTION, 1, 0, bits=bits, tokens=rows)
    matrix = step.batch * layer.heads * found.pairs * width // 8
    half = cache // 2
    yield replace(
        common,
        name=f"{name}: scores",
        flops=scores + extra,
        activation_nbytes=moved // 2 + extra_nbytes + matrix,
        kv_nbytes=half,
        launches=2,  # and the mask
    )
    yield replace(common, name=f"{name}: softmax", flops=softmax, weight_nbytes=weights, activation_nbytes=2 * matrix)
    rest = moved - moved // 2 + matrix
    yield replace(common, name=f"{name}: values", flops=values, activation_nbytes=rest, kv_nbytes=cache - half)


def _shape(layer: Layer, step: Step, sizes: _Sizes) -> tuple[int, ...]:
    """New tokens, past ones that are seen, heads, heads of the keys, and the mean size of a key and a value."""
    seen = read_tokens(step, layer.window) - step.new_tokens
    kv_heads = layer.kv_heads
    if layer.latent:
        kv_heads = 1 if sizes.absorbed else layer.heads
    return step.new_tokens, seen, layer.heads, kv_heads, (sizes.key + sizes.value) // 2


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Pairs of one sequence; numbers of a key and a value as they are multiplied; numbers in and out per token."""

    pairs: int
    key: int
    value: int
    input_size: int
    absorbed: bool  # latent attention that works on the latent vectors


def _sizes(layer: Layer, step: Step, options: Options) -> _Sizes:
    eager = options.attention == "eager"
    pairs = step.new_tokens * read_tokens(step, layer.window) if eager else _pairs(layer, step)
    key, value, own = layer.key_size, layer.value_size, (layer.key_size + layer.value_size) * layer.kv_heads
    absorbed = is_absorbed(layer, step, options)
    if layer.latent and absorbed:
        key, value = layer.latent.kv_lora + layer.latent.rope, layer.latent.kv_lora
        own = key
    return _Sizes(pairs, key, value, layer.heads * (key + value) + own, absorbed)


def _products(layer: Layer, step: Step, options: Options, sizes: _Sizes) -> tuple[int, int, int]:
    """FLOPs of QK, softmax and PV."""
    each = step.batch * layer.heads * sizes.pairs
    return 2 * each * sizes.key, 5 * each, 2 * each * sizes.value


def _pairs(layer: Layer, step: Step) -> int:
    return causal_pairs(step.new_tokens, step.past_tokens, layer.window)


def _turned(layer: Layer) -> int:
    """Numbers of a token's queries and keys that rotary embedding turns."""
    if layer.latent:
        return (layer.heads + 1) * layer.latent.rope
    return (layer.heads + layer.kv_heads) * layer.head_dim


def _rotary(layer: Layer, rows: int, width: int) -> tuple[int, int]:
    """FLOPs of the rotary embedding, and bytes of the tables' rows."""
    size = layer.latent.rope if layer.latent else layer.head_dim
    return 3 * rows * _turned(layer), rows * size * width // 8


def _cache_traffic(layer: Layer, cache: Cache, step: Step) -> int:
    """Bytes that one sequence reads and writes."""
    tokens = read_tokens(step, layer.window)
    whole = cache.layer_nbytes(layer, tokens)
    return whole + whole - cache.layer_nbytes(layer, tokens - step.new_tokens)


def _copied_nbytes(layer: Layer, storage: Storage, step: Step, options: Options, sizes: _Sizes) -> int:
    """Bytes of copies of the keys and values that are read: written once, read once."""
    tokens, width = step.batch * read_tokens(step, layer.window), storage.activation_bits
    if layer.latent and not sizes.absorbed:
        return 2 * tokens * layer.heads * (sizes.key + sizes.value) * width // 8
    if options.kv_copy == "none" or layer.latent:
        return 0
    vectors = layer.kv_heads if options.kv_copy == "cache" else layer.heads
    return 2 * tokens * vectors * (sizes.key + sizes.value) * width // 8
