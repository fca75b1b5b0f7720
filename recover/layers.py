"""Each stage of recovery over all linears of a model, as generators of (module name, result); a model that wears them.

Linears that share their input (gate and up) are quantized as one stacked matrix, which halves the number of small
steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlkit.recover.adapter import AdaptedLinear
from rlkit.recover.compensate import Compensation, compensate
from rlkit.recover.correct import LowRank, Moments, correct
from rlkit.recover.model import linears
from rlkit.recover.progress import Progress, Tell
from rlkit.recover.quantize import Quantized, quantize_nearest
from rlkit.recover.recipe import Scheme
from rlkit.recover.statistics import Statistics

HEAD_DAMPING = 0.1  # a tied lm_head is the embedding too, where every input counts alike: a rounder metric serves both


def nearest(model: Any, schemes: dict[str, Scheme], tell: Tell) -> Iterator[tuple[str, Quantized]]:
    """Round-to-nearest of every matrix."""
    modules = linears(model)
    for index, (name, scheme) in enumerate(schemes.items(), start=1):
        yield name, quantize_nearest(modules[name].weight, scheme)
        tell(Progress("round-to-nearest", index, len(schemes), name))


def compensated(
    model: Any, schemes: dict[str, Scheme], statistics: Statistics, options: Compensation, tell: Tell
) -> Iterator[tuple[str, Quantized]]:
    """Every matrix with error compensation against its input's second moment."""
    weights = {name: linears(model)[name].weight for name in schemes}
    done = 0
    for names in groups(schemes, statistics):
        first = names[0]
        damping = max(options.damping, HEAD_DAMPING) if first == "lm_head" else options.damping
        stacked = torch.cat([weights[name] for name in names])
        settings = Compensation(damping, options.rounds)
        yield from split(compensate(stacked, statistics.inputs[first], schemes[first], settings), names, weights)
        done += len(names)
        tell(Progress("compensate", done, len(schemes), first))


def corrected(
    model: Any,
    quantized: dict[str, Quantized],
    statistics: Statistics,
    rounds: int,
    options: Compensation,
    tell: Tell,
) -> Iterator[tuple[str, Quantized, LowRank]]:
    """Low-rank corrections where the scheme has a rank, alternated with compensation `rounds` times."""
    schemes = {name: q.scheme for name, q in quantized.items() if q.scheme.adapter_rank}
    weights = {name: linears(model)[name].weight.detach() for name in schemes}
    done, total = 0, len(schemes) * (rounds + 1)
    for names in groups(schemes, statistics):
        moment = statistics.inputs[names[0]]
        state = {name: quantized[name] for name in names}
        for index in range(rounds + 1):
            low_ranks = {}
            for name in names:
                moments = Moments(moment, statistics.outputs.get(name))
                error = weights[name] - state[name].dequantize()
                low_ranks[name] = correct(error, moments, schemes[name].adapter_rank)
            if index < rounds:
                left = torch.cat([weights[name] - low_ranks[name].product() for name in names])
                state = dict(split(compensate(left, moment, schemes[names[0]], options), names, weights))
            done += len(names)
            tell(Progress("correct", done, total, names[0]))
        yield from ((name, state[name], low_ranks[name]) for name in names)


def groups(schemes: dict[str, Scheme], statistics: Statistics) -> Iterator[list[str]]:
    """Modules that share input moment and scheme, together."""
    together: dict[tuple[int, Scheme], list[str]] = {}
    for name, scheme in schemes.items():
        together.setdefault((id(statistics.inputs[name]), scheme), []).append(name)
    yield from together.values()


def split(stacked: Quantized, names: list[str], weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, Quantized]]:
    """Undo the stacking of rows."""
    start = 0
    for name in names:
        rows = slice(start, start + len(weights[name]))
        yield name, Quantized(stacked.codes[rows], stacked.scales[rows], stacked.zeros[rows], stacked.scheme)
        start = rows.stop


@torch.no_grad()
def install(student: Any, weights: dict[str, torch.Tensor], low_ranks: dict[str, LowRank]) -> None:
    """Put float weights, corrections added, into the plain linears of `student`."""
    modules = linears(student)
    for name, weight in weights.items():
        modules[name].weight.copy_(weight + low_ranks[name].product() if name in low_ranks else weight)


def adapt(student: Any, weights: dict[str, torch.Tensor], low_ranks: dict[str, LowRank], dtype: torch.dtype) -> None:
    """Make `student` trainable: corrected linears become AdaptedLinear, their matrices in `dtype`."""
    for name, module in linears(student).items():
        if name in low_ranks:
            parent, _, last = name.rpartition(".")
            setattr(student.get_submodule(parent), last, AdaptedLinear(module, weights[name], low_ranks[name], dtype))


@torch.no_grad()
def uninstall(student: Any, weights: dict[str, torch.Tensor], low_ranks: dict[str, LowRank]) -> None:
    """The inverse of `adapt`: plain float32 linears with the given weights and corrections."""
    for name, low_rank in low_ranks.items():
        parent, _, last = name.rpartition(".")
        old = student.get_submodule(name)
        n, k = weights[name].shape
        plain = torch.nn.Linear(k, n, bias=old.bias is not None)
        plain.weight.copy_(weights[name] + low_rank.product())
        if old.bias is not None:
            plain.bias.copy_(old.bias)
        setattr(student.get_submodule(parent), last, plain.requires_grad_(False))


def save_state(
    path: Path, quantized: dict[str, Quantized], low_ranks: dict[str, LowRank], rows: list[dict[str, Any]]
) -> None:
    """Keep the corrected state so that an interrupted run need not repeat it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, q in quantized.items():
        tensors |= {f"{name}.codes": q.codes.contiguous(), f"{name}.scales": q.scales.contiguous()}
        tensors[f"{name}.zeros"] = q.zeros.contiguous()
    for name, low_rank in low_ranks.items():
        tensors |= {f"{name}.a": low_rank.a.contiguous(), f"{name}.b": low_rank.b.contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".part"), metadata={"stages": json.dumps(rows)})
    path.with_suffix(".part").replace(path)


def load_state(
    path: Path, schemes: dict[str, Scheme]
) -> tuple[dict[str, Quantized], dict[str, LowRank], list[dict[str, Any]]]:
    """What `save_state` kept."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        rows: list[dict[str, Any]] = json.loads(file.metadata()["stages"])
    quantized = {
        name: Quantized(tensors[f"{name}.codes"], tensors[f"{name}.scales"], tensors[f"{name}.zeros"], scheme)
        for name, scheme in schemes.items()
    }
    low_ranks = {
        name: LowRank(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in schemes if f"{name}.a" in tensors
    }
    return quantized, low_ranks, rows
