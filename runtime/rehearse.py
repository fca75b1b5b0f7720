"""How long steps take alone, beside other units' steps, and after another model's: loops on the crew of a real run.

An act is one kind of step on one unit, over and over: a frame; a chunk of a prompt that is read anew each time; the
next token of a reply at little depth. Times count from handing a step over until it was done, as in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from rlkit.runtime.realsteps import Reply, Streaming, prompt_ids
from rlkit.runtime.workplan import Crew

__all__ = ["Act", "Beside", "Kept", "Rehearsed", "chunks", "rehearse", "tokens"]

LEAST = 3  # steps of every loop
SHORT = 16  # tokens of the prompt before tokens at little depth
REPLY = 112  # tokens of a reply before another one begins: all within the first 128 of the context
FAR = 1 << 60


@dataclass(frozen=True, slots=True)
class Act:
    """A kind of step on a unit; `kind` is the same for units that are alike."""

    kind: str
    unit: int
    step: Callable[[], None]


class Beside(NamedTuple):
    """Two kinds of steps on two units at once: how many times as long each takes."""

    one: str
    other: str
    one_slower: float
    other_slower: float


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one act: ns alone, over and over, and after a step of another model (None where there is none)."""

    alone: float
    after: float | None


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What was found, by (kind, unit), and for pairs of kinds."""

    acts: dict[tuple[str, int], Kept]
    pairs: tuple[Beside, ...]


def rehearse(crew: Crew, acts: Sequence[Act], seconds: float, rounds: int = 3) -> Rehearsed:
    """Loop every act alone, every unit's acts in turn, and every two of different units beside each other.

    Each loop takes about `seconds`; medians over `rounds` that interleave, ratios within a round.
    """
    units = sorted({act.unit for act in acts})
    mine = {unit: [act for act in acts if act.unit == unit] for unit in units}
    alone: dict[tuple[str, int], list[float]] = {}
    after: dict[tuple[str, int], list[float]] = {}
    slower: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        now = {(act.kind, act.unit): loop(crew, [[act]], seconds)[act.kind, act.unit] for act in acts}
        for key, ns in now.items():
            alone.setdefault(key, []).append(ns)
        for unit in units:
            if len(mine[unit]) > 1:
                for key, ns in loop(crew, [mine[unit]], seconds).items():
                    after.setdefault(key, []).append(ns - now[key])
        for one, other in _pairs(acts):
            both = loop(crew, [[one], [other]], seconds)
            found = tuple(both[act.kind, act.unit] / now[act.kind, act.unit] for act in (one, other))
            slower.setdefault((one.kind, other.kind), []).append((found[0], found[1]))
    return Rehearsed(
        {key: Kept(median(each), None if key not in after else median(after[key])) for key, each in alone.items()},
        tuple(
            Beside(*kinds, median(one for one, _ in each), median(other for _, other in each))
            for kinds, each in slower.items()
        ),
    )


def _pairs(acts: Sequence[Act]) -> list[tuple[Act, Act]]:
    """Two kinds on two units, once for units that are alike."""
    found: dict[frozenset[str], tuple[Act, Act]] = {}
    for one in acts:
        for other in acts:
            if one.unit < other.unit:
                found.setdefault(frozenset((one.kind, other.kind)), (one, other))
    return list(found.values())


def loop(crew: Crew, lists: Sequence[Sequence[Act]], seconds: float) -> dict[tuple[str, int], float]:
    """Run every list's acts in turn on its unit, all lists at once; median ns by kind and unit.

    Until `seconds` have passed and every act has run LEAST times; what ends later ran beside less, and does not count.
    Raises what a step raised.
    """
    turns = {acts[0].unit: acts for acts in lists}
    taken: dict[tuple[str, int], list[int]] = {(act.kind, act.unit): [] for acts in lists for act in acts}
    began, place = dict.fromkeys(turns, 0), dict.fromkeys(turns, 0)
    until = crew.now() + round(1e9 * seconds)

    def start(unit: int) -> None:
        began[unit] = crew.now()
        crew.start(unit, turns[unit][place[unit]].step)

    for unit in turns:
        start(unit)
    while any(len(each) < LEAST for each in taken.values()) or crew.now() < until:
        for finish in crew.wait(FAR):
            if finish.error is not None:
                crew.rest()
                raise finish.error
            act = turns[finish.unit][place[finish.unit]]
            taken[act.kind, act.unit].append(finish.at - began[finish.unit])
            place[finish.unit] = (place[finish.unit] + 1) % len(turns[finish.unit])
            start(finish.unit)
    crew.rest()
    return {key: float(median(each)) for key, each in taken.items()}


def chunks(session: Streaming, size: int) -> Callable[[], None]:
    """A chunk of a prompt, with nothing before it."""
    ids = prompt_ids(session.vocab_size, size + 1, 0)

    def step() -> None:
        reply = Reply(ids, 1)
        reply.read(session, size)
        reply.close()

    return step


def tokens(session: Streaming, count: int = REPLY) -> Callable[[], None]:
    """The next token of a reply of `count`, then of another one; the prompt counts with the first."""
    ids = prompt_ids(session.vocab_size, SHORT, 0)
    replies: list[Reply] = []

    def step() -> None:
        if not replies or replies[-1].over:
            replies[:] = [Reply(ids, count)]
            replies[0].read(session, SHORT)
            return
        replies[-1].say(session)

    return step
