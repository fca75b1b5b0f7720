"""An item of a benchmark, and the rules by which one is scored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Rule(StrEnum):
    """How an item is scored; log p is that of a whole continuation after its context.

    raw            the choice of the largest log p
    per-byte       of the largest log p / UTF-8 bytes of the choice without the blank it begins with
    per-token      of the largest log p / tokens of the choice
    unconditional  of the largest log p less its log p behind a context that asks nothing
    greedy         the one continuation is right if every token of it is the model's first choice
    bits-per-byte  no right or wrong: -log2 p / UTF-8 bytes of the one continuation, less is better
    number         the context is a message, and the number that the reply to it answers is the right one
    letter         the same with the letter that it answers (taskreply.py)
    """

    RAW = "raw"
    PER_BYTE = "per-byte"
    PER_TOKEN = "per-token"
    UNCONDITIONAL = "unconditional"
    GREEDY = "greedy"
    BITS = "bits-per-byte"
    NUMBER = "number"
    LETTER = "letter"

    @property
    def chooses(self) -> bool:
        """Whether it picks the likeliest of several choices."""
        return self in (Rule.RAW, Rule.PER_BYTE, Rule.PER_TOKEN, Rule.UNCONDITIONAL)

    @property
    def replies(self) -> bool:
        """Whether it looks for the answer in a reply."""
        return self in (Rule.NUMBER, Rule.LETTER)


@dataclass(frozen=True, slots=True)
class Item:
    """A context and what may follow it, blanks included; `gold` is the right choice's place, None if nobody says.

    `contexts` is there where every choice has one of its own (WinoGrande). `unconditional` is a context that asks
    nothing. `answer` is the short answer to look for in a reply.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    gold: int | None = None
    unconditional: str | None = None
    contexts: tuple[str, ...] = ()
    answer: str = ""

    def __post_init__(self) -> None:
        if not self.choices or (self.contexts and len(self.contexts) != len(self.choices)):
            counts = f"{len(self.choices)} choices and {len(self.contexts)} contexts"
            raise ValueError(f"item {self.id} has {counts}; give one choice or more, and a context for each or for all")
        if self.gold is not None and not 0 <= self.gold < len(self.choices):
            raise ValueError(f"item {self.id}: choice {self.gold} is not among its {len(self.choices)}; count from 0")

    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of every choice."""
        return list(zip(self.contexts or (self.context,) * len(self.choices), self.choices, strict=True))

    def plain_pairs(self) -> list[tuple[str, str]]:
        """The same choices behind the context that asks nothing; none where there is no such context."""
        return [] if self.unconditional is None else [(self.unconditional, choice) for choice in self.choices]
