"""Automatic recipes, the arithmetic: which bits, group and rank each part of a model gets under a budget of bytes.

A unit is what has to be decided together: q, k and v of a layer, else one matrix. Each of its choices has stored bytes
and a forecast of the damage it does (KL to the original, nats per token). Damages are taken to add up, so the least
damage within a budget is a multiple-choice knapsack, solved by dynamic programming over bytes: exactly where a grid of
CELLS cells can tell all sums apart, else with sizes rounded up to the grid and what is then left over spent greedily.

Measuring is `sensitivity.py`'s business; no torch here.
"""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkit.recover.packing import snap_block
from rlkit.recover.recipe import Recipe, Rule, Scheme

CELLS = 1 << 16  # of the byte grid: a few hundred units then lose well under a percent of the budget to rounding
AS_IT_IS = Scheme(16, 32)  # how a rule says that a module stays as it is


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a unit: its scheme, stored bytes, forecast damage in nats per token."""

    scheme: Scheme
    nbytes: int
    damage: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damage) and self.damage >= 0):
            what = f"a damage of {self.damage} is no divergence"
            raise ValueError(f"{what}; look for NaN or infinite weights in the model")


@dataclass(frozen=True, slots=True)
class Unit:
    """Modules that get one scheme: their input size, their weights together, and the choices, smallest first."""

    modules: tuple[str, ...]
    k: int
    weights: int
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError(f"{self.label}: no scheme suits it; offer one whose group divides its input size")
        object.__setattr__(self, "choices", tuple(sorted(self.choices, key=lambda choice: choice.nbytes)))

    @property
    def label(self) -> str:
        """One name for all its modules."""
        return self.modules[0] if len(self.modules) == 1 else _folded(self.modules[0])

    @property
    def kind(self) -> str:
        """The name without its layer: units of one kind play the same part in their layers."""
        return self.label.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a recipe may store: bits per weight of the quantized matrices, or bytes of everything.

    `bits_per_weight` counts codes, scales, zero points and adapters, as `stored_nbytes` does, over the matrices'
    weights; a tied embedding counts once. `max_bytes` bounds `nbytes(recipe)`, which the caller gives: bytes of all
    tensors of what will be made, such as the planned bundle. It may add anything to `stored_nbytes` that does not
    depend on the schemes.
    """

    bits_per_weight: float | None = None
    max_bytes: int | None = None
    nbytes: Callable[[Recipe], int] | None = None

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.max_bytes is None):
            raise ValueError("a budget is either bits per weight or bytes; give one of --budget and --max-bytes")
        amount = self.bits_per_weight if self.max_bytes is None else self.max_bytes
        if amount is None or not (math.isfinite(amount) and amount > 0):
            raise ValueError(f"a budget of {amount} leaves nothing to store; use bits per weight such as 3.5")
        if self.max_bytes is not None and self.nbytes is None:
            raise ValueError("max_bytes needs nbytes, the function that counts the bytes of a recipe")

    @property
    def name(self) -> str:
        """Short text for recipe names: "3.5", or "60.2mb"."""
        return f"{self.bits_per_weight:g}" if self.max_bytes is None else f"{self.max_bytes / 1e6:g}mb"

    def allowance(self, units: Sequence[Unit]) -> int:
        """How many bytes the units together may take.

        Raises ValueError, with the smallest budget that can be met, if even their smallest choices take more.
        """
        smallest = stored([unit.choices[0] for unit in units])
        if self.max_bytes is None:
            assert self.bits_per_weight is not None
            allowed = math.floor(self.bits_per_weight * weights(units) / 8)
        else:
            allowed = self.max_bytes - self._fixed(units)
        if allowed < smallest:
            raise ValueError(self._too_small(units, smallest))
        return allowed

    def excess(self, units: Sequence[Unit], choices: Sequence[Choice]) -> int:
        """By how many bytes the choices are over the budget; zero or less if they fit."""
        if self.max_bytes is None or self.nbytes is None:
            return stored(choices) - self.allowance(units)
        return self.nbytes(to_recipe("counted", schemes(units, choices))) - self.max_bytes

    def _fixed(self, units: Sequence[Unit]) -> int:
        """Bytes that no choice changes: norms, float tables."""
        assert self.nbytes is not None
        smallest = [unit.choices[0] for unit in units]
        return self.nbytes(to_recipe("smallest", schemes(units, smallest))) - stored(smallest)

    def _too_small(self, units: Sequence[Unit], smallest: int) -> str:
        if self.max_bytes is None:
            least = math.ceil(8000 * smallest / weights(units)) / 1000  # rounded up: asking for it must work
            return f"{self.bits_per_weight:g} bits per weight cannot be met; the smallest reachable is {least:g}"
        least = smallest + self._fixed(units)
        bits = 8 * smallest / weights(units)
        return f"{self.max_bytes} bytes cannot be met; the smallest reachable is {least}, at {bits:.3f} bits per weight"


