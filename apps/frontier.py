"""The command `kv`: memory against accuracy over weights, KV caches and prefill chunks, and what fits a budget.

What is measured is kept by its content in the cache folder, so an interrupted call goes on, and another one over a
different space measures only what is new. Here options become a space; how points are measured is kvpoints.py.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console, heldout, kvanalytic, kvspread, kvweights
from rlkit.apps.kvpoints import Bench, Setup
from rlkit.apps.kvspread import Where
from rlkit.apps.kvweights import Weights
from rlkit.profiles import tasks as benchmarks
from rlkit.profiles.frontier import render, result, search
from rlkit.profiles.frontier import space as spaces
from rlkit.profiles.frontier.identity import identity_of
from rlkit.profiles.frontier.result import Budget, FrontierResult
from rlkit.profiles.frontier.search import Totals
from rlkit.profiles.frontier.space import FLOAT, LONG, Point, Space
from rlkit.profiles.frontier.store import Store
from rlkit.recover import assets, cache, source
from rlkit.recover.atomic import refuse_existing, write_text
from rlkit.recover.source import ModelShape, Source, SourceKind
from rlkit.runtime import kv as runtime_kv

PAGES = (".html", ".htm")
SHOWN = 40  # points that --dry-run lists


def frontier(  # noqa: PLR0913, one parameter per option of the command
    model: Annotated[str, typer.Argument(help="An asset, Hugging Face folder, .gguf, checkpoint or bundle.")],
    contexts: Annotated[
        str | None, typer.Option(help="Tokens of context, with commas between; 1024,4096 unless told.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help=f"What is asked: {', '.join(spaces.TASKS)}; needle,long-qa unless told.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="float, w8, w4, w4:awq, w4w2-gateup:full, a checkpoint or bundle, ...; the first is measured against."
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(help="Caches such as k8v4:smooth, kivi2; the paper's pairs with smoothing unless told."),
    ] = None,
    groups: Annotated[str | None, typer.Option(help="Group sizes of caches that do not say theirs.")] = None,
    chunks: Annotated[
        str | None, typer.Option(help="Tokens of a prompt read at once, or whole; 256 unless told.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Items of each task at each context; 24 unless told.")] = None,
    space: Annotated[
        Path | None, typer.Option(help="A TOML file with any of these under the same names; options go before it.")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Every point on every item, instead of a search.")] = False,
    max_bytes: Annotated[int | None, typer.Option(help="Choose the most accurate point within so many bytes.")] = None,
    max_loss: Annotated[
        float, typer.Option(help="Else the smallest that loses at most so many percent of the accuracy.")
    ] = 100 * result.MAX_LOSS,
    text: Annotated[str, typer.Option(help="Text for KL: builtin, an asset, a file.")] = heldout.BUILTIN,
    device: Annotated[str, typer.Option(help="For torch models: cpu, cuda, auto.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="For torch models: float32, bfloat16, float16.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws texts, places and items.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the result here, for --kv-from; else into the cache folder."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with an interactive plot: FILE.html.")] = None,
    analytic: Annotated[
        bool, typer.Option("--analytic", help="Reckon memory from a config.json or a known name; no weights, no run.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that measure, with a model each.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Measure on a Ray cluster: auto, HOST:PORT, or local for --workers here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the points and what they cost, and stop.")] = False,
) -> None:
    """Find the frontier of memory against accuracy over weights, KV caches, prefill chunks and contexts.

    Memory is weights + KV cache + peak of activations. Points that look worse than others of no more bytes are left
    out early: by KL first, then after an eighth, a quarter and half of the items. `rlkit export` and `rlkit serve`
    take what was chosen with --kv-from.

    Example: rlkit kv smollm2-135m --weights float,w4 --contexts 1024,4096 -o kv.json --html kv.html

    Example: rlkit kv ./bundle --max-bytes 400000000

    Example: rlkit kv published --analytic --contexts 10k..128k
    """
    given = {
        "weights": _words(weights),
        "kv": _words(kv),
        "groups": _numbers("--groups", groups),
        "chunks": None if chunks is None else tuple(map(spaces.chunk_of, _words(chunks) or ())),
        "contexts": None if contexts is None else kvanalytic.contexts_of(contexts),
        "tasks": _words(tasks),
        "items": items,
    }
    _check_files(output, html, force=force)
    budget, where = Budget(max_bytes, max_loss / 100), Where(workers, ray)
    if analytic:
        kvanalytic.refuse({"--tasks": tasks, "--items": items, "--grid": grid, "--dry-run": dry_run})
        kvanalytic.refuse({"--workers": workers != 1, "--ray": ray, "--device": device != "cpu", "--dtype": dtype})
        kvanalytic.show(model, _told_space(space, given), max_bytes, kvanalytic.Files(output, html, json))
        return
    heldout.find_text(text)
    with console.progress(quiet=json) as tell:
        found = source.resolve(model, download=model in assets.registry() and not dry_run, tell=tell)
        told = _told_space(space, given)
        named = kvweights.find(found, told.get("weights", (FLOAT,)), tell, download=not dry_run)
        wanted = _planned(found, told, named)
        points = wanted.points()
        if dry_run:
            _say_plan(
                _plan(named, _setup(wanted, named, text, seed, (device, dtype, threads)), points, grid), json=json
            )
            return
        named = [kvweights.make(found, one, tell) for one in named]
        setup = _setup(wanted, named, text, seed, (device, dtype, threads))
        bench = Bench(setup, tell)
        totals = bench.totals(wanted.contexts)
        with kvspread.measuring(bench, Store(_folder() / "points", bench.identify), where) as run:
            searched = (search.grid if grid else search.halving)(points, totals, run, tell)
    made = _result(found, wanted, bench, searched, budget)
    path = output or _place(found, made)
    _finish(made, path, html, json=json)
    if not json:
        _say_next(made, setup, path)


def _told_space(space: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """A space file's values, and options before them."""
    told = {} if space is None else spaces.read(space)
    return told | {key: value for key, value in given.items() if value is not None}


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(filter(None, (part.strip() for part in text.split(","))))


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text!r} is no list of numbers; write them such as 1024,4096") from error


