"""Simulated beside real: the same workload and policy, and how far apart what was measured of both is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rlkit.profiles.scheduling.metrics import Metrics, StreamMetrics
from rlkit.profiles.scheduling.together import said
from rlkit.runtime.dispatch import Effort
from rlkit.runtime.rehearse import Rehearsed

__all__ = ["MOST_POINTS", "MOST_TTFT", "Case", "Row", "Validation", "met", "rows"]

MOST_POINTS = 5.0  # between violation rates, in percentage points
MOST_TTFT = 0.20  # of the simulated median time to the first token
ALL = "all"
Measure = Callable[[Metrics], float | None]


@dataclass(frozen=True, slots=True)
class Case:
    """One policy and seed; `plain` is simulated with the profile's costs as they are, `simulated` with rehearsed."""

    policy: str
    seed: int
    plain: Metrics
    simulated: Metrics
    real: Metrics
    effort: Effort


@dataclass(frozen=True, slots=True)
class Row:
    """A measure, as the mean over seeds. `apart`: points for shares, else a share of the simulated; `most`: the bar."""

    policy: str
    stream: str
    measure: str
    unit: str
    plain: float | None
    simulated: float | None
    real: float | None
    apart: float | None
    most: float | None = None

    @property
    def within(self) -> bool | None:
        """Whether it is within its bar; None where there is none, or nothing to compare."""
        return None if self.most is None or self.apart is None else abs(self.apart) <= self.most


@dataclass(frozen=True, slots=True)
class Validation:
    """All of it. `demands` and `slower` by kind of step: fitted demand, rehearsed over profiled time alone."""

    scenario: str
    duration: int
    machine: dict[str, Any]
    units: tuple[str, ...]
    models: dict[str, str]  # where they are from
    cases: tuple[Case, ...]
    rehearsed: Rehearsed
    demands: dict[str, float]
    slower: dict[str, float]
    switch: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        cases = [
            {
                "policy": case.policy,
                "seed": case.seed,
                "profile_alone": case.plain.to_json(),
                "simulated": case.simulated.to_json(),
                "real": case.real.to_json(),
                "deciding": asdict(case.effort),
            }
            for case in self.cases
        ]
        pairs = [{**pair._asdict(), "fitted": list(said(self.demands, pair))} for pair in self.rehearsed.pairs]
        acts = [{"kind": kind, "unit": unit, **asdict(kept)} for (kind, unit), kept in self.rehearsed.acts.items()]
        return {
            "schema_version": 1,
            "kind": "schedule-validation",
            "scenario": self.scenario,
            "duration_s": self.duration / 1e9,
            "machine": self.machine,
            "units": list(self.units),
            "models": self.models,
            "bars": {"violation_points": MOST_POINTS, "ttft_share": MOST_TTFT},
            "met": met(self),
            "compared": [{**asdict(row), "within": row.within} for row in rows(self)],
            "rehearsed": {"acts": acts, "pairs": pairs, "demands": self.demands, "over_profile": self.slower},
            "switch_ns": {name: list(ns) for name, ns in self.switch.items()},
            "cases": cases,
            "notes": list(self.notes),
        }


def met(found: Validation) -> bool:
    """Whether every bar is met."""
    return all(row.within is not False for row in rows(found))


def rows(found: Validation) -> list[Row]:
    """Every policy's measures."""
    made = []
    for policy in dict.fromkeys(case.policy for case in found.cases):
        made += list(_rows(policy, [case for case in found.cases if case.policy == policy]))
    return made


def _rows(policy: str, cases: Sequence[Case]) -> Iterator[Row]:
    def row(stream: str, measure: str, unit: str, of: Measure, most: float | None = None) -> Row:
        plain, simulated, real = (
            _mean([of(metrics) for metrics in each])
            for each in ([c.plain for c in cases], [c.simulated for c in cases], [c.real for c in cases])
        )
        return Row(policy, stream, measure, unit, plain, simulated, real, _apart(simulated, real, unit), most)

    yield row(ALL, "violations, of all", "%", lambda m: 100 * m.violation_rate, MOST_POINTS)
    yield row(ALL, "violations, mean of streams", "%", lambda m: 100 * m.mean_rate, MOST_POINTS)
    for place, stream in enumerate(cases[0].real.streams):
        yield row(stream.name, "violations", "%", lambda m, p=place: _rate(m.streams[p]))  # type: ignore[misc]
        if stream.language is None:
            yield row(stream.name, "response, median", "ms", lambda m, p=place: _response(m.streams[p]))  # type: ignore[misc]
            continue
        yield row(stream.name, "TTFT, median", "ms", lambda m, p=place: _latency(m.streams[p], "ttft"), MOST_TTFT)  # type: ignore[misc]
        yield row(stream.name, "TPOT, median", "ms", lambda m, p=place: _latency(m.streams[p], "tpot"))  # type: ignore[misc]
        yield row(stream.name, "tokens", "", lambda m, p=place: _tokens(m.streams[p]))  # type: ignore[misc]
    for name in cases[0].real.utilization:
        yield row(name, "busy", "%", lambda m, n=name: 100 * m.utilization[n])  # type: ignore[misc]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _apart(simulated: float | None, real: float | None, unit: str) -> float | None:
    if simulated is None or real is None:
        return None
    if unit == "%":
        return real - simulated
    return (real - simulated) / simulated if simulated else None


def _rate(stream: StreamMetrics) -> float | None:
    return 100 * stream.violation_rate if stream.targets else None


def _response(stream: StreamMetrics) -> float | None:
    return None if stream.response is None else 1e3 * stream.response.p50


def _latency(stream: StreamMetrics, which: str) -> float | None:
    found = getattr(stream.language, which)
    return None if found is None else 1e3 * float(found.p50)


def _tokens(stream: StreamMetrics) -> float | None:
    return None if stream.language is None else float(stream.language.tokens)
