"""A comparison or a sweep as one HTML page that needs nothing else: charts inside, light and dark, one small script.

The script moves and zooms the charts of who ran where, all at once, and says what is pointed at.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template

from rlkit.profiles.scheduling import comparison, explore
from rlkit.profiles.scheduling.comparison import READING, Comparison, percent
from rlkit.profiles.scheduling.explore import Explored
from rlkit.profiles.scheduling.gantt import COLOURS, gantt, window
from rlkit.profiles.scheduling.metrics import Percentiles
from rlkit.profiles.scheduling.record import Run
from rlkit.profiles.scheduling.workload import Llm
from rlkit.profiles.svg import Frame, Scale, from_zero, legend_mark, line, mark, path, pixel, words
from rlkit.profiles.table import Table

ROW = 24.0  # pixels of a policy in a chart
LEFT = 118.0  # room for a policy's name


def to_html(found: Comparison, runs: Sequence[Run]) -> str:
    """The page of a comparison; `runs`: one of each policy, for the charts of who ran where."""
    until = window(runs)
    names = [stream.name for stream in found.prepared.base.streams]
    sections = [
        _section("Missed deadlines", comparison.NOTE, _bars(found)),
        _section("By stream", "Violated, %. Empty: nothing was due.", _heat(comparison.by_stream(found))),
        _section("Who ran where", _gantt_note(runs, until), _gantts(found.rates, runs, until)),
        _section("Use of the units", "Share of the time that a unit ran something, %.", _used(found)),
    ]
    panels = "".join(_latencies(found))
    if panels:
        note = "A mark at the median, a line to the 95th percentile, means over seeds; dashed: the target."
        sections.append(_section("Requests", note, f'<div class="panels">{panels}</div>'))
    shown = [comparison.overview(found), comparison.by_request(found), comparison.costs(found.prepared.base)]
    sections += [_section(table.title, table.note, _table(table)) for table in shown if table.rows]
    lines = [*comparison.findings(found), READING]
    about = [*found.about, found.prepared.scenario.about, *found.prepared.notes, *found.prepared.skipped]
    return _page(comparison.titled(found), lines, sections, about, streams=names, until=until)


def sweep_to_html(found: Explored) -> str:
    """The page of a sweep."""
    note = "Violated, %. A mark where models may use any unit; a line from the best to the worst assignment tried."
    ranges = "".join(_ranges(found, factor) for factor in found.space.factors)
    sections = [_section("Assignments", note, f'<div class="panels">{ranges}</div>')]
    if len(found.space.factors) > 1:
        sections.insert(0, _section("Over rates", "Violated, %, every model on any unit.", _over_rates(found)))
    sections += [_section(table.title, table.note, _table(table)) for table in explore.tables(found)]
    lines = [*explore.findings(found), READING]
    title = f"{found.scenario.title}: {found.device}, {found.scenario.duration / 1e9:g} s, {_seeds(found)}"
    return _page(title, lines, sections, [*found.about, *found.notes, *found.left_out], streams=[], until=0.0)


def _seeds(found: Explored) -> str:
    return f"{found.space.seeds} seed{'s' * (found.space.seeds > 1)}"


def _page(
    title: str, lines: Iterable[str], sections: Iterable[str], about: Iterable[str], *, streams: list[str], until: float
) -> str:
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_text(title),
        findings=_list(lines),
        sections="".join(sections),
        about=_list(line for line in about if line),
        data=json.dumps({"streams": streams, "until": until}).replace("<", "\\u003c"),
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _list(lines: Iterable[str]) -> str:
    made = "".join(f"<li>{_text(one)}</li>" for one in lines)
    return f"<ul>{made}</ul>" if made else ""


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{_text(title)}</h2><p class="note">{_text(note)}</p>{body}</section>'


def _rect(x: float, y: float, width: float, height: float, name: str, title: str) -> str:
    at = f'x="{pixel(x)}" y="{pixel(y)}" width="{pixel(max(width, 0.0))}" height="{pixel(height)}"'
    return f'<rect class="{name}" {at}><title>{_text(title)}</title></rect>'


def _bars(found: Comparison) -> str:
    """Each policy's violations: a bar for the mean over streams, a mark for all targets, a line for the deviation."""
    frame = Frame(760, 34 + ROW * len(found.summaries) + 34, left=LEFT, top=14)
    ends = [one.rate + (one.deviation or 0.0) for one in found.summaries] + [one.pooled for one in found.summaries]
    scale = from_zero([100 * max(ends)], *frame.x)
    parts = frame.columns(scale, scale.ticks(8))
    told = []
    for place, one in enumerate(found.summaries):
        y = frame.top + ROW * place
        told.append(f"{one.policy}: {percent(one.rate)} %, of all targets {percent(one.pooled)} %")
        parts.append(words(LEFT - 8, y + 16, one.policy, "end", "r"))
        parts.append(_rect(LEFT, y + 4, scale(100 * one.rate) - LEFT, ROW - 8, "bar c0", told[-1]))
        if one.deviation:
            low, high = (scale(100 * max(one.rate + sign * one.deviation, 0.0)) for sign in (-1, 1))
            parts.append(line(low, y + ROW / 2, high, y + ROW / 2, "even"))
        parts.append(mark(scale(100 * one.pooled), y + ROW / 2, 1, told[-1]))
    keys = f'<span><i class="box c0"></i>mean over streams</span><span>{legend_mark(1)}of all</span>'
    return f'<div class="legend">{keys}</div>' + frame.drawn(parts, "; ".join(told))


