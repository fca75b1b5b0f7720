"""Run benchmarks on a model: items to ids, ids to log-probabilities, these to verdicts; what is computed is kept.

    <folder>/<model's identity>/<task>-<data>.jsonl    one line per item: log p, tokens and first choices of its choices

Lines are added as items are done and hold no verdicts, so an interrupted run goes on, every rule reads the same lines,
and a model whose items are all there is not even opened. A line that was not completely written is ignored.

An item that does not fit the model's context loses tokens of its context from the left, which is counted; one whose
continuation alone does not fit, or has nothing before it that a model could start from, is left out, which is counted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.profiles import intervals
from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.tasks import Spec, Task
from rlkit.profiles.taskscore import EMPTY, Continuation, Pair, Scored, Scorer, Verdict, check_numbers, judge
from rlkit.recover.progress import Progress, Tell, silent

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
class Subject:
    """A model to evaluate: `open` is called once, if anything has to be computed.

    `identity` must change with whatever changes the figures: weights, precision, the runtime's settings, the context.
    """

    name: str
    identity: str
    open: Callable[[], tuple[Scorer, Tokens]]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A model's results on the items `ids` of a task that has `total`; more is better in `scores`, None is left out.

    Scores are 0 and 1, or bits per byte with their sign turned. `left_out` counts items by reason; `cut` those whose
    context was cut; `bare` those without one, begun after the model's first token; `reused` those that were there
    already. `seconds` were spent on the others.
    """

    spec: Spec
    sha256: str
    total: int
    chance: float | None
    ids: tuple[str, ...]
    scores: tuple[float | None, ...]
    bits_per_byte: tuple[float | None, ...]
    ties: int = 0
    cut: int = 0
    bare: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    reused: int = 0
    seconds: float = 0.0

    @property
    def column(self) -> NDArray[np.float64]:
        """The scores (items, 1) that count."""
        return np.array([[score] for score in self.scores if score is not None]).reshape(-1, 1)

    @property
    def wilson(self) -> intervals.Interval | None:
        """The accuracy with Wilson's interval; None where there is none."""
        counts = self.spec.rule is not Rule.BITS and len(self.column)
        return intervals.wilson(float(self.column.sum()), len(self.column)) if counts else None

    def interval(self, seed: int = 0) -> intervals.Interval:
        """The mean score with its bootstrap interval; with Wilson's where all items came out alike, as none differs."""
        if not len(self.column):
            return intervals.Interval(None, why="every item was left out")
        alike, wilson = len(np.unique(self.column)) == 1, self.wilson
        return wilson if alike and wilson is not None else intervals.mean([self.column], seed)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        table = asdict(self)
        table["wilson"] = None if self.wilson is None else self.wilson.to_json()
        table["spec"] = {**asdict(self.spec), "group": str(self.spec.group), "rule": str(self.spec.rule)}
        return table


def together(results: Sequence[TaskResult]) -> NDArray[np.float64]:
    """Scores (items, models) of one task on the items that count for all of these models.

    Raises ValueError for results of different tasks or data.
    """
    if len({(result.spec.name, result.spec.rule, result.sha256) for result in results}) != 1:
        names = ", ".join(f"{result.spec.name} ({result.sha256[:8]})" for result in results)
        raise ValueError(f"results of {names} are not of the same items; evaluate the same task again")
    tables = [dict(zip(result.ids, result.scores, strict=True)) for result in results]
    rows = [[table.get(item) for table in tables] for item in results[0].ids]
    found = [row for row in rows if all(score is not None for score in row)]
    return np.array(found, np.float64).reshape(-1, len(results))


