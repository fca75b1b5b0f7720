"""Rows of token ids as a tree of what they have in common, so that a model reads every shared beginning once.

Rows are sorted; those that begin alike lie side by side, and a stretch of them becomes a node where reading its common
part once saves enough to be worth a pass of its own. A row that is the beginning of another, or the same, is no row of
its own: what is asked of it is asked of the other.

    asks:  (row of ids, positions whose next token is judged, the tokens)
    tree:  few-shot prompt -> question -> the choices' tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LEAST_SHARED = 4  # tokens; a shorter beginning is not worth a pass
LEVELS = 32  # of nodes below each other; what more there is to share is read again
PASS_TOKENS = 3  # what a pass costs beside its tokens, in tokens: reading the weights

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Judge `tokens` as what follows ids `row[first]`, `row[first + 1]`, ...; `place` says whose they are.

    `row` ends where the last token's predecessor is, so that len(row) == first + len(tokens).
    """

    row: Ids
    first: int
    tokens: Ids
    place: int

    def __post_init__(self) -> None:
        if not self.tokens or self.first < 0 or len(self.row) != self.first + len(self.tokens):
            why = f"{len(self.tokens)} tokens from position {self.first} do not fit a row of {len(self.row)}"
            raise ValueError(f"{why}; a row ends before the last token that is judged")


@dataclass(frozen=True, slots=True)
class Read:
    """One token to judge by the logits at `position` of a node's ids: token number `number` of ask `ask`."""

    position: int
    token: int
    ask: int
    number: int


@dataclass(slots=True, eq=False)
class Node:
    """Ids that follow those of the nodes above, what is judged at them, and what goes on from here."""

    ids: Ids
    reads: list[Read] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)


def tree(asks: Sequence[Ask], chosen: Sequence[int] | None = None) -> list[Node]:
    """The nodes with nothing before them; together with what is below they read the row of every ask, or of some."""
    order = sorted(range(len(asks)) if chosen is None else chosen, key=lambda index: asks[index].row)
    rows: list[_Row] = []
    for index in order:
        row = asks[index].row
        if rows and row[: len(rows[-1].ids)] == rows[-1].ids:  # the one before is its beginning
            rows[-1] = _Row(row, [*rows[-1].asks, index])
        else:
            rows.append(_Row(row, [index]))
    return list(_nodes(rows, 0, asks, LEVELS))


@dataclass(frozen=True, slots=True)
class _Row:
    ids: Ids
    asks: list[int]


def _nodes(rows: Sequence[_Row], depth: int, asks: Sequence[Ask], levels: int) -> Iterator[Node]:
    """Nodes for sorted rows whose first `depth` ids are read by the nodes above; no row ends there."""
    waiting = [rows] if rows else []  # stretches of rows, from last to first
    while waiting:
        some = waiting.pop()
        shared = len(some[0].ids) if len(some) == 1 else common(some[0].ids, some[-1].ids)
        if len(some) == 1 or (levels and _worth(shared - depth, len(some), depth)):
            node = Node(some[0].ids[depth:shared])
            node.reads += _reads(some, depth, shared, asks)
            if len(some) > 1:
                node.children += _nodes(some, shared, asks, levels - 1)
            yield node
        else:
            waiting += reversed(_stretches(some, shared))


def _worth(shared: int, rows: int, depth: int) -> bool:
    """Whether reading a beginning once saves more than it costs.

    Rows with nothing before them are read together in few passes; each gets a pass of its own once something is.
    """
    passes = 1 if depth else rows + 1
    return shared >= LEAST_SHARED and shared * (rows - 1) > PASS_TOKENS * passes


def _stretches(rows: Sequence[_Row], at: int) -> list[Sequence[_Row]]:
    """Sorted rows cut where the id at `at` changes; no row ends before it."""
    cuts = [0, *(n for n in range(1, len(rows)) if rows[n].ids[at] != rows[n - 1].ids[at]), len(rows)]
    return [rows[start:end] for start, end in pairwise(cuts)]


def _reads(rows: Sequence[_Row], start: int, end: int, asks: Sequence[Ask]) -> Iterator[Read]:
    """What is asked at positions start .. end - 1, the same in all these rows."""
    for row in rows:
        for index in row.asks:
            ask = asks[index]
            for position in range(max(ask.first, start), min(len(ask.row), end)):
                number = position - ask.first
                yield Read(position - start, ask.tokens[number], index, number)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows have in common from their beginning."""
    for at, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return at
    return min(len(one), len(other))
