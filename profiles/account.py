"""What passes of a model cost somewhere, operator by operator: FLOPs, bytes and seconds, added up over many passes.

    roofline   the sum over operators of max(compute, memory) + dispatch
    life       the LIFE paper's (arXiv 2508.00904), over totals: TTFT = max(compute, memory) + dispatch;
               TPOT = memory + dispatch

Of the passes of one phase (chunks of a prompt, tokens one by one) only the past differs, and all that looks at it grows
with it in straight pieces. So the ends of a piece say what is between them: thousands of passes are added from a few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from rlkit.profiles.architecture import Architecture
from rlkit.profiles.operators import (
    Adapters,
    Matrix,
    Operator,
    Step,
    Weights,
    cache_nbytes,
    operators,
    past_operators,
    unique_experts,
    weigh,
)
from rlkit.profiles.places import Place
from rlkit.profiles.rates import STRAIGHT, Rates
from rlkit.recover.recipe import Recipe

KEPT = 64  # accounts and the like: over chunk sizes decoding stays the same, over contexts nothing does
Made = TypeVar("Made")
LOOP = "beside the model"  # the row of what a reply and a token take there


class Amounts(NamedTuple):
    """What operators of one name cost together; `seconds` is their roofline."""

    flops: float
    nbytes: float
    compute: float
    memory: float
    dispatch: float
    seconds: float

    def times(self, count: float, more: Amounts) -> Amounts:
        """So many of them, and `more`; written out, as sweeps do little else."""
        return Amounts(
            more[0] + count * self[0],
            more[1] + count * self[1],
            more[2] + count * self[2],
            more[3] + count * self[3],
            more[4] + count * self[4],
            more[5] + count * self[5],
        )


NOTHING = Amounts(0, 0, 0.0, 0.0, 0.0, 0.0)
Account = Mapping[str, Amounts]
"""Amounts by name of operator, in the order of the model."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What the operators of one name cost, together; `bound` is what takes the larger part of the time."""

    name: str
    flops: int
    nbytes: int
    seconds: float
    bound: str

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.nbytes if self.nbytes else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def account_of(ops: Iterable[Operator], rates: Rates) -> dict[str, Amounts]:
    """What operators cost, those of one name together."""
    found: dict[str, Amounts] = {}
    for op in ops:
        compute, memory, dispatch = spent = rates.spent(op)
        each = Amounts(op.flops, op.nbytes, compute, memory, dispatch, spent.seconds)
        found[op.name] = each.times(op.count, found.get(op.name, NOTHING))
    return found


def total(account: Account) -> Amounts:
    """Everything together."""
    return Amounts(*(sum(column) for column in zip(*account.values(), strict=True))) if account else NOTHING


def roofline_seconds(account: Account) -> float:
    """The per-operator roofline: the sum of each operator's larger bound, and its launches."""
    return total(account).seconds


def life_ttft_seconds(account: Account) -> float:
    """The LIFE paper's time to first token: the larger of the total compute and the total memory time."""
    whole = total(account)
    return max(whole.compute, whole.memory) + whole.dispatch


def life_tpot_seconds(account: Account) -> float:
    """The LIFE paper's time per token: memory time alone."""
    whole = total(account)
    return whole.memory + whole.dispatch


def costs(account: Account) -> tuple[Cost, ...]:
    """The operators as rows; what costs nothing at all is left out."""
    return tuple(
        Cost(name, round(row.flops), round(row.nbytes), row.seconds, _bound(row))
        for name, row in account.items()
        if row.nbytes or row.flops or row.seconds
    )


def _bound(row: Amounts) -> str:
    if row.memory >= row.compute and row.memory >= row.dispatch:
        return "memory"
    return "compute" if row.compute >= row.dispatch else "dispatch"


