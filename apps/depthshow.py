"""What commands of depth networks have in common: the work folder of a call, held-out data, the tables shown."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlkit.apps import console, depthscore, depthwork
from rlkit.apps.depthscore import Held
from rlkit.apps.depthsuite import loss
from rlkit.apps.depthwork import CUTS, FULL, SAME, Settings, Work
from rlkit.profiles import depthpage, depthpictures, depthresult
from rlkit.profiles.depthmetrics import StereoScore
from rlkit.profiles.depthresult import DepthResult, Row, Suite
from rlkit.recover import depthfile
from rlkit.recover.depthfile import Kind
from rlkit.recover.progress import Tell

PAGE, PICTURES = "report.html", "pictures"


def check_cuts(kind: Kind, names: Sequence[str]) -> None:
    """ValueError for a cut that is written otherwise, or is none for networks of that kind."""
    from rlkit.recover import slim as cutting

    other = cutting.How.SPN if kind is Kind.MONO else cutting.How.LEVEL
    for name in names:
        if any(cut.how is other for cut in cutting.parse(name)):
            raise ValueError(f"{name!r}: {other} is no cut for a {kind} network; use {', '.join(CUTS[kind])}")


def work_of(folder: Path, **given: Any) -> Work:
    """The work folder of a full network: its settings, and of smaller ones what is given, else as those there have."""
    networks = folder / "networks"
    smaller = depthfile.read(networks / SAME) if (networks / SAME).is_dir() else None
    return Work(folder, depthwork.settings_of(depthfile.read(networks / FULL), smaller, **given))


def held_out(
    settings: Settings, count: int, tell: Tell, *, data: Path | None = None, motorcycle: bool = True
) -> list[Held]:
    """What networks are measured on: scenes, the Motorcycle pair, a folder."""
    found = [depthscore.held_scenes(settings.kind, depthwork.view_of(settings), count)]
    if motorcycle:
        found.append(depthscore.held_motorcycle(settings.kind, settings.size[1], tell))
    if data is not None:
        found.append(depthscore.held_folder(settings.kind, data, count, settings.size))
    return found


def finish(folder: Path, suites: Sequence[Suite], *, json: bool) -> None:
    """Write the result, its page and its pictures, and show it."""
    about = (f"rlkit {version('rlkit-edge')}: rlkit {shlex.join(sys.argv[1:])}",)
    result = DepthResult(tuple(suites), about)
    depthresult.write(folder, result)
    depthpage.write(folder / PAGE, result)
    depthpictures.write(folder / PICTURES, result)
    if json:
        console.emit_json(result.to_json())
        return
    for suite in suites:
        show(suite)
    console.say(f"result: {folder / depthresult.RESULT}\npage: {folder / PAGE}\npictures: {folder / PICTURES}")


COLUMNS = {Kind.MONO: ("SSIM", "AbsRel", "d<1.25"), Kind.STEREO: ("3px err", "EPE px")}
NOTE = {
    Kind.MONO: "SSIM of log depth; d<1.25: % of pixels within a quarter; lost: share of the better full network's SSIM",
    Kind.STEREO: "3px err: % of pixels over 3 px and 5 % of the truth; lost: points over the better full network's",
}


def show(suite: Suite) -> None:
    """A table of sizes and speed, one per data set, and the bars; what a page has room for is there."""
    if sizes := list(_sizes(suite)):
        console.table(("", "parameters", "fewer %", "MFLOP", "file", "ms", "times as fast"), sizes)
    for data in suite.data:
        rows = [cells for row in suite.rows if (cells := _cells(suite, row, data.name))]
        columns = ("", *COLUMNS[suite.kind], "lost %")
        shown = len(columns) if any(row[-1] for row in rows) else -1  # nothing was lost by a single network
        console.table(columns[:shown], [row[:shown] for row in rows], title=f"{data.name}: {data.about}")
    console.emit(NOTE[suite.kind])
    for bar in suite.bars:
        word = "met" if bar.met else "NOT MET"
        console.emit(f"- {word}: {bar.claim}: {bar.found:.3g}, asked for {bar.wanted:.3g}")


def _sizes(suite: Suite) -> Iterator[tuple[str, ...]]:
    first = suite.rows[0]
    for row in suite.rows:
        if row.parameters is None or not first.parameters:
            continue
        fewer = f"{100 * (1 - row.parameters / first.parameters):.1f}"
        sizes = (f"{row.parameters:,}", fewer, f"{(row.flops or 0) / 1e6:,.0f}", console.nbytes_text(row.nbytes or 0))
        times = ("", "")
        if row.latency and first.latency:
            own, whole = row.latency[0].seconds, first.latency[0].seconds
            times = (f"{1e3 * own:.1f}", f"{whole / own:.2f}")
        yield (row.name, *sizes, *times)


def _cells(suite: Suite, row: Row, data: str) -> tuple[str, ...]:
    """A row's figures on a data set; nothing where it has none."""
    score = row.score(data)
    if score is None:
        return ()
    less = None if row.baseline or row.name == FULL else loss(suite, row, data)
    last = "" if less is None else f"{100 * less:.2f}"
    if isinstance(score, StereoScore):
        return row.name, f"{100 * score.three_pixel:.2f}", f"{score.epe:.3f}", last
    similar = "" if score.ssim is None else f"{score.ssim:.4f}"
    return row.name, similar, f"{score.abs_rel:.4f}", f"{100 * score.delta_1_25:.1f}", last
