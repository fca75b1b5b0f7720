"""From a work folder to its result: rows of all networks and baselines, int8 files, latencies, bars, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlkit.apps import depthint8, depthscore, depthtime
from rlkit.apps.depthscore import Held, Predict
from rlkit.apps.depthwork import FULL, INT8, SAME, Work, samples_of
from rlkit.profiles.depthresult import Bar, Row, Suite
from rlkit.recover import depthfile
from rlkit.recover.depthfile import Kind
from rlkit.recover.progress import Tell, silent

FRAME = (256, 256)  # height and width whose FLOPs and latency are told: what the paper's networks see
SHOWN = 3  # networks in pictures
# Fewer parameters, and the loss of the leading figure; without SPN an AnyNet has 19.97 % fewer.
PARAMETER_BARS = {Kind.MONO: (0.75, 0.02), Kind.STEREO: (0.1996, 0.03)}
SPEED_BAR = 2.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured besides scores: frame, int8 files, seconds of timing (0 = none), threads, forecasts of it."""

    frame: tuple[int, int] = FRAME
    int8: bool = True
    seconds: float = 20.0
    threads: int = 1
    forecast: bool = False


def measure(work: Work, names: Sequence[str], held: Sequence[Held], asked: Asked, tell: Tell = silent) -> Suite:
    """The suite of a work folder whose networks are made; `names` in the order of the table."""
    kind = work.settings.kind
    rows = [work.row(name, held, asked.frame) for name in names]
    export(work, names)
    rows = [replace(row, nbytes=work.onnx(row.name).stat().st_size) for row in rows]
    if asked.int8:
        rows += [_int8_row(work, row, held, tell) for row in list(rows) if row.name != SAME]
    if asked.seconds:
        files = {row.name: _file(work, row) for row in rows}
        times = depthtime.latencies(files, kind, asked.frame, threads=asked.threads, seconds=asked.seconds, tell=tell)
        if asked.forecast:
            times = depthtime.forecast(files, kind, asked.frame, times, tell)
        rows = [replace(row, latency=(times[row.name],)) for row in rows]
    first = samples_of(work.settings).first(depthscore.LEARNED_FROM)
    scale = depthfile.read(work.folder(FULL)).scale
    baselines = depthscore.baselines(held, first, scale, tell)
    data = tuple(each.data for each in held)
    suite = Suite(kind, *asked.frame, data, (*rows, *baselines))
    shown = {name: work.predict(name) for name in _shown(suite)} | _matching(kind)
    return replace(suite, bars=tuple(bars(suite)), pictures=depthscore.pictures(held, shown))


def export(work: Work, names: Sequence[str]) -> None:
    """Write the ONNX files that are not there yet."""
    from rlkit.export.vision import export_depth

    for name in names:
        if not work.onnx(name).is_file():
            export_depth(work.folder(name), work.onnx(name))


def _file(work: Work, row: Row) -> Path:
    return work.onnx(row.name.removesuffix(" int8"), INT8 if row.precision == "int8" else "")


def _int8_row(work: Work, row: Row, held: Sequence[Held], tell: Tell) -> Row:
    """The row of a network's int8 file, which is made if it is not there."""
    from rlkit.runtime.visionrun import open_depth

    how = depthint8.make(work, row.name, tell).how
    path = work.onnx(row.name, INT8)
    run = open_depth(path)
    found = depthscore.scores(held, lambda *images: [run(*images)], depthfile.read(work.folder(row.name)).scale)
    return replace(row, name=f"{row.name} int8", how=how, scores=found, nbytes=path.stat().st_size, precision="int8")


def _shown(suite: Suite) -> list[str]:
    """The full network and the best few that are smaller, by parameters apart."""
    best = dict.fromkeys(row.name.removesuffix(" int8") for row in suite.frontier())
    smaller = [name for name in best if name not in (FULL, SAME)]
    return [FULL, *smaller[:: max(1, len(smaller) // (SHOWN - 1))][: SHOWN - 1]]


def _matching(kind: Kind) -> dict[str, Predict]:
    return {} if kind is Kind.MONO else {depthscore.MATCHING: depthscore.matching}


def reference(suite: Suite, data: str | None = None) -> Row:
    """The better one of the full network and of that which learned on for as long as the smaller ones did."""
    full = [row for row in suite.rows if row.name in (FULL, SAME)]
    sign = 1 if suite.kind is Kind.MONO else -1
    return max(full, key=lambda row: sign * (suite.leading(row, data) or 0.0))


def loss(suite: Suite, row: Row, data: str | None = None) -> float | None:
    """How much worse than the reference, as depthscore.worse; None where there is no full network."""
    if not any(each.name in (FULL, SAME) for each in suite.rows):
        return None
    return depthscore.worse(suite.kind, suite.leading(row, data), suite.leading(reference(suite, data), data))


def bars(suite: Suite) -> list[Bar]:
    """What is asked of the smaller networks: loss on every data set that the full one reads, and speed.

    A data set on which one number everywhere is as good as the full network measures nothing, and has no bar.
    """
    found: list[Bar] = []
    full, smaller = suite.row(FULL), _smaller(suite)
    share, most = PARAMETER_BARS[suite.kind]
    unit = "SSIM lost" if suite.kind is Kind.MONO else "three-pixel error added"
    for data in (data.name for data in suite.data if data.held_out and _reads(suite, data.name)):
        losses = {row.name: loss(suite, row, data) for row in smaller}
        known = {name: value for name, value in losses.items() if value is not None}
        if known:
            best = min(known, key=lambda name: known[name])
            claim = f"{share:.0%} fewer parameters, share of {unit} on {data} ({best})"
            found.append(Bar(claim, most, known[best], known[best] <= most))
    within = {row.name for row in smaller if (one := loss(suite, row)) is not None and one <= most}
    good = [row for row in smaller if row.latency and (row.name in within or not suite.data)]
    if good and full.latency:
        fastest = min(good, key=lambda row: row.latency[0].seconds)
        ratio = full.latency[0].seconds / fastest.latency[0].seconds
        claim = f"{share:.0%} fewer parameters within that loss, times as fast as the full network ({fastest.name})"
        found.append(Bar(claim, SPEED_BAR, ratio, ratio >= SPEED_BAR))
    return found


def _smaller(suite: Suite) -> list[Row]:
    """The float32 networks with as many fewer parameters as the bar asks for."""
    floats = [row for row in suite.rows if row.parameters and row.precision == "float32"]
    whole = suite.row(FULL).parameters or 1
    share, _ = PARAMETER_BARS[suite.kind]
    return [row for row in floats if 1 - (row.parameters or 0) / whole >= share]


def _reads(suite: Suite, data: str) -> bool:
    constant = next((row for row in suite.rows if row.name == depthscore.CONSTANT), None)
    says = None if constant is None else suite.leading(constant, data)
    best = suite.leading(reference(suite, data), data)
    if says is None or best is None:
        return best is not None
    return best > says if suite.kind is Kind.MONO else best < says
