"""How likely continuations are after contexts, by any model that can read tokens and remember them.

    logprob = sum over the continuation's tokens of log softmax(logits before the token)[token]

What pairs have in common is read once (prefixes.py): the examples before every question of a task, a question before
its choices, the first words of choices. What the last calls read is kept too, so that pairs may come in small portions.
Only logits at judged positions become probabilities, in float32.

A pair longer than the model's context loses the beginning of its context, and says how much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlkit.recover.prefixes import Ask, Ids, Node, common, tree

KEPT_LEAST = 32  # tokens of a beginning that is worth keeping for the next call
KEPT_COUNT = 4
KEPT_IDS = 4096  # of all that is kept: 600 MB of a model of 4 billion parameters
JUDGED_VALUES = 2**22  # logits that become probabilities at a time, 16 MB

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Continuation:
    """The natural logarithm of a continuation's probability, its tokens, and whether each was the likeliest.

    `cut` is how many ids of the context were left out because the model's context is too short for them.
    """

    logprob: float
    tokens: int
    greedy: bool
    cut: int = 0


class Scorer(Protocol):
    """What judges continuations; `context_length` is the most tokens that a model reads."""

    @property
    def context_length(self) -> int:
        """The most tokens of a pair, but for its last, that are read."""
        ...

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        """One continuation for each pair (context ids, continuation ids), in their order.

        Raises ValueError for a pair without context or continuation, and for a continuation longer than the context.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Ids (T,) to read after what `past` remembers, the positions (n,) among them whose logits are wanted, sorted.

    `keep` says that the memory of past and ids is needed afterwards.
    """

    ids: NDArray[np.int64]
    past: Any
    past_length: int
    positions: NDArray[np.int64]
    keep: bool


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Logits (n, V) float32 at the wanted positions, and what the model remembers, if that was to be kept."""

    logits: NDArray[np.float32]
    past: Any


class Reader(Protocol):
    """A model that reads parts: in passes of its own choice, each by itself as far as values go.

    `max_ids` bounds the parts that it is given at once: ids of all, padding and what they remember included. Rows of
    more than `switch` tokens are read whole, in one pass: some models see all positions of such rows in another way.
    """

    context_length: int
    max_ids: int
    switch: int | None

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[int, Outcome]]:
        """Yield (number of the part, Outcome) in any order."""
        ...

    def cut(self, past: Any, length: int) -> Any:
        """The memory of the first `length` tokens of a memory."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    ids: Ids
    past: Any


class Likelihood:
    """The scorer of a reader."""

    def __init__(self, reader: Reader, *, kept: int = KEPT_COUNT) -> None:
        self._reader, self._most = reader, kept
        self._kept: list[_Kept] = []  # the latest last

    @property
    def context_length(self) -> int:
        """The most tokens of a pair, but for its last, that are read."""
        return self._reader.context_length

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        """One continuation for each pair (context ids, continuation ids), in their order.

        Raises ValueError as `asks_of` does, before anything is read.
        """
        asks = asks_of(pairs, self.context_length)
        found = [_Judged(len(ask.tokens)) for ask in asks]
        longest = self._reader.switch or self.context_length
        shared, by_themselves = (
            [n for n, ask in enumerate(asks) if (len(ask.row) > longest) == long] for long in (0, 1)
        )
        self._walk([self._rooted(node) for node in tree(asks, shared)], found)
        for n in by_themselves:
            self._walk([_Place(node, (), None, 0, 0) for node in tree(asks, [n])], found)
        return [
            judged.continuation(len(pair[0]) + len(pair[1]) - 1 - len(ask.row))
            for pair, ask, judged in zip(pairs, asks, found, strict=True)
        ]

    def _walk(self, places: list[_Place], found: list[_Judged]) -> None:
        """Read nodes and all below them; a few at a time, so that little is remembered at once."""
        for some in _portions(places, self._reader.max_ids):
            below: list[_Place] = []
            for number, outcome in self._reader.read([place.part() for place in some]):
                place = some[number]
                _judge(place.node, place.skipped, outcome.logits, found)
                ids = place.ids + place.node.ids[place.skipped :]
                if place.depth == 0 and place.node.children:
                    self._keep(ids, outcome.past)
                below += (_Place(child, ids, outcome.past, 0, place.depth + 1) for child in place.node.children)
            if below:
                self._walk(below, found)

    def _rooted(self, node: Node) -> _Place:
        """A node with nothing above it; the longest beginning that is still remembered need not be read again."""
        unread = min((read.position for read in node.reads), default=len(node.ids) - 1)  # what has to be read again
        lengths = [min(common(kept.ids, node.ids), unread) for kept in self._kept]
        best = max(lengths, default=0)
        if best < KEPT_LEAST:
            return _Place(node, (), None, 0, 0)
        at = lengths.index(best)
        self._kept.append(self._kept.pop(at))
        return _Place(node, node.ids[:best], self._reader.cut(self._kept[-1].past, best), best, 0)

    def _keep(self, ids: Ids, past: Any) -> None:
        if len(ids) >= KEPT_LEAST:
            self._kept.append(_Kept(ids, past))
        while len(self._kept) > self._most or sum(len(kept.ids) for kept in self._kept) > KEPT_IDS:
            del self._kept[0]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A node, the ids that are remembered before it, and how many of its own are among them."""

    node: Node
    ids: Ids
    past: Any
    skipped: int
    depth: int

    @property
    def length(self) -> int:
        """Ids to read."""
        return len(self.node.ids) - self.skipped

    def part(self) -> Part:
        wanted = sorted({read.position - self.skipped for read in self.node.reads})
        new = np.array(self.node.ids[self.skipped :], np.int64)
        return Part(new, self.past, len(self.ids), np.array(wanted, np.int64), bool(self.node.children))


