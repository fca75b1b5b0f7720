"""Operator models of a decoder: FLOPs and bytes of each operator of one step, from architecture and storage alone.

    linear      2 T K N FLOPs; weight bytes as stored (profiles.storage), bias N; reads T K, writes T N activations
    attention   profiles.attention
    experts     router 2 T h E; gate, up and down 2 T k K N FLOPs for k active of E; weight bytes of the expected number
                of different experts (profiles.experts)
    norm        4 T h FLOPs; residual T h; gated activation 5 T ffn
    adapter     2 T r (K + N) FLOPs, T N for adding it; r (K + N) weights in 8-bit blocks
    embedding   rows only; lm_head for `logits_tokens` of the T tokens

T counts the tokens of all sequences of the batch, which read the weights together. Activations are charged as if they
always went to memory; joined operators (Options) save what lies between them. What this does not know: what a cache
keeps between operators, and how kernels cut their work.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rlkit.profiles.architecture import Architecture
from rlkit.profiles.attention import attention, cache_nbytes, causal_pairs, is_absorbed, read_tokens, score_flops
from rlkit.profiles.experts import unique_experts
from rlkit.profiles.layer import Layer
from rlkit.profiles.step import NAMED, Kind, Operator, Options, Step, prefill_steps
from rlkit.profiles.storage import FORMATS, Cache, Format, Storage, format_named, packed
from rlkit.profiles.weights import Adapters, Block, Matrix, Weights, weigh

__all__ = [
    "FORMATS",
    "NAMED",
    "Adapters",
    "Block",
    "Cache",
    "Format",
    "Kind",
    "Matrix",
    "Operator",
    "Options",
    "Step",
    "Storage",
    "Weights",
    "cache_nbytes",
    "causal_pairs",
    "format_named",
    "operators",
    "operators_of",
    "packed",
    "past_operators",
    "prefill_steps",
    "read_tokens",
    "score_flops",
    "unique_experts",
    "weigh",
]

CPU = NAMED["cpu"]
_LATENT = "kv_b_proj"
_FIRST = ("experts.gate_proj", "experts.gate_up_proj")
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def operators(
    architecture: Architecture, weights: Weights, storage: Storage, step: Step, options: Options = CPU
) -> tuple[Operator, ...]:
    """Every operator of one step, in the order of the model, equal ones counted together."""
    return operators_of(architecture, weights, storage, (step,), options)


def operators_of(
    architecture: Architecture, weights: Weights, storage: Storage, steps: Sequence[Step], options: Options = CPU
) -> tuple[Operator, ...]:
    """The operators of several steps together, such as the chunks of a prompt: weights are read in each."""
    alike = Counter((step.new_tokens, step.logits_tokens, step.batch) for step in steps)
    found: list[Operator] = []
    for step in steps:
        # What does not look at the past is the same in all steps of these sizes: made once, counted as often.
        repeats = alike.pop((step.new_tokens, step.logits_tokens, step.batch), 0)
        found += _of_step(architecture, weights, storage, step, options, repeats)
    return _merged(found)


def past_operators(
    architecture: Architecture, weights: Weights, storage: Storage, step: Step, options: Options = CPU
) -> tuple[Operator, ...]:
    """Those of a step's operators that look at the past; the others are the same after any past."""
    return tuple(_of_step(architecture, weights, storage, step, options, repeats=0))


def _of_step(
    architecture: Architecture, weights: Weights, storage: Storage, step: Step, options: Options, repeats: int
) -> Iterator[Operator]:
    """One step's operators; those that do not look at the past run `repeats` times, or are left out at 0."""
    for block in weights.blocks if not repeats else ():
        yield from (_times(op, block.count) for op in _past(block, storage, step, options))
    if not repeats:
        return
    rows, width = step.batch * step.new_tokens, storage.activation_bits
    written = rows * architecture.hidden * width // 8
    table = Operator("embedding", Kind.EMBEDDING, 1, 0, rows * weights.row_nbytes, written, 0, 1, 0, rows)
    yield _times(table, repeats)
    if options.small_launches:
        yield Operator("inputs", Kind.ELEMENTWISE, repeats, 0, launches=options.small_launches, tokens=rows)
    joins_qkv = options.fused_qkv and all(_joinable(_named(block.matrices, _QKV)) for block in weights.blocks)
    for block in weights.blocks:
        matrices = _joined(block.matrices, block.layer, options, joins_qkv=joins_qkv)
        before, after = _around(block.layer, matrices, architecture.hidden, rows, storage, options)
        yield from (_times(op, repeats * block.count) for op in before)
        yield from (_times(op, block.count) for op in _past(block, storage, step, options))
        yield from (_times(op, repeats * block.count) for op in after)
    if architecture.layers[-1].norms:
        norm_nbytes = architecture.last_norm * storage.float_bits // 8
        yield _times(_norm("norm", rows * architecture.hidden, norm_nbytes, width, rows), repeats)
    if step.logits_tokens:
        head = _linear(weights.head, step.batch * step.logits_tokens, storage, options)
        yield from (_times(op, repeats) for op in head)


