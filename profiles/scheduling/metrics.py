"""What a run was worth: violated deadlines, times to first and per token, energy, use of the units, XRBench scores.

What counts, the same for every policy:

- A frame is on time if it finished at its deadline or before. Late, dropped, and unfinished with a deadline within the
  run are violations; unfinished frames that are due after the end are left out.
- A request has two targets. TTFT: its first token, from when it could run. TPOT (from two tokens on): the mean time of
  its further tokens, up to the end of the run if that is overdue. A dropped request misses what it has not met yet; an
  unfinished one what was due within the run, the rest is left out.
- `violation_rate` counts all frames and targets alike, so fast streams weigh most; `mean_rate` is the mean over
  streams, where a language model weighs as much as a camera.

TPOT percentiles are over single tokens, `tokens_per_s` is (tokens - 1) / (last - first token) over all requests, as a
reader sees it; `throughput` is tokens over the whole run. Energy is of finished steps; None where one's is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.profiles.scheduling import xrbench
from rlkit.profiles.scheduling.record import NEVER, Run
from rlkit.profiles.scheduling.workload import Llm, Stream

__all__ = ["Language", "Metrics", "Percentiles", "Spread", "StreamMetrics", "measure", "spread"]

SECOND = 1e9  # ns


@dataclass(frozen=True, slots=True)
class Percentiles:
    """In seconds, linear between ranks."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Language:
    """Of a stream of requests; None where nothing of the kind happened."""

    ttft: Percentiles | None
    tpot: Percentiles | None
    ttft_missed: int
    tpot_missed: int
    late_tokens: int  # further tokens that took longer than the target
    tokens: int
    tokens_per_s: float | None
    throughput: float


@dataclass(frozen=True, slots=True)
class StreamMetrics:
    """Of one stream. `jobs` = done + dropped + unfinished; `late` are done; `targets` are what `violations` are of."""

    name: str
    jobs: int
    done: int
    late: int
    dropped: int
    unfinished: int
    targets: int
    violations: int
    response: Percentiles | None  # from arrival to finish
    quality: float | None  # mean over steps, by the tokens that they advance
    energy_joules: float | None
    language: Language | None = None
    score: xrbench.Score | None = None

    @property
    def violation_rate(self) -> float:
        """Violations of targets, 0 to 1; 0 without targets."""
        return self.violations / self.targets if self.targets else 0.0


