"""Several models' results as one report: accuracies with intervals, differences, recovery, divergence; as tables.

    recovery = (recovered - quantized) / (full - quantized)

of the mean score over the same items, with a bootstrap interval over these items (`intervals.py`). It is the usual
definition of a recovery percentage; papers that print one do not all say theirs. A group's figure is that of the mean
over its tasks, each counting alike; tasks in bits per byte stand for themselves, as bits are no shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.profiles import intervals
from rlkit.profiles.divergence import Divergence
from rlkit.profiles.evaluation import TaskResult, together
from rlkit.profiles.intervals import Interval
from rlkit.profiles.table import Table
from rlkit.profiles.taskitem import Rule
from rlkit.profiles.tasks import Group

GROUPS = {
    Group.REGULAR: "in distribution",
    Group.OOD: "out of distribution",
    Group.MORE: "further tasks",
}
FORMULA = "recovery = (recovered - quantized) / (full - quantized)"


@dataclass(frozen=True, slots=True)
class ModelResult:
    """A model's results; `facts` say what it is, `divergence` how far from the reference it is, `why` if unknown."""

    name: str
    facts: dict[str, str]
    tasks: tuple[TaskResult, ...]
    divergence: Divergence | None = None
    why: str = ""

    def task(self, name: str) -> TaskResult:
        """Its result on a task."""
        return next(result for result in self.tasks if result.spec.name == name)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of models on the same tasks and items; `full` and `quantized` are names of models among them, if any.

    `sizes` says of each task in words why so many items, `text` what the divergence was measured on, `about` how.
    """

    models: tuple[ModelResult, ...]
    full: str | None = None
    quantized: str | None = None
    sizes: dict[str, str] = field(default_factory=dict)
    text: str = ""
    about: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"models {', '.join(names) or 'none'}: give at least one, and each a name of its own")
        for asked in (self.full, self.quantized):
            if asked is not None and asked not in names:
                raise ValueError(f"no model {asked!r} among {', '.join(names)}; name one of them")
        first = [result.spec.name for result in self.models[0].tasks]
        if any([result.spec.name for result in model.tasks] != first for model in self.models):
            raise ValueError("the models were not given the same tasks; evaluate all on the same ones")

    @property
    def recovered(self) -> tuple[str, ...]:
        """The models of which recovery can be said: all but full and quantized, where both are there."""
        if self.full is None or self.quantized is None:
            return ()
        return tuple(model.name for model in self.models if model.name not in (self.full, self.quantized))

    def model(self, name: str) -> ModelResult:
        """A model by name."""
        return next(model for model in self.models if model.name == name)

    def lines(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(title, names of the tasks it is the mean of): every task by itself, after a group its mean."""
        results = self.models[0].tasks
        for group, title in GROUPS.items():
            mine = [result for result in results if result.spec.group is group]
            for result in mine:
                yield result.spec.title, (result.spec.name,)
            shares = tuple(result.spec.name for result in mine if result.spec.rule is not Rule.BITS)
            if len(shares) > 1 and group is not Group.MORE:
                yield f"mean, {title}", shares

    def strata(self, tasks: Sequence[str], models: Sequence[str]) -> list[NDArray[np.float64]]:
        """Scores (items, models) per task, on the items that count for all of these models."""
        return [together([self.model(name).task(task) for name in models]) for task in tasks]

    def mean(self, tasks: Sequence[str], model: str) -> Interval:
        """A model's mean score."""
        if len(tasks) == 1:
            return self.model(model).task(tasks[0]).interval(self.seed)
        return self._of(intervals.mean, tasks, (model,))

    def difference(self, tasks: Sequence[str], model: str) -> Interval:
        """A model's mean score less the full one's."""
        return self._of(intervals.difference, tasks, (model, self.full or ""))

    def recovery(self, tasks: Sequence[str], model: str) -> Interval:
        """The share of the loss that a model got back."""
        return self._of(intervals.recovery, tasks, (self.full or "", self.quantized or "", model))

    def _of(self, figure: Any, tasks: Sequence[str], models: Sequence[str]) -> Interval:
        strata = self.strata(tasks, models)
        if any(not len(scores) for scores in strata):
            return Interval(None, why="no item counts for all of these models")
        found: Interval = figure(strata, self.seed)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the figures, and every item's results behind them."""
        return {
            "schema_version": 1,
            "models": [_model_json(model) for model in self.models],
            "full": self.full,
            "quantized": self.quantized,
            "formula": FORMULA,
            "lines": [self._line_json(title, tasks) for title, tasks in self.lines()],
            "sizes": self.sizes,
            "text": self.text,
            "about": list(self.about),
            "seed": self.seed,
        }

    def _line_json(self, title: str, tasks: tuple[str, ...]) -> dict[str, Any]:
        line: dict[str, Any] = {"title": title, "tasks": list(tasks)}
        line["score"] = {model.name: self.mean(tasks, model.name).to_json() for model in self.models}
        if self.full is not None:
            others = [model.name for model in self.models if model.name != self.full]
            line["difference"] = {name: self.difference(tasks, name).to_json() for name in others}
        line["recovery"] = {name: self.recovery(tasks, name).to_json() for name in self.recovered}
        return line


