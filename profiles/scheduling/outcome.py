"""What simulated runs were worth: one run's metrics and latencies, and the mean of a policy's runs over seeds.

`Outcome.rate`, the headline, is the mean over streams, so that each model counts alike, as in XRBench's score; `pooled`
counts all frames and targets alike. Percentiles are of one run each, and their mean over seeds is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from rlkit.profiles.scheduling import xrbench
from rlkit.profiles.scheduling.metrics import Language, Metrics, Percentiles, StreamMetrics, measure
from rlkit.profiles.scheduling.record import Run

SECOND = 1e9  # ns


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run; `ttft`, `tpot` (seconds) and `tokens_per_s` are of the requests of all streams together."""

    metrics: Metrics
    ttft: Percentiles | None
    tpot: Percentiles | None
    tokens_per_s: float | None
    events: int

    @property
    def rate(self) -> float:
        """Violation rate, the mean over streams, 0 to 1."""
        return self.metrics.mean_rate

    @property
    def pooled(self) -> float:
        """Violation rate over all frames and targets, 0 to 1."""
        return self.metrics.violation_rate

    @property
    def without_energy(self) -> float | None:
        """XRBench's score as if no energy were spent, for units of which none is known; None without frames."""
        scores = [
            stream.score.real_time * stream.done / stream.targets * stream.score.qoe
            for stream in self.metrics.streams
            if stream.score is not None
        ]
        return 100.0 * statistics.fmean(scores) if scores else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        more: dict[str, Any] = {
            name: value and asdict(value) for name, value in (("ttft", self.ttft), ("tpot", self.tpot))
        }
        more |= {"tokens_per_s": self.tokens_per_s, "events": self.events, "without_energy": self.without_energy}
        return {**self.metrics.to_json(), **more}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Outcome:
        """The inverse of `to_json`; KeyError or TypeError for what is none."""
        streams = tuple(_stream(row) for row in table["streams"])
        metrics = Metrics(**{**_fields(Metrics, table), "streams": streams})
        ttft, tpot = (_percentiles(table[name]) for name in ("ttft", "tpot"))
        return cls(metrics, ttft, tpot, table["tokens_per_s"], table["events"])


def _fields(kind: Any, table: dict[str, Any]) -> dict[str, Any]:
    return {item.name: table[item.name] for item in fields(kind)}


def _percentiles(table: dict[str, Any] | None) -> Percentiles | None:
    return None if table is None else Percentiles(**table)


def _stream(row: dict[str, Any]) -> StreamMetrics:
    language, score = row["language"], row["score"]
    if language is not None:
        parts = {name: _percentiles(language[name]) for name in ("ttft", "tpot")}
        language = Language(**{**_fields(Language, language), **parts})
    made = {
        "response": _percentiles(row["response"]),
        "language": language,
        "score": None if score is None else xrbench.Score(**score),
    }
    return StreamMetrics(**{**_fields(StreamMetrics, row), **made})


def outcome(run: Run) -> Outcome:
    """Of a run, simulated or real."""
    first, gaps, span = list[int](), list[int](), 0
    for number, times in run.tokens.items():
        if times and (submitted := run.submitted.get(number)) is not None:
            first.append(times[0] - submitted)
            gaps += [after - before for before, after in pairwise(times)]
            span += times[-1] - times[0]
    speed = len(gaps) / (span / SECOND) if span else None
    return Outcome(measure(run), _of(first), _of(gaps), speed, run.events)


def _of(times: Sequence[int]) -> Percentiles | None:
    if not times:
        return None
    p50, p95, p99 = (float(value) / SECOND for value in np.percentile(times, (50, 95, 99)))
    return Percentiles(p50, p95, p99)


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """Of one stream under one policy, means over seeds; None where nothing of the kind happened or is known."""

    name: str
    rate: float | None
    dropped: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    tokens_per_s: float | None
    quality: float | None
    energy_joules: float | None
    score: xrbench.Score | None  # of frames


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one policy, means over seeds. `deviation`: standard deviation of `rate` over seeds, None for a single one.

    `xrbench` is the overall score, 0 to 100; its parts are in the streams' scores.
    """

    policy: str
    rates: tuple[float, ...]  # by seed
    pooled: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    tokens_per_s: float | None
    dropped: float
    utilization: dict[str, float]
    energy_joules: float | None
    xrbench: float | None
    without_energy: float | None
    streams: tuple[StreamSummary, ...]
    events: int

    @property
    def rate(self) -> float:
        """Violation rate, mean over streams and seeds."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float | None:
        """Between seeds."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "rate": self.rate, "deviation": self.deviation}


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """Of one policy's runs with different seeds. ValueError: none, or of several policies."""
    names = {one.metrics.policy for one in outcomes}
    if len(names) != 1:
        raise ValueError(f"a summary of {len(names)} policies: give the runs of one")
    units = outcomes[0].metrics.utilization
    places = range(len(outcomes[0].metrics.streams))
    return Summary(
        policy=names.pop(),
        rates=tuple(one.rate for one in outcomes),
        pooled=statistics.fmean(one.pooled for one in outcomes),
        ttft=_percents(one.ttft for one in outcomes),
        tpot=_percents(one.tpot for one in outcomes),
        tokens_per_s=_mean(one.tokens_per_s for one in outcomes),
        dropped=statistics.fmean(one.metrics.dropped for one in outcomes),
        utilization={name: statistics.fmean(one.metrics.utilization[name] for one in outcomes) for name in units},
        energy_joules=_known(one.metrics.energy_joules for one in outcomes),
        xrbench=_known(one.metrics.xrbench for one in outcomes),
        without_energy=_mean(one.without_energy for one in outcomes),
        streams=tuple(_summary([one.metrics.streams[place] for one in outcomes]) for place in places),
        events=sum(one.events for one in outcomes),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _known(values: Iterable[float | None]) -> float | None:
    """The mean, None if one is not known."""
    found = list(values)
    return None if None in found else _mean(found)


def _percents(values: Iterable[Percentiles | None]) -> Percentiles | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Percentiles(*(statistics.fmean(getattr(one, item.name) for one in known) for item in fields(Percentiles)))


def _scores(values: Iterable[xrbench.Score | None]) -> xrbench.Score | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    real_time, qoe = (statistics.fmean(getattr(one, name) for one in known) for name in ("real_time", "qoe"))
    return xrbench.Score(real_time, _known(one.energy for one in known), qoe, _known(one.model for one in known))


def _summary(runs: Sequence[StreamMetrics]) -> StreamSummary:
    spoken = [one.language for one in runs if one.language is not None]
    return StreamSummary(
        name=runs[0].name,
        rate=_mean(one.violation_rate if one.targets else None for one in runs),
        dropped=statistics.fmean(one.dropped for one in runs),
        ttft=_percents(one.ttft for one in spoken),
        tpot=_percents(one.tpot for one in spoken),
        tokens_per_s=_mean(one.tokens_per_s for one in spoken),
        quality=_mean(one.quality for one in runs),
        energy_joules=_known(one.energy_joules for one in runs),
        score=_scores(one.score for one in runs),
    )
