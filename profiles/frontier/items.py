"""What a point is asked at a context: needles and questions made to its length, and items of benchmarks.

Items come in groups of UNIT that share a text, so that it is read once, the tasks in turn, so that any first so many
items hold all of them alike. A score is 0 or 1; of GSM8K, whose problems small models do not solve, the probability of
a worked solution per byte, 2^-(bits per byte).
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlkit.profiles import longqa, needle
from rlkit.profiles.frontier.search import UNIT
from rlkit.profiles.needle import Asking, Encode
from rlkit.profiles.taskask import Tokens, asked
from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.tasks import Task
from rlkit.profiles.taskscore import Continuation, Pair, Scored, Scorer, judge, nbytes
from rlkit.recover.prefixes import common

ANSWER = 8  # tokens left for an answer behind a prompt

Judge = Callable[[Sequence[Continuation]], float]


@dataclass(frozen=True, slots=True)
class Asked:
    """An item: the pairs of ids to score, and the score that their figures mean."""

    task: str
    id: str
    pairs: tuple[Pair, ...]
    judge: Judge


@dataclass(frozen=True, slots=True)
class Reading:
    """How a model reads: text to ids with what its tokenizer adds by itself, without it, and the id to begin with."""

    encode_special: Encode
    encode: Encode
    start: int | None = None

    @property
    def first(self) -> tuple[int, ...]:
        """The ids before a text that the tokenizer begins with something."""
        return tuple(self.encode_special(""))


def of_context(
    tasks: Sequence[str], context: int, count: int, reading: Reading, loaded: Mapping[str, Task], seed: int = 0
) -> list[Asked]:
    """`count` items of each task, up to whole groups, at a context; `loaded` has the benchmarks.

    Raises ValueError for a context that a made text does not fit in.
    """
    groups = -(-count // UNIT)
    columns = [list(itertools.islice(_groups(task, context, reading, loaded, seed), groups)) for task in tasks]
    rows = itertools.zip_longest(*columns, fillvalue=())
    return [item for row in rows for group in row for item in group]


def _groups(
    task: str, context: int, reading: Reading, loaded: Mapping[str, Task], seed: int
) -> Iterator[tuple[Asked, ...]]:
    if task in loaded:
        yield from _batched(_benchmark(loaded[task], context, reading, seed))
        return
    make = _needles if task == "needle" else _questions
    for number in itertools.count():
        case = make(context - ANSWER, reading, 1000 * seed + number)
        yield tuple(_made(task, number, case))


def _batched(items: Iterable[Asked]) -> Iterator[tuple[Asked, ...]]:
    left = iter(items)
    while group := tuple(itertools.islice(left, UNIT)):
        yield group


def _needles(length: int, reading: Reading, seed: int) -> Asking:
    """UNIT needles, each somewhere in its part of the text."""
    rng = random.Random(f"depths {seed}")
    depths = tuple((part + rng.random()) / UNIT for part in range(UNIT))
    return needle.make(needle.Wanted(length, depths, seed=seed), reading.encode, reading.first)


def _questions(length: int, reading: Reading, seed: int) -> Asking:
    return longqa.make(longqa.Wanted(length, UNIT, seed, UNIT // 2), reading.encode, reading.first)


def _made(task: str, number: int, case: Asking) -> Iterator[Asked]:
    for place, question in enumerate(case.questions):
        prompt = case.prompt(question)
        pairs = tuple((prompt, ids) for ids in case.options(question))
        yield Asked(task, f"{number}/{place}", pairs, _first_is_likeliest)


def _first_is_likeliest(said: Sequence[Continuation]) -> float:
    return float(said[0].logprob > max(one.logprob for one in said[1:]))


def _benchmark(task: Task, context: int, reading: Reading, seed: int) -> Iterator[Asked]:
    """Items that can be judged, in an order drawn by the seed; what is too long loses its beginning."""
    tokens = Tokens(reading.encode_special, context, reading.start)
    order = list(task.items)
    random.Random(f"{task.name} {seed}").shuffle(order)
    for item in order:
        found = asked(item, tokens, plain=False)
        if not isinstance(found, str) and item.gold is not None and all(map(nbytes, item.choices)):
            yield Asked(task.name, item.id, tuple(found.pairs), _judge(item, task.spec.rule))


def _judge(item: Item, rule: Rule) -> Judge:
    def score(said: Sequence[Continuation]) -> float:
        scored = Scored(
            item.id,
            tuple(one.logprob for one in said),
            tuple(one.tokens for one in said),
            tuple(one.greedy for one in said),
        )
        verdict = judge(item, scored, rule)
        if rule is Rule.BITS:
            return float(2.0 ** -(verdict.bits_per_byte or 0.0))
        return verdict.correct or 0.0

    return score


def scores(items: Sequence[Asked], scorer: Scorer) -> tuple[float, ...]:
    """The score of each item by a model."""
    said = scorer.score([pair for item in items for pair in item.pairs])
    found, at = [], 0
    for item in items:
        found.append(item.judge(said[at : at + len(item.pairs)]))
        at += len(item.pairs)
    return tuple(found)


def digest(items: Sequence[Asked]) -> str:
    """The same for the same tasks and ids, in order."""
    made = hashlib.sha256()
    for item in items:
        made.update(f"{item.task}\0{item.id}\0".encode())
        for both in item.pairs:
            for ids in both:
                made.update(np.array([len(ids), *ids], np.int64).tobytes())
    return made.hexdigest()


def tokens_read(items: Sequence[Asked]) -> int:
    """How many tokens these items make a model read that remembers what the last one had in common with the next."""
    total = 0
    last: Sequence[int] = ()
    for item in items:
        prompt = item.pairs[0][0]
        total += (
            len(prompt) - common(tuple(last), tuple(prompt)) + sum(len(following) for _context, following in item.pairs)
        )
        last = prompt
    return total