def _model_json(model: ModelResult) -> dict[str, Any]:
    table: dict[str, Any] = {"name": model.name, "facts": model.facts, "tasks": [t.to_json() for t in model.tasks]}
    table["divergence"] = None if model.divergence is None else model.divergence.to_json()
    return table | ({"why": model.why} if model.why else {})


def tables(found: Evaluation) -> tuple[Table, ...]:
    """Everything as tables; empty ones are left out."""
    made = (scores(found), differences(found), recoveries(found), divergences(found), items(found))
    return tuple(table for table in made if table.rows)


def scores(found: Evaluation) -> Table:
    """Every model's mean score by task."""
    columns = ("task", "items", "chance", *(model.name for model in found.models))
    rows = []
    for title, tasks in found.lines():
        first = found.models[0].task(tasks[0])
        alone = len(tasks) == 1
        chance = f"{100 * first.chance:.0f}" if alone and first.chance is not None else ""
        cells = (spread(found.mean(tasks, model.name), first.spec.rule) for model in found.models)
        rows.append((title, str(len(first.ids)) if alone else "", chance, *cells))
    note = "Accuracy in percent ± half of its 95 % bootstrap interval over items; LAMBADA: the last word, said first."
    if any(result.spec.rule is Rule.BITS for result in found.models[0].tasks):
        note += " Bits per byte: less is better, and they are in no mean."
    return Table("Accuracy", columns, tuple(rows), note)


def differences(found: Evaluation) -> Table:
    """Every model's distance from the full one by task."""
    others = [model.name for model in found.models if found.full is not None and model.name != found.full]
    rows = [
        (title, *(spread(found.difference(tasks, name), _rule(found, tasks), sign=True) for name in others))
        for title, tasks in (found.lines() if others else ())
    ]
    note = f"Points more (+) or fewer (-) than {found.full} on the same items, with the interval of that difference."
    if any(result.spec.rule is Rule.BITS for result in found.models[0].tasks):
        note += " Bits per byte: + is worse."
    return Table("Against the reference", ("task", *others), tuple(rows), note)


def recoveries(found: Evaluation) -> Table:
    """What came back of what quantization lost, by task."""
    rows = []
    for title, tasks in found.lines() if found.recovered else ():
        lost = found.difference(tasks, found.quantized or "")
        rows.append(
            (
                title,
                spread(lost, _rule(found, tasks), sign=True),
                *(share(found.recovery(tasks, name)) for name in found.recovered),
            )
        )
    note = f"{FORMULA}, over the same items, with its 95 % bootstrap interval; full is {found.full}, "
    note += f"quantized {found.quantized}. No interval: the loss itself is not clear of 0."
    return Table("Recovery", ("task", "lost", *found.recovered), tuple(rows), note)


