"""The command `eval`: accuracy on benchmarks, with intervals, and what came back of what quantization lost."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console, evalmodels, heldout
from rlkit.apps.evalmodels import Candidate, Ways
from rlkit.apps.heldout import HeldOut
from rlkit.profiles import evalreport, tasks
from rlkit.profiles.evalreport import Evaluation, ModelResult
from rlkit.profiles.evaluation import Store, TaskResult, calibration, evaluate, sized
from rlkit.profiles.tasks import Spec, Task
from rlkit.recover import assets, cache
from rlkit.recover.atomic import refuse_existing, write_json, write_text
from rlkit.recover.progress import Tell

AUTO = "auto"
PAGES = (".html", ".htm")


def run_eval(  # noqa: PLR0913, one parameter per option of the command
    model: Annotated[str, typer.Argument(help="A bundle, checkpoint folder, Hugging Face folder, .gguf or asset.")],
    asked: Annotated[
        str, typer.Option("--tasks", help="Sets and tasks, with commas between; --dry-run lists them.")
    ] = "standard",
    limit: Annotated[str, typer.Option(help="Items per task: a number, auto, or all.")] = "all",
    width: Annotated[float, typer.Option(help="For --limit auto: points on either side of an accuracy.")] = 4.0,
    against: Annotated[str | None, typer.Option(help="The model in full precision, to measure against.")] = None,
    quantized: Annotated[str | None, typer.Option(help="What MODEL was recovered from, for the recovery.")] = None,
    compare: Annotated[list[str] | None, typer.Option(help="Another model in the same table; may be repeated.")] = None,
    text: Annotated[str, typer.Option(help="Text for KL and perplexity: builtin, an asset, a file.")] = heldout.BUILTIN,
    min_tokens: Annotated[int, typer.Option(help="Tokens of that text.")] = 4000,
    adapter: Annotated[str | None, typer.Option(help="MODEL is a bundle: one of its adapters.")] = None,
    device: Annotated[str, typer.Option(help="For torch models: cpu, cuda, auto.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="For torch models: float32, bfloat16, float16.")] = None,
    kv: Annotated[str | None, typer.Option(help="For bundles: which KV cache.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, with a model each.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of each process.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the sample of items, and the bootstrap.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots: FILE.html.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
) -> None:
    """Accuracy of models on real benchmarks, with 95 % intervals; KL, agreement and perplexity against a reference.

    The standard set is nine tasks in distribution and three out of it (docs/tasks.md); gsm8k-gen and mmlu-gen ask
    instruct models in a chat and look for the answer in the reply. What is computed is kept by item: an interrupted run
    goes on, and another run with the same reference reuses its results. With --against and --quantized: recovery =
    (recovered - quantized) / (full - quantized).

    Example: rlkit eval bundles/w4 --tasks arc_easy,hellaswag --limit 200

    Example: rlkit eval healed --against smollm2-135m --quantized plain-w2 --limit auto --html eval.html
    """
    _check_files(output, html, force=force)
    wanted = _Wanted(tasks.find(asked), _limit(limit), _points(width), seed)
    asked_for = model if adapter is None else (model, adapter)
    references = list(dict.fromkeys(one for one in (against, quantized, asked_for, *(compare or [])) if one))
    ways = Ways(device, dtype, kv, workers, threads)
    if quantized is not None and against is None:
        raise ValueError("--quantized is for the recovery, which needs the full model too; name it with --against")
    with console.progress(quiet=json) as tell:
        models = evalmodels.candidates(references, ways, tell, download=not dry_run)
        roles = _Roles(*(_named(models, name, ways) for name in (against, quantized)))
        if dry_run:
            _say_plan(wanted, models, json=json)
            return
        held_out = None if roles.full is None else _reference(models, roles.full, (text, min_tokens), tell)
        found = _evaluated(wanted, wanted.load(tell, quiet=json), models, roles, tell)
        if held_out is not None:
            found = _diverged(found, models, held_out, tell)
    _finish(found, output, html, json=json)


@dataclass(frozen=True, slots=True)
class _Roles:
    full: str | None
    quantized: str | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Tasks and how many items of each; `limit` None for all, 0 for as many as `width` needs."""

    specs: list[Spec]
    limit: int | None
    width: float
    seed: int

    def load(self, tell: Tell, *, quiet: bool) -> list[Task]:
        """The tasks, whole; fetches their data if it is not kept."""
        if not tasks.needs_asset(self.specs):
            return tasks.load(self.specs, None)
        asset = assets.find(tasks.ASSET)
        if assets.cached(asset) is None and not quiet:
            console.say(_fetching(asset))
        return tasks.load(self.specs, assets.fetch(asset, tell))


def _fetching(asset: assets.Asset) -> str:
    what = f"{asset.name} ({asset.origin})"
    size, where = console.nbytes_text(asset.nbytes), cache.cache_folder()
    return f"fetching {what}, {size}, once: the items of the benchmarks; kept in {where}"


def _check_files(output: Path | None, html: Path | None, *, force: bool) -> None:
    if html is not None and html.suffix.lower() not in PAGES:
        raise ValueError(f"{html} is no name of a page; end it with .html")
    for path in filter(None, (output, html)):
        refuse_existing(path, force=force)


def _limit(text: str) -> int | None:
    if text == "all":
        return None
    if text == AUTO:
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--limit {text!r} is no number of items; give a number such as 200, auto, or all")
    return int(text)


def _points(width: float) -> float:
    if not 0.1 <= width <= 50:
        raise ValueError(f"--width {width} is no useful interval; give points such as 4")
    return width / 100