def _check_files(output: Path | None, html: Path | None, *, force: bool) -> None:
    if html is not None and html.suffix.lower() not in PAGES:
        raise ValueError(f"{html} is no name of a page; end it with .html")
    for path in filter(None, (output, html)):
        refuse_existing(path, force=force)


def _planned(model: Source, told: dict[str, Any], named: Sequence[Weights]) -> Space:
    """The space with its gaps filled for this model and its weights.

    Raises ValueError for contexts beyond the model's, caches that do not fit its heads, and caches named for bundles.
    """
    shape = source.read_shape(model)
    bundles = {one.name: _caches(one.model.path) for one in named if one.bundle}
    if len(bundles) == len(named) and "kv" in told:
        there = "; ".join(f"{name} has {', '.join(caches)}" for name, caches in bundles.items())
        raise ValueError(f"bundles are measured under each cache they offer ({there}); leave kv out")
    filled = {"contexts": _contexts(shape), **_fitting(shape), **told, "bundles": bundles}
    filled["weights"] = tuple(one.name for one in named)
    wanted = Space(**filled)
    for context in wanted.contexts:
        if context > shape.max_context:
            why = f"a context of {context} tokens exceeds the {shape.max_context} of {model.reference}"
            raise ValueError(f"{why}; ask for --contexts of at most {shape.max_context}")
    if len(bundles) < len(named):
        for scheme in wanted.schemes().values():
            scheme.refuse(shape.head_dim)
            if scheme.static:
                why = f"kv {scheme.name} has scales that the runtime chooses beforehand"
                raise ValueError(
                    f"{why}; measure it on a bundle that has it: rlkit kv-calibrate BUNDLE, rlkit kv BUNDLE"
                )
    return wanted


def _caches(bundle: Path) -> tuple[str, ...]:
    return runtime_kv.offered(bundle, source.read_json(bundle / "genai_config.json"))


def _contexts(shape: ModelShape) -> tuple[int, ...]:
    """The usual ones that the model has room for, or all of its room."""
    return tuple(one for one in spaces.CONTEXTS if one <= shape.max_context) or (shape.max_context,)


def _fitting(shape: ModelShape) -> dict[str, Any]:
    """The usual caches and group that the model's heads are divided by."""
    group = next((size for size in (64, 32, 16, 8) if shape.head_dim % size == 0), shape.head_dim)
    names = [name for name in spaces.KV if not name.startswith("kivi") or shape.head_dim % 32 == 0]
    return {"groups": (group,), "kv": tuple(names)}


def _setup(
    wanted: Space, named: Sequence[Weights], text: str, seed: int, how: tuple[str, str | None, int | None]
) -> Setup:
    device, dtype, threads = how
    return Setup(
        weights={one.name: str(one.model.file.resolve()) for one in named},
        nbytes={one.name: one.nbytes for one in named},
        tasks=wanted.tasks,
        items=wanted.items,
        text=text,
        seed=seed,
        device=device,
        dtype=dtype,
        threads=threads,
    )


def _folder() -> Path:
    return cache.cache_folder() / "kv"


