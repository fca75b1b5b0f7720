"""Depth networks as one HTML page that needs nothing else: no script, no link, charts and pictures inside, light, dark.

Each kind of network has a chart of accuracy over parameters and one over latency (the frontier is joined, baselines
are dashed), a table of all rows on all data, what each stage of an AnyNet says, measured against forecast latency, and
pictures: image, truth, predictions and their errors.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from string import Template

from rlkit.profiles import depthpictures
from rlkit.profiles.depthmetrics import DepthScore, StereoScore
from rlkit.profiles.depthpictures import Range
from rlkit.profiles.depthresult import HIGHER_IS_BETTER, Bar, DepthResult, Picture, Row, Score, Suite
from rlkit.profiles.svg import Frame, Scale, line, mark, path, powers, words
from rlkit.profiles.table import Table
from rlkit.recover.atomic import write_text
from rlkit.recover.depthfile import Kind

NAMES = {Kind.MONO: "Depth from one image", Kind.STEREO: "Disparity from a pair"}
FIGURES = {Kind.MONO: "SSIM of log depth (more is better)", Kind.STEREO: "three-pixel error, % (less is better)"}
COLUMNS = {
    Kind.MONO: ("SSIM", "AbsRel", "delta < 1.25, %", "RMSE, m"),
    Kind.STEREO: ("three-pixel error, %", "EPE, px"),
}
CHART = (520.0, 330.0)
ON, OFF = 0, 1  # series of the frontier, and of what is behind it
NARROW = 4.0  # times the smallest
CLOSE, LETTER = 14.0, 7.0  # pixels between two lines of text; of a letter


def write(path: Path, result: DepthResult) -> None:
    """Write the page, complete or not at all."""
    write_text(path, to_html(result))


def to_html(result: DepthResult) -> str:
    """The page; equal results give equal pages."""
    template = Template(Path(__file__).with_name("depthpage.html").read_text(encoding="utf-8"))
    networks = sum(not row.baseline for suite in result.suites for row in suite.rows)
    said = [f"{networks} network{'s' * (networks != 1)}", *(NAMES[suite.kind].lower() for suite in result.suites)]
    about = f"<section><h2>How this was made</h2>{_list(map(_text, result.about))}</section>" if result.about else ""
    return template.substitute(
        title="Depth networks: accuracy against size and speed",
        subtitle=_text(" · ".join(said)),
        bars=_list(_bar(bar) for suite in result.suites for bar in suite.bars),
        suites="".join(_suite(suite) for suite in result.suites),
        about=about,
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _list(lines: Iterable[str]) -> str:
    made = "".join(f"<li>{one}</li>" for one in lines)
    return f"<ul>{made}</ul>" if made else ""


def _bar(bar: Bar) -> str:
    word, name = ("met", "met") if bar.met else ("missed", "missed")
    return f'<b class="{name}">{word}</b> {_text(bar.claim)}: {bar.found:.4g} found, {bar.wanted:.4g} asked for'


def _suite(suite: Suite) -> str:
    data = " ".join(
        f"{each.name}: {each.about}, {each.samples} {'image' if suite.kind is Kind.MONO else 'pair'}"
        f"{'s' * (each.samples != 1)}{'' if each.held_out else ' (not held out)'}."
        for each in suite.data
    )
    tables = [accuracy(suite), stages(suite), latencies(suite)]
    parts = [
        f"<section><h2>{NAMES[suite.kind]}</h2>",
        f'<p class="note">{_text(data)} FLOPs and latency of a frame of {suite.width}x{suite.height}.</p>',
        f'<div class="charts">{"".join(_charts(suite))}</div>',
        *(_table(table, {row.name for row in suite.frontier()}) for table in tables if table.rows),
        *(_picture(suite.kind, picture) for picture in suite.pictures),
        "</section>",
    ]
    return "".join(parts)


# --- tables ---------------------------------------------------------------------------------------------------------


def accuracy(suite: Suite) -> Table:
    """Every row with its size and its figures on every data set."""
    several = len(suite.data) > 1
    figures = [f"{data.name}: {name}" if several else name for data in suite.data for name in COLUMNS[suite.kind]]
    first = next((row for row in suite.rows if not row.baseline), None)
    rows = [
        (
            row.name,
            *_sizes(row, first),
            *(cell for data in suite.data for cell in _cells(suite, row, data.name)),
            row.how,
        )
        for row in suite.rows
    ]
    columns = ("", "parameters", "fewer, %", "MFLOP", "file, kB", "precision", *figures, "how it was made")
    note = "Bold: on the frontier of parameters, no other network is as small and as accurate."
    return Table("Accuracy and size", columns, tuple(rows), note)


def _sizes(row: Row, first: Row | None) -> tuple[str, ...]:
    if row.parameters is None or first is None or not first.parameters:
        return "", "", "", "", ""
    fewer = 100 * (1 - row.parameters / first.parameters)
    flops = "" if row.flops is None else f"{row.flops / 1e6:,.1f}"
    nbytes = "" if row.nbytes is None else f"{row.nbytes / 1e3:,.1f}"
    return f"{row.parameters:,}", "" if row is first else f"{fewer:.1f}", flops, nbytes, row.precision


def _cells(suite: Suite, row: Row, data: str, stage: int | None = None) -> tuple[str, ...]:
    score = row.score(data, stage)
    return ("",) * len(COLUMNS[suite.kind]) if score is None else _figures(score)


def _figures(score: Score) -> tuple[str, ...]:
    if isinstance(score, StereoScore):
        return f"{100 * score.three_pixel:.2f}", f"{score.epe:.3f}"
    assert isinstance(score, DepthScore)
    ssim = "" if score.ssim is None else f"{score.ssim:.4f}"
    return ssim, f"{score.abs_rel:.4f}", f"{100 * score.delta_1_25:.2f}", f"{score.rmse_m:.3f}"


def stages(suite: Suite) -> Table:
    """What each stage of a network says, where stages were measured."""
    rows = []
    for row in suite.rows:
        for stage in sorted({each.stage for each in row.scores if each.stage is not None}):
            cells = (cell for data in suite.data for cell in _cells(suite, row, data.name, stage))
            rows.append((row.name, str(stage), *cells))
    figures = [f"{data.name}: {name}" for data in suite.data for name in COLUMNS[suite.kind]]
    return Table("Anytime: the answer of each stage", ("", "stage", *figures), tuple(rows))


def latencies(suite: Suite) -> Table:
    """Measured frames beside what was forecast, and how much faster than the first network."""
    first = {(each.device, each.threads): each.seconds for row in suite.rows[:1] for each in row.latency}
    rows = []
    for row in suite.rows:
        for each in row.latency:
            whole = first.get((each.device, each.threads))
            expected = each.forecast_seconds
            rows.append(
                (
                    row.name,
                    f"{each.device}, {each.threads} thread{'s' * (each.threads != 1)}",
                    _short(1e3 * each.seconds),
                    f"{_short(1e3 * each.low)} to {_short(1e3 * each.high)}",
                    "" if expected is None else _short(1e3 * expected),
                    "" if expected is None else f"{100 * (expected / each.seconds - 1):+.0f}",
                    "" if whole is None else f"{whole / each.seconds:.2f}x",
                    str(each.frames),
                )
            )
    columns = ("", "on", "median, ms", "quartiles, ms", "forecast, ms", "off by, %", "faster", "frames")
    return Table("Latency, measured and forecast", columns, tuple(rows))


def _table(table: Table, best: set[str]) -> str:
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    rows = "".join(_row(row, row[0] in best) for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<h3>{_text(table.title)}</h3>{note}{body}"


def _row(row: tuple[str, ...], best: bool) -> str:
    first, *others = row
    cells = "".join(f"<td{' class=long' * (len(cell) > 30)}>{_text(cell)}</td>" for cell in others)
    return f'<tr{" class=best" * best}><th scope="row">{_text(first)}</th>{cells}</tr>'


# --- charts ---------------------------------------------------------------------------------------------------------


def _charts(suite: Suite) -> Iterator[str]:
    """Accuracy over parameters, and over latency at each place where rows were timed."""
    best = {row.name for row in suite.frontier()}
    yield from _chart(suite, "parameters", lambda row: row.parameters and float(row.parameters), best, _count)
    for device, threads in dict.fromkeys((each.device, each.threads) for row in suite.rows for each in row.latency):

        def milliseconds(row: Row, device: str = device, threads: int = threads) -> float | None:
            found = [each.seconds for each in row.latency if (each.device, each.threads) == (device, threads)]
            return 1e3 * found[0] if found else None

        said = f"milliseconds a frame, {device}, {threads} thread{'s' * (threads != 1)}"
        points = [(milliseconds(row), suite.leading(row), row.name) for row in suite.rows]
        yield from _chart(suite, said, milliseconds, _frontier(suite, points), _short)


def _frontier(suite: Suite, points: Sequence[tuple[float | None, float | None, str]]) -> set[str]:
    sign = -1.0 if HIGHER_IS_BETTER[suite.kind] else 1.0
    known = sorted((x, sign * y, name) for x, y, name in points if x is not None and y is not None)
    found: set[str] = set()
    least = float("inf")
    for _, error, name in known:
        if error < least:
            least = error
            found.add(name)
    return found


def _short(value: float) -> str:
    """Three digits, without a power of ten where they are before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"


