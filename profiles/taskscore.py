"""From a model's log-probabilities to what it answered: the rules of `Rule`, item by item, and what cannot be scored.

    bits per byte = -log2 p(continuation | context) / UTF-8 bytes of the continuation without the blank it begins with

Log-probabilities are natural. Of equal choices the first is taken, and the tie is counted. An item is left out, and
counted with its reason, where nobody says what is right, and where a choice is empty: its log p of 0 would always win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rlkit.profiles.taskitem import Item, Rule

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context, one at least, and of what follows, one at least."""

NO_GOLD, EMPTY = "nobody says what is right", "an empty continuation"


class Continuation(Protocol):
    """What a model says of a continuation: its log p, how many tokens it has, whether each is the first choice."""

    @property
    def logprob(self) -> float:
        """The natural logarithm of its probability after the context."""

    @property
    def tokens(self) -> int:
        """How many tokens it has."""

    @property
    def greedy(self) -> bool:
        """Whether every token is the model's first choice."""


class Scorer(Protocol):
    """A model as the evaluation sees it."""

    def score(self, pairs: Sequence[Pair]) -> Sequence[Continuation]:
        """One answer for every pair, in order; pairs of the same context come one after the other."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A model's figures for the choices of one item; `cut` says how many context tokens did not fit its context.

    `plain` are the log-probabilities behind the context that asks nothing, where they were asked for.
    """

    id: str
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    greedy: tuple[bool, ...]
    plain: tuple[float, ...] = ()
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """An item under a rule: `correct` is 0 or 1, None without right or wrong; `why` is set if it was left out."""

    correct: float | None
    chosen: int | None = None
    tied: bool = False
    bits_per_byte: float | None = None
    why: str = ""


def nbytes(continuation: str) -> int:
    """UTF-8 bytes of a continuation without the blank it begins with."""
    return len(continuation.removeprefix(" ").encode())


def judge(item: Item, scored: Scored, rule: Rule) -> Verdict:
    """What a model's figures for an item mean under a rule. Raises ValueError if they are no figures of this item."""
    _check(item, scored, rule)
    if any(not nbytes(choice) for choice in item.choices) or not all(scored.tokens):
        return Verdict(None, why=EMPTY)
    if item.gold is None:
        return Verdict(None, why=NO_GOLD)
    bits = -scored.logprobs[item.gold] / math.log(2) / nbytes(item.choices[item.gold])
    if not rule.chooses:
        return Verdict(None if rule is Rule.BITS else float(scored.greedy[item.gold]), item.gold, bits_per_byte=bits)
    values = measures(item, scored, rule)
    chosen = int(values.argmax())
    tied = int((values == values[chosen]).sum()) > 1
    return Verdict(float(chosen == item.gold), chosen, tied, bits)


def measures(item: Item, scored: Scored, rule: Rule) -> NDArray[np.float64]:
    """What a rule compares, one number per choice; more is better."""
    logprobs = np.array(scored.logprobs, np.float64)
    if rule is Rule.PER_BYTE:
        logprobs /= np.array([nbytes(choice) for choice in item.choices])
    elif rule is Rule.PER_TOKEN:
        logprobs /= np.array(scored.tokens)
    elif rule is Rule.UNCONDITIONAL:
        logprobs -= np.array(scored.plain)
    return logprobs


def _check(item: Item, scored: Scored, rule: Rule) -> None:
    count = len(item.choices)
    if not len(scored.logprobs) == len(scored.tokens) == len(scored.greedy) == count:
        raise ValueError(f"item {item.id} has {count} choices and {len(scored.logprobs)} figures; score it again")
    if rule is Rule.UNCONDITIONAL and len(scored.plain) != count:
        raise ValueError(
            f"item {item.id} was not scored without its question; rule {rule} needs that, choose another or score it"
        )
    check_numbers(scored)


def check_numbers(scored: Scored) -> None:
    """Raise ValueError for figures that are NaN or infinite."""
    if not all(math.isfinite(value) for value in (*scored.logprobs, *scored.plain)):
        raise ValueError(f"the model gives no number for item {scored.id} (NaN or infinite); check the model")