def divergences(found: Evaluation) -> Table:
    """How far from the reference token by token."""
    rows = []
    for model in found.models:
        d = model.divergence
        if d is not None:
            kl = f"{d.kl_mean:.4f} ± {d.kl_stderr:.4f}"
            agree, other = f"{100 * d.top1_agreement:.1f} %", f"{d.perplexity_other:.2f}"
            rows.append((model.name, kl, agree, other, f"{d.perplexity_original:.2f}"))
        elif model.why:
            rows.append((model.name, model.why, "", "", ""))
    columns = ("model", "KL, nats/token", "same top token", "perplexity", "reference's perplexity")
    return Table("Token by token", columns, tuple(rows), f"Against {found.full}, on {found.text}.")


def items(found: Evaluation) -> Table:
    """What was not as planned with some items, by model and task."""
    rows = []
    for model in found.models:
        for result in model.tasks:
            said = [f"{count} left out: {why}" for why, count in result.left_out.items()]
            said += [f"{result.cut} cut from the left to fit the context"] if result.cut else []
            said += [f"{result.bare} without context, begun after BOS or, without one, EOS"] if result.bare else []
            said += [f"{result.ties} ties, the first choice taken"] if result.ties else []
            said += [f"{result.unanswered} replies without an answer, counted as wrong"] if result.unanswered else []
            cut = f"{result.unfinished} replies not ended within {result.spec.most} tokens or the context"
            said += [cut] if result.unfinished else []
            if said:
                rows.append((model.name, result.spec.title, "; ".join(said)))
    note = "Items left out count neither as right nor as wrong."
    return Table("Items", ("model", "task", "what happened"), tuple(rows), note)


def _rule(found: Evaluation, tasks: Sequence[str]) -> Rule:
    return found.models[0].task(tasks[0]).spec.rule


def spread(interval: Interval, rule: Rule, *, sign: bool = False) -> str:
    """An interval as value ± half its width: in percent, or in bits per byte, where more is worse."""
    if interval.value is None:
        return ""
    bits = rule is Rule.BITS
    value = -interval.value if bits else 100 * interval.value
    digits, plus = (3 if bits else 1), ("+" if sign else "")
    half = interval.half_width
    tail = "" if half is None else f" ± {half if bits else 100 * half:.{digits}f}"
    return f"{value:{plus}.{digits}f}{tail}{' bits/byte' if bits else ''}"


def share(interval: Interval) -> str:
    """A recovery in percent with the ends of its interval; a reason in place of what is undefined."""
    if interval.value is None:
        return interval.why.removeprefix("undefined: ").removesuffix(" on these items")
    if interval.low is None or interval.high is None:
        return f"{100 * interval.value:.0f} % (no interval)"
    return f"{100 * interval.value:.0f} % ({100 * interval.low:.0f} to {100 * interval.high:.0f})"


def findings(found: Evaluation) -> tuple[str, ...]:
    """What stands out, in sentences."""
    return (*_recovered(found), *_unanswered(found.models), *_sizes(found.sizes))


def _recovered(found: Evaluation) -> Iterator[str]:
    single = [tasks for _title, tasks in found.lines() if len(tasks) == 1]
    for name in found.recovered:
        shares = [found.recovery(tasks, name).value for tasks in single]
        known = [value for value in shares if value is not None]
        enough = sum(value >= 0.8 for value in known)
        said = f"{name} gets back 80 % or more of what quantization lost on {enough} of {len(single)} tasks"
        missing = len(single) - len(known)
        yield said + (f"; on {missing} nothing was lost that could come back" if missing else "")


def _unanswered(models: Sequence[ModelResult]) -> Iterator[str]:
    """Tasks on which a score says more of the form of replies than of what a model knows."""
    for model in models:
        for result in model.tasks:
            if result.spec.rule.replies and 2 * result.unanswered > len(result.column):
                said = f"{result.unanswered} of {len(result.column)} replies hold no answer, so the score says little"
                yield f"{model.name}, {result.spec.title}: {said}"


def _sizes(sizes: Mapping[str, str]) -> Iterator[str]:
    for task, said in sizes.items():
        yield f"{task}: {said}"
