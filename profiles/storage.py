"""How numbers are stored where a model runs: weights in codes with scales, the cache, and what stays float.

    matrix (n, k)  n (ceil(k / group) group bits / 8 + ceil(groups scale_bits / 8) + ceil(groups zero_bits / 8)) bytes:
                   whole groups along the inputs, each row's zero points packed on their own
    cache          tokens x vectors x (size bits / 8) + its scales and zero points, one per
                     token    vector of a head
                     group    `group` numbers of such a vector
                     channel  number of all vectors, for every `group` tokens; for all tokens if group is 0
                     tensor   layer: too few to count

Formats of GGUF files come from the table that reads them (recover.ggufheader): Q4_0 is 4 + 16 / 32 = 4.5 bits a weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from rlkit.profiles.layer import Layer
from rlkit.recover.ggufheader import TYPES
from rlkit.recover.packing import snap_block
from rlkit.recover.recipe import Scheme
from rlkit.recover.source import ModelShape

WIDEST = 64


@dataclass(frozen=True, slots=True)
class Format:
    """Codes of `bits`; `group` of them along the inputs share a scale and a zero point. group 0: plain floats."""

    name: str
    bits: int
    group: int = 0
    scale_bits: int = 0
    zero_bits: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= WIDEST:
            raise ValueError(f"bits = {self.bits} is no storage width; use 1 to {WIDEST} bits")
        if self.group < 0 or (self.group == 0) != (self.scale_bits == 0) or self.scale_bits < 0 or self.zero_bits < 0:
            raise ValueError(f"{self} contradicts itself; give a group and its scale's bits, or neither")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        return self.bits + (self.scale_bits + self.zero_bits) / self.group if self.group else float(self.bits)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a matrix of n rows and k inputs."""
        if not self.group:
            return n * k * self.bits // 8
        groups = -(-k // self.group)
        codes = -(-groups * self.group * self.bits // 8)
        return n * (codes + -(-groups * self.scale_bits // 8) + -(-groups * self.zero_bits // 8))


def packed(bits: int, group: int, scale_bits: int = 16, zero_bits: int | None = None) -> Format:
    """Codes in groups as MatMulNBits has them; zero points as wide as codes unless told otherwise, 0 for none."""
    zeros = bits if zero_bits is None else zero_bits
    return Format(f"w{bits}g{group}", bits, group, scale_bits, zeros)


def _of_gguf(name: str, block: int, block_nbytes: int) -> Format:
    digits = re.search(r"\d+", name)
    bits = int(digits.group()) if digits else 16
    if block == 1:
        return Format(name.lower(), 8 * block_nbytes)
    return Format(name.lower(), bits, block, 8 * block_nbytes - bits * block)


FORMATS = {"fp32": Format("fp32", 32), "fp16": Format("fp16", 16), "bf16": Format("bf16", 16)}
FORMATS |= {kind[0].lower(): _of_gguf(*kind) for kind in TYPES.values() if kind[0] not in ("F32", "F16", "BF16")}


def format_named(name: str) -> Format:
    """A format of FORMATS; ValueError naming them."""
    if name.lower() not in FORMATS:
        raise ValueError(f"storage format {name!r} is not known; use {', '.join(FORMATS)}")
    return FORMATS[name.lower()]


@dataclass(frozen=True, slots=True)
class Cache:
    """How keys and values are kept. `windowed`: a layer with a window keeps no more than its window."""

    bits: int = 32
    scale_bits: int = 0
    zero_bits: int = 0
    per: str = "token"
    group: int = 0
    windowed: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= WIDEST or not 0 <= self.scale_bits <= WIDEST or not 0 <= self.zero_bits <= WIDEST:
            raise ValueError(f"{self} has no storage width; use 1 to {WIDEST} bits, and 0 for scales that are not kept")
        if self.per not in ("token", "group", "channel", "tensor"):
            raise ValueError(f"per = {self.per!r} is no way to share scales; use token, group, channel or tensor")
        if self.group < 0 or (self.per == "group" and self.group < 1):
            raise ValueError(f"group = {self.group} shares no scale; give how many numbers do, e.g. 32")

    def nbytes(self, tokens: int, vectors: int, size: int) -> int:
        """Bytes of `tokens` tokens, each with so many vectors of `size` numbers."""
        return -(-(tokens * vectors * size * self.bits + self._shared(tokens, vectors, size)) // 8)

    def _shared(self, tokens: int, vectors: int, size: int) -> int:
        """Bits of scales and zero points; channels' are spread evenly over the tokens that share them."""
        each = self.scale_bits + self.zero_bits
        if self.per == "channel":
            return vectors * size * each * tokens // self.group if self.group else vectors * size * each
        if self.per == "group":
            return tokens * vectors * -(-size // self.group) * each
        return tokens * vectors * each if self.per == "token" else 0

    def layer_nbytes(self, layer: Layer, tokens: int) -> int:
        """Bytes of one layer's keys and values of `tokens` tokens, all of them kept."""
        return sum(self.nbytes(tokens, vectors, size) for vectors, size in layer.cached)


@dataclass(frozen=True, slots=True)
class Storage:
    """How a model is stored; the defaults are those of the ONNX CPU export.

    A matrix that the recipe quantizes is `packed` with `scale_bits`; `zero_bits` of None means zero points as wide as
    the codes, 0 none, and `symmetric_zeros` whether symmetric schemes have them too, as checkpoints write them. What
    the recipe leaves has the first of `formats` whose pattern matches the module, e.g. ("*.experts.*", MXFP4), else
    floats of `float_bits`. Low-rank branches of `adapter_bits` = 8 are blocks as the export writes them, else plain.
    """

    scale_bits: int = 32
    zero_bits: int | None = None
    symmetric_zeros: bool = True
    float_bits: int = 32
    activation_bits: int = 32
    adapter_bits: int = 8
    kv: Cache = field(default_factory=Cache)
    formats: tuple[tuple[str, Format], ...] = ()

    def __post_init__(self) -> None:
        for name in ("scale_bits", "float_bits", "activation_bits", "adapter_bits"):
            if not 1 <= getattr(self, name) <= WIDEST:
                raise ValueError(f"{name} = {getattr(self, name)} is no storage width; use 1 to {WIDEST} bits")
        if self.zero_bits is not None and not 0 <= self.zero_bits <= WIDEST:
            raise ValueError(f"zero_bits = {self.zero_bits} is no width of zero points; use 0 to {WIDEST}, or None")

    def format_of(self, scheme: Scheme | None, module: str, k: int, *, kept_float: bool = False) -> Format:
        """The format of a matrix with k inputs; ValueError if no group of the scheme's fits them."""
        if kept_float:
            return self.floats
        if scheme is None or scheme.bits == 16:
            return next((found for pattern, found in self.formats if fnmatchcase(module, pattern)), self.floats)
        fitting = scheme.resolve(k)
        zero_bits = fitting.bits if self.zero_bits is None else self.zero_bits
        if scheme.symmetric and not self.symmetric_zeros:
            zero_bits = 0
        return packed(fitting.bits, fitting.group, self.scale_bits, zero_bits)

    @property
    def floats(self) -> Format:
        """The format of what stays float."""
        return Format(f"fp{self.float_bits}", self.float_bits)

    def adapter_nbytes(self, n: int, k: int, rank: int) -> int:
        """Bytes of a low-rank branch: A (rank, k) and B (n, rank), in blocks without zero points if both allow it."""
        if not rank:
            return 0
        block_a, block_b = snap_block(k), snap_block(rank)
        if self.adapter_bits != 8 or block_a is None or block_b is None:
            bits = self.float_bits if self.adapter_bits == 8 else self.adapter_bits
            return rank * (k + n) * bits // 8
        blocks = (packed(8, block, self.scale_bits, 0) for block in (block_a, block_b))
        return sum(form.nbytes(*size) for form, size in zip(blocks, ((rank, k), (n, rank)), strict=True))

    def kv_token_nbytes(self, shape: ModelShape) -> int:
        """Bytes that one token adds to the cache, over all layers, none of which has a window."""
        return shape.layers * 2 * self.kv.nbytes(1, shape.kv_heads, shape.head_dim)
