"""A result as one HTML page that needs nothing else: plots that can be filtered and pointed at, and tables.

Every context has a plot for accuracy, KL and, where it was timed, milliseconds per token, all over total bytes, each
with the frontier of its own figure. The plots are drawn here, so the page shows them without its script too; the script
chooses between them, hides points, draws the frontier of those that are left, and says what is pointed at.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from rlkit.profiles.frontier import pareto, render
from rlkit.profiles.frontier.result import FrontierResult, Row
from rlkit.profiles.frontier.search import SMALLEST_KL
from rlkit.profiles.svg import Frame, Scale, legend_mark, mark, number, path, pixel, powers, words
from rlkit.profiles.table import Table

Shown = tuple[Row, float]
"""A point and its figure."""

WIDTH, HEIGHT = 900.0, 430.0
LOG_FROM = 8.0  # times the least: bytes that differ by more are drawn on a scale of powers


@dataclass(frozen=True, slots=True)
class Metric:
    """What a plot shows of a point; None where it is not known. `sign` is 1 where more is better, else -1."""

    key: str
    title: str
    of: Callable[[Row], float | None]
    sign: int = -1
    log: bool = False

    def frontier(self, shown: Sequence[Shown]) -> list[Shown]:
        """Those that no other dominates, by bytes."""
        return pareto.frontier(shown, lambda one: one[0].found.nbytes, lambda one: self.sign * one[1])


def _kl(row: Row) -> float | None:
    return None if row.found.kl is None else max(row.found.kl, SMALLEST_KL)


def _milliseconds(row: Row) -> float | None:
    return None if row.found.tpot_seconds is None else 1e3 * row.found.tpot_seconds


METRICS = (
    Metric("accuracy", "accuracy, %", lambda row: 100 * row.found.accuracy if row.complete else None, sign=1),
    Metric("kl", "KL, nats per token", _kl, log=True),
    Metric("tpot", "ms per token", _milliseconds),
)


def to_html(result: FrontierResult) -> str:
    """The page; equal results give equal pages."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    weights = tuple(dict.fromkeys(row.point.weights for row in result.rows))
    caches = tuple(dict.fromkeys(row.point.kv for row in result.rows))
    metrics = [one for one in METRICS if any(one.of(row) is not None for row in result.rows)]
    return template.substitute(
        title=_text(f"KV frontier of {result.model.name}"),
        findings=_list(render.findings(result)),
        contexts=_choices("context", [(str(one), f"{one:,} tokens") for one in result.contexts]),
        metrics=_choices("metric", [(one.key, one.title) for one in metrics]),
        weights=_boxes("weights", weights, marked=True),
        caches=_boxes("kv", caches),
        plots="".join(_plot(result, context, one, weights) for context in result.contexts for one in metrics),
        tables="".join(_table(result, table) for table in _tables(result)),
        note=_text(render.NOTE),
        about=_list(result.about),
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _list(lines: Iterator[str] | Sequence[str]) -> str:
    made = "".join(f"<li>{_text(one)}</li>" for one in lines)
    return f"<ul>{made}</ul>" if made else ""


def _choices(name: str, values: Sequence[tuple[str, str]]) -> str:
    """Radio buttons, the first chosen."""
    return "".join(
        f'<label><input type="radio" name="{name}" value="{_text(value)}"{" checked" * (not place)}>'
        f"{_text(shown)}</label>"
        for place, (value, shown) in enumerate(values)
    )


def _boxes(name: str, values: Sequence[str], *, marked: bool = False) -> str:
    return "".join(
        f'<label><input type="checkbox" name="{name}" value="{_text(value)}" checked>'
        f"{legend_mark(place) if marked else ''}{_text(value)}</label>"
        for place, value in enumerate(values)
    )


def _plot(result: FrontierResult, context: int, metric: Metric, weights: Sequence[str]) -> str:
    """One plot: a mark for each point that has the figure, and a line through the frontier."""
    shown = [(row, value) for row in result.at(context) if (value := metric.of(row)) is not None]
    frame = Frame(WIDTH, HEIGHT, left=64, top=34, bottom=44)
    title = f"{metric.title} over total bytes at {context:,} tokens"
    parts, best = [words(frame.left, 18, title, "start", "h")], metric.frontier(shown)
    if shown:
        parts += _drawn(frame, shown, best, metric, weights)
    else:
        parts.append(words(WIDTH / 2, HEIGHT / 2, "nothing was measured"))
    drawn = frame.drawn(parts, f"{title}: {'; '.join(_said(row, value) for row, value in best)}")
    return f'<figure data-context="{context}" data-metric="{metric.key}" data-sign="{metric.sign}">{drawn}</figure>'


def _said(row: Row, value: float) -> str:
    return f"{row.point.name} {render.size(row.found.nbytes)} {value:.3g}"


def _drawn(
    frame: Frame, shown: Sequence[Shown], best: Sequence[Shown], metric: Metric, weights: Sequence[str]
) -> Iterator[str]:
    nbytes = [row.found.nbytes / 1e6 for row, _value in shown]
    values = [value for _row, value in shown]
    across = _across(nbytes, frame)
    up = powers(values, *frame.y) if metric.log else _roomy(values, frame)
    yield from frame.rows(up)
    yield from frame.columns(across, across.ticks(7))
    yield words(WIDTH - frame.right, HEIGHT - 6, "MB", "end")
    yield path([(across(row.found.nbytes / 1e6), up(value)) for row, value in best], 6)
    on_frontier = {row.point for row, _value in best}
    for row, value in shown:
        series = weights.index(row.point.weights)
        told = "; ".join(_details(row))
        x, y = across(row.found.nbytes / 1e6), up(value)
        state = " part" * (not row.complete) + " best" * (row.point in on_frontier)
        tags = f'data-weights="{_text(row.point.weights)}" data-kv="{_text(row.point.kv)}" data-point="{row.point.key}"'
        tags += f' data-at="{pixel(x)},{pixel(y)}" data-of="{row.found.nbytes},{float(value)!r}"'
        drawn = mark(x, y, series, told)
        yield f'<g class="point{state}" tabindex="0" {tags}>{drawn}</g>'


def _across(values: Sequence[float], frame: Frame) -> Scale:
    if min(values) > 0 and max(values) > LOG_FROM * min(values):
        return powers(values, *frame.x, room=1.1)
    room = 0.06 * (max(values) - min(values)) or 0.05 * max(values)
    return Scale(max(0.0, min(values) - room), max(values) + room, *frame.x)


def _roomy(values: Sequence[float], frame: Frame) -> Scale:
    room = 0.08 * (max(values) - min(values)) or max(1.0, 0.05 * max(values))
    return Scale(min(values) - room, max(values) + room, *frame.y)


def _details(row: Row) -> Iterator[str]:
    """What is said of a point that is pointed at."""
    found, memory = row.found, row.found.memory
    yield row.point.name
    yield f"{render.size(memory.nbytes)} = {render.parts(memory)}, {render.share(row.saved)} saved"
    if not math.isnan(found.accuracy):
        lost = "" if row.loss is None else f", {render.share(row.loss)} lost"
        yield f"accuracy {100 * found.accuracy:.1f} on {len(found.scores)} items{lost}"
        yield ", ".join(f"{name} {100 * value:.1f}" for name, value in row.tasks.items())
    if found.kl is not None:
        yield f"KL {found.kl:.4f}"
    if found.tpot_seconds is not None and found.ttft_seconds is not None:
        yield f"{found.ttft_seconds:.2f} s to the first token, {number(1e3 * found.tpot_seconds)} ms per token"
    if found.why:
        yield found.why


def _tables(result: FrontierResult) -> Iterator[tuple[int, str, Table]]:
    for whole in (False, True):
        yield from zip(
            result.contexts,
            ("every" if whole else "best" for _ in result.contexts),
            render.tables(result, whole=whole),
            strict=True,
        )


def _table(result: FrontierResult, given: tuple[int, str, Table]) -> str:
    context, which, table = given
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    shown = " open" * (which == "best")
    return f'<details data-context="{context}"{shown}><summary>{_text(table.title)}</summary>{body}</details>'
