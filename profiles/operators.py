"""Operator models of a dense decoder: FLOPs and bytes of each operator of one step, from shape and recipe alone.

    linear      2 T K N FLOPs; weight bytes = N (K bits + ceil(K / group) (scale + zero bits)) / 8
    attention   pairs = T P + T (T + 1) / 2 (causal); QK and PV 2 H d pairs each, softmax 5 H pairs,
                RoPE 3 T (H + Hkv) d; reads keys and values of P + T tokens once, writes T: 2 Hkv d elements each
    norm        4 T h FLOPs; SwiGLU 5 T ffn; residual T h
    adapter     2 T r (K + N) FLOPs; r (K + N) weights in 8-bit blocks
    embedding   rows only; lm_head for `logits_tokens` of the T tokens

T new tokens after P past ones, H query and Hkv key/value heads of size d. Group query attention changes Hkv alone.
Attention is taken as fused: scores never reach memory. What this does not know: experts, sliding windows, latent
attention, and what a cache keeps between operators (activations are charged as if they always went to memory).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from rlkit.recover.packing import snap_block
from rlkit.recover.recipe import Recipe, Scheme
from rlkit.recover.source import ModelShape


class Kind(StrEnum):
    """What an operator is, as far as its speed goes."""

    EMBEDDING = "embedding"
    NORM = "norm"
    LINEAR = "linear"
    ADAPTER = "adapter"
    ATTENTION = "attention"
    ELEMENTWISE = "elementwise"


@dataclass(frozen=True, slots=True)
class Storage:
    """How numbers are stored where the model runs; the defaults are those of the ONNX CPU export.

    `zero_bits` of None means as many as the code itself, for symmetric schemes too, as the export always writes zero
    points; 0 means none. `kv_vector_bits` is what a quantized cache adds for each head's vector: its scale, its zero.
    """

    scale_bits: int = 32
    zero_bits: int | None = None
    float_bits: int = 32
    activation_bits: int = 32
    kv_bits: int = 32
    kv_vector_bits: int = 0
    adapter_bits: int = 8

    def __post_init__(self) -> None:
        for name in ("scale_bits", "float_bits", "activation_bits", "kv_bits", "adapter_bits"):
            if not 1 <= getattr(self, name) <= 64:
                raise ValueError(f"{name} = {getattr(self, name)} is no storage width; use 1 to 64 bits")

    def matrix_nbytes(self, n: int, k: int, scheme: Scheme | None) -> int:
        """Bytes of an (n, k) matrix under `scheme`; None = stored as float."""
        if scheme is None or scheme.bits == 16:
            return n * k * self.float_bits // 8
        resolved = scheme.resolve(k)
        zero_bits = self.zero_bits if self.zero_bits is not None else resolved.bits
        row_bits = k * resolved.bits + k // resolved.group * (self.scale_bits + zero_bits)
        return n * -(-row_bits // 8)

    def adapter_nbytes(self, n: int, k: int, rank: int) -> int:
        """Bytes of a low-rank branch: A (rank, k) and B (n, rank), in blocks without zero points if both allow it."""
        if not rank:
            return 0
        block_a, block_b = snap_block(k), snap_block(rank)
        if block_a is None or block_b is None:
            return rank * (k + n) * self.float_bits // 8
        scales = rank * k // block_a + n * rank // block_b
        return (rank * (k + n) * self.adapter_bits + scales * self.scale_bits) // 8

    def kv_token_nbytes(self, shape: ModelShape) -> int:
        """Bytes that one token adds to the cache, over all layers."""
        return shape.layers * 2 * shape.kv_heads * (shape.head_dim * self.kv_bits + self.kv_vector_bits) // 8


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix (n, k) that occurs `count` times with the same stored form; nbytes are of one."""

    name: str
    count: int
    n: int
    k: int
    bits: int
    nbytes: int
    rank: int
    adapter_nbytes: int

    @property
    def streamed_nbytes(self) -> int:
        """Bytes that every decode step reads of all of them, adapters included."""
        return self.count * (self.nbytes + self.adapter_nbytes)


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator that runs `count` times in a step; FLOPs and bytes are of one run."""

    name: str
    kind: Kind
    count: int
    flops: int
    weight_nbytes: int = 0
    activation_nbytes: int = 0
    kv_nbytes: int = 0
    launches: int = 1

    @property
    def nbytes(self) -> int:
        """Everything one run reads and writes."""
        return self.weight_nbytes + self.activation_nbytes + self.kv_nbytes


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the model: new tokens after past ones, and for how many of the new ones logits are computed."""

    new_tokens: int
    past_tokens: int = 0
    logits_tokens: int = 1

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.past_tokens < 0 or not 0 <= self.logits_tokens <= self.new_tokens:
            raise ValueError(f"{self} is no step: at least one new token, and logits for at most all of them")


def causal_pairs(new_tokens: int, past_tokens: int = 0) -> int:
    """How many (query, key) pairs `new_tokens` attend to after `past_tokens`: each sees all before and itself."""
    return new_tokens * past_tokens + new_tokens * (new_tokens + 1) // 2


