"""Items to ids that a model can be asked, and in what order: what begins alike together, the longest first."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rlkit.profiles.taskitem import Item
from rlkit.profiles.taskscore import EMPTY, Pair

Encode = Callable[[str], list[int]]
CHUNK_CHARACTERS = 60_000  # scored together, then written; about 15,000 tokens
HEAD, SHARED = 64, 4  # items whose contexts begin with the same characters, if so many do, come one after the other
TOO_LONG, NO_START = "a continuation longer than the context", "no token to begin with (the tokenizer has no BOS)"


@dataclass(frozen=True, slots=True)
class Tokens:
    """A model's tokenizer: `encode` adds what the tokenizer adds by itself, `limit` is the context in tokens.

    `start` is the id before a text with nothing before it: BOS, or what the model takes for it; None if there is none.
    """

    encode: Encode
    limit: int
    start: int | None = None

    def __post_init__(self) -> None:
        if self.limit < 2:
            raise ValueError(f"a context of {self.limit} tokens predicts nothing; give the model's own, 2 or more")

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, encoded together and cut where the context's own ids end; its last blanks go to what follows.

        Where no context is left, `start` takes its place; without that there is none.
        """
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        before = self.encode(bare) if bare else []
        following = self.encode(bare + continuation)[len(before) :] if before else self.encode(continuation)
        if before and continuation and not following:  # it melted into the context's last token
            following = self.encode(continuation)
        if before:
            return before, following
        start = [] if self.start is None else [self.start]
        return start, following[1:] if start and following[:1] == start else following

    def fitted(self, pair: tuple[list[int], list[int]]) -> tuple[Pair, int]:
        """A pair that fits, and how many ids its context lost; the last token predicts nothing, so it needs no room."""
        context, following = pair
        cut = max(0, len(context) + len(following) - 1 - self.limit)
        return (context[cut:], following), cut


@dataclass(frozen=True, slots=True)
class Asked:
    """The pairs of an item, those without its question, and how many ids its context lost."""

    pairs: list[Pair]
    plain: list[Pair]
    cut: int


def asked(item: Item, tokens: Tokens, *, plain: bool) -> Asked | str:
    """What to ask a model for an item; or why it cannot be asked."""
    tokens = replace(tokens, encode=functools.cache(tokens.encode))  # its choices share their context
    if plain and item.unconditional is None:
        return "no context without the question, which the rule needs"
    found = [tokens.fitted(tokens.pair(*both)) for both in item.pairs()]
    nothing = [tokens.fitted(tokens.pair(*both)) for both in item.plain_pairs()] if plain else []
    for (context, following), _cut in (*found, *nothing):
        if not following:
            return EMPTY
        if len(following) > tokens.limit:
            return TOO_LONG
        if not context:
            return NO_START
    return Asked([pair for pair, _ in found], [pair for pair, _ in nothing], max(cut for _, cut in found))


def length(item: Item) -> int:
    """Characters of an item's context and choices."""
    return len(item.context) + sum(map(len, item.choices))


def portions(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Items in portions to score together: the longest first, so that what fails, fails at once."""
    heads = Counter(item.context[:HEAD] for item in items)
    longest: dict[str, int] = {}
    for item in items:
        head = item.context[:HEAD]
        longest[head] = max(longest.get(head, 0), length(item))

    def place(item: Item) -> tuple[int, str, int]:
        head = item.context[:HEAD]
        return (longest[head], head, length(item)) if heads[head] >= SHARED else (length(item), "", 0)

    part: list[Item] = []
    size = 0
    for item in sorted(items, key=place, reverse=True):
        if part and size + length(item) > CHUNK_CHARACTERS:
            yield part
            part, size = [], 0
        part.append(item)
        size += length(item)
    if part:
        yield part
