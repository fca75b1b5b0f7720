"""Depth networks held to their bars: smaller ones beside the full one and the baselines, on held-out data.

    python -m rlkit.apps.benchmarks.depth -o ./bench-depth --suite mono

mono      75 % fewer parameters at no more than 2 % of SSIM lost, and at least twice as fast
stereo    20 % fewer parameters (no SPN) at no more than 3 points of three-pixel error added, held-out scenes and the
          Motorcycle pair
frontier  both kinds on to 90 % fewer and beyond, and int8
latency   files of the networks that are there, in turns, at 256x256 and 1 and 2 threads

Networks stay in the folder, so suites share them and an interrupted one goes on. The full network is compared as it is
and after it learned on for as long as the smaller ones did; the better of the two counts. --steps trains for longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console, depthshow, depthsuite, depthtime
from rlkit.apps.depthsuite import Asked
from rlkit.apps.depthwork import CUTS, DEFAULTS, FULL, SAME, Settings, Work
from rlkit.profiles import depthpage, depthpictures, depthresult
from rlkit.profiles.depthresult import Bar, DepthResult, Suite
from rlkit.recover.atomic import write_json
from rlkit.recover.depthfile import Kind
from rlkit.recover.progress import Tell

PUBLISHED = {
    Kind.MONO: ("level", "widths:0.497", "prune:0.25:0.4"),  # half the widths would be 74.9 % fewer
    Kind.STEREO: ("spn:4", "spn:1", "spn:0"),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is measured: where, with how many steps (None = as sized), held-out samples, seconds of timing, threads."""

    out: Path
    steps: int | None
    count: int
    seconds: float
    threads: int
    motorcycle: bool = True

    def work(self, kind: Kind) -> Work:
        """The work folder of a kind; smaller networks learn half as long as the full one."""
        settings = DEFAULTS[kind]
        return Work(self.out / str(kind), settings if self.steps is None else _longer(settings, self.steps))


def _longer(settings: Settings, steps: int) -> Settings:
    return replace(settings, steps=steps, slim_steps=-(-steps // 2))


def mono(wanted: Wanted, tell: Tell) -> list[Suite]:
    """The published reduction, and others of about its size."""
    return [_measured(wanted, Kind.MONO, PUBLISHED[Kind.MONO], tell, int8=False)]


def stereo(wanted: Wanted, tell: Tell) -> list[Suite]:
    """The published reductions."""
    return [_measured(wanted, Kind.STEREO, PUBLISHED[Kind.STEREO], tell, int8=False)]


def frontier(wanted: Wanted, tell: Tell) -> list[Suite]:
    """All cuts of both kinds, and int8."""
    return [_measured(wanted, kind, CUTS[kind], tell, int8=True) for kind in Kind]


def latency(wanted: Wanted, tell: Tell) -> list[Suite]:
    """Only timings, of the networks that are there, at one and at all asked threads."""
    found = []
    for kind in Kind:
        work = wanted.work(kind)
        names = [name for name in (FULL, *CUTS[kind]) if work.folder(name).is_dir() and work.done(name)]
        if not names:
            continue
        depthsuite.export(work, names)
        suite = depthsuite.measure(work, names, [], Asked(int8=False, seconds=0), tell)
        files = {name: work.onnx(name) for name in names}
        for threads in sorted({1, wanted.threads}):
            times = depthtime.latencies(
                files, kind, depthsuite.FRAME, threads=threads, seconds=wanted.seconds, tell=tell
            )
            times = depthtime.forecast(files, kind, depthsuite.FRAME, times, tell)
            rows = tuple(replace(row, latency=(*row.latency, times[row.name])) for row in suite.rows)
            suite = replace(suite, rows=rows)
        found.append(replace(suite, bars=tuple(_speed(suite))))
    if not found:
        raise ValueError(f"{wanted.out} has no networks yet; run the suites mono and stereo first")
    return found


def _speed(suite: Suite) -> list[Bar]:
    full, *others = (row for row in suite.rows if row.latency)
    if suite.kind is not Kind.MONO or not others:
        return []
    best = min(others, key=lambda row: row.latency[0].seconds)
    ratio = full.latency[0].seconds / best.latency[0].seconds
    claim = f"times as fast as the full network, one thread ({best.name})"
    return [Bar(claim, depthsuite.SPEED_BAR, ratio, ratio >= depthsuite.SPEED_BAR)]


def _measured(wanted: Wanted, kind: Kind, cuts: tuple[str, ...], tell: Tell, *, int8: bool) -> Suite:
    work = wanted.work(kind)
    work.train_full(tell)
    for name in (SAME, *cuts):
        work.slim(name, tell)
    held = depthshow.held_out(work.settings, wanted.count, tell, motorcycle=wanted.motorcycle)
    asked = Asked(int8=int8, seconds=wanted.seconds)
    return depthsuite.measure(work, (FULL, SAME, *cuts), held, asked, tell)


SUITES: dict[str, Callable[[Wanted, Tell], list[Suite]]] = {
    "mono": mono,
    "stereo": stereo,
    "frontier": frontier,
    "latency": latency,
}


def main(  # noqa: PLR0913, one parameter per option of the command
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of networks and results.")] = Path("bench-depth"),
    suite: Annotated[str, typer.Option(help="With commas between.")] = "mono,stereo,frontier,latency",
    steps: Annotated[int | None, typer.Option(min=1, help="Of the full networks; smaller ones take half.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 64,
    seconds: Annotated[float, typer.Option(min=0, help="Of timing frames per suite and threads.")] = 20.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the latency suite beside one.")] = 2,
    motorcycle: Annotated[bool, typer.Option(help="Measure on the Motorcycle pair.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
) -> None:
    """Hold depth networks to their bars; the exit code is 1 if one is missed."""
    names = suite.split(",")
    if unknown := [name for name in names if name not in SUITES]:
        raise typer.BadParameter(f"no suite {unknown[0]!r}; use {', '.join(SUITES)}")
    out.mkdir(parents=True, exist_ok=True)
    wanted = Wanted(out, steps, count, seconds, threads, motorcycle)
    found: dict[str, Any] = {"schema_version": 1}
    missed = False
    for name in names:
        with console.progress(quiet=json) as tell:
            suites = SUITES[name](wanted, tell)
        result = DepthResult(tuple(suites), (f"python -m rlkit.apps.benchmarks.depth --suite {name}",))
        found[name] = result.to_json()
        depthresult.write(out / name, result)
        depthpage.write(out / name / depthshow.PAGE, result)
        depthpictures.write(out / name / depthshow.PICTURES, result)
        missed |= not all(bar.met for each in suites for bar in each.bars)
        if not json:
            for each in suites:
                depthshow.show(each)
    write_json(out / "depth.json", found)
    if json:
        console.emit_json(found)
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
