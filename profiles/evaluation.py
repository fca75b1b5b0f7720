"""Run benchmarks on a model: items to ids, ids to log-probabilities, these to verdicts; what is computed is kept.

    <folder>/<model's identity>/<task>-<data>.jsonl    one line per item: log p, tokens and first choices of its
                                                       choices, or the reply to it

Lines are added as items are done and hold no verdicts, so an interrupted run goes on, every rule reads the same lines,
and a model whose items are all there is not even opened. A line that was not completely written is ignored.

An item that does not fit the model's context loses tokens of its context from the left, which is counted; one whose
continuation alone does not fit, or has nothing before it that a model could start from, is left out, which is counted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.profiles import intervals
from rlkit.profiles.taskask import Asked, asked, length, portions
from rlkit.profiles.taskask import Tokens as Tokens
from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.taskreply import Said, Talker, judge_reply
from rlkit.profiles.tasks import Spec, Task
from rlkit.profiles.taskscore import Continuation, Scored, Scorer, Verdict, check_numbers, judge
from rlkit.recover.progress import Progress, Tell, silent


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to evaluate: `open` is called once, if anything has to be computed; `talk` for tasks that want replies.

    `identity` must change with whatever changes the figures: weights, precision, the runtime's settings, the context;
    `manner` with what changes replies only: the chat template, the tokens that end one.
    """

    name: str
    identity: str
    open: Callable[[], tuple[Scorer, Tokens]]
    talk: Callable[[], Talker] | None = None
    manner: str = ""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A model's results on the items `ids` of a task that has `total`; more is better in `scores`, None is left out.

    Scores are 0 and 1, or bits per byte with their sign turned. `left_out` counts items by reason; `cut` those whose
    context was cut; `bare` those without one, begun after the model's first token; `reused` those that were there
    already. `seconds` were spent on the others. Of replies `unanswered` hold no answer and count as wrong, `unfinished`
    were cut before they ended.
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
    unanswered: int = 0
    unfinished: int = 0

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
        whose = subject.identity + (subject.manner if task.spec.rule.replies else "")
        identity = hashlib.sha256(whose.encode()).hexdigest()[:16]
        return self.folder / identity / f"{name}-{task.sha256[:16]}.jsonl"

    def read(self, subject: Subject, task: Task) -> dict[str, Scored]:
        """What is known of the choices, by item."""
        return {scored.id: scored for scored in map(_parsed, self._lines(subject, task)) if scored is not None}

    def said(self, subject: Subject, task: Task) -> dict[str, Said]:
        """The replies that are known, by item."""
        return {said.id: said for said in map(_said, self._lines(subject, task)) if said is not None}

    def holds(self, subject: Subject, task: Task) -> bool:
        """Whether everything that the task asks of the model is known."""
        if task.spec.rule.replies:
            return {item.id for item in task.items} <= self.said(subject, task).keys()
        known, plain = self.read(subject, task), task.spec.rule is Rule.UNCONDITIONAL
        return all(_complete(known.get(item.id), item, plain=plain) for item in task.items)

    def _lines(self, subject: Subject, task: Task) -> list[str]:
        path = self.path(subject, task)
        return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []

    def add(self, subject: Subject, task: Task, found: Iterable[Scored | Said]) -> None:
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


def _said(line: str) -> Said | None:
    try:
        table = json.loads(line)
        return Said(str(table["id"]), str(table["text"]), int(table["tokens"]), bool(table["ended"]))
    except (ValueError, KeyError, TypeError):
        return None


def evaluate(tasks: Sequence[Task], subject: Subject, store: Store, tell: Tell = silent) -> list[TaskResult]:
    """A model's results on tasks; what is not in the store is computed and added."""
    run = _Run(subject, store, tell)
    return [run.task(task) for task in tasks]


def calibration(task: Task, subjects: Sequence[Subject], store: Store, seed: int = 0) -> Task:
    """The items of a task by whose results its sample is sized: a first sample, or the largest that all models have."""
    first = task.sample(intervals.PILOT, seed)
    for limit in reversed([step for step in intervals.STEPS if step > intervals.PILOT]):
        sample = task.sample(limit, seed)
        if limit <= len(task.items) and all(store.holds(subject, sample) for subject in subjects):
            return sample
    return first


def sized(task: Task, results: Sequence[TaskResult], wanted: float, seed: int = 0) -> tuple[Task, intervals.Sizing]:
    """The smallest sample of a task that is good for intervals of `wanted` on either side, for each of some models.

    Sized by the models' results on the same first items. Bits per byte are no shares: such a task stays whole.
    """
    scores, total = together(results), len(task.items)
    if task.spec.rule is Rule.BITS or not len(scores):
        return task, intervals.Sizing(total, total, wanted, 0.0, 0.0, len(scores))
    sizing = intervals.size(scores, total, wanted, seed)
    return task.sample(sizing.limit, seed), sizing


