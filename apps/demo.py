"""The whole path on a small real model: pull, recover, export, run, profile, report.

Every step leaves a folder or file that is complete or absent, so a second call goes on where the first one stopped. The
steps are the same functions that the single commands call.

    rlkit-demo/
      held-out/ synthetic/            text to measure on, with the original's logits; text the model wrote
      checkpoints/w4  w4w2-gateup     rlkit recover
      bundles/w4      w4w2-gateup     rlkit export
      chat.json machine.json bench.json
      report.json report.html
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from rlkit.apps import console, heldout
from rlkit.apps.results import assemble, bundle_of, checkpoint_of
from rlkit.recover import assets, source
from rlkit.recover.atomic import need_space, write_json
from rlkit.recover.progress import Tell

MODEL, TEXT = "smollm2-135m", "lambada"
RECIPES = ("w4", "w4w2-gateup")  # the first is what the others are compared with
PROMPT = "What is gravity?"
PROMPT_TOKENS, NEW_TOKENS = 64, 64
NEEDED_NBYTES = 2_000_000_000
MARK = "rlkit-demo.json"  # says that a folder is ours, so that --fresh may empty it


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the plan: what it makes, how, and whether it must follow when an earlier step was made again."""

    title: str
    made: Path
    make: Callable[[Tell], None]
    follows: bool = False


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for everything that is made.")] = Path("rlkit-demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Do all steps again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Make SmolLM2-135M small, recover its accuracy, export it, run it, and say how good, large and fast it is.

    About 10 minutes on 2 cores, 5 GiB of memory, 2 GB of disk; downloads 180 MB once. No account, no text data.

    Example: rlkit demo
    """
    steps = plan(out)
    if dry_run:
        _show_plan(steps, out, json)
        return
    began = time.monotonic()
    _prepare(out, fresh=fresh)
    changed = False
    for number, step in enumerate(steps, start=1):
        done = step.made.exists() and not (step.follows and changed)
        if not json:
            console.say(f"[{number}/{len(steps)}] {step.title}{' (done before)' if done else ''}")
        if not done:
            with console.progress(quiet=json) as tell:
                step.make(tell)
            gc.collect()  # a torch model holds cycles, and the next step wants its memory
            changed = True
    _conclude(out, json, time.monotonic() - began)


def plan(out: Path) -> list[Step]:
    """The steps in order, each with the path that proves it done."""
    steps = [
        Step(f"pull {name}: {assets.find(name).about}", _cached_path(name), partial(_pull, name))
        for name in (MODEL, TEXT)
    ]
    steps.append(Step("let the model write text of its own", out / "corpus", partial(_synthesize, out)))
    for recipe in reversed(RECIPES):
        made = checkpoint_of(out, recipe)
        steps.append(Step(f"recover {recipe}", made, partial(_recover, out, recipe)))
    for recipe in RECIPES:
        made = bundle_of(out, recipe)
        steps.append(Step(f"export {recipe} and measure the file", made, partial(_export, out, recipe)))
    steps.append(Step(f"chat with {RECIPES[-1]}", out / "chat.json", partial(_chat, out), follows=True))
    steps.append(Step("measure this machine", out / "machine.json", partial(_machine, out)))
    steps.append(Step("bench both bundles side by side", out / "bench.json", partial(_bench, out), follows=True))
    return [*steps, Step("report", out / "report.json", partial(_report, out), follows=True)]


def _cached_path(name: str) -> Path:
    found = assets.cached(assets.find(name))
    return found if found is not None else Path("/nonexistent")


def _show_plan(steps: list[Step], out: Path, json: bool) -> None:
    rows = [(step.title, "done before" if step.made.exists() else "to do") for step in steps]
    if json:
        console.emit_json({"schema_version": 1, "path": str(out), "steps": [{"step": t, "state": s} for t, s in rows]})
        return
    console.table(("step", "state"), rows, title=f"rlkit demo in {out}")


def _prepare(out: Path, *, fresh: bool) -> None:
    """An own folder with enough space; --fresh empties it, but only if the mark says that it is ours."""
    if out.exists() and not (out / MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not a demo's folder; choose another with -o")
    if fresh and out.exists():
        shutil.rmtree(out)
    need_space(out, NEEDED_NBYTES)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARK, {"schema_version": 1, "rlkit": version("rlkit-edge")})


def _pull(name: str, tell: Tell) -> None:
    assets.fetch(name, tell)


def _held_out(out: Path) -> heldout.HeldOut:
    model = assets.find(MODEL)
    return heldout.HeldOut(assets.fetch(TEXT), out / "held-out", identity=str(model.sha256))


def _recover(out: Path, recipe: str, tell: Tell) -> None:
    from rlkit.recover import recipe as recipes
    from rlkit.recover import recovery

    chosen = recipes.load(recipe)
    corrected = any(rule.scheme.adapter_rank for rule in chosen.rules)
    recovery.recover(
        source.resolve(MODEL, download=True),
        chosen,
        checkpoint_of(out, recipe),
        settings=recovery.Settings(method="full" if corrected else "none"),
        against=_held_out(out).against,
        corpus=out / "corpus",
        tell=tell,
    )


def _synthesize(out: Path, tell: Tell) -> None:
    from rlkit.recover.model import fast_dtype, load_model
    from rlkit.recover.synthesize import Sampling, synthesize

    model, tokenizer = load_model(source.resolve(MODEL, download=True))
    synthesize(model.to(fast_dtype()), tokenizer, Sampling(), out / "corpus", tell=tell)


def _export(out: Path, recipe: str, tell: Tell) -> None:
    from rlkit.export.build import export_bundle

    checkpoint = checkpoint_of(out, recipe)
    measure = heldout.measure_bundle(_held_out(out), checkpoint, tell)
    export_bundle(checkpoint, bundle_of(out, recipe), measure=measure, tell=tell)


def _chat(out: Path, _tell: Tell) -> None:
    from rlkit.runtime.chat import Chat, Manner
    from rlkit.runtime.session import open_bundle

    bundle = bundle_of(out, RECIPES[-1])
    said = Chat(open_bundle(bundle)).answer(PROMPT, Manner(max_new_tokens=64))
    write_json(out / "chat.json", {"prompt": PROMPT, "reply": said, "bundle": bundle.name})


def _machine(out: Path, _tell: Tell) -> None:
    from rlkit.profiles.machine import measure_machine

    write_json(out / "machine.json", measure_machine().to_json())


def _bench(out: Path, tell: Tell) -> None:
    from rlkit.profiles import bench, worker

    prefill, decode = bench.Kind.PREFILL, bench.Kind.DECODE
    tests = bench.Case(prefill, PROMPT_TOKENS), bench.Case(decode, NEW_TOKENS, depth=PROMPT_TOKENS)
    work = bench.Plan(tests, repeats=7, warm_ups=2)
    bundles = [bundle_of(out, recipe) for recipe in RECIPES]
    found = worker.measure_bundles(bundles, work, worker.Setting(), tell)
    write_json(out / "bench.json", [measurement.to_json() for measurement in found])


def _report(out: Path, _tell: Tell) -> None:
    from rlkit.profiles.render import write_report

    held_out = _held_out(out)
    text = f"{held_out.tokens:,} tokens of LAMBADA passages"
    write_report(out, assemble(out, RECIPES, text=text, command="rlkit demo"))


def _conclude(out: Path, json: bool, seconds: float) -> None:
    """Show the report, whether it was made now or before."""
    from rlkit.profiles.render import tables
    from rlkit.profiles.report import findings, read_report

    if json:
        console.emit((out / "report.json").read_text(encoding="utf-8").rstrip())
        return
    report = read_report(out / "report.json")
    for drawn in tables(report):
        console.table(drawn.columns, drawn.rows, title=drawn.title)
    if report.chat:
        console.emit(f"You: {report.chat.prompt}\n{report.chat.bundle}: {report.chat.reply}\n")
    for line in findings(report):
        console.emit(f"- {line}")
    console.say(f"\n{console.duration(seconds)} in all; the report with plots: {(out / 'report.html').resolve()}")
    console.say(f"next: rlkit chat {bundle_of(out, RECIPES[-1])}")
