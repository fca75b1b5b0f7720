"""Charts of forecasts: the roofline with the operators on it, and speed over contexts, chunks or recipes.

Drawn with matplotlib, imported only when a chart is asked for, without a display. A chart is written as .png, .svg or
.html by its file's name; a page holds the numbers too, as a table.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.profiles.account import Cost
from rlkit.profiles.forecast import Forecast, Phase
from rlkit.profiles.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, STYLE, VERMILLION, inline
from rlkit.profiles.sweeps import Point, Sweep
from rlkit.profiles.table import Table
from rlkit.recover.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY)
MARKS = "osD^vPX*"
NAMED = 6  # operators that a roofline names, by time
WIDE = 20.0  # values that differ by more are drawn on a scale of powers
DARK = "#222222"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }}
svg {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0 }}
th, td {{ padding: .2em .7em; text-align: right; border-bottom: 1px solid #8884 }}
th:first-child, td:first-child {{ text-align: left }}
</style>
<h1>{title}</h1>
{drawings}
{tables}
</html>
"""

Draw = Callable[[], "Figure"]


def check_path(path: Path) -> None:
    """ValueError if a chart cannot be written under that name."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is no name of a chart; end it with {', '.join(SUFFIXES)}")


def save(path: Path, title: str, drawn: dict[str, Draw], tables: Sequence[Table] = ()) -> Path:
    """Write charts by description -> how to draw it: a page of all of them, or the first as a picture.

    Raises ValueError for a name that is none of SUFFIXES.
    """
    check_path(path)
    suffix = path.suffix.lower()
    if suffix == ".html":
        drawings = [
            inline(_saved(draw, format="svg", transparent=True, metadata={"Date": None}).decode(), f"chart{i}", said)
            for i, (said, draw) in enumerate(drawn.items())
        ]
        parts = {"drawings": "\n".join(drawings), "tables": "\n".join(_table(table) for table in tables)}
        write_bytes(path, PAGE.format(title=html.escape(title), **parts).encode())
        return path
    draw = next(iter(drawn.values()))
    how: dict[str, Any] = {"format": suffix[1:], "facecolor": "white"}
    data = _saved(draw, **how, **({"dpi": 120} if suffix == ".png" else {"metadata": {"Date": None}}))
    write_bytes(path, data.replace(INK.encode(), DARK.encode()) if suffix == ".svg" else data)
    return path


def _saved(draw: Draw, **how: Any) -> bytes:
    import matplotlib

    settings: Any = STYLE
    with matplotlib.rc_context(settings):
        buffer = io.BytesIO()
        draw().savefig(buffer, **how)
        return buffer.getvalue()


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(table.columns, "th"), *(row(cells, "td") for cells in table.rows)]
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2>\n<table>{''.join(lines)}</table>{note}"


def draw_roofline(made: Forecast) -> Figure:
    """Prefill and a decode step side by side: each operator at its FLOPs per byte and the FLOP/s it gets."""
    figure, axes = _figure(2, height=4.6)
    titles = (f"prefill of {made.workload.prompt_tokens:,} tokens", "one token after them")
    for axis, phase, title in zip(axes, (made.prefill, made.decode), titles, strict=True):
        _roofs(axis, phase)
        _operators(axis, phase.costs)
        axis.set_title(f"{title}, {phase.place.name}")
        axis.set_xlabel("FLOPs per byte")
    axes[0].set_ylabel("FLOP/s")
    figure.suptitle(f"{made.model} as {made.recipe}, {made.label}", fontsize=11)
    return figure


def describe_roofline(made: Forecast) -> str:
    """The chart in words."""

    def slowest(phase: Phase) -> str:
        whole = sum(cost.seconds for cost in phase.costs)
        top = sorted(phase.costs, key=lambda cost: -cost.seconds)[:3]
        return ", ".join(f"{cost.name} {cost.seconds / whole:.0%} ({cost.bound})" for cost in top)

    return (
        f"Roofline of {made.model} as {made.recipe}. Prefill: {slowest(made.prefill)}. Decode: {slowest(made.decode)}."
    )


def _roofs(axis: Axes, phase: Phase) -> None:
    rates = phase.place.rates
    xs = [cost.intensity for cost in phase.costs if cost.flops and cost.nbytes]
    ridge = max(rates.roofs.values()) / rates.bytes_per_s
    low, high = min([*xs, ridge, 0.1]) / 2, max([*xs, ridge]) * 4
    axis.loglog()
    for (name, roof), style in zip(rates.roofs.items(), ("-", "--"), strict=False):
        bend = roof / rates.bytes_per_s
        axis.plot([low, bend, high], [low * rates.bytes_per_s, roof, roof], style, color=INK, linewidth=1.2)
        said = f"{name}: {roof / 1e12:.2f} T/s" if roof >= 1e12 else f"{name}: {roof / 1e9:.0f} G/s"
        axis.annotate(said, (high, roof), xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8)
    axis.annotate(
        f"{rates.bytes_per_s / 1e9:.0f} GB/s", (low, low * rates.bytes_per_s), xytext=(4, 12),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    axis.set_xlim(low, high)
    _plain_powers(axis.xaxis)
    _plain_powers(axis.yaxis)


def _operators(axis: Axes, costs: Sequence[Cost]) -> None:
    shown = sorted((c for c in costs if c.flops and c.nbytes and c.seconds), key=lambda cost: -cost.seconds)
    whole = sum(cost.seconds for cost in costs) or 1.0
    for place, cost in enumerate(shown):
        named = place < NAMED
        style: dict[str, Any] = {"s": 20 + 400 * cost.seconds / whole, "alpha": 0.8}
        style |= {"color": COLOURS[place % len(COLOURS)], "marker": MARKS[place % len(MARKS)]} if named else {}
        style |= {} if named else {"color": GREY, "marker": "."}
        label = f"{cost.name} ({cost.seconds / whole:.0%})" if named else None
        axis.scatter([cost.intensity], [cost.flops / cost.seconds], label=label, **style)
    if shown:
        axis.legend(fontsize=8, frameon=False, loc="lower right", markerscale=0.6)


def draw_sweep(found: Sweep) -> Figure:
    """Decode speed and time to first token over the first axis, a curve for each combination of the others.

    Chunks do not change decode speed, so memory takes its place there.
    """
    axis = found.axes[0]
    figure, (left, right) = _figure(2, height=4.2)
    size = axis == "chunks"
    if axis == "recipes":
        _bars(left, found, [point.tokens_per_s or 0.0 for point in _numbered(found)])
        _bars(right, found, [point.ttft_seconds or 0.0 for point in _numbered(found)])
    else:
        for place, (name, curve) in enumerate(found.curves(axis).items()):
            speeds = [(point.memory_nbytes or 0) / 1e9 if size else point.tokens_per_s or 0.0 for point in curve]
            _curve(left, axis, curve, speeds, name, place)
            _curve(right, axis, curve, [point.ttft_seconds or 0.0 for point in curve], name, place)
        for panel in (left, right):
            panel.set_xscale("log", base=2)
            panel.set_xlabel("tokens of context" if axis == "contexts" else "tokens a chunk")
            panel.xaxis.set_major_formatter(lambda value, _at: f"{value:,.0f}")
            panel.tick_params(axis="x", labelrotation=35)
        times = [point.ttft_seconds or 0.0 for point in _numbered(found)]
        if max(times) > WIDE * min(times):
            right.set_yscale("log")
            _plain_powers(right.yaxis)
        else:
            right.set_ylim(bottom=0.0)
        left.set_ylim(bottom=0.0)
        left.legend(fontsize=8, frameon=False)
    left.set_title("memory, GB" if size else f"tokens/s, {found.decode_place}")
    right.set_title(f"seconds to the first token, {found.prefill_place}")
    figure.suptitle(f"{found.model}, {found.label}", fontsize=11)
    return figure


def _numbered(found: Sweep) -> list[Point]:
    return [point for point in found.points if not point.refused]


def describe_sweep(found: Sweep) -> str:
    """The chart in words."""
    parts = []
    for name, curve in found.curves(found.axes[0]).items():
        first, last = curve[0], curve[-1]
        parts.append(
            f"{name}: {first.tokens_per_s or 0:.1f} tokens/s after {first.context:,} tokens, "
            f"{last.tokens_per_s or 0:.1f} after {last.context:,}"
        )
    return f"Forecast of {found.model} at {found.decode_place}. " + "; ".join(parts)


def _curve(axis: Axes, name: str, points: Sequence[Point], values: Sequence[float], label: str, place: int) -> None:
    xs = [point.context if name == "contexts" else point.chunk or point.context for point in points]
    style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKS[place % len(MARKS)]}
    axis.plot(xs, values, label=label, markersize=4, linewidth=1.4, **style)


def _bars(axis: Axes, found: Sweep, values: Sequence[float]) -> None:
    """One bar per point, named by what tells it from the others."""
    at = list(range(len(values)))
    axis.barh(at, values, height=0.6, color=BLUE)
    for row, value in zip(at, values, strict=True):
        axis.annotate(f"{value:.3g}", (value, row), xytext=(4, 0), textcoords="offset points", va="center")
    axis.set_yticks(at, list(found.names().values()))
    axis.set_ylim(len(at) - 0.4, -0.6)
    axis.set_xlim(0.0, 1.2 * max(values, default=1.0))


def _plain_powers(axis: Axis) -> None:
    """Powers of ten as 100, 1 k, 10 M: a font without mathematics writes them."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    def text(value: float, _at: int | None = None) -> str:
        for scale, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
            if value >= scale:
                return f"{value / scale:g}{prefix}"
        return f"{value:g}"

    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def _figure(panels: int, *, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.patch.set_alpha(0.0)
        axis.grid(visible=True, alpha=0.25, linewidth=0.6)
    return figure, axes