@dataclass(frozen=True, slots=True)
class Metrics:
    """Of a run; `utilization` by unit name, share of the run."""

    setting: str
    policy: str
    seed: int
    streams: tuple[StreamMetrics, ...]
    utilization: dict[str, float]
    xrbench: float | None

    @property
    def violation_rate(self) -> float:
        """Violated among all frames and targets of all streams, 0 to 1."""
        targets = sum(stream.targets for stream in self.streams)
        return sum(stream.violations for stream in self.streams) / targets if targets else 0.0

    @property
    def mean_rate(self) -> float:
        """Mean over streams of their violation rates, those without targets left out."""
        rates = [stream.violation_rate for stream in self.streams if stream.targets]
        return sum(rates) / len(rates) if rates else 0.0

    @property
    def dropped(self) -> int:
        """Frames and requests given up."""
        return sum(stream.dropped for stream in self.streams)

    @property
    def energy_joules(self) -> float | None:
        """Of all finished steps."""
        known = [stream.energy_joules for stream in self.streams if stream.energy_joules is not None]
        return sum(known) if len(known) == len(self.streams) else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, rates included."""
        streams = [{**asdict(stream), "violation_rate": stream.violation_rate} for stream in self.streams]
        rates = {"violation_rate": self.violation_rate, "mean_rate": self.mean_rate}
        totals = {"dropped": self.dropped, "energy_joules": self.energy_joules}
        return {**asdict(self), "streams": streams, **rates, **totals}


@dataclass(frozen=True, slots=True)
class Spread:
    """How far policies differ: the lowest and highest rate, and their names.

    The RTGen paper's abstract says that its policies differ by 41.7 % in violation rate on average and not how that is
    computed; `relative` is our reading, (highest - lowest) / highest.
    """

    best: str
    worst: str
    lowest: float
    highest: float

    @property
    def points(self) -> float:
        """Highest - lowest, in percentage points."""
        return 100.0 * (self.highest - self.lowest)

    @property
    def relative(self) -> float:
        """(highest - lowest) / highest, 0 to 1; 0 if nothing was violated."""
        return (self.highest - self.lowest) / self.highest if self.highest else 0.0


def spread(rates: Mapping[str, float]) -> Spread:
    """Of violation rates by policy, the first of equals. ValueError: no policies."""
    if not rates:
        raise ValueError("spread of no policies: run at least one")
    best, worst = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    return Spread(best, worst, rates[best], rates[worst])


def measure(run: Run) -> Metrics:
    """All metrics of a run."""
    setting = run.workload.setting
    busy = [0] * len(setting.units)
    for start, finish, _, option in (*run.rows, *run.cut):
        busy[option.unit] += finish - start
    spent = _spent(run)
    quality = _quality(run)
    table = _Table(run)
    streams = tuple(
        _requests(table, place, stream, spent, quality[place])
        if isinstance(stream, Llm)
        else _frames(table, place, stream, spent, quality[place])
        for place, stream in enumerate(setting.streams)
    )
    scores = [stream.score for stream in streams if stream.score is not None]
    used = {name: time / setting.duration for name, time in zip(setting.units, busy, strict=True)}
    return Metrics(setting.name, run.policy, run.workload.seed, streams, used, xrbench.overall(scores))


class _Table:
    """A run as arrays, (jobs,) each."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.end = run.workload.setting.duration
        self.streams = np.array(run.workload.streams, np.int64)
        self.arrivals = np.array(run.workload.arrivals, np.int64)
        self.deadlines = np.array(run.workload.deadlines, np.int64)
        self.finished = np.array(run.finished, np.int64)
        self.dropped = np.array(run.dropped, np.int64)

    def numbers(self, place: int) -> NDArray[np.int64]:
        """Of a stream's jobs, in order."""
        return np.flatnonzero(self.streams == place)


def _spent(run: Run) -> list[float | None]:
    """Millijoule by job number, None if a step's are unknown."""
    spent: list[float | None] = [0.0] * len(run.workload)
    for _, _, number, option in run.rows:
        before = spent[number]
        spent[number] = None if before is None or option.millijoule is None else before + option.millijoule
    return spent


def _quality(run: Run) -> list[float | None]:
    """Mean quality of each stream's steps, weighted with tokens."""
    count = len(run.workload.setting.streams)
    worth, weight = [0.0] * count, [0] * count
    streams = run.workload.streams
    for _, _, number, option in run.rows:
        place, units = streams[number], option.units or 1
        worth[place] += option.quality * units
        weight[place] += units
    return [value / total if total else None for value, total in zip(worth, weight, strict=True)]


def _percentiles(ns: Sequence[int] | NDArray[np.int64]) -> Percentiles | None:
    if not len(ns):
        return None
    p50, p95, p99 = (float(value) / SECOND for value in np.percentile(ns, (50, 95, 99)))
    return Percentiles(p50, p95, p99)


def _joules(spent: Sequence[float | None]) -> float | None:
    known = [mj for mj in spent if mj is not None]
    return sum(known) / 1000.0 if len(known) == len(spent) else None


