"""A merged report as one HTML page that needs nothing else: no script, no link, charts inside, light and dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template

from rlkit.profiles import mergecharts, mergetext
from rlkit.profiles.merged import Line, Machine, Merged
from rlkit.profiles.mergetext import cell_text, columns, percent, rate_text
from rlkit.profiles.svg import legend_mark
from rlkit.profiles.table import Table

FAR = 0.3  # forecasts that are further off are marked


def to_html(merged: Merged) -> str:
    """The page; equal reports give equal pages."""
    template = Template(Path(__file__).with_name("merged.html").read_text(encoding="utf-8"))
    tests = sum(len(line.cells) for line in merged.lines)
    models = len({line.model for line in merged.lines})
    said = (_count(models, "model"), _count(tests, "result"), f"newest of {merged.date}" if merged.date else "")
    return template.substitute(
        title=f"How fast models run on {_count(len(columns(merged)), 'machine')}",
        subtitle=" · ".join(filter(None, said)),
        machines="".join(_card(merged, machine) for machine in merged.machines),
        findings=_panel((*mergetext.findings(merged), *merged.notes)),
        legend=_legend(columns(merged)),
        charts="".join(_charts(merged)),
        speeds=_speeds(merged),
        details="".join(_details(merged)),
        made="Made by <code>rlkit report</code> of " + _text(", ".join(merged.files)),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _card(merged: Merged, machine: Machine) -> str:
    """What a machine is, and what ran there."""
    cpu, cores, memory, system, provider, driver, versions, when = mergetext.machine_facts(merged, machine)
    labels = columns(merged)
    key = legend_mark(labels.index(machine.label)) if machine.label in labels else ""
    runs = f"{provider} {driver}".strip() if machine.label in labels else f"{machine.part.family}: nothing measured"
    threads = "" if machine.threads is None else f", {_count(machine.threads, 'thread')}"
    lines = [
        cpu,
        f"{cores} cores{threads}, {memory}, {system}",
        runs,
        versions,
        when if machine.label in labels else "",
    ]
    warn = '<span class="warn">software driver: computes on the CPU</span>' if machine.part.software else ""
    said = "".join(f"<span>{_text(line)}</span>" for line in lines if line)
    return f'<div class="card"><b>{key}{_text(machine.label)}</b>{said}{warn}</div>'


def _panel(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return '<div class="findings"><ul>' + "".join(f"<li>{_text(line)}</li>" for line in sentences) + "</ul></div>"


def _legend(labels: Sequence[str]) -> str:
    keys = (f"<span>{legend_mark(series)}{_text(label)}</span>" for series, label in enumerate(labels))
    return f'<div class="legend">{"".join(keys)}</div>' if labels else ""


def _charts(merged: Merged) -> Iterator[str]:
    panels = list(mergecharts.speed_panels(merged))
    if panels:
        yield _section("Decode speed over depth", "Tokens/s, by recipe. Point at a mark for its numbers.")
        for model, charts in panels:
            yield f'<h3>{_text(model)}</h3><div class="panels">{"".join(charts)}</div>'
    bandwidth = mergecharts.bandwidth_chart(merged)
    if bandwidth:
        yield _section("Bandwidth that decode reached", "Bytes of weights and cache that a token reads, over its time.")
        yield bandwidth
    scatters = list(mergecharts.forecast_charts(merged))
    if scatters:
        note = "On the line: as forecast. The bands are 10 % and 30 %; above it, slower was forecast than came true."
        yield _section("Forecast against measured", note)
        yield f'<div class="panels">{"".join(scatters)}</div>'


def _section(title: str, note: str) -> str:
    return f'<h2>{_text(title)}</h2><p class="note">{_text(note)}</p>'


def _speeds(merged: Merged) -> str:
    """Every test of every machine, by model and recipe."""
    labels = columns(merged)
    if not labels:
        return ""
    head = "".join(f'<th scope="col">{legend_mark(at)} {_text(label)}</th>' for at, label in enumerate(labels))
    rows = "".join(_rows(merged.lines, labels))
    note = (
        "Tokens/s, mean ± standard deviation over rounds, below it the forecast's time over the measured one, less 1. "
    )
    note += "Shaded: the fastest of the row, and whoever is within its scatter."
    body = f'<table><thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'{_section("Every test", note)}<div class="wide">{body}</div>'


def _rows(lines: Iterable[Line], labels: Sequence[str]) -> Iterator[str]:
    model = recipe = ""
    span = f'colspan="{len(labels) + 1}"'
    for line in lines:
        if line.model != model:
            model, recipe = line.model, ""
            yield f'<tr class="model"><th {span} scope="rowgroup">{_text(model)}</th></tr>'
        if line.recipe != recipe:
            recipe = line.recipe
            yield f'<tr class="recipe"><th {span} scope="rowgroup">{_text(recipe)}</th></tr>'
        cells = "".join(_cell(line, label) for label in labels)
        yield f'<tr class="test"><th scope="row">{_text(line.test.name)}</th>{cells}</tr>'


def _cell(line: Line, label: str) -> str:
    cell = line.cells.get(label)
    if cell is None:
        return "<td></td>"
    best = ' class="best"' if label in line.best else ""
    error = ""
    if cell.error is not None:
        far = ' class="far"' if abs(cell.error) > FAR else ""
        error = f"<small{far}>forecast {percent(cell.error)}</small>"
    return f'<td{best} title="{_text(cell_text(cell, line.test.kind))}">{_text(rate_text(cell))}{error}</td>'


def _details(merged: Merged) -> Iterator[str]:
    """What not everybody wants to see: skips, bandwidths, machines, as tables that open."""
    skips, bandwidths, machines = mergetext.skips(merged), mergetext.bandwidths(merged), mergetext.machines(merged)
    if skips.rows:
        yield _section("Not measured", "What the scripts left out, and why.")
        yield _table(skips, left=2, long=2)
    for table in (bandwidths, machines):
        if table.rows:
            left = 3 if table is bandwidths else len(table.columns)
            yield f"<details><summary>{_text(table.title)}</summary>{_table(table, left=left)}</details>"


def _table(table: Table, *, left: int, long: int = -1) -> str:
    """A plain table: the first `left` columns are words, column `long` may be sentences."""

    def name(place: int) -> str:
        return ' class="long"' if place == long else ' class="left"' if place < left else ""

    head = "".join(f'<th scope="col"{name(place)}>{_text(text)}</th>' for place, text in enumerate(table.columns))
    rows = "".join(
        "<tr>" + "".join(f"<td{name(place)}>{_text(cell)}</td>" for place, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
