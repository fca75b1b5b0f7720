"""What is counted: a pass of the model, how its operators are joined where it runs, and the record of an operator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

MOST_TOKENS = 10**9


class Kind(StrEnum):
    """What an operator is, as far as its speed goes."""

    EMBEDDING = "embedding"
    NORM = "norm"
    LINEAR = "linear"
    ADAPTER = "adapter"
    ATTENTION = "attention"
    ELEMENTWISE = "elementwise"
    EXPERTS = "experts"
    CONV = "conv"


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator that runs `count` times in a step; FLOPs, bytes and launches are of one run.

    `bits` is the width of its weights' codes, or of the cache's numbers for attention; `tokens` how many rows it has.
    `shape`, for those who look measurements up: (n, k, group) of a product, (n, k, rank) of an adapter, (new tokens,
    past tokens it sees, heads, KV heads, head size) of attention.
    """

    name: str
    kind: Kind
    count: int
    flops: int
    weight_nbytes: int = 0
    activation_nbytes: int = 0
    kv_nbytes: int = 0
    launches: int = 1
    bits: int = 0
    tokens: int = 1
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Everything one run reads and writes."""
        return self.weight_nbytes + self.activation_nbytes + self.kv_nbytes

    def counted(self, count: int) -> Operator:
        """The same with another count; dataclasses.replace, which sweeps would spend a fifth of their time in."""
        moved = self.weight_nbytes, self.activation_nbytes, self.kv_nbytes
        return Operator(
            self.name, self.kind, count, self.flops, *moved, self.launches, self.bits, self.tokens, self.shape
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the model: new tokens after past ones, and for how many of the new ones logits are computed.

    Numbers are those of one sequence; `batch` sequences of the same lengths run together and share the weights.
    """

    new_tokens: int
    past_tokens: int = 0
    logits_tokens: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        sizes = (self.new_tokens, self.past_tokens, self.logits_tokens, self.batch)
        if any(type(size) is not int or not 0 <= size <= MOST_TOKENS for size in sizes):
            raise ValueError(f"{self} is no step: its numbers must be whole and from 0 to {MOST_TOKENS:,}")
        if not self.new_tokens or not self.batch or self.logits_tokens > self.new_tokens:
            raise ValueError(f"{self} is no step: at least one new token, and logits for at most all of them")


@dataclass(frozen=True, slots=True)
class Options:
    """How operators are joined and carried out where the model runs; the defaults are our ONNX CPU export.

    attention        "fused": scores never reach memory; "eager": three products that compute and store every score
    fused_qkv        q, k and v are one product, if all layers store them alike and none has a branch
    fused_gate_up    gate and up are one product, in layers that store them alike without a branch
    fused_norm       a norm adds the residual, too
    fused_rotary     attention turns queries and keys
    fused_qk_norm    attention normalizes queries and keys
    fused_activation the activation and its product with up are one operator
    fused_experts    the experts of a layer are one operator
    fused_bias       a linear adds its bias
    kv_copy          "none"; "cache": a past that is read is first unpacked into the type of activations; "heads": and
                     repeated for every query head
    latent           "absorbed": latent attention works on the cached vectors; "expanded": on keys and values made of
                     them; "cheaper": whichever has fewer FLOPs
    skew             of the routing to experts (profiles.experts)
    unpacking        count 2 FLOPs per packed weight and pass for making floats of it
    small_launches   operators of the graph that do next to nothing, once a step: lengths out of a mask
    """

    attention: str = "fused"
    fused_qkv: bool = True
    fused_gate_up: bool = True
    fused_norm: bool = True
    fused_rotary: bool = True
    fused_qk_norm: bool = False
    fused_activation: bool = False
    fused_experts: bool = True
    fused_bias: bool = False
    kv_copy: str = "none"
    latent: str = "cheaper"
    skew: float = 0.0
    unpacking: bool = False
    small_launches: int = 6

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not known; use {', '.join(known)}")
        if self.small_launches < 0:
            raise ValueError(f"small_launches = {self.small_launches} is no number of launches; use 0 or more")


_CHOICES = {
    "attention": ("fused", "eager"),
    "kv_copy": ("none", "cache", "heads"),
    "latent": ("absorbed", "expanded", "cheaper"),
}
_CPU = Options()
# What the graphs of the GenAI model builder 0.18 join for each provider (2026-11), and a framework that joins nothing.
NAMED = {
    "cpu": _CPU,
    "webgpu": replace(_CPU, fused_gate_up=False, fused_qk_norm=True),
    "dml": replace(_CPU, fused_gate_up=False, fused_qkv=False, fused_rotary=False),
    "eager": Options(
        "eager",
        fused_qkv=False,
        fused_gate_up=False,
        fused_norm=False,
        fused_rotary=False,
        fused_experts=False,
        kv_copy="heads",
    ),
}


def prefill_steps(
    tokens: int, chunk: int | None = None, *, past_tokens: int = 0, all_logits: bool = False, batch: int = 1
) -> tuple[Step, ...]:
    """The passes that read a prompt, at most `chunk` tokens each.

    Each pass computes the logits of its last token, as a graph with an lm_head does, or of all its tokens. Raises
    ValueError for sizes that are none.
    """
    if tokens < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"{tokens} tokens in chunks of {chunk} are no prompt; each must be at least 1")
    size = tokens if chunk is None else chunk
    starts = range(0, tokens, size)
    return tuple(
        Step(new, past_tokens + start, new if all_logits else 1, batch)
        for start, new in ((start, min(size, tokens - start)) for start in starts)
    )
