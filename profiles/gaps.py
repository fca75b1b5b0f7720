"""A comparison as tables for a terminal or a document, and as numbers for a spreadsheet."""

from __future__ import annotations

from collections.abc import Callable

from rlkit.profiles.compare import Compared, Comparison, Row
from rlkit.profiles.table import Table, csv_text

COLUMNS = ("class", "operator", "bits", "runs", "forecast", "measured", "diff", "error", "MB", "GB/s", "GFLOP/s", "gap")
NOTE = (
    "Times in ms; diff: forecast less measured. Gap: its size over that of all rows' differences. GB/s and GFLOP/s: "
    "what the forecast counts over the measured time. An empty cell: not in the forecast, or not in the graph."
)


def tables(found: Comparison) -> tuple[Table, ...]:
    """The classes over all steps, then every step operator by operator."""
    return (_classes(found), *(_step(step) for step in found.compared))


def _step(step: Compared) -> Table:
    rows = [(row.kind, row.name, str(row.bits or ""), *_cells(row), f"{step.share(row):.0%}") for row in step.rows]
    whole = Row("all", "", 0, 0, step.forecast_seconds, step.measured_seconds, *_amounts(step))
    rows.append(("all", "", "", *_cells(whole), ""))
    return Table(step.title, COLUMNS, tuple(rows), NOTE)


def _amounts(step: Compared) -> tuple[float, float]:
    return sum(row.flops for row in step.rows), sum(row.nbytes for row in step.rows)


def _cells(row: Row) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:+.0%}"
    return (
        str(row.count or ""),
        _scaled(row.forecast_seconds, 1e-3, 3),
        _scaled(row.measured_seconds, 1e-3, 3),
        f"{1e3 * row.difference:+.3f}",
        error,
        _scaled(row.nbytes or None, 1e6, 2),
        _scaled(row.bytes_per_s, 1e9, 1),
        _scaled(row.flops_per_s, 1e9, 1),
    )


def _scaled(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def _classes(found: Comparison) -> Table:
    """One row per class and one for the whole; forecast, measured and error of every step."""
    kinds = list(dict.fromkeys(row.kind for step in found.compared for row in step.rows))
    classes = [{row.kind: row for row in step.classes()} for step in found.compared]
    rows = [(kind, *(_both(of.get(kind)) for of in classes)) for kind in kinds]
    wholes = [Row("all", "", 0, 0, step.forecast_seconds, step.measured_seconds) for step in found.compared]
    rows.append(("all", *(_both(whole) for whole in wholes)))
    simple = [Row("", "", 0, 0, step.baseline_seconds, step.measured_seconds) for step in found.compared]
    rows.append(("bytes/bandwidth", *(_both(row) for row in simple)))
    title = f"{found.bundle} ({found.recipe}), {found.threads} threads: forecast of {found.where.place}"
    note = (
        f"Medians of {found.steps} steps of a token. All measured is generation by genai, the loop around it included."
    )
    columns = ("forecast / measured, ms", *(step.title for step in found.compared))
    return Table(f"{title}, {found.where.label}", columns, tuple(rows), note)


def _both(row: Row | None) -> str:
    """ "2.82 / 3.42 (-18%)"."""
    if row is None:
        return ""
    error = "" if row.error is None else f" ({row.error:+.0%})"
    return f"{_scaled(row.forecast_seconds, 1e-3, 2) or '-'} / {_scaled(row.measured_seconds, 1e-3, 2) or '-'}{error}"


_NUMBERS: dict[str, Callable[[Compared, Row], object]] = {
    "prompt_tokens": lambda step, _row: step.prompt_tokens,
    "past_tokens": lambda step, _row: step.past_tokens,
    "class": lambda _step, row: row.kind,
    "operator": lambda _step, row: row.name,
    "bits": lambda _step, row: row.bits or None,
    "runs": lambda _step, row: row.count,
    "forecast_seconds": lambda _step, row: row.forecast_seconds,
    "measured_seconds": lambda _step, row: row.measured_seconds,
    "difference_seconds": lambda _step, row: row.difference,
    "error": lambda _step, row: row.error,
    "flops": lambda _step, row: row.flops,
    "nbytes": lambda _step, row: row.nbytes,
    "bytes_per_s": lambda _step, row: row.bytes_per_s,
    "flops_per_s": lambda _step, row: row.flops_per_s,
    "share": lambda step, row: step.share(row),
}


def to_csv(found: Comparison) -> str:
    """A line per step and operator, in SI units."""
    rows = [[value(step, row) for value in _NUMBERS.values()] for step in found.compared for row in step.rows]
    return csv_text(list(_NUMBERS), rows)
