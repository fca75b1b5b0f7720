"""Plots of a report as SVG text to put into a page, or as PNG: divergence by stage, size and speed, forecast and truth.

Drawn with matplotlib, which is imported only here and only when a plot is asked for. Text takes the colour of the page
around it (currentColor), so that one drawing serves light and dark; colours are Okabe and Ito's, which people with any
colour vision can tell apart, and forecast is hatched besides. Every bar carries its value.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.profiles.report import BundleResult, Report, Stage
from rlkit.profiles.timing import Timing, milliseconds
from rlkit.recover.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the colour of text until the drawing is put into a page
BLUE, VERMILLION, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"
SKY, PURPLE, YELLOW, GREY = "#56b4e9", "#cc79a7", "#f0e442", "#999999"
KINDS = {
    "attention": (BLUE, "attention"),
    "gate_up": (VERMILLION, "gate and up"),
    "down": (ORANGE, "down"),
    "adapter": (PURPLE, "adapters"),
    "lm_head": (GREEN, "lm_head"),
    "embedding": (SKY, "embedding"),
    "other": (GREY, "norms and tables"),
}
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 1.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "rlkit",
}
ROW_INCHES = 0.46


def svg_plots(report: Report) -> dict[str, str]:
    """The plots that the report has numbers for: title -> inline SVG with its own description."""
    found = {}
    for name, (title, _draw) in PLOTS.items():
        drawn = _saved(name, report, format="svg", transparent=True, metadata={"Date": None})
        if drawn is not None:
            found[title] = inline(drawn.decode(), name, describe(name, report))
    return found


def save_pngs(report: Report, folder: Path, *, dpi: int = 110) -> list[Path]:
    """The same plots as PNG files on white."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in PLOTS:
        drawn = _saved(name, report, format="png", dpi=dpi, facecolor="white")
        if drawn is not None:
            paths.append(folder / f"{name}.png")
            write_bytes(paths[-1], drawn)
    return paths


def _saved(name: str, report: Report, **how: Any) -> bytes | None:
    """Draw and save one plot; None if the report has nothing for it."""
    import matplotlib

    settings: Any = STYLE
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks: the page's may have
        figure = PLOTS[name][1](report)
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, **how)
        return buffer.getvalue()


def _figure(rows: float, panels: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 1.15 + ROW_INCHES * max(rows, 2)), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.patch.set_alpha(0.0)
        axis.tick_params(left=False)
        axis.spines["left"].set_visible(False)
    return figure, list(axes)


def _bars(axis: Axes, at: Sequence[float], values: Sequence[float], texts: Sequence[str], **style: Any) -> None:
    """Horizontal bars with their values written at the end."""
    errors = style.pop("errors", None)
    bars = axis.barh(at, values, xerr=errors, ecolor=INK, capsize=3, **style)
    ends = [value + (errors[1][i] if errors else 0.0) for i, value in enumerate(values)]
    for bar, end, text in zip(bars, ends, texts, strict=True):
        _value(axis, end, bar.get_y() + bar.get_height() / 2, text)
    axis.set_xlim(0.0, max(axis.get_xlim()[1], 1.32 * max(ends)))


def _value(axis: Axes, x: float, y: float, text: str) -> None:
    place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points"}
    axis.annotate(text, (x, y), va="center", ha="left", fontsize=9, **place)


def _name_rows(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), [_short(name) for name in names])
    axis.set_ylim(len(names) - 0.45, -0.55)  # first row on top


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def draw_divergence(report: Report) -> Figure | None:
    """KL and top-1 agreement after each stage."""
    stages = [(stage.name, stage.divergence) for stage in report.stages if stage.divergence is not None]
    if not stages:
        return None
    figure, (left, right) = _figure(len(stages), 2)
    at = list(range(len(stages)))
    kl = [found.kl_mean for _name, found in stages]
    errors = [[found.kl_stderr for _name, found in stages]] * 2
    _bars(left, at, kl, [f"{value:.3f}" for value in kl], height=0.62, color=BLUE, errors=errors)
    same = [100 * found.top1_agreement for _name, found in stages]
    _bars(right, at, same, [f"{value:.1f} %" for value in same], height=0.62, color=GREEN)
    left.set_title("KL to the original")
    left.set_xlabel("nats per token (lower is better)")
    right.set_title("Same most likely token")
    right.set_xlabel("% of tokens (higher is better)")
    right.set_xlim(0.0, 118.0)
    right.set_xticks(range(0, 101, 25))
    _name_rows(left, [name for name, _found in stages])
    return figure


def draw_size_and_speed(report: Report) -> Figure | None:
    """Bytes by kind of tensor and decode speed of each bundle."""
    if not report.bundles:
        return None
    figure, (left, right) = _figure(len(report.bundles) + 1.6, 2)
    _stack(left, report.bundles)
    timings = [bundle.measurement for bundle in report.bundles]
    speeds = [timing.tokens_per_s for timing in timings]
    texts = [_speed_text(timing) for timing in timings]
    _bars(right, range(len(speeds)), speeds, texts, height=0.55, color=BLUE, errors=_speed_errors(timings))
    right.set_xlim(0.0, right.get_xlim()[1] * 1.25)
    right.set_title("Decode speed, measured")
    right.set_xlabel("tokens/s (higher is better)")
    _name_rows(left, [bundle.name for bundle in report.bundles])
    _legend(figure, left, columns=4)
    return figure