def _around(
    layer: Layer, matrices: Sequence[Matrix], hidden: int, rows: int, storage: Storage, options: Options
) -> tuple[list[Operator], list[Operator]]:
    """A layer's operators before and after those that look at the past."""
    inside = [matrix for matrix in matrices if _is_attention(matrix) and matrix.name != _LATENT]
    before = list(_norms(layer, hidden, rows, storage, options))
    before += [op for matrix in inside[:-1] for op in _linear(matrix, rows, storage, options)]
    split = any(matrix.name == "qkv_proj" for matrix in inside)
    before += _head_norms(layer, rows, storage, options, split=split)
    after = [*_linear(inside[-1], rows, storage, options)]
    outside = [matrix for matrix in matrices if not _is_attention(matrix)]
    return before, [*after, *_mlp(layer, outside, hidden, rows, storage, options)]


def _past(block: Block, storage: Storage, step: Step, options: Options) -> Iterator[Operator]:
    """A layer's operators that look at the past: attention, and what expands latent vectors."""
    layer = block.layer
    for matrix in block.matrices:
        if matrix.name == _LATENT:
            seen = step.new_tokens if is_absorbed(layer, step, options) else read_tokens(step, layer.window)
            yield from _linear(matrix, step.batch * seen, storage, options)
    yield from attention(layer, storage, step, options)


def _mlp(
    layer: Layer, matrices: Sequence[Matrix], hidden: int, rows: int, storage: Storage, options: Options
) -> Iterator[Operator]:
    width, experts = storage.activation_bits, layer.experts
    for matrix in matrices:
        if matrix.name.endswith("down_proj"):
            inner = rows * matrix.k * (matrix.active if matrix.experts else 1)
            joined = any(_prefix(m) == _prefix(matrix) and m.name.endswith("gate_up_proj") for m in matrices)
            yield from _activation(matrix, inner, joined, layer.gated, width, options)
        yield from _linear(matrix, rows, storage, options)
        if matrix.name == "router" and experts is not None:
            mixed = rows * experts.active * hidden
            moved = (rows * experts.count + mixed + rows * hidden) * width // 8
            flops = 5 * rows * experts.count + 2 * mixed
            launches = 0 if options.fused_experts else 3  # the best, their shares, the weighted sum
            yield Operator("routing", Kind.ELEMENTWISE, 1, flops, 0, moved, 0, launches, 0, rows)


