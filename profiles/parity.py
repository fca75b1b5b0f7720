"""Does one execution provider compute what another does? Differences by value and by operator, in numpy alone.

An error is the largest difference over the largest value of the reference, so that it means the same for every value.

Attention has two more references: the exact one in float64, and what the flash-attention shader of ONNX Runtime's
WebGPU provider (read in 1.27) computes by way of Vulkan. It takes as many keys per pass as a subgroup has invocations,
16 at most, but counts at least 8; keys beyond the subgroup are zero, so they only add to the denominator of softmax.
And the accumulators that it declares within the loop start a pass at what the one before left in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
COUNTED, MOST = 8, 16  # keys that the shader counts per pass at least, and takes at most
_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one value is from its reference; error is relative to the reference's largest."""

    name: str
    op: str
    error: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def error(found: Array, expected: Array) -> float:
    """The largest difference over the reference's largest value; infinite for another shape or for NaN."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    gap = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    scale = float(np.abs(expected.astype(np.float64)).max())
    relative = float(gap) / scale if scale else float(gap)
    return relative if np.isfinite(relative) else float("inf")


def differences(
    found: Mapping[str, Array], expected: Mapping[str, Array], operators: Mapping[str, str]
) -> list[Difference]:
    """Every value of `operators` that both sides have, in its order."""
    both = (name for name in operators if name in found and name in expected)
    return [Difference(name, operators[name], error(found[name], expected[name])) for name in both]


def worst_by_operator(rows: Iterable[Difference]) -> dict[str, Difference]:
    """Operator -> its largest difference, the largest first."""
    worst: dict[str, Difference] = {}
    for row in rows:
        if row.op not in worst or row.error > worst[row.op].error:
            worst[row.op] = row
    return dict(sorted(worst.items(), key=lambda item: -item[1].error))


def first_over(rows: Iterable[Difference], limit: float) -> Difference | None:
    """The first value that is off by more than the limit."""
    return next((row for row in rows if row.error > limit), None)


def attend(q: Array, k: Array, v: Array, heads: int, past: int = 0) -> NDArray[np.float64]:
    """Causal attention in float64: q (B, S, heads * D), k and v (B, KV heads, past + S, D) -> (B, S, heads * D)."""
    q, k, v = _by_head(q, k, v, heads)
    scores = q @ k.swapaxes(2, 3)
    seen = np.arange(k.shape[2])[None] <= past + np.arange(q.shape[2])[:, None]
    weights = np.exp(np.where(seen, scores - scores.max(-1, keepdims=True), -np.inf))
    return _joined(weights / weights.sum(-1, keepdims=True) @ v)


def attend_in_passes(q: Array, k: Array, v: Array, heads: int, past: int = 0, *, subgroup: int) -> NDArray[np.float64]:
    """What the shader makes of the same input where subgroups have that many invocations; see the module."""
    q, k, v = _by_head(q, k, v, heads)
    batch, _, new, _ = q.shape
    total, taken = k.shape[2], min(subgroup, MOST)
    width = max(taken, COUNTED)
    out = np.zeros(q.shape)
    left = np.zeros((batch, heads, new, width))
    highest = np.full((batch, heads, new, 1), _LOWEST)
    below = np.zeros((batch, heads, new, 1))
    for start in range(0, total, taken):
        stop = min(start + taken, total)
        left[..., : stop - start] += q @ k[:, :, start:stop].swapaxes(2, 3)
        seen = start + np.arange(width)[None] <= past + np.arange(new)[:, None]
        scores = np.where(seen, left, _LOWEST)
        raised = np.maximum(highest, scores.max(-1, keepdims=True))
        weights = np.exp(scores - raised)
        kept = below * np.exp(highest - raised)
        below = kept + weights.sum(-1, keepdims=True)
        left = weights / below
        out = out * (kept / below) + left[..., : stop - start] @ v[:, :, start:stop]
        highest = raised
    return _joined(out)


def _by_head(q: Array, k: Array, v: Array, heads: int) -> tuple[Array, Array, Array]:
    """q scaled and k, v repeated, all (B, heads, tokens, D) in float64."""
    batch, new, wide = q.shape
    size, repeats = wide // heads, heads // k.shape[1]
    split = q.astype(np.float64).reshape(batch, new, heads, size).swapaxes(1, 2) / size**0.5
    return split, k.astype(np.float64).repeat(repeats, 1), v.astype(np.float64).repeat(repeats, 1)


def _joined(out: Array) -> NDArray[np.float64]:
    batch, heads, new, size = out.shape
    return np.ascontiguousarray(out.swapaxes(1, 2)).reshape(batch, new, heads * size)
