"""A comparison as bars: what was forecast, hatched, under what was measured, the largest differences first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlkit.profiles.compare import Compared, Comparison, Row, gap
from rlkit.profiles.plots import BLUE, VERMILLION
from rlkit.profiles.timing import milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 8  # operators with bars of their own, by the size of their difference
ROW_INCHES, PANEL_INCHES = 0.42, 0.9


def draw_gaps(found: Comparison) -> Figure:
    """A panel per step: the whole, then its operators."""
    from matplotlib.figure import Figure

    panels = [_bars(step) for step in found.compared]
    heights = [PANEL_INCHES + ROW_INCHES * len(rows) for rows in panels]
    figure = Figure(figsize=(8.8, 0.9 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, step, rows in zip(axes, found.compared, panels, strict=True):
        _panel(axis, step, rows)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"{found.bundle}, forecast of {found.where.place}, {found.where.label}", fontsize=11)
    return figure


def describe(found: Comparison) -> str:
    """The chart in words."""
    return "Forecast beside measurement. " + " ".join(
        f"{step.title}: {step.error:+.0%}, {gap(step, found.where)}." for step in found.compared
    )


def _bars(step: Compared) -> list[Row]:
    """The whole, the operators that differ most, and the others as one."""
    ordered = list(step.ordered)
    others = ordered[SHOWN:]
    rows = [Row("all", "whole step", 0, 0, step.forecast_seconds, step.measured_seconds), *ordered[:SHOWN]]
    if others:
        told, took = (
            sum(getattr(row, f"{side}_seconds") or 0.0 for row in others) for side in ("forecast", "measured")
        )
        rows.append(Row("others", f"{len(others)} others", 0, 0, told, took))
    return rows


def _panel(axis: Axes, step: Compared, rows: Sequence[Row]) -> None:
    hatched: dict[str, Any] = {"color": "none", "hatch": "////", "edgecolor": VERMILLION, "linewidth": 1.2}
    sides: tuple[tuple[float, str, dict[str, Any]], ...] = (
        (-0.2, "measured", {"color": BLUE}),
        (0.2, "forecast", hatched),
    )
    for shift, side, style in sides:
        values = [1e3 * (getattr(row, f"{side}_seconds") or 0.0) for row in rows]
        axis.barh([at + shift for at in range(len(rows))], values, height=0.36, label=side, **style)
    for at, row in enumerate(rows):
        end = 1e3 * max(row.forecast_seconds or 0.0, row.measured_seconds or 0.0, 0.0)
        axis.annotate(_said(row), (end, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    names = [row.name + (f", {row.bits} bits" if row.bits else "") for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.set_xlim(right=1.3 * max(axis.get_xlim()[1], 1e-6))
    axis.set_title(step.title)
    axis.set_xlabel("ms")


def _said(row: Row) -> str:
    """The error, or what is missing."""
    if row.forecast_seconds is None:
        return f"{milliseconds(row.measured_seconds or 0.0)} ms, not forecast"
    if row.measured_seconds is None:
        return f"{milliseconds(row.forecast_seconds)} ms, does not run"
    error = "" if row.error is None else f" ({row.error:+.0%})"
    return f"{milliseconds(row.forecast_seconds)} against {milliseconds(row.measured_seconds)} ms{error}"
