"""What this machine can do, measured with numpy in a few seconds: read bandwidth and matrix-product speed.

    read_bytes_per_s   a buffer far larger than the caches, read once per pass, one slice per thread; the best pass,
                       since everything that disturbs a pass makes it slower
    flops_per_s        float32 products of a prefill's shape through numpy's BLAS; again the best

What it does not know: the int8 peak. The 4-bit and 2-bit kernels with accuracy_level 4 compute in int8 (VNNI where the
CPU has it), up to four times the float32 rate, so `flops_per_s` is a lower bound of what prefill may reach, and a
forecast made with it an upper bound of compute time. BLAS chooses its own thread count. Efficiency per kind of operator
and the cost of starting one are not measured either: forecasts made from this are uncalibrated.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from rlkit.runtime.processor import cpu_name as cpu_name  # others import it from here

Clock = Callable[[], float]

READ_NBYTES = 512 * 2**20  # far larger than any laptop's last-level cache
CHUNK_NBYTES = 4 * 2**20  # one numpy call reads this much; small enough to spread, large enough to hide the call
PREFILL_SHAPES = ((256, 1024, 1024), (256, 2048, 2048), (512, 2048, 2048))  # (tokens, K, N)


@dataclass(frozen=True, slots=True)
class Rate:
    """The best of several trials, and how far the median one stayed below it."""

    best: float
    median: float
    trials: int

    @property
    def spread(self) -> float:
        """(best - median) / best: near 0 on a quiet machine."""
        return 1.0 - self.median / self.best


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine's identity and measured peaks; `threads` is what this process may use."""

    cpu: str
    system: str
    cores: int
    threads: int
    memory_nbytes: int
    read_bytes_per_s: float
    read_spread: float
    flops_per_s: float
    flops_spread: float
    date: str
    source: str = "measured"

    def __post_init__(self) -> None:
        if not (self.read_bytes_per_s > 0 and self.flops_per_s > 0):
            rates = f"{self.read_bytes_per_s} bytes/s and {self.flops_per_s} FLOP/s"
            raise ValueError(f"{rates} are no peaks; measure the machine again")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Machine:
        """The inverse of `to_json`."""
        return cls(**{name: table[name] for name in cls.__slots__})


def measure_machine(*, threads: int | None = None, read_nbytes: int = READ_NBYTES, seconds: float = 1.5) -> Machine:
    """Measure read bandwidth and float32 matrix products for about `seconds` each."""
    used = threads or usable_threads()
    read = measure_read(used, nbytes=read_nbytes, seconds=seconds)
    product = measure_matmul(seconds=seconds)
    return Machine(
        cpu=cpu_name(),
        system=f"{platform.system()} {platform.machine()}",
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        threads=used,
        memory_nbytes=int(psutil.virtual_memory().total),
        read_bytes_per_s=read.best,
        read_spread=read.spread,
        flops_per_s=product.best,
        flops_spread=product.spread,
        date=datetime.date.today().isoformat(),
    )


def usable_threads() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def measure_read(
    threads: int, *, nbytes: int = READ_NBYTES, seconds: float = 1.5, clock: Clock = time.perf_counter
) -> Rate:
    """Bytes per second of reading `nbytes` (at most an eighth of free memory) over and over for `seconds`."""
    words = min(nbytes, int(psutil.virtual_memory().available) // 8) // 4
    buffer = np.ones(words, dtype=np.int32)  # written once: untouched pages would all be one cached page of zeros
    slices = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:

        def once() -> None:
            for _ in pool.map(_read, slices):
                pass

        return _best(once, buffer.nbytes, seconds=seconds, clock=clock)


def _read(part: NDArray[np.int32]) -> None:
    # max over integers is numpy's leanest reduction (no rounding order to keep) and runs without the interpreter lock.
    step = CHUNK_NBYTES // 4
    for start in range(0, len(part), step):
        part[start : start + step].max()


def measure_matmul(
    *,
    shapes: tuple[tuple[int, int, int], ...] = PREFILL_SHAPES,
    seconds: float = 1.5,
    clock: Clock = time.perf_counter,
) -> Rate:
    """FLOP per second of float32 products (tokens, K) x (K, N): the best shape's rate."""
    rng = np.random.default_rng(0)
    rates = []
    for tokens, k, n in shapes:
        x = rng.standard_normal((tokens, k), dtype=np.float32)  # (tokens, K)
        w = rng.standard_normal((k, n), dtype=np.float32)  # (K, N)
        out = np.empty((tokens, n), dtype=np.float32)

        def once(x: NDArray[np.float32] = x, w: NDArray[np.float32] = w, out: NDArray[np.float32] = out) -> None:
            np.matmul(x, w, out=out)

        rates.append(_best(once, 2 * tokens * k * n, seconds=seconds / len(shapes), clock=clock))
    return max(rates, key=lambda rate: rate.best)


def _best(once: Callable[[], object], amount: int, *, seconds: float, clock: Clock) -> Rate:
    """Repeat `once` for `seconds` (three times at least, after one warm-up) and rate it as `amount` per second."""
    once()
    taken = list(_durations(once, seconds, clock))
    return Rate(amount / min(taken), amount / statistics.median(taken), len(taken))


def _durations(once: Callable[[], object], seconds: float, clock: Clock) -> Iterator[float]:
    began = clock()
    count = 0
    while count < 3 or clock() - began < seconds:
        start = clock()
        once()
        yield clock() - start
        count += 1
