"""How long depth networks take for a frame: their ONNX files open side by side, frames in turns, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from rlkit.profiles.depthresult import Latency
from rlkit.recover.depthfile import Kind
from rlkit.recover.progress import Progress, Tell, silent

WARM_UPS, FEWEST = 2, 5
INPUTS = {Kind.MONO: ("image",), Kind.STEREO: ("left", "right")}
Clock = Callable[[], float]


def latencies(  # noqa: PLR0913, what is timed, where, and for how long
    files: Mapping[str, Path],
    kind: Kind,
    frame: tuple[int, int],
    *,
    threads: int = 1,
    seconds: float = 20.0,
    provider: str = "cpu",
    tell: Tell = silent,
    clock: Clock = time.perf_counter,
) -> dict[str, Latency]:
    """Each file's seconds for a frame of height x width, about `seconds` for all of them together.

    In turns, so that what else the machine does meets all of them alike; compare medians of one call only.
    """
    from rlkit.runtime import framebench

    shapes = {name: (1, 3, *frame) for name in INPUTS[kind]}
    opened = {
        name: framebench.open_frame(path, provider=provider, threads=threads, shapes=shapes)
        for name, path in files.items()
    }
    for each in opened.values():
        for _ in range(WARM_UPS):
            each.run()
    taken: dict[str, list[float]] = {name: [] for name in opened}
    began, rounds = clock(), 0
    while opened and (rounds < FEWEST or clock() - began < seconds):
        for name, each in opened.items():
            start = clock()
            each.run()
            taken[name].append(clock() - start)
        rounds += 1
        tell(Progress("time frames", min(round(clock() - began), round(seconds)), round(seconds)))
    return {name: _latency(times, provider, threads) for name, times in taken.items()}


def forecast(
    files: Mapping[str, Path],
    kind: Kind,
    frame: tuple[int, int],
    measured: Mapping[str, Latency],
    tell: Tell = silent,
) -> dict[str, Latency]:
    """The same latencies with what this machine's single operators let expect; those are measured once and kept."""
    from rlkit.profiles import vision, visionrates

    shapes = {name: (1, 3, *frame) for name in INPUTS[kind]}
    threads = {each.threads for each in measured.values()}
    rates = {count: visionrates.VisionRates(visionrates.here(count, tell=tell)) for count in threads}
    found = {}
    for name, each in measured.items():
        expected = vision.forecast_file(files[name], rates[each.threads], shapes=shapes).seconds
        found[name] = replace(each, forecast_seconds=expected)
    return found


def _latency(times: list[float], device: str, threads: int) -> Latency:
    low, middle, high = statistics.quantiles(times, n=4)
    return Latency(device, threads, middle, low, high, len(times))
