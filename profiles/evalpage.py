"""An evaluation as one HTML page that needs nothing else: no script, no link, charts inside, light and dark.

Charts: every task a panel with each model's score and its interval, the chance of guessing dashed; and one of the
recovery percentages by task, the lines at 0, 80 and 100 percent dashed.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template

from rlkit.profiles import evalreport
from rlkit.profiles.evalreport import Evaluation
from rlkit.profiles.intervals import Interval
from rlkit.profiles.svg import COLOURS, Frame, Scale, legend_mark, line, mark, words
from rlkit.profiles.table import Table
from rlkit.profiles.taskitem import Rule

ROW = 22.0  # pixels of a model in a panel
RECOVERED = (-0.5, 1.5)  # what the chart of recovery shows at most; ends beyond it are cut
LINES = (0.0, 0.8, 1.0)


def to_html(found: Evaluation) -> str:
    """The page; equal evaluations give equal pages."""
    template = Template(Path(__file__).with_name("evalpage.html").read_text(encoding="utf-8"))
    names = [model.name for model in found.models]
    tasks = len(found.models[0].tasks)
    said = (f"{tasks} task{'s' * (tasks != 1)}", f"{len(names)} model{'s' * (len(names) != 1)}", found.text)
    return template.substitute(
        title=_text(f"Accuracy of {' and '.join(names) if len(names) < 3 else f'{len(names)} models'}"),
        subtitle=_text(" · ".join(filter(None, said))),
        findings=_list(evalreport.findings(found)),
        legend=_legend(names),
        charts="".join(_charts(found)),
        tables="".join(_table(table) for table in evalreport.tables(found)),
        about=_list([*found.about, *(_facts(model.name, model.facts) for model in found.models)]),
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _facts(name: str, facts: dict[str, str]) -> str:
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items() if value)


def _list(lines: Iterable[str]) -> str:
    made = "".join(f"<li>{_text(one)}</li>" for one in lines)
    return f"<ul>{made}</ul>" if made else ""


def _legend(names: Sequence[str]) -> str:
    keys = (f"<span>{legend_mark(series)}{_text(name)}</span>" for series, name in enumerate(names))
    return f'<div class="legend">{"".join(keys)}</div>'


def _charts(found: Evaluation) -> Iterator[str]:
    single = [(title, tasks) for title, tasks in found.lines() if len(tasks) == 1]
    yield "<section><h2>Score by task</h2>"
    yield '<p class="note">With 95 % bootstrap intervals over items. Point at a mark for its numbers.</p>'
    yield f'<div class="panels">{"".join(_panel(found, title, tasks) for title, tasks in single)}</div></section>'
    if found.recovered:
        yield f'<section><h2>Recovery</h2><p class="note">{_text(evalreport.FORMULA)}; dashed: 0, 80 and 100 %.</p>'
        yield _recovery(found, list(found.lines())) + "</section>"


def _panel(found: Evaluation, title: str, tasks: tuple[str, ...]) -> str:
    """The models' scores on one task, one below the other."""
    rule, chance = found.models[0].task(tasks[0]).spec.rule, found.models[0].task(tasks[0]).chance
    title += ", bits per byte (less is better)" if rule is Rule.BITS else ", %"
    values = [_shown(found.mean(tasks, model.name), rule) for model in found.models]
    ends = [value for one in values for value in (one.low, one.value, one.high) if value is not None]
    ends += [] if chance is None or rule is Rule.BITS else [chance]
    frame = Frame(320, 46 + ROW * len(values) + 26, left=12, bottom=26)
    if not ends:
        return frame.drawn([words(12, 16, title, "start", "h"), words(12, 44, "nothing to score", "start")], title)
    room = max((max(ends) - min(ends)) * 0.08, 0.005)
    scale = Scale(min(ends) - room, max(ends) + room, *frame.x)
    number = (lambda value: f"{value:.2g}") if rule is Rule.BITS else (lambda value: f"{100 * value:.4g}")
    parts = [words(12, 16, title, "start", "h"), *frame.columns(scale, scale.ticks(5), number)]
    if chance is not None and rule is not Rule.BITS:
        parts.append(line(scale(chance), frame.top, scale(chance), frame.height - frame.bottom, "even"))
    for series, (model, value) in enumerate(zip(found.models, values, strict=True)):
        told = f"{model.name}: {evalreport.spread(found.mean(tasks, model.name), rule)}"
        parts += _dot(scale, frame.top + ROW * (series + 0.9), series, value, told)
    return frame.drawn(parts, f"{title}: {'; '.join(_told(found, tasks, rule))}")


def _told(found: Evaluation, tasks: tuple[str, ...], rule: Rule) -> Iterator[str]:
    for model in found.models:
        yield f"{model.name} {evalreport.spread(found.mean(tasks, model.name), rule) or 'nothing to score'}"


def _shown(interval: Interval, rule: Rule) -> Interval:
    """Bits per byte as they are said, not with their sign turned."""
    if rule is not Rule.BITS or interval.value is None or interval.low is None or interval.high is None:
        return interval
    return Interval(-interval.value, -interval.high, -interval.low)


def _dot(scale: Scale, y: float, series: int, value: Interval, told: str) -> Iterator[str]:
    """A mark with its interval; ends outside the scale are cut."""
    if value.value is None:
        return
    if value.low is not None and value.high is not None:
        low, high = (min(max(end, scale.low), scale.high) for end in (value.low, value.high))
        yield line(scale(low), y, scale(high), y, f"ends c{series % COLOURS}")
    yield mark(scale(min(max(value.value, scale.low), scale.high)), y, series, told)


def _recovery(found: Evaluation, lines: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """Every task a row, every recovered model a mark in it."""
    step = max(ROW, 12.0 * len(found.recovered) + 6)
    frame = Frame(720, 40 + step * len(lines) + 30, left=190, bottom=30)
    scale = Scale(*RECOVERED, *frame.x)
    parts = frame.columns(scale, [-0.5, 0.5, 1.5], lambda value: f"{100 * value:.0f} %")
    for place in LINES:
        parts.append(line(scale(place), frame.top, scale(place), frame.height - frame.bottom, "even"))
        parts.append(words(scale(place), frame.height - frame.bottom + 16, f"{100 * place:.0f} %"))
    names = [model.name for model in found.models]
    told = []
    for row, (title, tasks) in enumerate(lines):
        middle = frame.top + step * (row + 0.5)
        parts.append(words(frame.left - 10, middle + 4, title, "end", "h" if len(tasks) > 1 else "r"))
        for at, name in enumerate(found.recovered):
            value = found.recovery(tasks, name)
            told.append(f"{title}, {name}: {evalreport.share(value)}")
            y = middle + 12.0 * (at - (len(found.recovered) - 1) / 2)
            if value.value is None:
                parts.append(words(scale(0.0) + 6, y + 4, value.why.removeprefix("undefined: "), "start"))
            parts += _dot(scale, y, names.index(name), value, told[-1])
    return frame.drawn(parts, "; ".join(told))


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    rows = "".join(_row(row) for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>{_text(table.title)}</h2>{note}{body}</section>"


def _row(row: tuple[str, ...]) -> str:
    first, *others = row
    name = ' class="mean"' if first.startswith("mean, ") else ""
    cells = "".join(f"<td{' class=long' * (len(cell) > 40)}>{_text(cell)}</td>" for cell in others)
    return f'<tr{name}><th scope="row">{_text(first)}</th>{cells}</tr>'