class _Judged:
    """What is known of one ask's tokens so far."""

    def __init__(self, tokens: int) -> None:
        self.logprobs: NDArray[np.float64] = np.full(tokens, np.nan)
        self.greedy: NDArray[np.bool_] = np.zeros(tokens, np.bool_)

    def continuation(self, cut: int) -> Continuation:
        return Continuation(float(self.logprobs.sum()), len(self.logprobs), bool(self.greedy.all()), cut)


def _judge(node: Node, skipped: int, logits: NDArray[np.float32], found: list[_Judged]) -> None:
    """Note what logits (n, V) at a node's judged positions say."""
    if not node.reads:
        return
    _, rows = np.unique([read.position for read in node.reads], return_inverse=True)
    tokens = np.array([read.token for read in node.reads])
    likeliest = logits.argmax(axis=-1)
    logprobs = logits[rows, tokens] - _norms(logits, likeliest)[rows]
    for read, logprob, same in zip(node.reads, logprobs, likeliest[rows] == tokens, strict=True):
        found[read.ask].logprobs[read.number] = logprob
        found[read.ask].greedy[read.number] = same


def _norms(logits: NDArray[np.float32], likeliest: NDArray[np.intp]) -> NDArray[np.float32]:
    """The logarithm of the sum of exp over each row of logits (n, V), whose largest are at `likeliest`."""
    highest = np.take_along_axis(logits, likeliest[:, None], axis=-1)
    found = np.empty(len(logits), np.float32)
    step = max(1, JUDGED_VALUES // logits.shape[1])
    for start in range(0, len(logits), step):
        shifted = logits[start : start + step] - highest[start : start + step]
        found[start : start + step] = np.log(np.exp(shifted, out=shifted).sum(axis=-1))
    return found + highest[:, 0]


def asks_of(pairs: Sequence[Pair], limit: int) -> list[Ask]:
    """Pairs as rows of at most `limit` ids, cut from the left.

    Raises ValueError for a pair without context or continuation, and for a continuation of more than `limit` tokens.
    """
    asks = []
    for place, (context, continuation) in enumerate(pairs):
        for what, ids in (("context", context), ("continuation", continuation)):
            if not len(ids):
                remedy = "begin with the model's first token" if what == "context" else "leave the pair out"
                raise ValueError(f"pair {place} has no token in its {what}, so nothing can be judged; {remedy}")
        if len(continuation) > limit:
            why = f"pair {place} has {len(continuation)} tokens to judge, more than the context of {limit}"
            raise ValueError(f"{why}; shorten it or judge it in parts")
        row = tuple(int(token) for token in (*context, *continuation[:-1]))[-limit:]
        tokens = tuple(int(token) for token in continuation)
        asks.append(Ask(row, len(row) - len(tokens), tokens, place))
    return asks


def alike(lengths: Sequence[int], pass_ids: int) -> list[list[int]]:
    """Numbers of rows in groups to read in one pass each, padded, so that ids and padding cost least, longest first.

    A pass costs as much as `pass_ids` ids beside those it reads. Rows of one length stay together, so the best cuts of
    the sorted lengths are found by trying all.
    """
    order = sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True)
    starts = [at for at in range(len(order)) if not at or lengths[order[at]] != lengths[order[at - 1]]]
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the rows up to each start: their cost, where the last group begins
    for end in [*starts[1:], len(order)]:
        costs = (
            (best[number][0] + pass_ids + (end - start) * lengths[order[start]], start)
            for number, start in enumerate(starts[: len(best)])
        )
        best.append(min(costs, default=(0.0, 0)))
    groups, end = list[list[int]](), len(order)
    places = {start: number for number, start in enumerate([*starts, len(order)])}
    while end:
        start = best[places[end]][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def _portions(places: Sequence[_Place], most: int) -> Iterator[list[_Place]]:
    """Places by length, in portions of at most `most` ids when padded, and at least one; the longest first."""
    ordered = sorted(places, key=lambda place: place.length + len(place.ids))
    while ordered:
        width = ordered[-1].length + len(ordered[-1].ids)
        count = max(1, most // width)
        yield ordered[-count:]
        ordered = ordered[:-count]