def _linear(matrix: Matrix, rows: int, storage: Storage, options: Options) -> Iterator[Operator]:
    """A product and the branch beside it."""
    n, k, runs, read, width = matrix.n, matrix.k, rows, 1.0, storage.activation_bits
    if matrix.experts:
        runs, read = rows * matrix.active, unique_experts(matrix.experts, matrix.active, rows, options.skew)
    flops, packed_weights = 2 * runs * n * k, matrix.format.group > 0
    if options.unpacking and packed_weights:
        flops += round(read * 2 * n * k)
    if matrix.experts:  # one operator for all of them, or products expert by expert
        launches = int(matrix.name in _FIRST) if options.fused_experts else math.ceil(read)
    else:
        launches = 1 + (matrix.bias_nbytes > 0 and not options.fused_bias)
    kind = Kind.EXPERTS if matrix.experts else Kind.LINEAR
    nbytes, moved = round(read * (matrix.nbytes + matrix.bias_nbytes)), runs * (k + n) * width // 8
    shape = n, k, matrix.format.group
    yield Operator(matrix.name, kind, 1, flops, nbytes, moved, 0, launches, matrix.bits, rows, shape)
    if matrix.rank:
        branch = round(read * matrix.adapter_nbytes)
        moved = runs * (k + 2 * matrix.rank + n) * width // 8
        flops = 2 * runs * matrix.rank * (k + n)
        shape = n, k, matrix.rank
        yield Operator("adapters", Kind.ADAPTER, 1, flops, branch, moved, 0, 2, storage.adapter_bits, rows, shape)
        yield Operator("adapters: sum", Kind.ELEMENTWISE, 1, runs * n, 0, 3 * runs * n * width // 8, 0, 1, 0, rows)


def _norm(name: str, elements: int, weight_nbytes: int, width: int, rows: int, launches: int = 1) -> Operator:
    moved = 2 * elements * width // 8
    return Operator(name, Kind.NORM, 1, 4 * elements, weight_nbytes, moved, 0, launches, 0, rows)


def _norms(layer: Layer, hidden: int, rows: int, storage: Storage, options: Options) -> Iterator[Operator]:
    """A layer's norms and its two residuals, joined where options say so."""
    width, elements = storage.activation_bits, rows * hidden
    weights = layer.norm_terms * hidden * storage.float_bits // 8
    joined = min(2, layer.norms) if options.fused_norm else 0
    if joined:
        both = Operator("residual and norm", Kind.NORM, 1, 5 * elements, weights, elements * width // 2, 0, 1, 0, rows)
        yield _times(both, joined)
    if layer.norms > joined:
        yield _times(_norm("norm", elements, weights, width, rows), layer.norms - joined)
    if joined < 2:
        added = Operator("residual", Kind.ELEMENTWISE, 1, elements, 0, 3 * elements * width // 8, 0, 1, 0, rows)
        yield _times(added, 2 - joined)


def _head_norms(layer: Layer, rows: int, storage: Storage, options: Options, *, split: bool) -> Iterator[Operator]:
    """Norms of queries and keys, or of latent vectors; a joint q, k and v is split for them."""
    width, size = storage.activation_bits, layer.head_dim
    if layer.latent:
        for elements in (layer.latent.q_lora or 0, layer.latent.kv_lora):
            if elements:
                yield _norm("latent norm", rows * elements, elements * storage.float_bits // 8, width, rows)
    if not layer.qk_norm or options.fused_qk_norm:
        return
    if split:
        moved = 2 * rows * (layer.heads + 2 * layer.kv_heads) * size * width // 8
        yield Operator("split", Kind.ELEMENTWISE, 1, 0, 0, moved, 0, 1, 0, rows)
    for heads in (layer.heads, layer.kv_heads):
        kept = size if layer.qk_norm == "head" else heads * size
        # A reshape before and after it.
        yield _norm("head norm", rows * heads * size, kept * storage.float_bits // 8, width, rows, launches=3)


def _activation(
    down: Matrix, elements: int, joined: bool, gated: bool, width: int, options: Options
) -> Iterator[Operator]:
    """What is between up and down; `joined`: gate and up come as one and are split first."""
    inside = bool(down.experts) and options.fused_experts
    rows = elements // down.k
    if joined and not options.fused_activation and not inside:
        yield Operator("split", Kind.ELEMENTWISE, 1, 0, 0, 4 * elements * width // 8, 0, 1, 0, rows)
    one = options.fused_activation or not gated
    accesses = (3 if gated else 2) if one else 5  # the activation of gate, then its product with up
    launches = 0 if inside else (1 if one else 2)
    moved = accesses * elements * width // 8
    yield Operator("activation", Kind.ELEMENTWISE, 1, 5 * elements, 0, moved, 0, launches, 0, rows)


def _is_attention(matrix: Matrix) -> bool:
    return matrix.name.startswith(("q", "k", "v", "o_"))


def _prefix(matrix: Matrix) -> str:
    return matrix.name.rpartition(".")[0]


def _named(matrices: Iterable[Matrix], names: Sequence[str], prefix: str = "") -> list[Matrix]:
    wanted = [f"{prefix}.{name}" if prefix else name for name in names]
    return [matrix for matrix in matrices if matrix.name in wanted]


def _joinable(parts: Sequence[Matrix]) -> bool:
    """Whether they are stored alike and none has a branch."""
    return len({matrix.format for matrix in parts}) <= 1 and not any(matrix.rank for matrix in parts)


def _joined(matrices: tuple[Matrix, ...], layer: Layer, options: Options, *, joins_qkv: bool) -> list[Matrix]:
    """A layer's matrices as products: q, k, v and gate, up as one where that is asked for and possible."""
    found = list(matrices)
    if joins_qkv and not layer.latent:
        found = _join(found, _QKV, "qkv_proj")
    if not options.fused_gate_up:
        return found
    for prefix in ("", "experts", "shared_expert"):
        parts = _named(found, _GATE_UP, prefix)
        # The export joins packed matrices alone; experts come as one whatever they are.
        if len(parts) == 2 and _joinable(parts) and (parts[0].format.group or prefix == "experts"):
            names = [part.name for part in parts]
            found = _join(found, names, f"{prefix}.gate_up_proj" if prefix else "gate_up_proj")
    return found


def _join(matrices: list[Matrix], names: Sequence[str], name: str) -> list[Matrix]:
    parts = [matrix for matrix in matrices if matrix.name in names]
    if len(parts) != len(names):
        return matrices
    first = parts[0]
    whole = Matrix(
        name=name,
        n=sum(part.n for part in parts),
        k=first.k,
        format=first.format,
        nbytes=sum(part.nbytes for part in parts),
        bias_nbytes=sum(part.bias_nbytes for part in parts),
        count=first.count,
        active=first.active,
        experts=first.experts,
    )
    at = matrices.index(first)
    rest = [matrix for matrix in matrices if matrix.name not in names]
    return [*rest[:at], whole, *rest[at:]]


def _times(op: Operator, count: int) -> Operator:
    """The operator run so many times as often."""
    return op if count == 1 else op.counted(op.count * count)


def _merged(ops: Iterable[Operator]) -> tuple[Operator, ...]:
    """Equal operators counted together, in the order of their first."""
    found: dict[tuple[object, ...], tuple[Operator, int]] = {}
    for op in ops:
        moved = op.weight_nbytes, op.activation_nbytes, op.kv_nbytes
        key = (op.name, op.flops, moved, op.launches, op.bits, op.tokens, op.shape)
        found[key] = op, found.get(key, (op, 0))[1] + op.count
    return tuple(op if op.count == count else op.counted(count) for op, count in found.values())