class _Run:
    """One model under evaluation; it is opened when the first item has to be computed."""

    def __init__(self, subject: Subject, store: Store, tell: Tell) -> None:
        self._subject, self._store, self._tell = subject, store, tell
        self._opened: tuple[Scorer, Tokens] | None = None

    def task(self, task: Task) -> TaskResult:
        """A task's result."""
        return self._replied(task) if task.spec.rule.replies else self._scored(task)

    def _scored(self, task: Task) -> TaskResult:
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
        total, done, count = sum(map(length, missing)), 0, 0
        left: dict[str, str] = {}
        stage = f"{self._subject.name}: {task.name}"
        for part in portions(missing):
            self._tell(Progress(stage, done, total, f"{count}/{len(missing)} items"))
            asks = {item.id: asked(item, tokens, plain=plain) for item in part}
            left |= {name: ask for name, ask in asks.items() if isinstance(ask, str)}
            found = _figures(scorer, {name: ask for name, ask in asks.items() if not isinstance(ask, str)})
            self._store.add(self._subject, task, found)
            known |= {scored.id: scored for scored in found}
            done, count = done + sum(map(length, part)), count + len(part)
        self._tell(Progress(stage, total, total, f"{len(missing)} items"))
        return left

    def _replied(self, task: Task) -> TaskResult:
        known = self._store.said(self._subject, task)
        missing = {item.id: item.context for item in task.items if item.id not in known}
        begun = time.perf_counter()
        left = self._talk(task, missing, known) if missing else {}
        return _answered(task, known, left, (len(task.items) - len(missing), time.perf_counter() - begun))

    def _talk(self, task: Task, missing: dict[str, str], known: dict[str, Said]) -> dict[str, str]:
        """Get replies into `known` and the store, each as it comes; what could not be asked, with the reason."""
        if self._subject.talk is None:
            return dict.fromkeys(missing, "a model that cannot be talked to")
        stage, left, total = f"{self._subject.name}: {task.name}", dict[str, str](), len(missing)
        self._tell(Progress(stage, 0, total, f"0/{total} replies"))
        for done, said in enumerate(self._subject.talk().replies(missing, task.spec.most), start=1):
            if said.why:
                left[said.id] = said.why
            else:
                self._store.add(self._subject, task, [said])
                known[said.id] = said
            self._tell(Progress(stage, done, total, f"{done}/{total} replies"))
        if silent_on := missing.keys() - known.keys() - left.keys():
            raise ValueError(
                f"the model replied to all but {len(silent_on)} of {total} messages; it must reply to each"
            )
        return left


def _complete(scored: Scored | None, item: Item, *, plain: bool) -> bool:
    count = len(item.choices)
    return scored is not None and len(scored.logprobs) == count and (not plain or len(scored.plain) == count)


def _figures(scorer: Scorer, asks: dict[str, Asked]) -> list[Scored]:
    pairs = [pair for ask in asks.values() for pair in (*ask.pairs, *ask.plain)]
    answers: Sequence[Continuation] = scorer.score(pairs) if pairs else []
    if len(answers) != len(pairs):
        raise ValueError(f"the scorer answered {len(answers)} of {len(pairs)} pairs; it must answer each, in order")
    found, at = [], 0
    for name, ask in asks.items():
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


def _answered(task: Task, known: dict[str, Said], left: dict[str, str], effort: tuple[int, float]) -> TaskResult:
    """Verdicts on replies, as `_result` gives them on choices."""
    rule, asked_of = task.spec.rule, [item for item in task.items if item.id not in left]
    judged = {item.id: judge_reply(item, known[item.id], rule) for item in asked_of}
    verdicts = [judged[item.id][0] if item.id in judged else Verdict(None, why=left[item.id]) for item in task.items]
    return TaskResult(
        spec=task.spec,
        sha256=task.sha256,
        total=task.spec.items,
        chance=task.chance,
        ids=tuple(item.id for item in task.items),
        scores=tuple(verdict.correct for verdict in verdicts),
        bits_per_byte=(None,) * len(verdicts),
        left_out=dict(Counter(verdict.why for verdict in verdicts if verdict.why)),
        reused=effort[0],
        seconds=effort[1],
        unanswered=sum(not found for _verdict, found in judged.values()),
        unfinished=sum(not known[item.id].ended for item in asked_of),
    )


def _minus(value: float | None) -> float | None:
    return None if value is None else -value
