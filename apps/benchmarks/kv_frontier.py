"""`rlkit kv` held to its bars on a real model: what its search finds, what is saved, what smoothing does.

    python -m rlkit.apps.benchmarks.kv_frontier -o ./bench-kv-frontier

search      successive halving against the whole grid over CACHES in two group sizes at 512 tokens: which of the grid's
            frontier points it measured to the end (`near`: or one of at most 1 % more bytes that is at most an item
            worse), how far its frontier is from the grid's, and its items' share of the grid's. The share is also told
            with screens (bytes and KL of every point), which both need
reduction   total memory saved, and accuracy lost, by 4-bit weights with quantized caches in chunks of 256, against the
            model with everything in 16 bit (weights too, whatever its file stores) and the prompt read at once. The bar
            holds a point that saves enough at every context and whose loss over all items of --tasks is small enough
smoothing   KL and needles under int4 and int2, keys alone and with values, with and without the mean of keys taken out

Sizes: --items of each task at 1,024 tokens and below, in proportion fewer at longer contexts, at least 4. What was
measured is kept in the cache folder, where `rlkit kv` finds it too, so a second run is done at once. Unless told, each
suite has what two quiet cores do in six to eight minutes; making 4-bit weights takes longer, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from rlkit.apps import console, kvspread, kvweights
from rlkit.apps.kvanalytic import contexts_of
from rlkit.apps.kvpoints import Bench, Setup
from rlkit.apps.kvspread import Where
from rlkit.profiles.frontier import pareto, search
from rlkit.profiles.frontier.result import accuracy_of, complete, nbytes_of
from rlkit.profiles.frontier.search import UNIT, Evaluated, Found
from rlkit.profiles.frontier.space import FLOAT, Point, Space
from rlkit.profiles.frontier.store import Store
from rlkit.recover import assets, cache, source
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import Tell
from rlkit.recover.source import Source

SHARE_BAR = 0.4  # of the grid's evaluations
NEAR = 0.01  # of a point's bytes
SAVED_BAR, LOSS_BAR = 0.68, 0.03  # of total memory, of accuracy
PAIRS = ("k8v8", "k8v4", "k8v2", "k4v4", "k4v2", "k2v2")
CACHES = (*PAIRS, *(f"{kv}:smooth" for kv in PAIRS), "kivi4", "kivi2")
SEARCHED, BASE = 512, 1024  # tokens of context
CUTS = ("k8v4:smooth", "k4v4:smooth:g32")
CONTEXTS = "1024,6k"
ITEMS = 12
TASKS = ("needle", "long-qa")
SMOOTHED = ("k4v16", "k4v4", "k2v16", "k2v2")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The model, 4-bit weights of it, and how much is measured where."""

    model: Source
    weights: str
    contexts: tuple[int, ...]
    items: int
    threads: int | None
    where: Where
    tasks: tuple[str, ...] = TASKS

    def items_at(self, context: int) -> int:
        """Of each task."""
        return max(UNIT, round(self.items * min(1.0, BASE / context) / UNIT) * UNIT)