def _frames(
    table: _Table, place: int, stream: Stream, spent: list[float | None], quality: float | None
) -> StreamMetrics:
    numbers = table.numbers(place)
    finished, deadlines = table.finished[numbers], table.deadlines[numbers]
    ran = finished != NEVER
    gone = table.dropped[numbers] != NEVER
    left_out = ~ran & ~gone & (deadlines > table.end)
    late = int((ran & (finished > deadlines)).sum())
    done, dropped = int(ran.sum()), int(gone.sum())
    targets = len(numbers) - int(left_out.sum())
    energies = [spent[number] for number in numbers[ran].tolist()]
    lates = (finished - deadlines)[ran].tolist()
    return StreamMetrics(
        name=stream.name,
        jobs=len(numbers),
        done=done,
        late=late,
        dropped=dropped,
        unfinished=len(numbers) - done - dropped,
        targets=targets,
        violations=targets - (done - late),
        response=_percentiles((finished - table.arrivals[numbers])[ran]),
        quality=quality,
        energy_joules=_joules(energies),
        score=xrbench.score(lates, energies, targets, dropped) if targets else None,
    )


@dataclass(slots=True)
class _Targets:
    """Counts over the requests of a stream."""

    targets: int = 0
    ttft_missed: int = 0
    tpot_missed: int = 0
    late: int = 0

    def ttft(self, met: bool) -> None:
        self.targets += 1
        self.ttft_missed += not met

    def tpot(self, met: bool) -> None:
        self.targets += 1
        self.tpot_missed += not met


def _requests(table: _Table, place: int, llm: Llm, spent: list[float | None], quality: float | None) -> StreamMetrics:
    run = table.run
    numbers: list[int] = table.numbers(place).tolist()
    counts = _Targets()
    first, gaps, response, tokens, span = [], [], [], 0, 0
    for number in numbers:
        times, submitted = run.tokens.get(number, []), run.submitted.get(number)
        missed = _judge(counts, table, llm, number)
        if run.finished[number] != NEVER and submitted is not None:
            response.append(run.finished[number] - submitted)
            counts.late += missed
        if times and submitted is not None:
            first.append(times[0] - submitted)
            gaps += [after - before for before, after in pairwise(times)]
            tokens += len(times)
            span += times[-1] - times[0]
    language = Language(
        ttft=_percentiles(first),
        tpot=_percentiles(gaps),
        ttft_missed=counts.ttft_missed,
        tpot_missed=counts.tpot_missed,
        late_tokens=sum(gap > llm.tpot for gap in gaps),
        tokens=tokens,
        tokens_per_s=len(gaps) / (span / SECOND) if span else None,
        throughput=tokens / (table.end / SECOND),
    )
    dropped = sum(run.dropped[number] != NEVER for number in numbers)
    return StreamMetrics(
        name=llm.name,
        jobs=len(numbers),
        done=len(response),
        late=counts.late,
        dropped=dropped,
        unfinished=len(numbers) - len(response) - dropped,
        targets=counts.targets,
        violations=counts.ttft_missed + counts.tpot_missed,
        response=_percentiles(response),
        quality=quality,
        energy_joules=_joules([spent[number] for number in numbers]),
        language=language,
    )


def _judge(counts: _Targets, table: _Table, llm: Llm, number: int) -> bool:
    """Count a request's targets and whether they were met; True if it missed one."""
    run, before = table.run, counts.ttft_missed + counts.tpot_missed
    times = run.tokens.get(number, [])
    several = run.workload.outputs[number] > 1
    gone = run.dropped[number] != NEVER
    # What is still to wait for (its frame has not finished) is due by its nominal time.
    due = run.submitted.get(number, run.workload.arrivals[number]) + llm.ttft
    if not times:
        if gone or due <= table.end:
            counts.ttft(met=False)
        if several and (gone or due + llm.tpot <= table.end):
            counts.tpot(met=False)
        return counts.ttft_missed + counts.tpot_missed > before
    counts.ttft(met=times[0] <= due)
    if gone:
        counts.tpot(met=False)
    elif run.finished[number] == NEVER and table.end > times[-1] + llm.tpot:
        counts.tpot(met=table.end - times[0] <= llm.tpot * len(times))
    elif len(times) > 1:
        counts.tpot(met=times[-1] - times[0] <= llm.tpot * (len(times) - 1))
    return counts.ttft_missed + counts.tpot_missed > before