@dataclass(frozen=True, slots=True)
class Store:
    """Where figures of items are kept."""

    folder: Path

    def path(self, subject: Subject, task: Task) -> Path:
        """The file of a model and a task's data."""
        name = "".join(char if char.isalnum() or char in "-_" else "_" for char in task.name)[:60]
        identity = hashlib.sha256(subject.identity.encode()).hexdigest()[:16]
        return self.folder / identity / f"{name}-{task.sha256[:16]}.jsonl"

    def read(self, subject: Subject, task: Task) -> dict[str, Scored]:
        """What is known, by item."""
        path = self.path(subject, task)
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        return {scored.id: scored for scored in map(_parsed, lines) if scored is not None}

    def add(self, subject: Subject, task: Task, found: Iterable[Scored]) -> None:
        """Add items. What comes in one call is written at once, so that several processes may add to one file."""
        path = self.path(subject, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(asdict(scored), allow_nan=False) + "\n" for scored in found)
        with path.open("a+b") as file:
            torn = file.seek(0, 2) > 0 and (file.seek(-1, 2), file.read(1))[1] != b"\n"
            file.write((b"\n" if torn else b"") + lines.encode())


def _parsed(line: str) -> Scored | None:
    try:
        table = json.loads(line)
        lists = {name: tuple(table[name]) for name in ("logprobs", "tokens", "greedy", "plain")}
        return Scored(id=str(table["id"]), cut=int(table["cut"]), **lists)
    except (ValueError, KeyError, TypeError):
        return None


def evaluate(tasks: Sequence[Task], subject: Subject, store: Store, tell: Tell = silent) -> list[TaskResult]:
    """A model's results on tasks; what is not in the store is computed and added."""
    run = _Run(subject, store, tell)
    return [run.task(task) for task in tasks]


def sized(
    tasks: Sequence[Task], subject: Subject, store: Store, wanted: float, tell: Tell = silent, seed: int = 0
) -> list[tuple[Task, intervals.Sizing]]:
    """Every task with the smallest sample of it that is good for intervals of `wanted` on either side.

    Sized by the model's results on a first sample of it (`intervals.PILOT` items). Bits per byte are no shares: such a
    task stays whole.
    """
    run, found = _Run(subject, store, tell), []
    for task in tasks:
        pilot = run.task(task.sample(intervals.PILOT, seed))
        total, known = len(task.items), len(pilot.column)
        if task.spec.rule is Rule.BITS or not known:
            found.append((task, intervals.Sizing(total, total, wanted, 0.0, 0.0, known)))
            continue
        sizing = intervals.size(pilot.column, total, wanted, seed)
        found.append((task.sample(sizing.limit, seed), sizing))
    return found


class _Run:
    """One model under evaluation; it is opened when the first item has to be computed."""

    def __init__(self, subject: Subject, store: Store, tell: Tell) -> None:
        self._subject, self._store, self._tell = subject, store, tell
        self._opened: tuple[Scorer, Tokens] | None = None

    def task(self, task: Task) -> TaskResult:
        known = self._store.read(self._subject, task)
        plain = task.spec.rule is Rule.UNCONDITIONAL
        missing = [item for item in task.items if not _complete(known.get(item.id), item, plain=plain)]
        begun = time.perf_counter()
        left = self._compute(task, missing, known, plain=plain) if missing else {}
        return _result(task, known, left, (len(task.items) - len(missing), time.perf_counter() - begun))

    def _compute(self, task: Task, missing: list[Item], known: dict[str, Scored], *, plain: bool) -> dict[str, str]:
        """Score items into `known` and the store; what could not be scored, with the reason."""
        if self._opened is None:
            self._opened = self._subject.open()
        scorer, tokens = self._opened
        total, done, count = sum(map(_length, missing)), 0, 0
        left: dict[str, str] = {}
        stage = f"{self._subject.name}: {task.name}"
        for part in portions(missing):
            self._tell(Progress(stage, done, total, f"{count}/{len(missing)} items"))
            asked = {item.id: _asked(item, tokens, plain=plain) for item in part}
            left |= {name: ask for name, ask in asked.items() if isinstance(ask, str)}
            found = _scored(scorer, {name: ask for name, ask in asked.items() if not isinstance(ask, str)})
            self._store.add(self._subject, task, found)
            known |= {scored.id: scored for scored in found}
            done, count = done + sum(map(_length, part)), count + len(part)
        self._tell(Progress(stage, total, total, f"{len(missing)} items"))
        return left


