"""Measure this machine with single operators, for forecasts of models that were never run here.

Every operator of our CPU bundles is timed in a graph of its own kind (export/repeats.py) at a few sizes, with the
options bundles run with: products with weights in 2, 4 and 8 bits, attention at depths, norms and elementwise
operators, what starting an operator costs, and what the generation loop adds per token. No model is evaluated, so a
forecast made from this has seen none of the models that it is compared with.

What it does not know: whether the machine will be as quiet later. `Calibration.spread` says how steady it was now.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil

from rlkit.profiles import efficiency, machine
from rlkit.profiles.efficiency import (
    LADDER,
    Around,
    Attention,
    Ladder,
    Peaks,
    Product,
    Rowwise,
    Table,
    product_nbytes,
)
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.runtime.probe import Clock, TokenTrials, Trials

BUSY = 0.08  # a median spread of trials above this means that something else was running
SECONDS = 240.0  # after which nothing new is begun; about 100 are needed on two quiet cores
FAR_NBYTES = 256 * 2**20  # of weights, read in turn: far more than a laptop's caches hold
MOST_NODES = 1024
FEW, MANY = (1, 8), (64, 512)  # tokens of a decode step, and of a prompt
CACHE_NBYTES = 32 * 2**20  # of the last-level cache where the system does not say
Form = tuple[int, int]  # bits, block
Shape = tuple[int, int]  # n, k
Heads = tuple[int, int, int]  # query heads, KV heads, their size


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured; `slice_seconds` is spent on each point, three trials at least."""

    formats: tuple[Form, ...]  # the first are plain floats, whose speed is the peak
    shapes: tuple[Shape, ...]
    branches: tuple[tuple[int, int, Shape], ...]  # low-rank ones: (bits, block, shape)
    attentions: tuple[Heads, ...]
    passes: tuple[tuple[int, int], ...]  # (new tokens, past tokens)
    ladder: tuple[tuple[int, int], ...]  # (width of products, MiB of weights)
    rows: tuple[int, ...]
    widths: tuple[int, ...]
    arounds: tuple[Shape, ...] = ((1024, 1), (131072, 1), (1024, 32))  # (vocabulary, layers)
    slice_seconds: float = 0.15
    twice: bool = True  # products of a decode step once more at the end; the faster counts


_LOW = tuple((bits, block) for bits in (4, 2, 8) for block in (128, 64, 32))
FULL = Plan(
    formats=((32, 0), *_LOW),
    shapes=((2048, 2048), (512, 512), (8192, 2048), (2048, 8192), (2048, 512), (512, 2048)),
    branches=((8, 64, (64, 2048)), (8, 32, (2048, 64)), (8, 128, (64, 2048))),
    attentions=((16, 4, 128), (16, 16, 128), (16, 4, 64), (16, 16, 64)),
    passes=((1, 0), (1, 256), (1, 1024), (1, 4096), (64, 0), (64, 1024), (512, 0), (512, 4096), (2048, 0)),
    ladder=tuple((width, megabytes) for width in (512, 2048) for megabytes in (4, 16, 32, 64, 128, 256)),
    rows=(1, 32, 1024),
    widths=(128, 1024, 8192),
)
QUICK = replace(
    FULL,
    formats=((32, 0), (4, 128), (2, 128), (8, 128), (4, 32), (2, 64)),
    shapes=((2048, 2048), (512, 512), (8192, 2048)),
    attentions=((16, 4, 128), (16, 4, 64)),
    passes=((1, 0), (1, 1024), (1, 4096), (64, 0), (512, 0), (2048, 0)),
    ladder=tuple((width, megabytes) for width in (512, 2048) for megabytes in (8, 32, 64, 256)),
    rows=(1, 512),
    widths=(128, 4096),
    slice_seconds=0.05,
    twice=False,
)