def _result(model: Source, wanted: Space, bench: Bench, found: search.Found, budget: Budget) -> FrontierResult:
    names = {context: [item.task for item in bench.items(context)] for context in wanted.contexts}
    rows = tuple(result.rows_of(found, names))
    about = (f"rlkit {version('rlkit-edge')}: rlkit {shlex.join(sys.argv[1:])}",)
    return FrontierResult(
        model=identity_of(model),
        rows=rows,
        chosen=tuple(result.choose(rows, budget)),
        budget=budget,
        evaluations=found.evaluations,
        grid_evaluations=found.grid_evaluations,
        settings={"space": wanted.to_json(), **_told(bench.setup)},
        about=about,
    )


def _told(setup: Setup) -> dict[str, Any]:
    names = ("text", "seed", "device", "dtype")
    return {name: value for name, value in setup.to_json().items() if name in names}


def _place(model: Source, made: FrontierResult) -> Path:
    """Where a result is kept unless told: by what was searched over, so that equal calls have one file."""
    what = repr((made.model.to_json(), made.settings, made.budget))
    name = f"{Path(model.reference).name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}.json"
    return _folder() / "results" / name


@dataclass(frozen=True, slots=True)
class _Plan:
    """What would be measured: points, the weights to make first, the items of a search and of the whole grid."""

    points: Sequence[Point]
    missing: Sequence[str]
    totals: Totals
    items: float
    grid_items: float
    fetch_nbytes: int = 0


def _plan(named: Sequence[Weights], setup: Setup, points: Sequence[Point], whole: bool) -> _Plan:
    """Fetches nothing: where the benchmarks are not here yet, their items count as many as were asked for."""
    contexts = list(dict.fromkeys(point.context for point in points))
    asset = assets.find(benchmarks.ASSET)
    absent = [name for name in setup.tasks if name not in LONG] if assets.cached(asset) is None else []
    here = tuple(name for name in setup.tasks if name not in absent)
    totals = Bench(replace(setup, tasks=here)).totals(contexts) if here else Totals(dict.fromkeys(contexts, 0), 1.0)
    more = len(absent) * -(-setup.items // search.UNIT) * search.UNIT
    totals = replace(totals, items={context: count + more for context, count in totals.items.items()})
    spent = search.planned(points, totals, whole=whole)
    missing = [one.name for one in named if not one.ready]
    whole_grid = search.planned(points, totals, whole=True)
    return _Plan(points, missing, totals, spent, whole_grid, asset.nbytes if absent else 0)


def _say_plan(plan: _Plan, *, json: bool) -> None:
    if json:
        counts = {"items": dict(plan.totals.items), "screen_items": plan.totals.screen}
        spent = {"evaluations": plan.items, "grid_evaluations": plan.grid_items}
        first = {"to_make": list(plan.missing), "fetch_nbytes": plan.fetch_nbytes}
        points = [point.to_json() for point in plan.points]
        console.emit_json({"schema_version": 1, "points": points, **counts, **spent, **first})
        return
    rows = [(one.context, one.weights, one.kv, one.chunk or "whole") for one in plan.points[:SHOWN]]
    console.table(("context", "weights", "kv", "chunk"), rows, title=f"{len(plan.points)} points")
    if len(plan.points) > SHOWN:
        console.emit(f"and {len(plan.points) - SHOWN} more")
    for context, count in plan.totals.items.items():
        console.emit(
            f"{count} items at {context:,} tokens; bytes and KL of a point count as {plan.totals.screen:.1f} items"
        )
    console.emit(f"{plan.items:,.0f} items to measure, of {plan.grid_items:,.0f} of the whole grid")
    for name in plan.missing:
        console.emit(f"weights {name} would be made first")
    if plan.fetch_nbytes:
        console.emit(
            f"{benchmarks.ASSET}, {console.nbytes_text(plan.fetch_nbytes)}, would be fetched first: the benchmarks"
        )


def _finish(made: FrontierResult, path: Path, html: Path | None, *, json: bool) -> None:
    result.save(made, path)
    if html is not None:
        from rlkit.profiles.frontier.page import to_html

        write_text(html, to_html(made))
    if json:
        console.emit_json(made.to_json())
        return
    for table in render.narrow(made):
        console.table(table.columns, table.rows, title=table.title)
    console.emit(render.NOTE)
    for line in render.findings(made):
        console.emit(f"- {line}")
    if html is not None:
        console.say(f"page: {html}")
    console.say(f"result: {path}")


def _say_next(made: FrontierResult, setup: Setup, path: Path) -> None:
    """What to do with what was chosen at the longest context."""
    if not made.chosen:
        return
    model = source.resolve(setup.weights[made.chosen[-1].point.weights])
    if model.kind is SourceKind.BUNDLE:
        console.say(f"next: rlkit serve {model.file} --kv-from {path}")
    else:
        console.say(f"next: rlkit export {model.file} -o BUNDLE --kv-from {path}")