class Model:
    """A model as it is stored at a place, ready to be counted; what does not depend on the past is counted once."""

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe | None,
        place: Place,
        adapters: Adapters | None = None,
        weights: Weights | None = None,
    ) -> None:
        """`weights`, where they are known, are taken as they are, whatever the recipe would make.

        Raises ValueError naming a matrix whose inputs no group of the recipe fits.
        """
        self.architecture, self.place = architecture, place
        self.recipe = "none" if recipe is None else recipe.name
        self.weights = weights or weigh(architecture, place.stored(recipe), place.storage, adapters)
        self.matrices, self.stored_nbytes = self.weights.matrices, self.weights.stored_nbytes
        self._read_nbytes = self.weights.streamed_nbytes
        self._fits: dict[int, Rates] = {}
        self._made: dict[tuple[object, ...], Any] = {}
        self._fixed: dict[tuple[int, int, int, int], dict[str, Amounts]] = {}
        self.rates = self._rates(self._size(0, 1))

    def account(self, new_tokens: int, pasts: Sequence[int], logits: int = 1, batch: int = 1) -> Account:
        """What passes of `new_tokens` after each of `pasts` cost together; `pasts` are evenly spaced."""
        key = "account", new_tokens, pasts[0], pasts[-1], len(pasts), logits, batch
        return self.once(key, lambda: self._account(new_tokens, pasts, logits, batch))

    def once(self, key: tuple[object, ...], make: Callable[[], Made]) -> Made:
        """What `make` makes under that key, kept for a while: over chunk sizes decoding stays the same."""
        if key not in self._made:
            value = make()  # which may keep things of its own
            if len(self._made) >= KEPT:
                self._made.clear()
            self._made[key] = value
        found: Made = self._made[key]
        return found

    def _account(self, new_tokens: int, pasts: Sequence[int], logits: int, batch: int) -> dict[str, Amounts]:
        def looking_back(past: int) -> dict[str, Amounts]:
            step = Step(new_tokens, past, logits, batch)
            about = self.architecture, self.weights, self.place.storage
            return account_of(past_operators(*about, step, self.place.options), rates)

        size = self._size(pasts[len(pasts) // 2], batch)
        rates = self._rates(size)
        fixed = self._fixed_part(new_tokens, logits, batch, size)
        varying = summed(looking_back, pasts, rates.straight)
        return {name: row.times(len(pasts), varying.get(name, NOTHING)) for name, row in fixed.items()}

    def rates_at(self, past: int, batch: int = 1) -> Rates:
        """The rates of a step after `past` tokens."""
        return self._rates(self._size(past, batch))

    def _size(self, past: int, batch: int) -> int:
        """What a decode step reads of weights and cache, in eighths of powers of two: rates may depend on it."""
        cached = cache_nbytes(self.architecture, self.place.storage.kv, past + 1, batch)
        return round(8 * math.log2(self._read_nbytes + cached))

    def _rates(self, size: int) -> Rates:
        if size not in self._fits:
            model = self.architecture
            self._fits[size] = self.place.rates.fitted(2 ** (size / 8), model.vocab, len(model.layers))
        return self._fits[size]

    def _fixed_part(self, new_tokens: int, logits: int, batch: int, size: int) -> dict[str, Amounts]:
        """What a pass costs beside what looks at the past, which keeps its place with nothing in it."""
        key = new_tokens, logits, batch, size
        if key not in self._fixed:
            step, rates = Step(new_tokens, 0, logits, batch), self._rates(size)
            about = self.architecture, self.weights, self.place.storage
            whole = account_of(operators(*about, step, self.place.options), rates)
            varying = account_of(past_operators(*about, step, self.place.options), rates)
            self._fixed[key] = {name: _minus(row, varying.get(name)) for name, row in whole.items()}
        return self._fixed[key]

    def streamed_nbytes(self, tokens: int = 1) -> int:
        """Bytes of matrices that a pass over `tokens` tokens reads; of experts as many as are expected to differ."""
        skew = self.place.options.skew
        return sum(_streamed(matrix, tokens, skew) for matrix in self.matrices)


def _streamed(matrix: Matrix, tokens: int, skew: float) -> int:
    if tokens == 1 or not matrix.experts:
        return matrix.streamed_nbytes
    layers = matrix.count // matrix.experts
    read = layers * unique_experts(matrix.experts, matrix.active // layers, tokens, skew)
    return round(read * (matrix.nbytes + matrix.adapter_nbytes))


def _minus(row: Amounts, part: Amounts | None) -> Amounts:
    if part is None:
        return row
    # Where all of it looks at the past, the difference of two sums is rounding alone.
    left = row.nbytes > part.nbytes or row.flops > part.flops
    return Amounts(*(a - b for a, b in zip(row, part, strict=True))) if left else NOTHING


def beside(seconds: float) -> dict[str, Amounts]:
    """The row of what is done beside the model; none if it takes no time that is known."""
    return {LOOP: NOTHING._replace(dispatch=seconds, seconds=seconds)} if seconds else {}


def summed(
    value: Callable[[int], dict[str, Amounts]], pasts: Sequence[int], straight: float = STRAIGHT
) -> dict[str, Amounts]:
    """The sum of `value` over evenly spaced arguments, from few of them: straight pieces are found by halving.

    `straight`: how far, as a share, the middle of a piece may be from the line between its ends.
    """
    ends = {0: value(pasts[0]), len(pasts) - 1: value(pasts[-1])}

    def between(low: int, high: int) -> dict[str, Amounts]:
        """The sum over indices low .. high, both included."""
        first, last, inner = ends[low], ends[high], high - low - 1
        if inner <= 0:
            return first if low == high else _mixed(((first, 1.0), (last, 1.0)))
        middle = (low + high) // 2
        ends[middle] = value(pasts[middle])
        share = (middle - low) / (high - low)
        if _close(_mixed(((first, 1.0 - share), (last, share))), ends[middle], straight):
            half = (high - low + 1) / 2
            return _mixed(((first, half), (last, half)))
        return _mixed(((between(low, middle), 1.0), (between(middle, high), 1.0), (ends[middle], -1.0)))

    return between(0, len(pasts) - 1)


def _mixed(parts: Sequence[tuple[dict[str, Amounts], float]]) -> dict[str, Amounts]:
    """The weighted sum of accounts of the same operators."""
    names = parts[0][0]
    return {
        name: Amounts(*(sum(w * row for (_, w), row in zip(parts, rows, strict=True)) for rows in columns))
        for name, columns in (
            (name, list(zip(*(account[name] for account, _ in parts), strict=True))) for name in names
        )
    }


def _close(made: dict[str, Amounts], true: dict[str, Amounts], straight: float) -> bool:
    return all(
        abs(a - b) <= straight * abs(b) for name, row in true.items() for a, b in zip(made[name], row, strict=True)
    )