class Instruments(Protocol):
    """What measures; `Onnx` in earnest."""

    def read(self, threads: int) -> Trials:
        """Seconds of reading a byte from memory with so many threads."""

    def products(self, form: Form, shape: Shape, count: int, tokens: Sequence[int], seconds: float) -> list[Trials]:
        """Seconds of one of `count` products for each number of tokens."""

    def chain(self, form: Form, width: int, count: int, seconds: float) -> Trials:
        """Seconds of a norm, a product (width, width), an activation and another, among `count` in a chain."""

    def attention(self, heads: Heads, tokens: int, past: int, count: int, seconds: float) -> Trials:
        """Seconds of one attention."""

    def rowwise(self, kind: str, tokens: int, width: int, count: int, seconds: float) -> Trials:
        """Seconds of one operator over rows."""

    def around(self, vocab: int, layers: int, seconds: float) -> TokenTrials:
        """Seconds of the generation loop."""


@dataclass(frozen=True, slots=True)
class Onnx:
    """The CPU through onnxruntime and onnxruntime-genai, with so many threads."""

    threads: int

    def read(self, threads: int) -> Trials:
        """See Instruments."""
        rate = machine.measure_read(threads, seconds=0.6)
        return Trials(1.0 / rate.best, 1.0 / rate.median, rate.trials)

    def products(self, form: Form, shape: Shape, count: int, tokens: Sequence[int], seconds: float) -> list[Trials]:
        """See Instruments."""
        from rlkit.export import repeats
        from rlkit.runtime.probe import open_probe

        probe = open_probe(repeats.products(*form, *shape, count), self.threads)
        return [probe.time(number, seconds) for number in tokens]

    def chain(self, form: Form, width: int, count: int, seconds: float) -> Trials:
        """See Instruments."""
        from rlkit.export import repeats
        from rlkit.runtime.probe import open_probe

        return open_probe(repeats.chain(*form, width, count), self.threads).time(1, seconds)

    def attention(self, heads: Heads, tokens: int, past: int, count: int, seconds: float) -> Trials:
        """See Instruments."""
        from rlkit.export import repeats
        from rlkit.runtime.probe import open_probe

        return open_probe(repeats.attentions(*heads, count, tokens + past), self.threads).time(tokens, seconds, past)

    def rowwise(self, kind: str, tokens: int, width: int, count: int, seconds: float) -> Trials:
        """See Instruments."""
        from rlkit.export import repeats
        from rlkit.runtime.probe import open_probe

        return open_probe(repeats.pointwise(kind, width, count), self.threads).time(tokens, seconds)

    def around(self, vocab: int, layers: int, seconds: float) -> TokenTrials:
        """See Instruments."""
        from rlkit.export import repeats
        from rlkit.runtime.probe import time_tokens

        return time_tokens(*repeats.decoder(vocab, layers), self.threads, seconds)


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds the sizes of probes: the last-level cache, and how much memory weights may take."""

    cache_nbytes: int
    far_nbytes: int

    @classmethod
    def here(cls) -> Room:
        """This machine's: weights of four times the cache or FAR_NBYTES, but an eighth of free memory at most."""
        cache = cache_nbytes()
        free = int(psutil.virtual_memory().available)
        return cls(cache, min(max(FAR_NBYTES, 4 * cache), 4 * FAR_NBYTES, free // 8))


@dataclass(frozen=True, slots=True)
class Task:
    """Something to measure, and about how many seconds it takes."""

    name: str
    weight: float
    run: Callable[[], None]


@dataclass(slots=True)
class _Work:
    """What is measured with what, and the rows so far."""

    plan: Plan
    tools: Instruments
    room: Room
    rows: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in efficiency.ROWS})
    reads: dict[int, float] = field(default_factory=dict)
    dispatch_seconds: float = 0.0
    spreads: list[float] = field(default_factory=list)

    def tasks(self, threads: int) -> Iterator[Task]:
        """What to do, the most important first."""
        for number in thread_counts(threads):
            yield Task(f"reading with {number} threads", 0.9, partial(self.read, number))
        yield Task("starting operators", 0.2, self.dispatch)
        for vocab, layers in self.plan.arounds:
            yield Task(f"the loop around {layers} layers", 0.5, partial(self.around, vocab, layers))
        for kind, width in itertools.product(efficiency.ACCESSES, self.plan.widths):
            yield Task(f"{kind} of width {width}", 0.4, partial(self.rowwise, kind, width))
        first, *others = self.plan.shapes
        for form in self.plan.formats:
            yield self._product_task(form, first)
        for heads, (tokens, past) in itertools.product(self.plan.attentions, self.plan.passes):
            weight = 0.3 + 3e-7 * tokens * (past + tokens)
            yield Task(f"attention of {tokens} after {past}", weight, partial(self.attention, heads, tokens, past))
        for width, megabytes in self.plan.ladder:
            yield Task(f"{megabytes} MB of weights", 0.6, partial(self.rung, width, megabytes))
        for shape, form in itertools.product(others, self.plan.formats):
            yield self._product_task(form, shape)
        for bits, block, shape in self.plan.branches:
            yield self._product_task((bits, block), shape)
        for shape, form in itertools.product(self.plan.shapes, self.plan.formats[1:] if self.plan.twice else ()):
            yield Task(f"{form[0]}-bit products once more", 0.6, partial(self.again, form, shape))

    @property
    def complete(self) -> bool:
        """Whether a forecast can be made: the rest refines it."""
        return all(self.rows[name] for name in ("products", "attentions", "rowwise", "around"))

    def table(self, threads: int, facts: dict[str, Any]) -> Table:
        """The rows so far, with the peaks that are among them."""
        rates = [2.0 * row.tokens * row.n * row.k / row.seconds for row in self.rows["products"] if row.bits == 32]
        peaks = Peaks(max(self.reads.values()), max(rates), self.dispatch_seconds, threads)
        return Table(peaks, **{name: tuple(rows) for name, rows in self.rows.items()}, facts=facts)

    def read(self, threads: int) -> None:
        """Reading from memory."""
        self.reads[threads] = 1.0 / self._note(self.tools.read(threads))

    def dispatch(self) -> None:
        """Operators that do next to nothing."""
        self.dispatch_seconds = self._note(self.tools.rowwise("add", 1, 8, 256, self.plan.slice_seconds))

    def around(self, vocab: int, layers: int) -> None:
        """The generation loop."""
        trials = self.tools.around(vocab, layers, 2 * self.plan.slice_seconds)
        row = Around(vocab, layers, self._note(trials.prompt), self._note(trials.token))
        self.rows["around"].append(row)

    def rowwise(self, kind: str, width: int) -> None:
        """Norms and elementwise operators."""
        for tokens in self.plan.rows:
            count = 8 if tokens * width > 2**17 else 32
            trials = self.tools.rowwise(kind, tokens, width, count, self.plan.slice_seconds / 3)
            self.rows["rowwise"].append(Rowwise(kind, tokens, width, self._note(trials)))

    def products(self, form: Form, shape: Shape) -> None:
        """A format and shape, with weights far beyond the caches, and in them where they fit."""
        size = product_nbytes(*form, *shape)
        far = self._far(form, shape)
        near = max(1, min(int(self.room.cache_nbytes / 4 / size), far, 64))
        fits = near * size <= self.room.cache_nbytes / 2 and near < far
        self._products(form, shape, far, FEW, cached=False)
        self._products(form, shape, near, (*FEW, *MANY) if fits else MANY, cached=fits)

    def again(self, form: Form, shape: Shape) -> None:
        """A decode step's products once more, minutes later: what slowed the machine for a while is found out."""
        before = self.rows["products"]
        self.rows["products"] = []
        self._products(form, shape, self._far(form, shape), FEW, cached=False)
        faster = {astuple(row)[:-1]: row.seconds for row in self.rows["products"]}
        self.rows["products"] = [
            replace(row, seconds=min(row.seconds, faster.get(astuple(row)[:-1], row.seconds))) for row in before
        ]

    def _far(self, form: Form, shape: Shape) -> int:
        """How many products are far more than the caches hold."""
        return max(1, min(math.ceil(self.room.far_nbytes / product_nbytes(*form, *shape)), MOST_NODES))

    def _products(self, form: Form, shape: Shape, count: int, tokens: Sequence[int], *, cached: bool) -> None:
        taken = self.tools.products(form, shape, count, tokens, self.plan.slice_seconds)
        for number, trials in zip(tokens, taken, strict=True):
            self.rows["products"].append(Product(*form, number, *shape, cached, self._note(trials)))

    def _product_task(self, form: Form, shape: Shape) -> Task:
        weight = 0.9 + 1.5e-8 * shape[0] * shape[1]
        return Task(f"{form[0]}-bit products {shape[0]} x {shape[1]}", weight, partial(self.products, form, shape))

    def rung(self, width: int, megabytes: int) -> None:
        """A working set of the ladder: what a product takes in a chain, without the operators between."""
        size = 2 * product_nbytes(*LADDER, width, width)
        wanted = math.ceil(min(megabytes * 2**20, self.room.far_nbytes) / size)
        count = max(1, min(wanted, MOST_NODES))
        whole = self._note(self.tools.chain(LADDER, width, count, self.plan.slice_seconds))
        table = self.table(1, {})
        between = sum(table.seconds(kind, tokens=1, n=width) for kind in ("norm", "activation"))
        seconds = max((whole - between) / 2, whole / 8)
        self.rows["ladder"].append(Ladder(round(count * size), width, seconds))

    def attention(self, heads: Heads, tokens: int, past: int) -> None:
        """Attention; caches of a decode step are read in turn, as those of a model's layers are."""
        size = 8 * heads[1] * heads[2] * (tokens + past)  # bytes of float32 keys and values
        count = max(1, min(self.room.far_nbytes // size, 32)) if tokens == 1 else (2 if tokens < 512 else 1)
        trials = self.tools.attention(heads, tokens, past, count, self.plan.slice_seconds)
        self.rows["attentions"].append(Attention(tokens, past, *heads, self._note(trials)))

    def _note(self, trials: Trials) -> float:
        """The seconds of trials; how steady they were is kept, too."""
        self.spreads.append(trials.spread)
        return trials.seconds


@dataclass(frozen=True, slots=True)
class Calibration:
    """One machine measured: the table forecasts interpolate, reading speed by threads, and how it went."""

    table: Table
    reads: dict[int, float]  # threads -> bytes per second
    spread: float
    skipped: int
    seconds: float
    date: str

    @property
    def busy(self) -> bool:
        """Whether something else seems to have been running."""
        return self.spread > BUSY


def calibrate(
    threads: int | None = None,
    *,
    plan: Plan = FULL,
    seconds: float = SECONDS,
    tell: Tell = silent,
    instruments: Instruments | None = None,
    room: Room | None = None,
    clock: Clock = time.perf_counter,
) -> Calibration:
    """Measure what `plan` says, the most important first; what does not fit into `seconds` is left out and counted.

    At least what a forecast needs is measured. Raises ValueError for a thread count or budget that is none.
    """
    used = machine.usable_threads() if threads is None else threads
    if used < 1 or not seconds > 0:
        raise ValueError(f"{used} threads for {seconds} s measure nothing; give at least 1 thread and 1 second")
    work = _Work(plan, instruments or Onnx(used), room or Room.here())
    tasks = list(work.tasks(used))
    total = round(100 * sum(task.weight for task in tasks))
    began, done, skipped = clock(), 0.0, 0
    for task in tasks:
        tell(Progress("calibrate", round(done), total, task.name))
        if clock() - began < seconds or not work.complete:
            task.run()
        else:
            skipped += 1
        done += 100 * task.weight
    tell(Progress("calibrate", total, total, ""))
    spread = statistics.median(work.spreads)
    date = datetime.date.today().isoformat()
    facts = {
        "cpu": machine.cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": date,
        "threads": used,
        "spread": round(spread, 4),
        "skipped": skipped,
        "read_bytes_per_s": {str(number): rate for number, rate in work.reads.items()},
    }
    return Calibration(work.table(used, facts), work.reads, spread, skipped, clock() - began, date)


def thread_counts(threads: int) -> list[int]:
    """1, 2, 4, ... and `threads` itself."""
    powers = [2**power for power in range(threads.bit_length()) if 2**power < threads]
    return [*powers, threads]


def cache_nbytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The size of the largest cache of a core; CACHE_NBYTES where the system does not say."""
    scales = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for file in folder.glob("index*/size") if os.name == "posix" else ():
        text = file.read_text(encoding="ascii", errors="replace").strip()
        if text[:-1].isdigit() and text[-1] in scales:
            sizes.append(int(text[:-1]) * scales[text[-1]])
    return max(sizes, default=CACHE_NBYTES)
