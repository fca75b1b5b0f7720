"""Workers of a scorer pool that need no model; processes find them by the name of this module."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from rlkit.recover.likelihood import Continuation, Pair


class Clerk:
    """A model that finds a continuation as likely as it is long, and repeats what it is told."""

    def __init__(self, number: int) -> None:
        self.number = number

    def who(self) -> int:
        """The process."""
        return self.number

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        """By length."""
        return [Continuation(-float(len(rest)), len(context), True) for context, rest in pairs]

    def replies(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """The beginning of the prompt."""
        yield from ((at, list(ids)[:count]) for at, (ids, count) in enumerate(zip(prompts, most, strict=True)))


def lost(_number: int) -> Clerk:
    """A process that is killed."""
    os._exit(3)


def refused(number: int) -> Clerk:
    """A model that cannot be opened."""
    raise ValueError(f"no room for number {number}; use another")