def searched(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """What successive halving finds of the grid's frontier, and what it takes."""
    space = Space(kv=CACHES, groups=(32, 64), contexts=(SEARCHED,), items=wanted.items)
    by_halving, by_grid = _found(wanted, space, tell, whole=(False, True))
    mine, best = (pareto.frontier(complete(one.points), nbytes_of, accuracy_of) for one in (by_halving, by_grid))
    known = complete(by_halving.points)
    rows = [
        {
            "point": one.point.name,
            "nbytes": one.nbytes,
            "accuracy": one.accuracy,
            "found": any(other.point == one.point for other in known),
            "near": any(_near(other, one) for other in known),
        }
        for one in best
    ]
    screens = len(by_grid.points) * _screen(by_grid)
    share = (by_halving.evaluations - screens) / (by_grid.evaluations - screens)
    facts: dict[str, Any] = {
        "context": SEARCHED,
        "points": len(by_grid.points),
        "items": len(by_grid.points[0].scores),
        "item_evaluations_share": share,
        "share_with_screens": by_halving.evaluations / by_grid.evaluations,
        "distance": pareto.distance(mine, best, nbytes_of, accuracy_of),
    }
    return {**facts, "rows": rows, "bar": SHARE_BAR, "met": share <= SHARE_BAR and all(row["found"] for row in rows)}


def _near(other: Evaluated, one: Evaluated) -> bool:
    """Whether it takes the place of a point: as small but for NEAR, at most an item worse."""
    item = 1 / len(one.scores)
    return other.nbytes <= (1 + NEAR) * one.nbytes and other.accuracy >= one.accuracy - item - 1e-9


def _screen(grid: Found) -> float:
    """What a screen counts in items, from what the grid took."""
    scored = sum(len(one.scores) for one in grid.points)
    return (grid.evaluations - scored) / len(grid.points)


def reduction(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """What 4-bit weights and caches save at each context, and what they lose over all."""
    found: dict[str, list[Evaluated]] = {}
    references: list[Evaluated] = []
    tasks: list[str] = []
    for context in wanted.contexts:
        space = Space(
            weights=(FLOAT, wanted.weights),
            kv=CUTS,
            contexts=(context,),
            tasks=wanted.tasks,
            items=wanted.items_at(context),
        )
        points = [space.reference(context), *(one for one in space.points() if one.weights != FLOAT)]
        (grid,) = _found(wanted, space, tell, whole=(True,), points=points, tasks=tasks)
        references.append(_in_16_bit(grid.points[0], wanted.model))
        for one in grid.points[1:]:
            found.setdefault(one.point.name, []).append(one)
    rows = [_lost(name, some, references, tasks) for name, some in found.items()]
    met = any(row["saved_least"] >= SAVED_BAR and row["loss"] <= LOSS_BAR for row in rows)
    facts: dict[str, Any] = {"contexts": list(wanted.contexts), "items": len(tasks), "saved_bar": SAVED_BAR}
    return {**facts, "rows": rows, "bar": LOSS_BAR, "met": met}


def _in_16_bit(reference: Evaluated, model: Source) -> Evaluated:
    """The same with two bytes for each parameter."""
    whole = kvweights.HALF * source.read_shape(model).parameters
    return replace(reference, memory=replace(reference.memory, weights_nbytes=whole))


def _lost(
    name: str, some: Sequence[Evaluated], references: Sequence[Evaluated], tasks: Sequence[str]
) -> dict[str, Any]:
    """A point's row: saved at each context, accuracy of each task, and the loss with its standard error."""
    ours, theirs = (np.array([score for one in ones for score in one.scores]) for ones in (some, references))
    of = np.array(tasks)
    error = float(np.std(ours - theirs, ddof=1) / np.sqrt(len(of)) / max(theirs.mean(), 1e-9))
    row: dict[str, Any] = {"point": name}
    for one, reference in zip(some, references, strict=True):
        row[f"saved_{one.point.context}"] = 1 - one.nbytes / reference.nbytes
    row["saved_least"] = min(value for key, value in row.items() if key.startswith("saved_"))
    for task in dict.fromkeys(tasks):
        row[task], row[f"{task}_reference"] = float(ours[of == task].mean()), float(theirs[of == task].mean())
    row["loss"] = float(1 - ours.mean() / max(theirs.mean(), 1e-9))
    return row | {"loss_error": error, "kl": some[0].kl}


def smoothing(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """What taking the mean out of keys does to KL and to needles."""
    kv = [name for base in SMOOTHED for name in (base, f"{base}:smooth")]
    space = Space(kv=tuple(kv), contexts=(BASE,), tasks=("needle",), items=wanted.items)
    (found,) = _found(wanted, space, tell, whole=(True,))
    by_kv = {one.point.kv: one for one in found.points if one.point.chunk is not None}
    rows: list[dict[str, Any]] = []
    for base in SMOOTHED:
        plain, smooth = by_kv[base], by_kv[f"{base}:smooth"]
        kl = {"kl": plain.kl, "kl_smooth": smooth.kl, "times": (plain.kl or 0.0) / max(smooth.kl or 0.0, 1e-9)}
        rows.append({"kv": base, **kl, "needle": plain.accuracy, "needle_smooth": smooth.accuracy})
    facts: dict[str, Any] = {"context": BASE, "items": len(found.points[0].scores)}
    facts |= {"needle_reference": found.points[0].accuracy, "rows": rows, "bar": 1.0}
    return {**facts, "met": all(row["times"] > 1.0 for row in rows)}


def _found(
    wanted: Wanted,
    space: Space,
    tell: Tell,
    *,
    whole: Sequence[bool],
    points: Sequence[Point] | None = None,
    tasks: list[str] | None = None,
) -> Iterator[Found]:
    """The points of a space by successive halving, or each on all items where it is to be whole.

    Adds the task of every item to `tasks`.
    """
    named = [kvweights.make(wanted.model, one, tell) for one in kvweights.find(wanted.model, space.weights, tell)]
    setup = Setup(
        weights={one.name: one.model.reference for one in named},
        nbytes={one.name: one.nbytes for one in named},
        tasks=space.tasks,
        items=space.items,
        threads=wanted.threads,
    )
    bench = Bench(setup, tell)
    if tasks is not None:
        tasks += [item.task for context in space.contexts for item in bench.items(context)]
    store = Store(cache.cache_folder() / "kv" / "points", bench.identify)
    with kvspread.measuring(bench, store, wanted.where) as run:
        for each in whole:
            how = search.grid if each else search.halving
            yield how(points or space.points(), bench.totals(space.contexts), run, tell)


SUITES: dict[str, Callable[[Wanted, Tell], dict[str, Any]]] = {
    "search": searched,
    "reduction": reduction,
    "smoothing": smoothing,
}


def main(  # noqa: PLR0913, one parameter per option of the command
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")] = Path("bench-kv-frontier"),
    suites: Annotated[str, typer.Option(help="With commas between.")] = ",".join(SUITES),
    model: Annotated[str, typer.Option(help="A float model, as for `rlkit kv`.")] = "smollm2-135m",
    weights: Annotated[str, typer.Option(help="Of the suite reduction, as for `rlkit kv`.")] = "w4",
    contexts: Annotated[str, typer.Option(help="Of the suite reduction.")] = CONTEXTS,
    tasks: Annotated[str, typer.Option(help="Of the suite reduction, as for `rlkit kv`.")] = ",".join(TASKS),
    items: Annotated[int, typer.Option(min=UNIT, help="Of each task at 1,024 tokens and below.")] = ITEMS,
    workers: Annotated[int, typer.Option(min=1, help="Processes that measure, with a model each.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Hold the frontier of a model to the bars; the exit code is 1 if one is missed."""
    names = suites.split(",")
    if unknown := [name for name in names if name not in SUITES]:
        raise typer.BadParameter(f"no suite {unknown[0]!r}; use {', '.join(SUITES)}")
    found: dict[str, Any] = {"schema_version": 1, "model": model, "weights": weights}
    with console.progress(quiet=json) as tell:
        resolved = source.resolve(model, download=model in assets.registry(), tell=tell)
        wanted = Wanted(
            resolved, weights, contexts_of(contexts), items, threads, Where(workers), tuple(tasks.split(","))
        )
        for name in names:
            found[name] = SUITES[name](wanted, tell)
            write_json(out / "kv_frontier.json", found)
    if json:
        console.emit_json(found)
    else:
        show(found, names)
    if not all(found[name]["met"] for name in names):
        raise typer.Exit(1)


def show(found: dict[str, Any], names: Sequence[str]) -> None:
    """Every suite as a table with its facts, and whether its bar is met."""
    for name in names:
        told = found[name]
        rows = [tuple(map(_cell, row.values())) for row in told["rows"]]
        console.table(tuple(told["rows"][0]), rows, title=f"{found['model']}: {name}")
        facts = [f"{key} {_cell(value)}" for key, value in told.items() if key not in ("rows", "bar", "met")]
        console.emit("; ".join(facts))
        console.emit(f"bar {told['bar']:g}: {'met' if told['met'] else 'NOT MET'}")


def _cell(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
