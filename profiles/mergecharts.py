"""Charts of a merged report: decode speed over depth, bandwidth that decode reached, forecasts against measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rlkit.profiles.bench import Kind
from rlkit.profiles.merged import Cell, Line, Merged
from rlkit.profiles.mergetext import cell_text, charted, columns, percent, rate_text
from rlkit.profiles.svg import Frame, Scale, from_zero, line, mark, path, pixel, powers, words
from rlkit.profiles.timing import milliseconds

PANEL = Frame(340, 220)
WIDE = 20.0  # values that differ by more are drawn on a scale of powers
ROW = 22.0
BANDS = (0.1, 0.3)


def speed_panels(merged: Merged) -> Iterator[tuple[str, list[str]]]:
    """(model, a chart for each recipe): tokens/s of decode over depth, a line for each machine, one scale a model."""
    labels, shown = columns(merged), charted(merged)
    decodes = [each for each in merged.lines if each.test.kind is Kind.DECODE and set(shown) & set(each.cells)]
    for model in dict.fromkeys(each.model for each in decodes):
        mine = [each for each in decodes if each.model == model]
        rates = [cell.tokens_per_s.mean for each in mine for label, cell in each.cells.items() if label in shown]
        depths = sorted({each.test.depth for each in mine})
        wide = max(rates) > WIDE * min(rates)
        upward = powers(rates, *PANEL.y) if wide else from_zero(rates, *PANEL.y)
        series = {label: labels.index(label) for label in shown}
        recipes: dict[str, list[Line]] = {}
        for each in mine:
            recipes.setdefault(each.recipe, []).append(each)
        yield model, [_speed_panel(lines, series, depths, upward) for lines in recipes.values()]


def _speed_panel(lines: Sequence[Line], shown: Mapping[str, int], depths: Sequence[int], upward: Scale) -> str:
    """Depths stand at equal distances: from none to thousands, no even scale shows them all."""
    step = (PANEL.x[1] - PANEL.x[0] - 24) / max(len(depths) - 1, 1)
    across = {depth: PANEL.x[0] + 12 + step * place for place, depth in enumerate(depths)}
    parts = [words(PANEL.left, 15, lines[0].recipe, "start", "h"), *PANEL.rows(upward)]
    for depth, x in across.items():
        parts.append(words(x, PANEL.height - PANEL.bottom + 16, f"{depth:,}"))
    parts.append(words(sum(PANEL.x) / 2, PANEL.height - 3, "tokens in the cache", name="a"))
    said = []
    for label, series in shown.items():
        # Decodes of other lengths are other tests: a line joins those of one length alone.
        for tokens in sorted({each.test.tokens for each in lines if label in each.cells}):
            mine = [each for each in lines if label in each.cells and each.test.tokens == tokens]
            points = [(across[each.test.depth], upward(each.cells[label].tokens_per_s.mean)) for each in mine]
            parts.append(path(points, series) if len(points) > 1 else "")
            for each, (x, y) in zip(mine, points, strict=True):
                cell = each.cells[label]
                title = f"{label}\n{each.test.name}: {rate_text(cell)} tokens/s\n{cell_text(cell, Kind.DECODE)}"
                parts.append(mark(x, y, series, title))
                said.append(f"{label} {rate_text(cell)} at {each.test.depth}")
    return PANEL.drawn(parts, f"Tokens/s of {lines[0].model} {lines[0].recipe} over depth: {'; '.join(said)}")


def bandwidth_chart(merged: Merged) -> str:
    """GB/s of decode at the least depth of each model and recipe: a row each, a mark for each machine; "" of none."""
    labels, shown = columns(merged), charted(merged)
    rows: dict[tuple[str, str], tuple[Line, dict[str, Cell]]] = {}
    for each in merged.lines:
        cells = {label: each.cells[label] for label in shown if label in each.cells and each.cells[label].bytes_per_s}
        key = each.model, each.recipe
        if each.test.kind is Kind.DECODE and cells and (key not in rows or _fuller(each, cells, *rows[key])):
            rows[key] = each, cells
    if not rows:
        return ""
    frame = Frame(1000, 50 + ROW * len(rows), left=230, top=14, bottom=36)
    across = from_zero(
        [(cell.bytes_per_s or 0.0) / 1e9 for _, cells in rows.values() for cell in cells.values()], *frame.x
    )
    parts = frame.columns(across, across.ticks(8))
    for place, ((model, recipe), (each, cells)) in enumerate(rows.items()):
        y = frame.top + ROW * (place + 0.5)
        parts += [words(frame.left - 10, y + 4, f"{model}  {recipe}", "end", "r"), line(frame.left, y, frame.x[1], y)]
        for label, cell in cells.items():
            rate = (cell.bytes_per_s or 0.0) / 1e9
            said = f"{label}\n{each.name}: {rate:.1f} GB/s\n{cell_text(cell, Kind.DECODE)}"
            parts.append(mark(across(rate), y, labels.index(label), said, 5.0))
    parts.append(words(sum(frame.x) / 2, frame.height - 4, "GB/s", name="a"))
    return frame.drawn(parts, "Bandwidth that decode reached, in GB/s; the table of bandwidth holds the numbers")


def _fuller(each: Line, cells: Mapping[str, Cell], kept: Line, others: Mapping[str, Cell]) -> bool:
    """Whether a line of the same depth or less compares more machines than the one before."""
    return len(cells) > len(others) and each.test.depth <= kept.test.depth


def forecast_charts(merged: Merged) -> Iterator[str]:
    """Forecast over measured time on scales of powers, one chart per token and one for first tokens."""
    labels = columns(merged)
    for kind, title in ((Kind.DECODE, "per token"), (Kind.PREFILL, "to the first token")):
        found = [
            (labels.index(label), each, cell)
            for each in merged.lines
            for label, cell in each.cells.items()
            if each.test.kind is kind and cell.forecast is not None
        ]
        if found:
            yield _forecast_chart(found, labels, kind, title)


def _forecast_chart(found: Sequence[tuple[int, Line, Cell]], labels: Sequence[str], kind: Kind, title: str) -> str:
    frame = Frame(480, 400, left=58, bottom=46)
    pairs = [(1e3 * cell.seconds.p50, 1e3 * (cell.forecast.seconds if cell.forecast else 0)) for _s, _l, cell in found]
    every = [value for pair in pairs for value in pair]
    across, upward = powers(every, *frame.x), powers(every, *frame.y)
    parts = [words(frame.left, 15, f"ms {title}", "start", "h")]
    parts += [_band(across, upward, share) for share in reversed(BANDS)]
    parts += [*frame.rows(upward), *frame.columns(across, across.ticks())]
    parts.append(line(across(across.low), upward(across.low), across(across.high), upward(across.high), "even"))
    for (series, each, cell), (true, made) in zip(found, pairs, strict=True):
        error = cell.error or 0.0
        said = f"{labels[series]}\n{each.name}\nmeasured {milliseconds(true / 1e3)} ms, forecast "
        said += f"{milliseconds(made / 1e3)} ms ({percent(error)}), {cell.forecast.label if cell.forecast else ''}"
        parts.append(mark(across(true), upward(made), series, said))
    parts.append(words(sum(frame.x) / 2, frame.height - 8, "measured, ms", name="a"))
    turned = f'transform="translate(13 {pixel(sum(frame.y) / 2)}) rotate(-90)"'
    parts.append(f'<text class="a" {turned} text-anchor="middle">forecast, ms</text>')
    worst = max(found, key=lambda each: abs(each[2].error or 0.0))
    said = f"worst {labels[worst[0]]}, {worst[1].name}, {percent(worst[2].error or 0.0)}"
    return frame.drawn(parts, f"Forecast against measured milliseconds {title} of {len(found)} tests; {said}")


def _band(across: Scale, upward: Scale, share: float) -> str:
    """The area where a forecast is off by no more than a share."""
    low, high, less, more = across.low, across.high, 1 - share, 1 + share
    lower = (low, low), (low / less, low), (high, high * less)
    upper = (high, high), (high / more, high), (low, low * more)
    at = " ".join(f"{pixel(across(x))},{pixel(upward(y))}" for x, y in (*lower, *upper))
    return f'<polygon class="band" points="{at}"/>'