def stored_nbytes(scheme: Scheme, n: int, k: int) -> int:
    """Stored bytes of an (n, k) matrix and its adapter: the factors in 8-bit blocks with float32 scales.

    A factor whose rows do not split into blocks of 32 makes both stay float32.
    """
    return scheme.nbytes(n, k) + (_adapter_nbytes(scheme.adapter_rank, n, k) if scheme.adapter_rank else 0)


def _adapter_nbytes(rank: int, n: int, k: int) -> int:
    blocks = snap_block(k), snap_block(rank)
    if blocks[0] is None or blocks[1] is None:
        return 4 * rank * (n + k)
    return rank * (n + k) + 4 * (rank * k // blocks[0] + n * rank // blocks[1])


def stored(choices: Iterable[Choice]) -> int:
    """Bytes of all choices together."""
    return sum(choice.nbytes for choice in choices)


def weights(units: Iterable[Unit]) -> int:
    """Weights of all units together."""
    return sum(unit.weights for unit in units)


def schemes(units: Sequence[Unit], choices: Sequence[Choice]) -> dict[str, Scheme]:
    """The chosen scheme of every module."""
    return {name: choice.scheme for unit, choice in zip(units, choices, strict=True) for name in unit.modules}


def allocate(units: Sequence[Unit], nbytes: int) -> tuple[Choice, ...]:
    """The choice for each unit that together take at most `nbytes` and do the least damage.

    Raises ValueError if the smallest choices take more than `nbytes`.
    """
    smallest = stored(unit.choices[0] for unit in units)
    if smallest > nbytes:
        raise ValueError(f"{nbytes} bytes cannot be met; the smallest choices take {smallest}")
    extras = [np.array([choice.nbytes for choice in unit.choices]) - unit.choices[0].nbytes for unit in units]
    spare = min(nbytes - smallest, int(sum(extra[-1] for extra in extras)))
    step = int(np.gcd.reduce(np.concatenate(extras))) or 1
    cell = step * max(1, -(-(spare // step) // CELLS))
    return _spend(units, _solve(units, [-(-extra // cell) for extra in extras], spare // cell), nbytes)


def _solve(units: Sequence[Unit], sizes: list[Any], cells: int) -> list[Choice]:
    """Dynamic programming: least[c] is the least damage of the units so far within c cells."""
    least = np.zeros(cells + 1)
    picks = np.zeros((len(units), cells + 1), np.uint8)
    for row, unit, size in zip(picks, units, sizes, strict=True):
        best = least + unit.choices[0].damage
        for index, choice in enumerate(unit.choices[1:], start=1):
            start = int(size[index])
            if start > cells:
                continue
            damage = least[: cells + 1 - start] + choice.damage
            better = damage < best[start:]  # a tie keeps the smaller choice
            best[start:][better], row[start:][better] = damage[better], index
        least = best
    chosen, left = [], cells
    for row, unit, size in zip(picks[::-1], reversed(units), reversed(sizes), strict=True):
        index = int(row[left])
        chosen.append(unit.choices[index])
        left -= int(size[index])
    return chosen[::-1]


def _spend(units: Sequence[Unit], chosen: list[Choice], nbytes: int) -> tuple[Choice, ...]:
    """Spend the bytes that rounding left over: the exchange that helps most, until none fits."""
    left = nbytes - stored(chosen)
    while True:
        gains = [
            (old.damage - new.damage, index, new)
            for index, (unit, old) in enumerate(zip(units, chosen, strict=True))
            for new in unit.choices
            if new.damage < old.damage and new.nbytes - old.nbytes <= left
        ]
        if not gains:
            return tuple(chosen)
        _, index, new = max(gains, key=lambda gain: gain[:2])
        left -= new.nbytes - chosen[index].nbytes
        chosen[index] = new


def solve(units: Sequence[Unit], budget: Budget) -> tuple[Choice, ...]:
    """`allocate` within a budget; ValueError, with the smallest that can be met, if there is no such recipe."""
    allowed = budget.allowance(units)
    while True:
        choices = allocate(units, allowed)
        over = budget.excess(units, choices)
        if over <= 0:
            return choices
        allowed = min(allowed, stored(choices)) - over  # the caller counts more than `stored_nbytes` does


def table(units: Sequence[Unit], choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """One JSON row per unit: what it got and what that is forecast to cost."""
    return [
        {
            "unit": unit.label,
            "bits": choice.scheme.bits,
            "group": choice.scheme.group,
            "adapter_rank": choice.scheme.adapter_rank,
            "nbytes": choice.nbytes,
            "bits_per_weight": round(8 * choice.nbytes / unit.weights, 4),
            "forecast_kl": choice.damage,
        }
        for unit, choice in zip(units, choices, strict=True)
    ]


def to_recipe(name: str, chosen: Mapping[str, Scheme | None], description: str = "") -> Recipe:
    """A recipe that gives every module of `chosen` its scheme (None: it stays as it is), in few readable rules.

    What most layers have becomes a rule for all layers, at the end; layers that differ come first, one rule per scheme.
    """
    parts: dict[str, dict[int | None, Scheme]] = {}
    for module, scheme in chosen.items():
        pattern, layer = _split_layer(module)
        parts.setdefault(pattern, {})[layer] = scheme or AS_IT_IS
    common: dict[Scheme, list[str]] = {}
    special: dict[Scheme, list[str]] = {}
    for pattern, by_layer in _merged(parts).items():
        usual = Counter(by_layer.values()).most_common(1)[0][0]
        common.setdefault(usual, []).append(pattern.replace("{}", "*"))
        for scheme in dict.fromkeys(by_layer.values()):
            layers = [layer for layer, found in by_layer.items() if found == scheme and layer is not None]
            if scheme != usual:
                special.setdefault(scheme, []).extend(pattern.replace("{}", text) for text in _numbers(layers))
    rules = [Rule(tuple(patterns), scheme) for group in (special, common) for scheme, patterns in group.items()]
    recipe = Recipe(name, tuple(rules), description)
    if all(recipe.scheme_for(module) == scheme for module, scheme in chosen.items()):
        return recipe
    plain: dict[Scheme, list[str]] = {}  # names that patterns of others cover too: spell every one out
    for module, scheme in chosen.items():
        plain.setdefault(scheme or AS_IT_IS, []).append(glob.escape(module))
    return Recipe(name, tuple(Rule(tuple(names), scheme) for scheme, names in plain.items()), description)


def _split_layer(module: str) -> tuple[str, int | None]:
    """("model.layers.{}.mlp.up_proj", 3) of "model.layers.3.mlp.up_proj"."""
    found = re.search(r"(?<=\.)\d+(?=\.)", module)
    if found is None or str(int(found[0])) != found[0]:
        return module, None
    return module[: found.start()] + "{}" + module[found.end() :], int(found[0])


def _folded(name: str) -> str:
    return re.sub(r"\.[qkv]_proj$", ".[qkv]_proj", name)


def _merged(parts: dict[str, dict[int | None, Scheme]]) -> dict[str, dict[int | None, Scheme]]:
    """q, k and v under one pattern where all their layers agree."""
    merged: dict[str, dict[int | None, Scheme]] = {}
    for pattern, by_layer in parts.items():
        folded = _folded(pattern)
        same = [parts.get(other) == by_layer for other in (re.sub(r"\[qkv\]", letter, folded) for letter in "qkv")]
        merged.setdefault(folded if all(same) else pattern, by_layer)
    return merged


def _numbers(layers: Iterable[int]) -> list[str]:
    """Shell patterns that match these numbers and no others: 3, [4-7], 1[025]."""
    tens: dict[str, list[int]] = {}
    for layer in sorted(layers):
        tens.setdefault(str(layer // 10) if layer > 9 else "", []).append(layer % 10)
    return [head + _digits(digits) for head, digits in tens.items()]


def _digits(digits: list[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    run = len(digits) > 2 and digits[-1] - digits[0] == len(digits) - 1
    return f"[{digits[0]}-{digits[-1]}]" if run else f"[{''.join(map(str, digits))}]"