def score_flops(shape: ModelShape, pairs: int) -> int:
    """FLOPs of QK and PV together, over all layers."""
    return shape.layers * 4 * shape.heads * shape.head_dim * pairs


def matrices(shape: ModelShape, recipe: Recipe, storage: Storage) -> tuple[Matrix, ...]:
    """The weight matrices that a decode step streams, equal ones counted together; lm_head last."""
    found: Counter[Matrix] = Counter()
    for module, n, k in shape.linears():
        scheme = recipe.scheme_for(module)
        rank = scheme.adapter_rank if scheme else 0
        bits = scheme.bits if scheme else storage.float_bits
        nbytes = storage.matrix_nbytes(n, k, scheme)
        found[Matrix(module.rsplit(".", 1)[-1], 1, n, k, bits, nbytes, rank, storage.adapter_nbytes(n, k, rank))] += 1
    return tuple(
        Matrix(m.name, count, m.n, m.k, m.bits, m.nbytes, m.rank, m.adapter_nbytes) for m, count in found.items()
    )


def embedding_nbytes(shape: ModelShape, recipe: Recipe, storage: Storage) -> int:
    """Stored bytes of an embedding table of its own: 0 where it is tied to lm_head."""
    if shape.tied:
        return 0
    return storage.matrix_nbytes(shape.vocab, shape.hidden, recipe.scheme_for("model.embed_tokens"))


def operators(shape: ModelShape, weights: tuple[Matrix, ...], storage: Storage, step: Step) -> tuple[Operator, ...]:
    """Every operator of one step, in the order of the model, equal layers counted together."""
    linears = [op for matrix in weights for op in _linear(matrix, storage, step)]
    return (
        _embedding(shape, storage, step),
        *_norms(shape, storage, step),
        *(op for op in linears if op.name != "lm_head"),
        _attention(shape, storage, step),
        *_elementwise(shape, storage, step),
        *(op for op in linears if op.name == "lm_head"),
    )


def _linear(matrix: Matrix, storage: Storage, step: Step) -> list[Operator]:
    tokens = step.logits_tokens if matrix.name == "lm_head" else step.new_tokens
    width, name = storage.activation_bits, matrix.name
    moved = tokens * (matrix.k + matrix.n) * width // 8
    flops = 2 * tokens * matrix.k * matrix.n
    found = [Operator(name, Kind.LINEAR, matrix.count, flops, matrix.nbytes, moved)] if tokens else []
    if tokens and matrix.rank:
        # Two products and the addition to the base's output, which is read and written once more.
        flops = 2 * tokens * matrix.rank * (matrix.k + matrix.n) + tokens * matrix.n
        moved = tokens * (matrix.k + 2 * matrix.rank + 3 * matrix.n) * width // 8
        adapter = Operator("adapters", Kind.ADAPTER, matrix.count, flops, matrix.adapter_nbytes, moved, launches=3)
        found.append(adapter)
    return found


def _embedding(shape: ModelShape, storage: Storage, step: Step) -> Operator:
    elements = step.new_tokens * shape.hidden
    read, written = (elements * bits // 8 for bits in (storage.float_bits, storage.activation_bits))
    return Operator("embedding", Kind.EMBEDDING, 1, 0, read, written)


def _norm(count: int, elements: int, weights: int, storage: Storage) -> Operator:
    weight_nbytes = weights * storage.float_bits // 8
    return Operator("norm", Kind.NORM, count, 4 * elements, weight_nbytes, 2 * elements * storage.activation_bits // 8)


def _norms(shape: ModelShape, storage: Storage, step: Step) -> list[Operator]:
    found = [_norm(2 * shape.layers + 1, step.new_tokens * shape.hidden, shape.hidden, storage)]
    if shape.qk_norm:
        found += [
            _norm(shape.layers, step.new_tokens * heads * shape.head_dim, shape.head_dim, storage)
            for heads in (shape.heads, shape.kv_heads)
        ]
    return found


def _attention(shape: ModelShape, storage: Storage, step: Step) -> Operator:
    tokens, heads, kv_heads, size = step.new_tokens, shape.heads, shape.kv_heads, shape.head_dim
    pairs = causal_pairs(tokens, step.past_tokens)
    scores = score_flops(shape, pairs) // shape.layers
    flops = scores + 5 * heads * pairs + 3 * tokens * (heads + kv_heads) * size  # and softmax, rotary embedding
    moved = tokens * 2 * (heads + kv_heads) * size * storage.activation_bits // 8  # q, k, v in; output out
    cache = (step.past_tokens + 2 * tokens) * storage.kv_token_nbytes(shape) // shape.layers  # all read, new written
    return Operator("attention", Kind.ATTENTION, shape.layers, flops, 0, moved, cache)


def _elementwise(shape: ModelShape, storage: Storage, step: Step) -> list[Operator]:
    tokens, width = step.new_tokens, storage.activation_bits
    gated = Operator(
        "swiglu", Kind.ELEMENTWISE, shape.layers, 5 * tokens * shape.ffn, 0, 3 * tokens * shape.ffn * width // 8
    )
    added = tokens * shape.hidden
    return [gated, Operator("residual", Kind.ELEMENTWISE, 2 * shape.layers, added, 0, 3 * added * width // 8)]