def _legend(figure: Figure, axis: Axes, *, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _stack(axis: Axes, bundles: Sequence[BundleResult]) -> None:
    rows = list(range(len(bundles)))
    starts = [0.0] * len(bundles)
    for kind, (colour, label) in KINDS.items():
        sizes = [_megabytes(bundle, kind) for bundle in bundles]
        if any(sizes):
            axis.barh(rows, sizes, left=starts, height=0.55, color=colour, label=label)
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    for row, end in zip(rows, starts, strict=True):
        _value(axis, end, row, f"{end:.1f} MB")
    axis.set_xlim(0.0, max(starts) * 1.32)
    axis.set_title("Size")
    axis.set_xlabel("MB (lower is better)")


def _megabytes(bundle: BundleResult, kind: str) -> float:
    if kind != "other":
        return bundle.nbytes_by_kind.get(kind, 0) / 1e6
    return sum(nbytes for name, nbytes in bundle.nbytes_by_kind.items() if name == kind or name not in KINDS) / 1e6


def _speed_text(timing: Timing) -> str:
    rate = timing.bytes_per_s
    return f"{timing.tokens_per_s:.1f}" + (f"  ({rate / 1e9:.1f} GB/s)" if rate is not None else "")


def _speed_errors(timings: Sequence[Timing]) -> list[list[float]] | None:
    spreads = [(timing.tokens_per_s, timing.spread) for timing in timings if timing.spread is not None]
    if len(spreads) < len(timings):
        return None
    below = [max(0.0, speed - 1.0 / spread.tpot_p90_seconds) for speed, spread in spreads]
    above = [max(0.0, 1.0 / spread.tpot_p10_seconds - speed) for speed, spread in spreads]
    return [below, above]


def draw_forecast(report: Report) -> Figure | None:
    """Forecast beside measurement: time to first token and time per token."""
    if not report.bundles:
        return None
    figure, (left, right) = _figure(1.35 * len(report.bundles) + 0.9, 2)
    for axis, field in ((left, "ttft"), (right, "tpot")):
        _time_bars(axis, field, report.bundles)
    work = report.bundles[0].measurement
    left.set_title("Time to first token")
    left.set_xlabel(f"ms, {work.prompt_tokens} prompt tokens")
    right.set_title("Time per token")
    right.set_xlabel(f"ms, mean of {work.new_tokens} new tokens")
    _name_rows(left, [bundle.name for bundle in report.bundles])
    _legend(figure, left, columns=2)
    return figure


def _time_bars(axis: Axes, field: str, bundles: Sequence[BundleResult]) -> None:
    """Measured seconds of one field of the timings, solid, and under each the forecast, hatched."""
    hatched: dict[str, Any] = {"color": "none", "hatch": "////", "edgecolor": VERMILLION, "linewidth": 1.2}
    errors = _time_errors([bundle.measurement for bundle in bundles], field)
    measured: dict[str, Any] = {"color": BLUE, "label": "measured", "errors": errors}
    for shift, side, style in (
        (-0.2, "measurement", measured),
        (0.2, "forecast", {**hatched, "label": "forecast"}),
    ):
        seconds = [getattr(getattr(bundle, side), f"{field}_seconds") for bundle in bundles]
        rows = [row + shift for row in range(len(bundles))]
        texts = [f"{milliseconds(value)} ms" for value in seconds]
        _bars(axis, rows, [1e3 * value for value in seconds], texts, height=0.36, **style)


def _time_errors(timings: Sequence[Timing], field: str) -> list[list[float]] | None:
    spreads = [(getattr(timing, f"{field}_seconds"), timing.spread) for timing in timings if timing.spread is not None]
    if len(spreads) < len(timings):
        return None
    below = [1e3 * max(0.0, median - getattr(spread, f"{field}_p10_seconds")) for median, spread in spreads]
    above = [1e3 * max(0.0, getattr(spread, f"{field}_p90_seconds") - median) for median, spread in spreads]
    return [below, above]


PLOTS: dict[str, tuple[str, Callable[[Report], Figure | None]]] = {
    "divergence": ("Divergence from the original, stage by stage", draw_divergence),
    "size-speed": ("Size and speed of the bundles", draw_size_and_speed),
    "forecast": ("Forecast beside measurement", draw_forecast),
}


def describe(name: str, report: Report) -> str:
    """What a plot shows, in words and numbers, for those who cannot see it."""
    if name == "divergence":
        return "KL to the original by stage: " + "; ".join(_stage_text(stage) for stage in report.stages)
    if name == "size-speed":
        parts = (f"{b.name} {b.nbytes / 1e6:.1f} MB, {b.measurement.tokens_per_s:.1f} tokens/s" for b in report.bundles)
        return "Size and decode speed: " + "; ".join(parts)
    return "Forecast against measurement: " + "; ".join(_times_text(bundle) for bundle in report.bundles)


def _times_text(bundle: BundleResult) -> str:
    made, true = bundle.forecast, bundle.measurement
    first = f"first token {milliseconds(made.ttft_seconds)} against {milliseconds(true.ttft_seconds)} ms"
    later = f"per token {milliseconds(made.tpot_seconds)} against {milliseconds(true.tpot_seconds)} ms"
    return f"{bundle.name} {first}, {later}"


def _stage_text(stage: Stage) -> str:
    found = stage.divergence
    if found is None:
        return f"{stage.name} not measured"
    return f"{stage.name} {found.kl_mean:.3f} nats, {found.top1_agreement:.1%} agreement"


def inline(text: str, name: str, description: str) -> str:
    """A drawing as an <svg> element without anything that reaches outside itself."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)  # several drawings share one page
    text = text.replace(INK, "currentColor")
    label = html.escape(description, quote=True)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{label}"', text, count=1)
