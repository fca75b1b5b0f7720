"""The command `depth demo`: both kinds of networks, brief: train, make smaller, export, int8, measure, report.

OUT/mono OUT/stereo     work folders (depthwork.py)
OUT/depth.json report.html pictures/*.png pictures.safetensors
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from rlkit.apps import console, depthshow, depthsuite
from rlkit.apps.depthsuite import Asked
from rlkit.apps.depthwork import DEFAULTS, FULL, SAME, Settings, Work
from rlkit.profiles.depthresult import Suite
from rlkit.recover.atomic import need_space, write_json
from rlkit.recover.depthfile import Kind
from rlkit.recover.progress import Tell

MARK = "rlkit-depth-demo.json"  # says that a folder is ours, so that --fresh may empty it
NEEDED_NBYTES = 300_000_000
HELD_OUT = 24  # scenes to measure on
TIMED_SECONDS = 10.0  # of frames, for each kind


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of network: how it learns, and the cuts."""

    settings: Settings
    cuts: tuple[str, ...]


PARTS = {
    Kind.MONO: Part(
        replace(DEFAULTS[Kind.MONO], size=(64, 96), steps=350, slim_steps=200, pool=800),
        ("level", "widths:0.497", "prune:0.1:0.3"),
    ),
    Kind.STEREO: Part(
        replace(DEFAULTS[Kind.STEREO], steps=300, slim_steps=120, pool=200),
        ("spn:0", "spn:0+prune:0.1"),
    ),
}


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for everything that is made.")] = Path(
        "rlkit-depth-demo"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Do all steps again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Train depth networks briefly, make them smaller, export them, and measure them on scenes and a real pair.

    Under 10 minutes on 2 cores and 2 GB of memory; downloads 12 MB once. An interrupted call goes on.

    Example: rlkit depth demo
    """
    works = {kind: Work(out / str(kind), part.settings) for kind, part in PARTS.items()}
    if dry_run:
        _show_plan(works, json=json)
        return
    began = time.monotonic()
    _prepare(out, fresh=fresh)
    with console.progress(quiet=json) as tell:
        suites = [_suite(works[kind], part, tell) for kind, part in PARTS.items()]
    depthshow.finish(out, suites, json=json)
    if not json:
        console.say(f"{console.duration(time.monotonic() - began)} in all")
        console.say(f"next: rlkit depth slim {works[Kind.MONO].out} --cuts prune:0.25:0.4,prune:0.05")


def _suite(work: Work, part: Part, tell: Tell) -> Suite:
    work.train_full(tell)
    for name in (SAME, *part.cuts):
        work.slim(name, tell)
    held = depthshow.held_out(work.settings, HELD_OUT, tell)
    return depthsuite.measure(work, (FULL, SAME, *part.cuts), held, Asked(seconds=TIMED_SECONDS), tell)


def _show_plan(works: dict[Kind, Work], *, json: bool) -> None:
    rows = [
        (f"{kind}: {name}", "done before" if work.folder(name).is_dir() else "to do")
        for kind, work in works.items()
        for name in (FULL, SAME, *PARTS[kind].cuts)
    ]
    if json:
        console.emit_json({"schema_version": 1, "steps": [{"step": step, "state": state} for step, state in rows]})
        return
    console.table(("step", "state"), rows, title="rlkit depth demo")


def _prepare(out: Path, *, fresh: bool) -> None:
    """An own folder with enough space; --fresh empties it, but only if the mark says that it is ours."""
    if out.exists() and not (out / MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not a depth demo's folder; choose another with -o")
    if fresh and out.exists():
        shutil.rmtree(out)
    need_space(out, NEEDED_NBYTES)
    write_json(out / MARK, {"schema_version": 1})
