"""What is compared on WebGPU, and what counts as the same: the cases of benchmarks/webgpu_parity.py.

One deviation is known and expected, not passed over: where a subgroup has fewer than 8 invocations, the shader that
attends over several new tokens at once counts keys that are not there (profiles/parity.py). It shows where more keys
are seen than a subgroup has invocations; with fewer the very same shader must be exact, and so must everything else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlkit.apps.benchmarks.webgpu_models import VOCAB
from rlkit.profiles import parity

if TYPE_CHECKING:
    from rlkit.export.probes import Attention, Probe, Product

    Case = Product | Attention

Arrays = dict[str, NDArray[Any]]
NARROW = "narrow subgroups"  # the known deviation
ATTENTION = "GroupQueryAttention"
COARSE_LIMIT = 0.02  # accuracy_level 4: either side rounds x to 8 bits, by blocks of its own


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens that are run at once, after those of the step before or after none."""

    name: str
    tokens: int
    continues: bool


STEPS = (
    Step("prompt of 4", 4, False),
    Step("prompt of 24", 24, False),
    Step("1 token after 24", 1, True),
)


def products() -> list[Product]:
    """MatMulNBits of every width and block, with and without zero points; then biases, odd sizes, int8 activations."""
    from rlkit.export.probes import Product

    plain = [
        Product(bits, block, rows=rows, zeros=zeros)
        for bits in (2, 4, 8)
        for block in (32, 64, 128)
        for zeros in (True, False)
        for rows in (1, 5)
    ]
    odd = [Product(bits, 64, n=100, k=160, rows=3, bias=True) for bits in (2, 4, 8)]  # the last block is not full
    large = [Product(bits, 32, n=256, k=512, rows=rows, bias=rows > 1) for bits in (2, 4, 8) for rows in (1, 20)]
    coarse = [Product(bits, block, n=64, rows=5, level=4) for bits in (2, 4, 8) for block in (64, 128)]
    return [*plain, *odd, *large, *coarse]


def attentions() -> list[Attention]:
    """GroupQueryAttention over head sizes; then packed inputs, groups, batches, windows, norms within."""
    from rlkit.export.probes import Attention

    heads = [
        Attention(head, new=new, past=past, rotary=rotary)
        for head in (32, 64, 96, 128)
        for new, past, rotary in (
            (1, 0, True),
            (1, 17, False),
            (1, 17, True),
            (4, 0, True),
            (24, 0, False),
            (24, 0, True),
        )
    ]
    turned = [
        Attention(64, new=1, past=17, packed=True),
        Attention(64, new=4, packed=True),
        Attention(64, new=24, packed=True),
        Attention(64, new=3, past=17, rotary=False),
        Attention(64, heads=4, kv_heads=4, new=1, past=17),
        Attention(64, heads=4, kv_heads=4, new=24),
        Attention(64, heads=8, kv_heads=1, new=1, past=17),
        Attention(64, heads=8, kv_heads=1, new=24),
        Attention(64, new=1, past=17, rows=2),
        Attention(64, new=24, window=8),
        Attention(64, new=24, smooth=True),
        Attention(64, new=1, past=17, normed=True),
    ]
    return [*heads, *turned]


def probe(case: Case, seed: int) -> Probe:
    """The single-node model of a case."""
    from rlkit.export import probes

    return probes.product(case, seed) if isinstance(case, probes.Product) else probes.attention(case, seed)


def is_narrow(new: int, total: int, subgroup: int) -> bool:
    """Whether the known deviation shows: several new tokens see more keys than a subgroup of fewer than 8 has lanes."""
    return 0 < subgroup < parity.COUNTED and new > 1 and total > subgroup