def _heat(table: Table) -> str:
    """A table whose cells are shaded by their value, 0 to 100."""
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(_shaded(cell) for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return f'<div class="wide"><table class="heat"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _shaded(cell: str) -> str:
    return f'<td style="--v:{float(cell):g}%">{_text(cell)}</td>' if cell else "<td></td>"


def _gantt_note(runs: Sequence[Run], until: float) -> str:
    seed = runs[0].workload.seed if runs else 0
    said = "Pale: a token of a request. Edged: late. The last lane: what was dropped, and when."
    return f"The first {until / 1e3:.1f} s with seed {seed}. {said}"


def _gantts(rates: Mapping[str, float], runs: Sequence[Run], until: float) -> str:
    """All runs, with their sliders, and the streams' colours."""
    streams = [stream.name for stream in runs[0].workload.setting.streams] if runs else []
    keys = "".join(
        f'<span><i class="box s{place % COLOURS}"></i>{_text(name)}</span>' for place, name in enumerate(streams)
    )
    sliders = (
        '<form id="view" hidden><label>from <input type="range" name="from" min="0" max="1000" value="0"></label>'
        '<label>shown <input type="range" name="shown" min="0" max="1000" value="500"></label>'
        "<output></output></form>"
    )
    drawn = "".join(
        f"<figure><figcaption>{_text(run.policy)} <span>{percent(rates[run.policy])} %</span></figcaption>"
        f"{gantt(run, until)}</figure>"
        for run in runs
    )
    told = '<p id="told" hidden aria-live="polite">Point at a step. Drag a chart to move, double-click to zoom in.</p>'
    return f'<div class="controls"><div class="legend">{keys}</div>{sliders}{told}</div>{drawn}'


def _used(found: Comparison) -> str:
    """A group of bars per policy, a bar per unit."""
    units = found.prepared.base.units
    thick = 9.0
    step = thick * len(units) + 12
    frame = Frame(760, 14 + step * len(found.summaries) + 34, left=LEFT, top=14)
    scale = Scale(0.0, 100.0, *frame.x)
    parts = frame.columns(scale, scale.ticks(5))
    told = []
    for place, one in enumerate(found.summaries):
        y = frame.top + step * place + 6
        parts.append(words(LEFT - 8, y + thick * len(units) / 2 + 4, one.policy, "end", "r"))
        for at, unit in enumerate(units):
            share = 100 * one.utilization[unit]
            told.append(f"{one.policy}, {unit}: {share:.0f} %")
            parts.append(_rect(LEFT, y + thick * at, scale(share) - LEFT, thick - 2, f"bar c{at % 8}", told[-1]))
    keys = "".join(f'<span><i class="box c{at % 8}"></i>{_text(unit)}</span>' for at, unit in enumerate(units))
    return f'<div class="legend">{keys}</div>{frame.drawn(parts, "; ".join(told))}'


def _latencies(found: Comparison) -> Iterator[str]:
    """Two panels for each stream of requests."""
    for place, stream in enumerate(found.prepared.base.streams):
        if isinstance(stream, Llm):
            of = {one.policy: one.streams[place] for one in found.summaries}
            first = {policy: one.ttft for policy, one in of.items()}
            token = {policy: one.tpot for policy, one in of.items()}
            yield from _panel(f"{stream.name}: TTFT, ms", first, stream.ttft / 1e6)
            yield from _panel(f"{stream.name}: TPOT, ms", token, stream.tpot / 1e6)


def _panel(title: str, values: Mapping[str, Percentiles | None], target: float) -> Iterator[str]:
    known = [times for times in values.values() if times is not None]
    if not known:
        return
    frame = Frame(430, 44 + ROW * len(values) + 30, left=LEFT)
    scale = from_zero([target, *(1e3 * times.p95 for times in known)], *frame.x)
    parts = [words(12, 16, title, "start", "h"), *frame.columns(scale, scale.ticks(4))]
    parts.append(line(scale(target), frame.top, scale(target), frame.height - frame.bottom, "even"))
    told = [f"{title}, target {target:g}"]
    for row, (policy, times) in enumerate(values.items()):
        y = frame.top + ROW * (row + 0.5)
        parts.append(words(LEFT - 8, y + 4, policy, "end", "r"))
        if times is not None:
            p50, p95 = 1e3 * times.p50, 1e3 * times.p95
            told.append(f"{policy}: {p50:.0f} and {p95:.0f}")
            parts += [line(scale(p50), y, scale(p95), y, "ends c0"), mark(scale(p50), y, 0, told[-1])]
    yield frame.drawn(parts, "; ".join(told))


def _ranges(found: Explored, factor: float) -> str:
    """Each policy: a line from its best assignment to its worst, a mark where all is free."""
    frame = Frame(520, 44 + ROW * len(found.space.policies) + 30, left=LEFT)
    scale = from_zero([100 * one.summary.rate for one in found.at(factor)], *frame.x)
    title = f"rate x {factor:g}"
    parts = [words(12, 16, title, "start", "h"), *frame.columns(scale, scale.ticks(5))]
    told = [title]
    free = found.free(factor)
    for row, policy in enumerate(found.space.policies):
        y = frame.top + ROW * (row + 0.5)
        rates = [100 * one.summary.rate for one in found.at(factor, policy)]
        best = found.best(factor, policy)
        told.append(
            f"{policy}: free {percent(free[policy])}, best {percent(best.summary.rate)} ({best.assignment.name})"
        )
        parts.append(words(LEFT - 8, y + 4, policy, "end", "r"))
        parts += [line(scale(min(rates)), y, scale(max(rates)), y, "ends c0")]
        parts += [mark(scale(100 * free[policy]), y, 0, told[-1])]
    return frame.drawn(parts, "; ".join(told))


def _over_rates(found: Explored) -> str:
    """A line per policy."""
    factors = sorted(found.space.factors)
    frame = Frame(820, 360)
    across = Scale(factors[0], factors[-1], *frame.x)
    rates = {factor: found.free(factor) for factor in factors}
    up = from_zero([100 * rate for some in rates.values() for rate in some.values()], *frame.y)
    parts = [*frame.rows(up), *frame.columns(across, factors)]
    told = []
    for series, policy in enumerate(found.space.policies):
        points = [(across(factor), up(100 * rates[factor][policy])) for factor in factors]
        parts.append(path(points, series))
        for factor, (x, y) in zip(factors, points, strict=True):
            told.append(f"{policy}, rate x {factor:g}: {percent(rates[factor][policy])} %")
            parts.append(mark(x, y, series, told[-1]))
    keys = "".join(f"<span>{legend_mark(at)}{_text(policy)}</span>" for at, policy in enumerate(found.space.policies))
    return f'<div class="legend">{keys}</div>{frame.drawn(parts, "; ".join(told))}'


def _table(table: Table) -> str:
    """Words to the left, long ones in several lines, under a head on the same side."""
    sides = [_side(cell) for cell in next(iter(table.rows), table.columns)]
    named = zip(table.columns, sides, strict=True)
    head = "".join(f'<th scope="col"{side.replace("long", "left")}>{_text(column)}</th>' for column, side in named)
    rows = "".join(f'<tr><th scope="row">{_text(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(cell: str) -> str:
    return f"<td{_side(cell)}>{_text(cell)}</td>"


def _side(cell: str) -> str:
    return ' class="long"' if len(cell) > 30 else "" if cell[:1] in "0123456789+-" else ' class="left"'
