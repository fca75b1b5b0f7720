"""What is done to one layer of the sweep: its linears quantized, corrected, and a line for the log.

Linears that share their input and scheme (gate and up) are quantized as one stacked matrix, which halves the number of
small steps; large matrices (lm_head) go in blocks of rows, since rows do not depend on each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from rlkit.recover.correct import LowRank, Moments, correct, forecast
from rlkit.recover.model import linears
from rlkit.recover.quantize import BLOCK, Quantized
from rlkit.recover.quantizers import Quantize, Quantizer, equalize
from rlkit.recover.recipe import Scheme
from rlkit.recover.sweep import HEAD, LayerMoments

HEAD_DAMPING = 0.1  # a tied lm_head is the embedding too, where every input counts alike: a rounder metric serves both


@dataclass(frozen=True, slots=True)
class Treatment:
    """What to do to every layer: schemes and adapter ranks by full module name, the quantizer, alternation rounds.

    `rounds` counts how often quantization is repeated on what the correction leaves over; None makes no correction.
    """

    schemes: Mapping[str, Scheme]
    ranks: Mapping[str, int]
    quantizer: Quantizer
    rounds: int | None


@dataclass(frozen=True, slots=True)
class LayerState:
    """A layer's outcome by full module name; `others` are norms and biases that equalization changed."""

    prefix: str
    quantized: dict[str, Quantized]
    corrected: dict[str, tuple[Quantized, LowRank]]
    others: dict[str, torch.Tensor]
    log: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def treat(moments: LayerMoments, treatment: Treatment) -> LayerState:
    """Quantize and correct a layer. Consumes `moments`: equalization changes them in place."""
    began = time.perf_counter()
    names = [name for name in linears(moments.layer) if moments.full(name) in treatment.schemes]
    schemes = {name: treatment.schemes[moments.full(name)] for name in names}
    others: dict[str, torch.Tensor] = {}
    if treatment.quantizer.equalize and moments.prefix:
        equalize(moments.layer, moments.inputs, moments.outputs, schemes)
        others = _others(moments, names)
    quantized: dict[str, Quantized] = {}
    corrected: dict[str, tuple[Quantized, LowRank]] = {}
    for group in _groups(schemes, moments.inputs):
        scheme, moment = schemes[group[0]], moments.inputs[group[0]]
        quantize = partial(stacked, moment=moment, scheme=scheme, quantize=treatment.quantizer.quantize)
        quantized |= quantize({name: moments.weight(name) for name in group})
        ranks = {name: rank for name in group if (rank := treatment.ranks.get(moments.full(name), 0))}
        if treatment.rounds is not None and ranks:
            corrected |= alternate(moments, ranks, quantized, quantize, treatment.rounds)
    log: dict[str, Any] = {"layer": moments.prefix or HEAD, "modules": _log(moments, schemes, quantized, corrected)}
    log["seconds"] = round(time.perf_counter() - began, 2)
    full = moments.full
    return LayerState(
        moments.prefix,
        {full(name): state for name, state in quantized.items()},
        {full(name): pair for name, pair in corrected.items()},
        others,
        log,
    )


def _others(moments: LayerMoments, quantized: list[str]) -> dict[str, torch.Tensor]:
    """Everything of the layer that is not a quantized matrix."""
    matrices = {f"{name}.weight" for name in quantized}
    state = moments.layer.state_dict()
    return {moments.full(name): tensor.clone() for name, tensor in state.items() if name not in matrices}


def _groups(schemes: dict[str, Scheme], inputs: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Modules that share input moment and scheme, together."""
    together: dict[tuple[int, Scheme], list[str]] = {}
    for name, scheme in schemes.items():
        together.setdefault((id(inputs[name]), scheme), []).append(name)
    yield from together.values()


def stacked(
    weights: Mapping[str, torch.Tensor], moment: torch.Tensor, scheme: Scheme, quantize: Quantize
) -> dict[str, Quantized]:
    """Matrices (N, K) that share their input moment (K, K) and scheme, by name, quantized as one."""
    if HEAD in weights:
        moment = moment + torch.diag(torch.full_like(moment.diagonal(), HEAD_DAMPING * float(moment.diagonal().mean())))
    parts = list(weights.values())
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return dict(_split(in_blocks(whole, lambda rows: quantize(rows, moment, scheme)), weights))


PARTS = ("codes", "scales", "zeros")


def in_blocks(weight: torch.Tensor, quantize: Callable[[torch.Tensor], Quantized]) -> Quantized:
    """`quantize` applied to blocks of rows of a matrix (N, K) in float32, so that large ones need little memory."""
    step = max(1, BLOCK // weight.shape[1])
    parts = [quantize(weight[start : start + step].detach().float()) for start in range(0, len(weight), step)]
    if len(parts) == 1:
        return parts[0]
    codes, scales, zeros = (torch.cat([getattr(part, key) for part in parts]) for key in PARTS)
    return Quantized(codes, scales, zeros, parts[0].scheme)


def _split(stacked: Quantized, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Quantized]]:
    """Undo the stacking of rows."""
    start = 0
    for name, weight in weights.items():
        rows = slice(start, start + len(weight))
        yield name, replace(stacked, **{key: getattr(stacked, key)[rows] for key in PARTS})
        start = rows.stop


def alternate(
    moments: LayerMoments,
    ranks: Mapping[str, int],
    states: Mapping[str, Quantized],
    quantize: Callable[[dict[str, torch.Tensor]], dict[str, Quantized]],
    rounds: int,
) -> dict[str, tuple[Quantized, LowRank]]:
    """Low-rank corrections of the linears that `ranks` names, alternated with codes for what they leave over.

    It starts from the codes in `states` and ends with a correction, `rounds` times codes in between.
    """
    weights = {name: moments.weight(name).detach().float() for name in ranks}
    metrics = {name: Moments(moments.inputs[name], moments.outputs.get(name)) for name in ranks}
    for left in range(rounds, -1, -1):
        low_ranks = {
            name: correct(w - states[name].dequantize(), metrics[name], ranks[name]) for name, w in weights.items()
        }
        if left:
            states = quantize({name: w - low_ranks[name].product() for name, w in weights.items()})
    return {name: (states[name], low_ranks[name]) for name in ranks}


def _log(
    moments: LayerMoments,
    schemes: dict[str, Scheme],
    quantized: dict[str, Quantized],
    corrected: dict[str, tuple[Quantized, LowRank]],
) -> dict[str, Any]:
    """Per module: bits, group, rank, output error relative to the output, and the forecast of its share of the KL."""
    rows: dict[str, Any] = {}
    for name, scheme in schemes.items():
        weight = moments.weight(name)
        if name == HEAD:  # too large for products in float32, and no gradient moment to weigh it by
            rows[name] = {"bits": scheme.bits, "group": scheme.group}
            continue
        state, low_rank = corrected.get(name, (quantized[name], None))
        error = weight.float() - state.dequantize()
        if low_rank is not None:
            error = error - low_rank.product()
        metric = Moments(moments.inputs[name], moments.outputs.get(name))
        whole = float(((weight.float() @ metric.input) * weight).sum())
        rank = 0 if low_rank is None else low_rank.a.shape[0]
        row: dict[str, Any] = {"bits": scheme.bits, "group": scheme.group, "rank": rank}
        row["output_error"] = round(float(((error @ metric.input) * error).sum()) / max(whole, 1e-30), 6)
        if metric.output is not None:
            row["kl_forecast"] = round(forecast(error, metric), 6)
        rows[name] = row
    return rows