def _chart(
    suite: Suite, across: str, size: Callable[[Row], float | None], best: set[str], number: Callable[[float], str]
) -> Iterator[str]:
    """One chart; none where no row has both."""
    factor = 100.0 if suite.kind is Kind.STEREO else 1.0
    known = [(x, factor * y, row) for row in suite.rows if (x := size(row)) and (y := suite.leading(row)) is not None]
    if not known:
        return
    flat = [(factor * y, row) for row in suite.rows if row.baseline and (y := suite.leading(row)) is not None]
    frame = Frame(*CHART, left=52, top=44, bottom=46, right=70)
    up = _upward(frame, [y for _, y, _ in known], [y for y, _ in flat])
    right = _across(frame, [x for x, _, _ in known])
    parts = [words(12, 16, FIGURES[suite.kind], "start", "h"), *frame.rows(up)]
    parts += frame.columns(right, right.ticks(), number)
    parts.append(words(sum(frame.x) / 2, frame.height - 8, across, "middle", "a"))
    taken: list[Taken] = []
    parts += _baselines(frame, up, flat, taken)
    joined = sorted((right(x), up(y)) for x, y, row in known if row.name in best)
    parts += [path(joined, ON)] if len(joined) > 1 else []
    for x, y, row in sorted(known, key=lambda each: each[2].name not in best):
        told = f"{row.name}: {number(x)}, {y:.4g}"
        parts.append(mark(right(x), up(y), ON if row.name in best else OFF, told, 5.0))
        parts += _label(right(x) + 8, up(y) + (16 if HIGHER_IS_BETTER[suite.kind] else -6), row.name, taken)
    described = "; ".join(f"{row.name} {number(x)}, {y:.4g}" for x, y, row in known)
    yield f"<div>{frame.drawn(parts, f'{FIGURES[suite.kind]} over {across}: {described}')}</div>"


