"""What vision operators take on this machine, from chains of single ones: rates for profiles.vision, in some seconds.

    utilisation = ideal seconds / measured seconds,   ideal = max(FLOPs / best rate of all, bytes / bandwidth)

of convolutions of kernel 3 with as many channels out as in, by channels and pixels, apart for two and three dimensions,
depthwise and int8. Another convolution goes at the utilisation of the one with sqrt(n * k / kernel) channels, so at
that of equal FLOPs per pixel. The rest goes by bytes, as the operator measured that is most like it, from arrays in the
caches to arrays beyond them. Starting an operator is measured with operators that do next to nothing. No network is
run, so that a forecast has seen none of those it is compared with.

What this does not know: layouts converted between unlike operators, other kernels than 3 (they count as more or fewer
channels), and whether the machine will be as quiet later.
"""

from __future__ import annotations

import datetime
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit.profiles import machine
from rlkit.profiles.rates import CALIBRATED, Band, Bounds, Peaks, Spent
from rlkit.profiles.step import Kind, Operator
from rlkit.profiles.surface import Point, Surface
from rlkit.profiles.vision import LOOP
from rlkit.recover.atomic import write_json
from rlkit.recover.cache import cache_folder
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.source import read_json

SCHEMA_VERSION = 1
Clock = Callable[[], float]
MOST_FLOPS = 6e8  # of a probed convolution
COUNT, SMALL = 4, 64  # operators in a chain, and in one of operators that do next to nothing
LOOPED = 8  # operators in a step of export/visionscan.py
CHANNELS: tuple[int, ...] = (1, 4, 16, 64, 256)
SIDES = (8, 32, 128, 256)
DEEP_CHANNELS: tuple[int, ...] = (1, 4, 16)
DEEP_SIDES, DEPTH = (8, 32, 64), 8
MOVED = ((16, 16, 16), (16, 64, 64), (16, 256, 256))
FORMS = ("conv 2d", "conv 3d", "depthwise conv", "int8 conv 2d", "int8 conv 3d")
# The mover that is most like an operator; "add" for all others.
LIKE = {
    "batchnormalization": "normalize",
    "softmax": "normalize",
    **dict.fromkeys(("slice", "pad", "gather", "gatherelements", "expand", "where", "transpose"), "slice"),
    **dict.fromkeys(("maxpool", "resize", "upsample"), "pool"),
    **dict.fromkeys(("quantizelinear", "dequantizelinear"), "integer"),
    **dict.fromkeys((f"qlinear{name}" for name in ("leakyrelu", "add", "mul", "concat", "sigmoid")), "integer"),
}
MOVERS = ("add", "normalize", "slice", "pool", "integer")


