"""Automatic recipes, the measuring: how much each part of a model suffers from each scheme, and what follows from it.

1. Every candidate scheme of every matrix is carried out once, with a forecast of its damage (candidates.py).
2. The forecasts are only proportional: for each kind of matrix and width, that kind is quantized in all layers at
   once, and the KL divergence measured on held-out rows says by what factor its forecasts are off.
3. The allocation (allocate.py) and every named recipe that the budget allows are put together from the candidates and
   measured on all held-out rows; the best is the result, so none of those is better.

All of this is before any training. The model is never changed: a matrix is replaced where it is used, while it is used.
In memory are the model, and one layer with its moments and candidates.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover.allocate import Budget, Choice, Unit, schemes, solve, stored, table, to_recipe, weights
from rlkit.recover.atomic import write_json
from rlkit.recover.candidates import Candidates, Search, plan_units, quantize_all
from rlkit.recover.model import linears
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.recipe import Recipe, Scheme
from rlkit.recover.sweep import HEAD, Rows

CALIBRATION_ROWS = 8  # held-out rows that set the factors; the comparison at the end takes all
EMBEDDING = "model.embed_tokens"
Divergence = Callable[[Mapping[str, Scheme]], float]  # schemes by module -> KL of the model that wears them


@dataclass(frozen=True, slots=True)
class Auto:
    """The recipe found, one row per unit for printing, and the figures it was chosen by, as JSON values."""

    recipe: Recipe
    rows: list[dict[str, Any]]
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Work:
    """Rows for the moments, other rows (ids (rows, T)) held out for measuring, and a folder of this model's own.

    An interrupted search continues from what the folder holds, and another budget in it takes seconds.
    """

    rows: Rows
    held_out: NDArray[np.int64]
    scratch: Path

    def __post_init__(self) -> None:
        if self.held_out.ndim != 2 or not self.held_out.size:
            raise ValueError(f"held-out ids are {self.held_out.shape}, so nothing can be measured; hold out some rows")


def auto_recipe(model: Any, work: Work, budget: Budget, search: Search | None = None, *, tell: Tell = silent) -> Auto:
    """The best recipe found within `budget`; no fixed recipe that fits it is better, as measured here.

    Raises ValueError, with the smallest budget that can be met, before any long work.
    """
    search = search or Search()
    units = plan_units(model, search)
    budget.allowance(units)
    kept = quantize_all(model, work.rows, units, search, work.scratch, tell=tell)
    every = few = remembered(model, work.held_out, kept)
    if len(work.held_out) > CALIBRATION_ROWS:
        few = remembered(model, work.held_out[:CALIBRATION_ROWS], kept)
    units, factors = calibrate(units, kept, few, tell=tell)
    found = compare(units, budget, search.fixed, every, tell=tell)
    return _auto(units, budget, found, factors, work)


@torch.no_grad()
def divergence(model: Any, ids: NDArray[np.int64], kept: Candidates) -> Divergence:
    """What measures the mean KL from `model` to itself in other schemes, nats per token over ids (rows, T).

    Of the original only the last hidden states are kept: its logits would be many times larger.
    """
    rows = torch.from_numpy(np.ascontiguousarray(ids))
    original = model.model(input_ids=rows, use_cache=False).last_hidden_state  # (rows, T, hidden)
    weight, bias = model.lm_head.weight, model.lm_head.bias

    @torch.no_grad()
    def measure(chosen: Mapping[str, Scheme]) -> float:
        total = 0.0
        with wearing(model, chosen, kept):
            changed = model.model(input_ids=rows, use_cache=False).last_hidden_state
            for before, after in zip(original, changed, strict=True):
                p = torch.log_softmax(torch.nn.functional.linear(before, weight, bias).float(), dim=-1)  # (T, V)
                q = torch.log_softmax(model.lm_head(after).float(), dim=-1)
                total += float((p.exp() * (p - q)).sum())
        return max(0.0, total / rows.numel())

    return measure


def remembered(model: Any, ids: NDArray[np.int64], kept: Candidates) -> Divergence:
    """`divergence`, its results kept beside the candidates: asked again, even by another process, it says the same."""
    file = kept.folder / f"measured-{_digest(np.ascontiguousarray(ids).tobytes(), ids.shape)}.json"
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    live: list[Divergence] = []

    def measure(chosen: Mapping[str, Scheme]) -> float:
        key = _digest(b"", sorted(chosen.items(), key=lambda item: item[0]))
        if key not in known:
            if not live:  # the original's pass is worth its time only now
                live.append(divergence(model, ids, kept))
            known[key] = live[0](chosen)
            write_json(file, known)
        return known[key]

    return measure


def _digest(content: bytes, more: object) -> str:
    return hashlib.sha256(content + repr(more).encode()).hexdigest()[:16]


@contextlib.contextmanager
def wearing(model: Any, chosen: Mapping[str, Scheme], kept: Candidates) -> Iterator[None]:
    """Within the context the chosen modules compute with their candidates; a tied embedding with lm_head's."""
    modules: dict[str, Any] = {name: module for name, module in linears(model).items() if name in chosen}
    forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        name: partial(_linear, module, partial(kept.weight, name, chosen[name])) for name, module in modules.items()
    }
    if HEAD in modules:
        head = kept.weight(HEAD, chosen[HEAD]).to(model.lm_head.weight.dtype)  # for many calls, and the embedding: kept
        forwards[HEAD] = partial(_linear, modules[HEAD], partial(torch.Tensor.detach, head))
        if model.config.tie_word_embeddings:
            modules[EMBEDDING] = model.get_input_embeddings()
            forwards[EMBEDDING] = partial(torch.nn.functional.embedding, weight=head)
    try:
        for name, module in modules.items():
            vars(module)["forward"] = forwards[name]
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


