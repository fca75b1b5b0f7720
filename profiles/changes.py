"""Two result files of `rlkit bench` compared, test by test, and whether a difference means anything.

A difference is called significant where Welch's t test says so at 95 %: the means of tokens/s are apart by more than t
times the root of both squared standard errors. It knows how rounds scatter within each file, not whether the machine
was in the same state both times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlkit.profiles.bench import Case, Series
from rlkit.profiles.benchfile import PACKAGES, Result
from rlkit.profiles.table import Table
from rlkit.profiles.timing import Summary

SCHEMA_VERSION = 1  # of a comparison as JSON
# Two-sided 95 % points of Student's t by degrees of freedom (any table of it); between two the larger one is taken.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 20: 2.086, 40: 2.021}


@dataclass(frozen=True, slots=True)
class Change:
    """One test of one bundle in two files: tokens/s, `ratio` = b / a, its standard error, whether they really differ.

    `error` and `significant` are None where a file has a single round.
    """

    name: str
    test: Case
    a: Summary
    b: Summary
    ratio: float
    error: float | None
    significant: bool | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "test": self.test.name}


def compare(a: Result, b: Result) -> tuple[Change, ...]:
    """Every test that both files have of a bundle of one name; of two files with one bundle each, names may differ.

    Raises ValueError where they have nothing in common.
    """
    mine, theirs = _by_test(a, b), _by_test(b, a)
    found = tuple(_change(key, series, theirs[key]) for key, series in mine.items() if key in theirs)
    if not found:
        tests = [sorted({f"{name}, {test.name}" for name, test in side}) for side in (mine, theirs)]
        raise ValueError(f"the results share no test: {'; '.join(tests[0])} against {'; '.join(tests[1])}")
    return found


def _by_test(result: Result, other: Result) -> dict[tuple[str, Case], Series]:
    names = [entry.measurement.name for entry in result.entries]
    if len(result.entries) == len(other.entries) == 1:
        names = [" / ".join(dict.fromkeys(sorted((names[0], other.entries[0].measurement.name))))]
    pairs = zip(names, result.entries, strict=True)
    return {(name, series.test): series for name, entry in pairs for series in entry.measurement.series}


def _change(key: tuple[str, Case], a: Series, b: Series) -> Change:
    before, after = a.tokens_per_s, b.tokens_per_s
    ratio = after.mean / before.mean
    error = None
    if before.error is not None and after.error is not None:
        error = ratio * math.hypot(before.error / before.mean, after.error / after.mean)
    return Change(*key, before, after, ratio, error, significant(before, after))


def significant(a: Summary, b: Summary) -> bool | None:
    """Whether two means differ by Welch's t test at 95 %; None where a side has one value."""
    if a.error is None or b.error is None:
        return None
    both = math.hypot(a.error, b.error)
    if not both:
        return a.mean != b.mean
    freedom = both**4 / sum(side**4 / (n - 1) for side, n in ((a.error, a.count), (b.error, b.count)))
    least = max((known for known in T95 if known <= freedom), default=1)
    return abs(a.mean - b.mean) > T95[least] * both


def change_table(changes: Sequence[Change]) -> Table:
    """One row per test: both rates, their ratio and whether it means anything."""
    rows = [
        (
            change.name,
            change.test.name,
            change.a.text(),
            change.b.text(),
            f"{change.ratio:.3f}" + ("" if change.error is None else f" ± {change.error:.3f}"),
            _verdict(change),
        )
        for change in changes
    ]
    columns = ("bundle", "test", "A tokens/s", "B tokens/s", "B / A", "")
    return Table(
        "B against A",
        columns,
        tuple(rows),
        "± of the ratio is its standard error; the verdict, Welch's at 95 %, does not know how busy the machine was.",
    )


def _verdict(change: Change) -> str:
    if change.significant is None:
        return "one round: unknown"
    if not change.significant:
        return "within the noise"
    return "B is faster" if change.ratio > 1 else "B is slower"


def differences(a: Result, b: Result) -> Iterator[str]:
    """What else differs between two files, in sentences: a comparison of speeds may be one of these."""
    pairs = {"machine": (a.host.cpu, b.host.cpu), "system": (a.host.system, b.host.system), "date": (a.date, b.date)}
    for name in PACKAGES:
        pairs[name] = a.versions.get(name, "unknown"), b.versions.get(name, "unknown")
    for what, places in (("threads", "threads"), ("provider", "provider")):
        pairs[what] = _said(a, places), _said(b, places)
    for what, (left, right) in pairs.items():
        if left != right:
            yield f"{what}: {left} against {right}"


def _said(result: Result, field: str) -> str:
    return ", ".join(dict.fromkeys(str(getattr(entry.measurement, field)) for entry in result.entries))