def _upward(frame: Frame, ends: Sequence[float], flat: Sequence[float]) -> Scale:
    """From the worst network to the best, and to those baselines that leave the networks half of the height."""
    low, high = min(ends), max(ends)
    reach = max(high - low, 0.02 * high)
    near = [y for y in flat if low - reach <= y <= high + reach]
    low, high = min(low, *near) if near else low, max(high, *near) if near else high
    room = max(0.1 * (high - low), 0.005 * high, 1e-4)
    return Scale(low - room, high + room, *frame.y)


def _across(frame: Frame, ends: Sequence[float]) -> Scale:
    """Powers, or even steps where all is within a factor of NARROW."""
    if max(ends) > NARROW * min(ends):
        return powers(ends, *frame.x)
    room = max(0.1 * (max(ends) - min(ends)), 0.02 * max(ends))
    return Scale(min(ends) - room, max(ends) + room, *frame.x)


Taken = tuple[float, float, float]
"""Where words stand: left end, baseline, width."""


def _baselines(frame: Frame, up: Scale, flat: Sequence[tuple[float, Row]], taken: list[Taken]) -> Iterator[str]:
    """Dashed lines; at an edge, as words alone, what is beyond the scale."""
    at = frame.left + 4
    beyond = {True: frame.top + CLOSE - 2, False: frame.height - frame.bottom - 4}  # above, below
    for y, row in flat:
        if up.low <= y <= up.high:
            yield line(frame.left, up(y), frame.width - frame.right, up(y), "even")
            place, said = up(y) - 4, f"{row.name} {y:.3g}"
        else:
            above = y > up.high
            place, said = beyond[above], f"{'↑' if above else '↓'} {row.name} {y:.3g}"
            beyond[above] += CLOSE if above else -CLOSE
        taken.append((at, place, LETTER * len(said)))
        yield words(at, place, said, "start", "a")


def _label(x: float, y: float, name: str, taken: list[Taken]) -> Iterator[str]:
    """A mark's name, where no other words are; beside the frontier, which rises or falls."""
    wide = LETTER * len(name)
    if all(abs(y - top) >= CLOSE or x > left + room or x + wide < left for left, top, room in taken):
        taken.append((x, y, wide))
        yield words(x, y, name, "start", "r")


# --- pictures -------------------------------------------------------------------------------------------------------


def _picture(kind: Kind, picture: Picture) -> str:
    ends = depthpictures.value_range(kind, picture.truth, picture.valid)
    figures = "".join(
        f'<figure><img alt="{_text(f"{picture.name}: {shown.name}")}" src="{_source(shown.png)}">'
        f"<figcaption>{_text(shown.name)}</figcaption></figure>"
        for shown in depthpictures.drawn(kind, depthpictures.thinned(picture))
    )
    return f'<h3>{_text(picture.name)}</h3>{_key(kind, ends)}<div class="pictures">{figures}</div>'


def _key(kind: Kind, ends: Range) -> str:
    """What the colours say."""
    unit, far, what = (
        ("m", f"{100 * depthpictures.FAR_SHARE:.0f} % of the truth", "depth")
        if kind is Kind.MONO
        else ("px", f"{depthpictures.FAR_PIXELS:.0f} px", "disparity")
    )
    value, error = (_source(depthpictures.bar(colours)) for colours in (depthpictures.VALUE, depthpictures.ERROR))
    return (
        f'<p class="key">{what} {ends.dark:.3g} {unit} <img alt="dark to light" src="{value}"> {ends.light:.3g} {unit}'
        f' · error 0 <img alt="dark to light" src="{error}"> {far} and more · checks: truth not known</p>'
    )


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