def _linear(module: Any, load: Callable[[], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, load().to(x.dtype), module.bias)


def calibrate(
    units: Sequence[Unit], kept: Candidates, measure: Divergence, *, tell: Tell = silent
) -> tuple[list[Unit], list[dict[str, Any]]]:
    """The units with damages in nats per token, and a JSON row for each measurement that these rest on.

    Forecasts of a kind of matrix share a factor by class (2 bits; 2 bits with an adapter; more bits): the measured KL
    of each unit's smallest choice of that class in all layers at once, over the sum of their forecasts. A unit alone in
    its kind, as lm_head is, has every choice measured.
    """
    alone = [kind for kind, count in Counter(unit.kind for unit in units).items() if count == 1]
    classes: dict[tuple[str, str], dict[str, Scheme]] = {}  # scheme by module
    for unit in units:
        for name, choice in _smallest(unit, unit.kind in alone).items():
            classes.setdefault((unit.kind, name), {}).update(dict.fromkeys(unit.modules, choice.scheme))
    rows, factors = [], {}
    for index, ((kind, name), chosen) in enumerate(classes.items(), start=1):
        forecast, kl = sum(kept.forecast(*item) for item in chosen.items()), measure(chosen)
        factors[kind, name] = kl / max(forecast, 1e-30)
        rows.append({"kind": kind, "class": name, "forecast": forecast, "kl": kl})
        tell(Progress("calibrate", index, len(classes), f"{kind} {name}: KL {kl:.4f}"))

    def damage(unit: Unit, scheme: Scheme) -> float:
        forecast = sum(kept.forecast(module, scheme) for module in unit.modules)
        return forecast * factors[unit.kind, _class(scheme, unit.kind in alone)]

    return [
        replace(unit, choices=tuple(replace(choice, damage=damage(unit, choice.scheme)) for choice in unit.choices))
        for unit in units
    ], rows


def _smallest(unit: Unit, alone: bool) -> dict[str, Choice]:
    """The smallest choice of each class."""
    return {_class(choice.scheme, alone): choice for choice in reversed(unit.choices)}


def _class(scheme: Scheme, alone: bool) -> str:
    if alone:
        return f"{scheme.bits} bits, group {scheme.group}, rank {scheme.adapter_rank}"
    return ("2 bits" if scheme.bits == 2 else "4 bits and more") + (", adapter" if scheme.adapter_rank else "")


def compare(
    units: Sequence[Unit], budget: Budget, fixed: Sequence[Recipe], measure: Divergence, *, tell: Tell = silent
) -> dict[str, tuple[tuple[Choice, ...], float]]:
    """The allocation and each fixed recipe within the budget: choices and measured KL by name, the best first."""
    rivals = {"allocated": solve(units, budget)}
    for recipe in fixed:
        choices = follow(recipe, units)
        if choices and budget.excess(units, choices) <= 0:
            rivals[recipe.name] = choices
    found = {}
    for index, (name, choices) in enumerate(rivals.items(), start=1):
        found[name] = choices, measure(schemes(units, choices))
        tell(Progress("compare", index, len(rivals), f"{name}: KL {found[name][1]:.4f}"))
    return dict(sorted(found.items(), key=lambda item: item[1][1]))


def follow(recipe: Recipe, units: Sequence[Unit]) -> tuple[Choice, ...] | None:
    """The choices that `recipe` makes; None if it has something for a unit that was not tried."""
    chosen = []
    for unit in units:
        asked = {recipe.scheme_for(module) for module in unit.modules}
        fitted = {scheme.resolve(unit.k) if scheme else None for scheme in asked}
        match = [choice for choice in unit.choices if fitted == {choice.scheme}]
        if not match:
            return None
        chosen.append(match[0])
    return tuple(chosen)


def _auto(
    units: Sequence[Unit],
    budget: Budget,
    found: Mapping[str, tuple[tuple[Choice, ...], float]],
    factors: list[dict[str, Any]],
    work: Work,
) -> Auto:
    best, (choices, kl) = next(iter(found.items()))
    bits = {name: 8 * stored(made) / weights(units) for name, (made, _) in found.items()}
    others = [f"{name} {other:.4f} at {bits[name]:.3f}" for name, (_, other) in found.items() if name != best]
    chosen = "" if best == "allocated" else f", the same as {best}"
    description = (
        f"chosen by measurement{chosen}: {bits[best]:.3f} bits per weight, KL {kl:.4f} nats/token before training on "
        f"{work.held_out.shape[0]} held-out synthetic sequences" + (f"; {', '.join(others)}" if others else "")
    )
    figures = {
        "budget": budget.name,
        "chosen": best,
        "kl": kl,
        "bits_per_weight": bits[best],
        "nbytes": stored(choices),
        "forecast_kl": sum(choice.damage for choice in choices),
        "compared": [
            {
                "name": name,
                "kl": other,
                "forecast_kl": sum(choice.damage for choice in made),
                "bits_per_weight": bits[name],
                "nbytes": stored(made),
            }
            for name, (made, other) in found.items()
        ],
        "calibration": factors,
        "moment_rows": list(work.rows.ids.shape),
        "held_out_rows": list(work.held_out.shape),
    }
    recipe = to_recipe(f"auto-{budget.name}", schemes(units, choices), description)
    return Auto(recipe, table(units, choices), figures)