def _named(models: Sequence[Candidate], reference: str | None, ways: Ways) -> str | None:
    """The name that a reference has among the models."""
    if reference is None:
        return None
    (alone,) = evalmodels.candidates([reference], ways)
    return next(
        model.name
        for model in models
        if model.adapter is None and model.model.file.resolve() == alone.model.file.resolve()
    )


def _store() -> Store:
    return Store(cache.cache_folder() / "eval")


def _evaluated(
    wanted: _Wanted, whole: list[Task], models: Sequence[Candidate], roles: _Roles, tell: Tell
) -> Evaluation:
    """Every model on the same items; how many, all of them together say where that is asked."""
    if wanted.limit == 0:
        chosen, sizes = _sized(wanted, whole, models, tell)
    else:
        chosen, sizes = [task.sample(wanted.limit, wanted.seed) for task in whole], {}
    results = [
        ModelResult(candidate.name, candidate.facts, found)
        for candidate, found in zip(models, _results(chosen, models, tell), strict=True)
    ]
    return Evaluation(tuple(results), roles.full, roles.quantized, sizes, about=_about(chosen), seed=wanted.seed)


def _sized(
    wanted: _Wanted, whole: list[Task], models: Sequence[Candidate], tell: Tell
) -> tuple[list[Task], dict[str, str]]:
    """As many items of every task as the model needs that needs most, and why so many."""
    with contextlib.ExitStack() as stack:  # only asked what is kept: none is opened
        subjects = [stack.enter_context(model.subject()) for model in models]
        first = [calibration(task, subjects, _store(), wanted.seed) for task in whole]
    pilots = _results(first, models, tell)
    found = [
        sized(task, results, wanted.width, wanted.seed)
        for task, results in zip(whole, zip(*pilots, strict=True), strict=True)
    ]
    names = [model.name for model in models]
    whose = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}, as many as any of them needs"
    return [task for task, _ in found], {task.name: f"{sizing.text()} of {whose}" for task, sizing in found}


def _results(chosen: Sequence[Task], models: Sequence[Candidate], tell: Tell) -> Iterator[tuple[TaskResult, ...]]:
    """Every model's results, one model after the other."""
    for candidate in models:
        with candidate.subject(tell) as subject:
            yield tuple(evaluate(chosen, subject, _store(), tell))


def _about(chosen: Sequence[Task]) -> tuple[str, ...]:
    rules = "; ".join(f"{task.spec.title}: {task.spec.rule}, {len(task.items)} of {task.spec.items}" for task in chosen)
    made = f"rlkit {version('rlkit-edge')}, {datetime.date.today().isoformat()}"
    return (f"Scored by, and items: {rules}", f"{made}: rlkit {shlex.join(sys.argv[1:])}")


def _reference(models: Sequence[Candidate], full: str, text: tuple[str, int], tell: Tell) -> HeldOut:
    """The full model's logits on a text, kept: first of all, as what fails here should not fail after hours."""
    reference = next(model for model in models if model.name == full)
    held_out = evalmodels.stick(reference, *text)
    evalmodels.keep_reference(held_out, reference, tell)
    return held_out


def _diverged(found: Evaluation, models: Sequence[Candidate], held_out: HeldOut, tell: Tell) -> Evaluation:
    """The same with every model's divergence from the full one."""
    results = []
    for candidate, result in zip(models, found.models, strict=True):
        if candidate.name != found.full:
            measured = evalmodels.divergence(held_out, candidate, _store().folder, tell)
            told = {"why": measured} if isinstance(measured, str) else {"divergence": measured}
            result = replace(result, **told)
        results.append(result)
    return replace(found, models=tuple(results), text=f"{held_out.label}, {held_out.tokens} tokens")


def _say_plan(wanted: _Wanted, models: Sequence[Candidate], *, json: bool) -> None:
    """What would be done: tasks and items, models, and what would be fetched."""
    asset = assets.find(tasks.ASSET)
    missing = tasks.needs_asset(wanted.specs) and assets.cached(asset) is None
    limit = wanted.limit
    counts = {spec.name: spec.items if not limit else min(limit, spec.items) for spec in wanted.specs}
    if json:
        plan: dict[str, Any] = {"schema_version": 1, "models": [model.name for model in models], "items": counts}
        console.emit_json({**plan, "sized": limit == 0, "fetch_nbytes": asset.nbytes if missing else 0})
        return
    rows = [
        (spec.name, spec.title, evalreport.GROUPS[spec.group], str(spec.rule), str(counts[spec.name]), spec.licence)
        for spec in wanted.specs
    ]
    console.table(("name", "task", "group", "rule", "items", "licence"), rows, title="Tasks")
    console.emit("models: " + ", ".join(f"{model.name} ({model.facts['form']})" for model in models))
    if limit == 0:
        console.emit(f"at most so many items: as few as ± {100 * wanted.width:g} points need")
    if missing:
        console.emit("would be " + _fetching(asset))


def _finish(found: Evaluation, output: Path | None, html: Path | None, *, json: bool) -> None:
    if output is not None:
        write_json(output, found.to_json())
    if html is not None:
        from rlkit.profiles.evalpage import to_html

        write_text(html, to_html(found))
        if not json:
            console.say(f"written to {html}")
    if json:
        console.emit_json(found.to_json())
        return
    for table in evalreport.tables(found):
        console.table(table.columns, table.rows, title=table.title)
        console.emit(table.note)
    for line in evalreport.findings(found):
        console.emit(f"- {line}")