def judge(
    case: Case, feeds: Arrays, outputs: dict[str, Arrays], said: dict[str, str | None], limit: float, subgroup: int
) -> dict[str, Any]:
    """A row of the report: error of WebGPU against the CPU, what explains it, and whether that is as it should be."""
    row: dict[str, Any] = {"name": case.name, "error": None, "explained": None, "note": "", "passed": False}
    if said["cpu"] and said["webgpu"]:  # a form that this runtime does not know
        return {**row, "note": f"no provider takes it: {_short(said['cpu'])}", "passed": bool(_normed(case))}
    if said["cpu"] or said["webgpu"]:
        return {**row, "note": f"{'CPU' if said['cpu'] else 'WebGPU'}: {_short(said['cpu'] or said['webgpu'] or '')}"}
    limit = COARSE_LIMIT if getattr(case, "level", 0) == 4 else limit
    off = max(parity.error(outputs["webgpu"][name], expected) for name, expected in outputs["cpu"].items())
    row |= {"error": off, "passed": off <= limit}
    if off > limit and not hasattr(case, "bits") and _uses_flash_prefill(case):
        row["explained"] = _explained(case, feeds, outputs, subgroup)
        if is_narrow(case.new, case.past + case.new, subgroup):
            row |= {"passed": True, "note": NARROW}
    return row


def judge_step(
    name: str, cpu: Arrays, found: dict[str, Arrays], operators: dict[str, str], limit: float, subgroup: int
) -> dict[str, Any]:
    """One step of the whole model: errors node by node, of the logits, and the first value that differs."""
    step = next(step for step in STEPS if step.name == name)
    total = cpu["attention_mask"].shape[1]
    narrow = is_narrow(step.tokens, total, subgroup)
    rows = parity.differences(found["parts"], cpu, operators)
    worst = parity.worst_by_operator(rows)
    first = parity.first_over(rows, limit)
    unexpected = [row for row in rows if row.error > limit and not (narrow and row.op == ATTENTION)]
    logits = parity.error(found["webgpu"]["logits"], cpu["logits"])
    return {
        "name": name,
        "nodes": len(rows),
        "operators": [row.to_json() for row in worst.values()],
        "first": None if first is None else f"{first.op} {first.name}",
        "logits": logits,
        "note": NARROW if narrow else "",
        "passed": not unexpected and (narrow or logits <= limit),
    }


def cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """A row of the report as text."""
    error, explained = (f"{row[key]:.1e}" if row[key] is not None else "" for key in ("error", "explained"))
    return row["name"], error, explained, row["note"] if row["passed"] else f"FAILED {row['note']}".rstrip()


def step_feeds(step: Step, bundle: Path, before: Arrays) -> Arrays:
    """What the bundle's graph is fed for a step; `before` holds what the step before computed."""
    decoder = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]
    heads, size = decoder["num_key_value_heads"], decoder["head_size"]
    cache = {
        name.replace("present", "past_key_values"): value
        if step.continues
        else np.zeros((1, heads, 0, size), np.float32)
        for name, value in _caches(decoder, before).items()
    }
    past = next(iter(cache.values())).shape[2]
    ids = np.random.default_rng(step.tokens).integers(3, VOCAB, (1, step.tokens))
    return {"input_ids": ids, "attention_mask": np.ones((1, past + step.tokens), np.int64), **cache}


def _caches(decoder: dict[str, Any], before: Arrays) -> Arrays:
    names = [f"present.{layer}.{part}" for layer in range(decoder["num_hidden_layers"]) for part in ("key", "value")]
    return {name: before.get(name, np.zeros(0, np.float32)) for name in names}


def _normed(case: Case) -> bool:
    return getattr(case, "normed", False)


def _uses_flash_prefill(case: Attention) -> bool:
    return case.new > 1 and case.window < 0 and not case.smooth  # other shaders serve windows and smooth softmax


def _explained(case: Attention, feeds: Arrays, outputs: dict[str, Arrays], subgroup: int) -> float | None:
    """How far WebGPU is from the shader's model; None where positions turn the inputs, or the subgroup is unknown."""
    if case.rotary or case.packed or not subgroup:
        return None
    keys, values = (outputs["cpu"][name] for name in ("keys", "values"))
    expected = parity.attend_in_passes(feeds["q"], keys, values, case.heads, case.past, subgroup=subgroup)
    return parity.error(outputs["webgpu"]["y"], expected)


def _short(text: str) -> str:
    """The end of the runtime's message, which is where it says what is wrong."""
    return " ".join(text.split())[-60:]
