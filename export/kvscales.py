"""Quantized KV caches: their forms, and one scale per channel or tensor from a sample of keys and values.

A cache in int8 or int4 holds codes c of -2^(b-1) .. 2^(b-1) - 1, and the runtime reads c * scale, with scales that stay
as they are for every token: static, symmetric, float32, one per channel of a KV head or one for all of a layer. So a
scale must fit tokens that nobody has seen yet. Three ways to choose it:

    max          the largest value of the sample is the largest code: nothing is clipped, everything is coarse
    percentile   all but 1 in 1000 values fit
    mse          the least mean squared error on the sample, by search; clips what is rare and large

Keys are kept after their rotation. The slowest pairs of channels turn by less than a radian in a short text, so short
texts do not show what they hold at depth; `deeper` turns a sample on to positions anywhere in the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CHANNEL, TENSOR = "channel", "tensor"
PER = {CHANNEL: "PER_CHANNEL", TENSOR: "PER_TENSOR"}  # as GroupQueryAttention says it
PERCENTILE = 99.9
HEAD_MULTIPLE = 8  # of head sizes that GroupQueryAttention takes: run, onnxruntime 1.31.1
SMALLEST = np.float32(1e-6)  # range of a channel that is zero throughout
RATIOS = np.geomspace(1.0, 0.2, 33, dtype=np.float32)  # of the scale that clips nothing


@dataclass(frozen=True, slots=True)
class Scheme:
    """A kind of quantized cache: its name and the width of its codes, two of which share a byte at 4 bits.

    `room` widens every range that was found on a sample, for tokens that it does not show, where steps are fine enough.
    """

    name: str
    bits: int
    room: float = 1.0

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def nbytes(self, head_size: int) -> int:
        """Bytes of one token's keys, or values, of one KV head."""
        return -(-head_size * self.bits // 8)


SCHEMES = {scheme.name: scheme for scheme in (Scheme("int8", 8, room=1.15), Scheme("int4", 4))}


def scheme_named(name: str) -> Scheme:
    """One of SCHEMES; ValueError naming them."""
    if name not in SCHEMES:
        raise ValueError(f"kv {name!r} is no kind of quantized cache; use {' or '.join(SCHEMES)}")
    return SCHEMES[name]


def schemes_named(words: str) -> tuple[Scheme, ...]:
    """Several, with commas between; ValueError for none, unknown and repeated ones."""
    names = [word.strip() for word in words.split(",")]
    if len(set(names)) != len(names):
        raise ValueError(f"kv {words!r} names a cache twice; write {','.join(SCHEMES)}")
    return tuple(scheme_named(name) for name in names)


def refuse(target: str, head_size: int, schemes: tuple[Scheme, ...]) -> None:
    """Raise ValueError for a target without a kernel for quantized caches, and for heads that it does not take."""
    if target != "cpu":
        other = "; set its provider option kvCacheQuantizationBits=4 instead" if target == "webgpu" else ""
        raise ValueError(f"{target} has no kernel for a quantized KV cache{other}; use --target cpu, or leave --kv out")
    for scheme in schemes:
        if head_size % HEAD_MULTIPLE:
            why = f"heads of {head_size} numbers are no multiple of {HEAD_MULTIPLE}"
            raise ValueError(f"{why}, so the runtime refuses a cache in {scheme.name}; leave --kv out")


def file_name(graph: str, scheme: str) -> str:
    """The file beside `graph` that has a cache of this kind: model.onnx -> model.kv-int8.onnx."""
    path = PurePath(graph)
    return f"{path.stem}.kv-{scheme}{path.suffix}"


def by_max(sample: Floats, scheme: Scheme) -> Floats:
    """Scales (C,) of a sample (n, C) that clip nothing."""
    widest = np.abs(sample).max(axis=0)
    return np.asarray(np.maximum(widest, SMALLEST) / np.float32(scheme.highest), np.float32)


def by_percentile(sample: Floats, scheme: Scheme) -> Floats:
    """Scales (C,) of a sample (n, C) that clip 1 value in 1000."""
    wide = np.percentile(np.abs(sample), PERCENTILE, axis=0)
    return np.asarray(np.maximum(wide, SMALLEST) / scheme.highest, np.float32)


def by_mse(sample: Floats, scheme: Scheme) -> Floats:
    """Scales (C,) of a sample (n, C) of least mean squared error, among RATIOS of those that clip nothing."""
    whole = by_max(sample, scheme)
    best, least = whole, np.full(sample.shape[1], np.inf)
    for ratio in RATIOS:
        scales = whole * ratio
        error = np.square(rounded(sample, scales, scheme) - sample).sum(axis=0, dtype=np.float64)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


Choice = Callable[[Floats, Scheme], Floats]
METHODS: dict[str, Choice] = {"max": by_max, "percentile": by_percentile, "mse": by_mse}


def scales_of(sample: Floats, scheme: Scheme, ranges: str, per: str) -> Floats:
    """Scales of a sample (n, C) by one of METHODS, (C,) per channel or (1,) per tensor."""
    return METHODS[ranges](sample if per == CHANNEL else sample.reshape(-1, 1), scheme)


def rounded(sample: Floats, scales: Floats, scheme: Scheme) -> Floats:
    """What the cache gives back for values (n, C) under scales (C,) or (1,)."""
    codes: Floats = np.rint(sample / scales)
    np.clip(codes, scheme.lowest, scheme.highest, out=codes)
    return codes * scales


def relative_error(sample: Floats, scales: Floats, scheme: Scheme) -> float:
    """Root mean square of what rounding does to a sample (n, C), against that of the sample."""
    wrong = np.square(rounded(sample, scales, scheme) - sample).mean(dtype=np.float64)
    size = np.square(sample).mean(dtype=np.float64)
    return float(np.sqrt(wrong / size)) if size > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How a layer turns its keys: tables (positions, pairs), and whether a pair's channels are neighbours."""

    cos: Floats
    sin: Floats
    interleaved: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """One attention of a graph: its node, the outputs that are its cache, and how it turns keys, if constants say."""

    node: str
    presents: tuple[str, str]
    heads: int
    head_size: int
    rotation: Rotation | None

    @property
    def channels(self) -> int:
        """Numbers of one token's keys, and of its values."""
        return self.heads * self.head_size


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Keys and values of n tokens as one attention keeps them, (n, heads, head size) each."""

    keys: NDArray[np.floating[Any]]
    values: NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class LayerScales:
    """Scales of one attention, (heads * head size,) per channel or (1,) per tensor, keys and values apart.

    The errors are those of the sample they were chosen on, relative.
    """

    keys: Floats
    values: Floats
    key_error: float = 0.0
    value_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Choices:
    """How scales are chosen: one of METHODS, and for keys and values one of PER.

    `context`: how far on keys are turned, in tokens; None to the end of the model's context. Less is finer there, and
    further on what the slow pairs hold is clipped.
    """

    ranges: str = "mse"
    keys: str = CHANNEL
    values: str = CHANNEL
    seed: int = 0
    context: int | None = None

    def __post_init__(self) -> None:
        if self.ranges not in METHODS:
            raise ValueError(f"range {self.ranges!r} is no way to choose a scale; use {', '.join(METHODS)}")
        for per in (self.keys, self.values):
            if per not in PER:
                raise ValueError(f"scales per {per!r} do not exist; use {' or '.join(PER)}")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} is negative; use 0 or more")
        if self.context is not None and self.context < 1:
            raise ValueError(f"a context of {self.context} tokens holds nothing; use at least 1, or leave it out")


def deeper(keys: Floats, rotation: Rotation, seed: int, context: int | None = None) -> Floats:
    """Keys (n, heads, size) turned on by the angles of positions below `context`, drawn by `seed` for each token.

    Turning by a and then by b turns by a + b, so this is what the same tokens would leave in the cache further on.
    Tables that also scale (YaRN) have turned the keys once already, so only their angle is used.
    """
    tokens, half = len(keys), rotation.cos.shape[1]
    at = np.random.default_rng(seed).integers(0, min(len(rotation.cos), context or len(rotation.cos)), tokens)
    angles: Floats = np.arctan2(rotation.sin[at], rotation.cos[at])[:, None]  # (n, 1, half)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if rotation.interleaved else _halves(half)
    turned = keys.copy()  # channels behind the tables' stay as they are
    turned[..., first] = keys[..., first] * cos - keys[..., second] * sin
    turned[..., second] = keys[..., first] * sin + keys[..., second] * cos
    return turned


def _halves(half: int) -> tuple[slice, slice]:
    return slice(0, half), slice(half, 2 * half)


def calibrate(attention: Attention, sample: Sample, scheme: Scheme, choices: Choices) -> LayerScales:
    """Scales of one attention. Keys count twice: where they were taken, and turned on to anywhere in the context.

    Raises ValueError for NaN and infinity.
    """
    keys, values = (np.asarray(part, np.float32) for part in (sample.keys, sample.values))
    if not (np.isfinite(keys).all() and np.isfinite(values).all()):
        raise ValueError(f"keys or values of {attention.node} hold NaN or infinity, so no range fits; check the model")
    if attention.rotation is not None:
        keys = np.concatenate([keys, deeper(keys, attention.rotation, choices.seed, choices.context)])
    keys, values = (part.reshape(len(part), attention.channels) for part in (keys, values))
    key_scales = scales_of(keys, scheme, choices.ranges, choices.keys) * np.float32(scheme.room)
    value_scales = scales_of(values, scheme, choices.ranges, choices.values) * np.float32(scheme.room)
    errors = relative_error(keys, key_scales, scheme), relative_error(values, value_scales, scheme)
    return LayerScales(key_scales, value_scales, *errors)
