"""The measuring end of `rlkit tune`: settings of one bundle, each in a worker process of its own.

Settings reach a worker as a file that RLKIT_TUNED names, so it opens the bundle just as every command does.
"""

from __future__ import annotations

import contextlib
import datetime
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from rlkit.profiles import worker
from rlkit.profiles.bench import Work
from rlkit.profiles.options import facts_here
from rlkit.profiles.tune import SECONDS, Clock, Outcome, Sample, tune
from rlkit.profiles.worker import Worker
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import Tell, silent
from rlkit.runtime import hugepages
from rlkit.runtime.folder import read_bundle, threads_here
from rlkit.runtime.tuned import OVERRIDE, Tuned, machine_facts

PIECE = 0.25  # seconds that the prompt and the reply of a round shall take
PILOT = (16, 8)  # tokens of prompt and reply that the sizes of rounds are found with
LONGEST_PROMPT, LONGEST_REPLY = 512, 64
MOST_OPEN = 6
LOOK = 0.5  # seconds of watching what others use
SPARE = 0.8  # of the free memory that open workers may take


class Workers:
    """Worker processes, one per setting, kept open as memory allows; use it in a `with` block."""

    def __init__(self, bundle: Path, *, clock: Clock = time.monotonic) -> None:
        self._bundle = bundle
        self._clock = clock
        config, _manifest = read_bundle(bundle)
        self._context = int(config["model"]["context_length"])
        self._vocab = int(config["model"]["vocab_size"])
        self._rng = random.Random(0)
        self._open: dict[str, tuple[Worker, contextlib.ExitStack]] = {}  # the longest unused first
        self._sizes = tuple(min(size, (self._context - 2) // 2) for size in PILOT)
        self._sized = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0
        self._opening = 0.0
        self._round_seconds = 0.0
        self._room = MOST_OPEN
        if min(self._sizes) < 1:
            raise ValueError(f"{bundle} has a context of {self._context} tokens, too short to measure")

    def __enter__(self) -> Workers:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.fresh()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def opening(self) -> float:
        """Seconds that opening took, the longest so far."""
        return self._opening

    @property
    def round_seconds(self) -> float:
        """Seconds that a round takes, without opening."""
        return self._round_seconds

    @property
    def room(self) -> int:
        """How many workers may be open at a time."""
        return self._room

    def fresh(self) -> None:
        """End every worker."""
        while self._open:
            _worker, stack = self._open.pop(next(iter(self._open)))
            stack.close()

    def round(self, tuned: Tuned) -> Sample:
        """A prompt, then a reply, with settings that are opened if they are not."""
        opened = self._worker(tuned)
        if not self._sized:
            self._find_sizes(opened)
        prompt, reply = self._sizes
        start = self._clock()
        sample = Sample(self._prefill(opened, prompt) / prompt, self._decode(opened, reply) / reply)
        self._round_seconds = max(self._round_seconds, self._clock() - start)
        return sample

    def _find_sizes(self, opened: Worker) -> None:
        """How many tokens a round has, from a warm run of few, and how many workers memory holds."""
        prompt, reply = self._sizes
        for _ in range(2):
            speeds = prompt / self._prefill(opened, prompt), reply / self._decode(opened, reply)
        longest = (min(LONGEST_PROMPT, self._context // 2), min(LONGEST_REPLY, self._context // 2 - 2))
        least = self._sizes
        self._sizes = tuple(
            max(min(round(PIECE * speed), most), few) for speed, most, few in zip(speeds, longest, least, strict=True)
        )
        self._sized = True
        free = int(psutil.virtual_memory().available)
        peak = opened.peak_nbytes() or 0
        more = int(SPARE * free / peak) if peak else MOST_OPEN - 1
        self._room = max(1, min(MOST_OPEN, 1 + more))

    def _prefill(self, opened: Worker, tokens: int) -> float:
        return sum(opened.generate(Work([], self._ids(tokens), 1, self._context_used)))

    def _decode(self, opened: Worker, tokens: int) -> float:
        return sum(opened.generate(Work([], self._ids(1), tokens, self._context_used)))

    @property
    def _context_used(self) -> int:
        return min(self._context, LONGEST_PROMPT + LONGEST_REPLY + 2)

    def _ids(self, count: int) -> list[int]:
        low = min(256, self._vocab // 2)  # special tokens tend to have the lowest ids
        return [self._rng.randrange(low, self._vocab) for _ in range(count)]

    def _worker(self, tuned: Tuned) -> Worker:
        key = repr(replace(tuned, about={}))
        if key in self._open:
            self._open[key] = self._open.pop(key)
            return self._open[key][0]
        while len(self._open) >= self._room:
            self._open.pop(next(iter(self._open)))[1].close()
        start = self._clock()
        stack = contextlib.ExitStack()
        opened = stack.enter_context(self._start(tuned))
        self._open[key] = opened, stack
        self._opening = max(self._opening, self._clock() - start)
        return opened

    @contextlib.contextmanager
    def _start(self, tuned: Tuned) -> Iterator[Worker]:
        assert self._folder is not None, "workers are used in a with block"
        self._count += 1
        path = Path(self._folder.name, f"{self._count}.json")
        write_json(path, tuned.to_json())
        variables = {**hugepages.variables(), **tuned.environment, OVERRIDE: str(path)}
        with worker.start(str(self._bundle), worker.command(self._bundle), variables) as opened:
            yield opened


def default_of(bundle: Path) -> Tuned:
    """What a bundle runs with where nothing was measured; ValueError or FileNotFoundError for what is no bundle."""
    return Tuned(threads_here(*read_bundle(bundle)))


def tune_bundle(bundle: Path, *, seconds: float = SECONDS, inexact: bool = False, tell: Tell = silent) -> Outcome:
    """Measure settings of a bundle on this machine's processor; see `tune`. Writes nothing."""
    default = default_of(bundle)
    load = psutil.cpu_percent(LOOK) / 100
    with Workers(bundle) as bench:
        facts = facts_here(two_bits=_two_bits(bundle))
        return replace(tune(bench, facts, default, seconds=seconds, inexact=inexact, tell=tell), load=load)


def _two_bits(bundle: Path) -> bool:
    """Whether its manifest says so; False for somebody else's bundle."""
    _config, manifest = read_bundle(bundle)
    return any(tensor.get("bits") == 2 for tensor in manifest.get("tensors") or ())


def about(bundle: Path) -> dict[str, Any]:
    """What is written beside settings."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"bundle": bundle.resolve().name, "date": date, "machine": machine_facts()}
