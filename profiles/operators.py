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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

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
    "prefill_steps",
    "read_tokens",
    "score_flops",
    "unique_experts",
    "weigh",
]

CPU = NAMED["cpu"]
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
    made = (_of_step(architecture, weights, storage, step, options) for step in steps)
    return _merged(op for ops in made for op in ops)


def _of_step(
    architecture: Architecture, weights: Weights, storage: Storage, step: Step, options: Options
) -> Iterator[Operator]:
    rows, width = step.batch * step.new_tokens, storage.activation_bits
    written = rows * architecture.hidden * width // 8
    yield Operator("embedding", Kind.EMBEDDING, 1, 0, rows * weights.row_nbytes, written, 0, 1, 0, rows)
    if options.small_launches:
        yield Operator("inputs", Kind.ELEMENTWISE, 1, 0, launches=options.small_launches, tokens=rows)
    joins_qkv = options.fused_qkv and all(_joinable(_named(block.matrices, _QKV)) for block in weights.blocks)
    for block in weights.blocks:
        for op in _block(block, architecture.hidden, storage, step, options, joins_qkv=joins_qkv):
            yield _times(op, block.count)
    if architecture.last_norm or architecture.layers[-1].norms:
        norm_nbytes = architecture.last_norm * storage.float_bits // 8
        yield _norm("norm", rows * architecture.hidden, norm_nbytes, width, rows)
    if step.logits_tokens:
        yield from _linear(weights.head, step.batch * step.logits_tokens, storage, options, width)


def _block(
    block: Block, hidden: int, storage: Storage, step: Step, options: Options, *, joins_qkv: bool
) -> Iterator[Operator]:
    """The operators of one layer."""
    layer, width, rows = block.layer, storage.activation_bits, step.batch * step.new_tokens
    matrices = _joined(block.matrices, layer, options, joins_qkv=joins_qkv)
    seen = step.batch * read_tokens(step, layer.window)  # latent vectors that are expanded
    before_mlp = [matrix for matrix in matrices if _is_attention(matrix)]
    yield from _norms(layer, hidden, rows, storage, options)
    for matrix in before_mlp[:-1]:
        expanded = matrix.name == "kv_b_proj" and not is_absorbed(layer, step, options)
        yield from _linear(matrix, seen if expanded else rows, storage, options, width)
    yield from _head_norms(layer, rows, storage, options, split=joins_qkv)
    yield from attention(layer, storage, step, options)
    yield from _linear(before_mlp[-1], rows, storage, options, width)
    yield from _mlp(layer, [m for m in matrices if not _is_attention(m)], hidden, rows, storage, options)


def _mlp(
    layer: Layer, matrices: Sequence[Matrix], hidden: int, rows: int, storage: Storage, options: Options
) -> Iterator[Operator]:
    width, experts = storage.activation_bits, layer.experts
    for matrix in matrices:
        if matrix.name.endswith("down_proj"):
            inner = rows * matrix.k * (matrix.active if matrix.experts else 1)
            joined = any(_prefix(m) == _prefix(matrix) and m.name.endswith("gate_up_proj") for m in matrices)
            yield from _activation(matrix, inner, joined and not layer.fused, layer.gated, width, options)
        yield from _linear(matrix, rows, storage, options, width)
        if matrix.name == "router" and experts is not None:
            mixed = rows * experts.active * hidden
            moved = (rows * experts.count + mixed + rows * hidden) * width // 8
            flops = 5 * rows * experts.count + 2 * mixed
            launches = 0 if options.fused_experts else 3  # the best, their shares, the weighted sum
            yield Operator("routing", Kind.ELEMENTWISE, 1, flops, 0, moved, 0, launches, 0, rows)


def _linear(matrix: Matrix, rows: int, storage: Storage, options: Options, width: int) -> Iterator[Operator]:
    """A product and the branch beside it."""
    n, k, runs, read = matrix.n, matrix.k, rows, 1.0
    if matrix.experts:
        runs, read = rows * matrix.active, unique_experts(matrix.experts, matrix.active, rows, options.skew)
    flops, packed_weights = 2 * runs * n * k, matrix.format.group > 0
    if options.unpacking and packed_weights:
        flops += round(read * 2 * n * k)
    first = not matrix.name.endswith("down_proj") or not options.fused_experts
    launches = 1 if not matrix.experts or first else 0
    launches += bool(matrix.bias_nbytes) and not options.fused_bias and not matrix.experts
    kind = Kind.EXPERTS if matrix.experts else Kind.LINEAR
    nbytes, moved = round(read * (matrix.nbytes + matrix.bias_nbytes)), runs * (k + n) * width // 8
    yield Operator(matrix.name, kind, 1, flops, nbytes, moved, 0, launches, matrix.bits, rows)
    if matrix.rank:
        branch = round(read * matrix.adapter_nbytes)
        moved = runs * (k + 2 * matrix.rank + n) * width // 8
        flops = 2 * runs * matrix.rank * (k + n)
        yield Operator("adapters", Kind.ADAPTER, 1, flops, branch, moved, 0, 2, storage.adapter_bits, rows)
        yield Operator("adapters: sum", Kind.ELEMENTWISE, 1, runs * n, 0, 3 * runs * n * width // 8, 0, 1, 0, rows)


def _norm(name: str, elements: int, weight_nbytes: int, width: int, rows: int, launches: int = 1) -> Operator:
    moved = 2 * elements * width // 8
    return Operator(name, Kind.NORM, 1, 4 * elements, weight_nbytes, moved, 0, launches, 0, rows)


def _norms(layer: Layer, hidden: int, rows: int, storage: Storage, options: Options) -> Iterator[Operator]:
    """A layer's norms and its two residuals, joined where options say so."""
    width, elements, weights = (
        storage.activation_bits,
        rows * hidden,
        layer.norm_terms * hidden * storage.float_bits // 8,
    )
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
    if split and not layer.fused:
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
    return op if count == 1 else replace(op, count=op.count * count)


def _merged(ops: Iterable[Operator]) -> tuple[Operator, ...]:
    """Equal operators counted together, in the order of their first."""
    found: dict[tuple[object, ...], tuple[Operator, int]] = {}
    for op in ops:
        key = (op.name, op.flops, op.weight_nbytes, op.activation_nbytes, op.kv_nbytes, op.launches, op.bits, op.tokens)
        found[key] = op, found.get(key, (op, 0))[1] + op.count
    return tuple(op if op.count == count else replace(op, count=count) for op, count in found.values())