def _length(item: Item) -> int:
    return len(item.context) + sum(map(len, item.choices))


def portions(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Items in portions to score together: the longest first, so that what fails, fails at once."""
    heads = Counter(item.context[:HEAD] for item in items)
    longest: dict[str, int] = {}
    for item in items:
        head = item.context[:HEAD]
        longest[head] = max(longest.get(head, 0), _length(item))

    def place(item: Item) -> tuple[int, str, int]:
        head = item.context[:HEAD]
        return (longest[head], head, _length(item)) if heads[head] >= SHARED else (_length(item), "", 0)

    part: list[Item] = []
    size = 0
    for item in sorted(items, key=place, reverse=True):
        if part and size + _length(item) > CHUNK_CHARACTERS:
            yield part
            part, size = [], 0
        part.append(item)
        size += _length(item)
    if part:
        yield part


def _complete(scored: Scored | None, item: Item, *, plain: bool) -> bool:
    count = len(item.choices)
    return scored is not None and len(scored.logprobs) == count and (not plain or len(scored.plain) == count)


@dataclass(frozen=True, slots=True)
class _Asked:
    pairs: list[Pair]
    plain: list[Pair]
    cut: int


def _asked(item: Item, tokens: Tokens, *, plain: bool) -> _Asked | str:
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
    return _Asked([pair for pair, _ in found], [pair for pair, _ in nothing], max(cut for _, cut in found))


def _scored(scorer: Scorer, asked: dict[str, _Asked]) -> list[Scored]:
    pairs = [pair for ask in asked.values() for pair in (*ask.pairs, *ask.plain)]
    answers: Sequence[Continuation] = scorer.score(pairs) if pairs else []
    if len(answers) != len(pairs):
        raise ValueError(f"the scorer answered {len(answers)} of {len(pairs)} pairs; it must answer each, in order")
    found, at = [], 0
    for name, ask in asked.items():
        mine, plain = answers[at : at + len(ask.pairs)], answers[at + len(ask.pairs) :][: len(ask.plain)]
        at += len(ask.pairs) + len(ask.plain)
        found.append(
            Scored(
                id=name,
                logprobs=tuple(float(answer.logprob) for answer in mine),
                tokens=tuple(int(answer.tokens) for answer in mine),
                greedy=tuple(bool(answer.greedy) for answer in mine),
                plain=tuple(float(answer.logprob) for answer in plain),
                cut=ask.cut,
            )
        )
        check_numbers(found[-1])
    return found


def _result(task: Task, known: dict[str, Scored], left: dict[str, str], effort: tuple[int, float]) -> TaskResult:
    """Verdicts on what is known; `effort` is how many items were there already, and the seconds for the others."""
    verdicts = [
        judge(item, known[item.id], task.spec.rule) if item.id not in left else Verdict(None, why=left[item.id])
        for item in task.items
    ]
    bits = task.spec.rule is Rule.BITS
    scores = [_minus(v.bits_per_byte) if bits else v.correct for v in verdicts]
    return TaskResult(
        spec=task.spec,
        sha256=task.sha256,
        total=task.spec.items,
        chance=task.chance,
        ids=tuple(item.id for item in task.items),
        scores=tuple(scores),
        bits_per_byte=tuple(verdict.bits_per_byte for verdict in verdicts),
        ties=sum(verdict.tied for verdict in verdicts),
        cut=sum(known[item.id].cut > 0 for item in task.items if item.id not in left),
        bare=sum(not context.strip() for item in task.items if item.id not in left for context, _ in item.pairs()[:1]),
        left_out=dict(Counter(verdict.why for verdict in verdicts if verdict.why)),
        reused=effort[0],
        seconds=effort[1],
    )


def _minus(value: float | None) -> float | None:
    return None if value is None else -value