@dataclass(frozen=True, slots=True)
class Conv:
    """Seconds of one convolution of a form: as many channels out as in, over so many pixels."""

    form: str
    channels: int
    pixels: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Mover:
    """Seconds of operators like `kind` that move nbytes together."""

    kind: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Table:
    """Everything measured with so many threads; step_seconds: of a loop, beside the operators in it."""

    threads: int
    bytes_per_s: float
    flops_per_s: float
    dispatch_seconds: float
    step_seconds: float
    convs: tuple[Conv, ...]
    movers: tuple[Mover, ...]
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Table:
        """Inverse of to_json; ValueError for what is no table."""
        if fields.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version {fields.get('schema_version')} is not {SCHEMA_VERSION}; measure again")
        try:
            kept = {name: fields[name] for name in cls.__slots__}
            convs, movers = (
                [kind(**row) for row in fields[name]] for name, kind in (("convs", Conv), ("movers", Mover))
            )
            return cls(**{**kept, "convs": tuple(convs), "movers": tuple(movers)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no table of vision operators ({error!r}); measure again") from error


def write(path: Path, table: Table) -> None:
    """Write a table, complete or not at all."""
    write_json(path, table.to_json())


def read(path: Path) -> Table:
    """A table that was written; ValueError naming the file for anything else."""
    try:
        return Table.from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def here(threads: int = 1, *, force: bool = False, tell: Tell = silent) -> Table:
    """This machine's table: the one kept in the cache folder if it is of this processor, or measured now and kept."""
    path = cache_folder() / "devices" / f"vision-{threads}.json"
    if path.is_file() and not force:
        try:
            kept = read(path)
            if (kept.facts.get("cpu"), kept.threads) == (machine.cpu_name(), threads):
                return kept
        except ValueError:  # of another version, or damaged: measured again
            pass
    made = measure(threads, tell=tell)
    write(path, made)
    return made


class VisionRates(Bounds):
    """The rates of a table: what profiles.rates.Rates asks for. ValueError for a table without convolutions."""

    def __init__(self, table: Table) -> None:
        self.table = table
        note = "from chains of single operators on this machine"
        floats = [rate for form, rate in _reached(table) if not form.startswith("int8")]
        integers = [rate for form, rate in _reached(table) if form.startswith("int8")]
        peak = max([table.flops_per_s, *floats])  # a convolution may beat numpy's products
        packed = max([peak, *integers])
        self.peaks = Peaks(table.bytes_per_s, peak, table.dispatch_seconds, note, packed)
        self._convs = {form: self._surface(form) for form in FORMS if any(row.form == form for row in table.convs)}
        if FORMS[0] not in self._convs:
            raise ValueError("no convolution was measured, so none can be forecast; measure again")
        self._moved = {
            kind: Surface.through({(float(row.nbytes),): row.seconds / row.nbytes for row in rows}, kind)
            for kind in MOVERS
            if (rows := [row for row in table.movers if row.kind == kind])
        }

    def _surface(self, form: str) -> Surface:
        rows = [row for row in self.table.convs if row.form == form]
        points: dict[Point, float] = {
            (float(row.channels), float(row.pixels)): self._ideal(probe(row.form, row.channels, row.pixels))
            / row.seconds
            for row in rows
        }
        return Surface.through(points, form)

    def _ideal(self, op: Operator) -> float:
        bounds = self.peaks.spent(op)
        return max(bounds.compute, bounds.memory)

    @property
    def label(self) -> str:
        """Calibrated: by single operators."""
        return CALIBRATED

    @property
    def bytes_per_s(self) -> float:
        """Reading from memory."""
        return self.table.bytes_per_s

    @property
    def dispatch_seconds(self) -> float:
        """Starting an operator."""
        return self.table.dispatch_seconds

    @property
    def roofs(self) -> dict[str, float]:
        """The best of what was measured, of floats and of integers."""
        return self.peaks.roofs

    @property
    def band(self) -> Band:
        """A guess: single operators were measured, whole networks were not."""
        return Band((0.6, 1.6), (0.6, 1.6), "chains of single operators; networks mix unlike ones")

    def spent(self, op: Operator) -> Spent:
        """Seconds of one run."""
        dispatch = op.launches * self.table.dispatch_seconds
        if op.name == LOOP:
            return Spent(0.0, 0.0, op.launches * self.table.step_seconds)
        if op.kind != Kind.CONV:
            surface = self._moved.get(LIKE.get(op.name, "add"))
            if surface is None or op.kind == Kind.LINEAR:
                return self.peaks.spent(op)
            return Spent(0.0, op.nbytes * surface.at((max(float(op.nbytes), 1.0),)), dispatch)
        form = f"int8 {op.name}" if op.bits == 8 else op.name
        surface = self._convs.get(form, self._convs[FORMS[0]])
        seconds = self._ideal(op) / surface.at((equal_channels(op), float(op.tokens)))
        return Spent(seconds, 0.0, dispatch)

    def assumptions(self) -> tuple[str, ...]:
        """When, where and how steadily it was measured."""
        facts = self.table.facts
        said = f"{len(self.table.convs)} convolutions and {len(self.table.movers)} other operators"
        return (
            f"{CALIBRATED} on {facts.get('date')}: {said} in chains, {self.table.threads} threads of "
            f"{facts.get('cpu')}; trials spread by {100 * float(facts.get('spread', 0)):.0f} %",
            f"starting an operator takes {1e6 * self.table.dispatch_seconds:.1f} us",
        )


def _reached(table: Table) -> Iterator[tuple[str, float]]:
    """FLOP/s of every convolution that was measured."""
    for row in table.convs:
        yield row.form, probe(row.form, row.channels, row.pixels).flops / row.seconds


def equal_channels(op: Operator) -> float:
    """Channels of the probed convolution with as many FLOPs per pixel; those of a depthwise one are its own."""
    n, k, _groups = op.shape
    kernel = 27 if op.name == "conv 3d" else 9
    return float(n) if op.name == "depthwise conv" else math.sqrt(n * k / kernel)


def probe(form: str, channels: int, pixels: int) -> Operator:
    """The operator of a probed convolution."""
    kernel = 27 if form.endswith("3d") else 9
    k = kernel if form == "depthwise conv" else kernel * channels
    bits = 8 if form.startswith("int8") else 32
    moved, held = 2 * pixels * channels * bits // 8, channels * k * bits // 8
    name = form.removeprefix("int8 ")
    return Operator(
        name, Kind.CONV, 1, 2 * pixels * channels * k, held, moved, bits=bits, tokens=pixels, shape=(channels, k, 1)
    )


def points() -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(form, channels, size) of the convolutions to measure, none of more FLOPs than MOST_FLOPS."""
    flat: tuple[tuple[int, ...], ...] = tuple((side, side) for side in SIDES)
    deep: tuple[tuple[int, ...], ...] = tuple((DEPTH, side, side) for side in DEEP_SIDES)
    asked = [(f"{start}conv 2d", CHANNELS, flat) for start in ("", "int8 ")]
    asked += [(f"{start}conv 3d", DEEP_CHANNELS, deep) for start in ("", "int8 ")]
    for form, widths, sizes in (*asked, ("depthwise conv", (32, 128), flat[1:3])):
        for channels in widths:
            for size in sizes:
                if probe(form, channels, math.prod(size)).flops <= MOST_FLOPS:
                    yield form, channels, size


Time = Callable[[bytes, int, float], float]
"""A model, its threads, about how many seconds to take -> seconds of a run: the median of the faster half."""


def measure(
    threads: int = 1,
    *,
    slice_seconds: float = 0.06,
    clock: Clock = time.perf_counter,
    tell: Tell = silent,
    timed: Time | None = None,
) -> Table:
    """Measure every point for about `slice_seconds`; ValueError for threads that are none.

    clock: time.process_time counts what one thread computes, whatever else runs; it is no latency.
    """
    from rlkit.export import convrepeats

    if threads < 1:
        raise ValueError(f"{threads} threads measure nothing; give at least 1")
    spreads: list[float] = []
    ask = timed or functools.partial(_timed, spreads=spreads, clock=clock)
    wanted = list(points())
    total = len(wanted) + len(MOVED) * len(MOVERS) + 3
    tell(Progress("operators", 0, total, "memory and products"))
    reading = machine.measure_read(threads, seconds=0.3, clock=clock).best
    peak = machine.measure_matmul(seconds=0.3, clock=clock).best
    dispatch = ask(convrepeats.movers("add", (1, 2, 4), SMALL), threads, slice_seconds) / SMALL
    convs: list[Conv] = []
    for done, (form, channels, size) in enumerate(wanted):
        tell(Progress("operators", 3 + done, total, f"{form} of {channels} channels"))
        groups = channels if form == "depthwise conv" else 1
        model = convrepeats.convolutions(channels, size, COUNT, groups=groups, int8=form.startswith("int8"))
        seconds = max(ask(model, threads, slice_seconds) / COUNT - dispatch, dispatch / 8)
        convs.append(Conv(form, channels, math.prod(size), seconds))
    movers: list[Mover] = []
    for kind in MOVERS:
        for shape in MOVED:
            tell(Progress("operators", 3 + len(convs) + len(movers), total, kind))
            runs, nbytes = moved(kind, shape)
            seconds = ask(convrepeats.movers(kind, shape, COUNT), threads, slice_seconds) / COUNT - runs * dispatch
            movers.append(Mover(kind, nbytes // runs, max(seconds / runs, dispatch / 8)))
    tell(Progress("operators", total, total, ""))
    step = ask(convrepeats.loop(SMALL + 1), threads, slice_seconds) / SMALL - LOOPED * dispatch
    facts = {
        "cpu": machine.cpu_name(),
        "date": datetime.date.today().isoformat(),
        "spread": statistics.median(spreads) if spreads else 0.0,
    }
    return Table(threads, reading, peak, dispatch, max(step, 0.0), tuple(convs), tuple(movers), facts)


def moved(kind: str, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Operators of one link of a chain of movers, and the bytes that they move together, as profiles.vision counts."""
    numbers = math.prod(shape)
    once = {"add": (1, 12), "normalize": (1, 8), "slice": (2, 16), "pool": (2, 10), "integer": (1, 2)}
    runs, nbytes = once[kind]
    return runs, round(nbytes * numbers)


def _timed(model: bytes, threads: int, seconds: float, *, spreads: list[float], clock: Clock) -> float:
    from rlkit.runtime.framebench import open_frame
    from rlkit.runtime.probe import repeat

    trials = repeat(open_frame(model, threads=threads).run, seconds, clock=clock)
    spreads.append(trials.spread)
    return trials.seconds
