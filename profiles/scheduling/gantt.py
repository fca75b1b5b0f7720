"""The first seconds of a run as a chart of who ran where: a lane per unit, a lane for what was dropped.

Shapes are placed in milliseconds in an SVG that the page's script zooms by its viewBox; without the script it shows the
first part. Colours are streams, pale is a token of a request, an edge of warning colour is a frame that was late.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from rlkit.profiles.scheduling.record import NEVER, Row, Run
from rlkit.runtime.jobs import Option

COLOURS = 12
LANE, BAR = 10, 8  # heights, of any unit: the page stretches them
WINDOW_MS, SHOWN_MS = 10_000.0, 500.0  # drawn at most, shown at first
MOST_STEPS = 1_200  # of a run


def window(runs: Sequence[Run]) -> float:
    """Milliseconds that are drawn of every run, so that none has more than so many steps."""
    ends = [WINDOW_MS]
    for run in runs:
        ends.append(run.workload.setting.duration / 1e6)
        starts = sorted(row[0] for row in (*run.rows, *run.cut))
        if len(starts) > MOST_STEPS:
            ends.append(starts[MOST_STEPS] / 1e6)
    return max(min(ends), 1.0)


def gantt(run: Run, until: float) -> str:
    """A figure: names of the lanes, the chart, and a line for the times below it."""
    units = run.workload.setting.units
    names = "".join(f"<span>{html.escape(name)}</span>" for name in (*units, "dropped"))
    height = LANE * (len(units) + 1)
    shown = min(SHOWN_MS, until)
    label = html.escape(f"{run.policy}: steps by unit, first {until / 1e3:.1f} s", quote=True)
    box = f'viewBox="0 0 {_ms(shown)} {height}" preserveAspectRatio="none" role="img" aria-label="{label}"'
    shapes = "".join((*_lanes(len(units), until), *_steps(run, until), *_drops(run, until)))
    axis = "".join(f'<span style="left:{20 * at}%">{shown * at / 5:g} ms</span>' for at in range(5))
    style = f"--lanes:{len(units) + 1}"
    chart = f'<svg class="gantt" {box}>{shapes}</svg><div class="axis">{axis}</div>'
    return f'<div class="run" style="{style}"><div class="lanes">{names}</div><div class="area">{chart}</div></div>'


def _ms(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _lanes(count: int, until: float) -> Iterator[str]:
    for lane in range(count + 1):
        yield f'<rect class="lane" x="0" y="{LANE * lane + 1}" width="{_ms(until)}" height="{BAR}"/>'


def _steps(run: Run, until: float) -> Iterator[str]:
    rows = sorted((*run.rows, *run.cut), key=lambda row: row[0])
    for row in rows:
        if row[0] / 1e6 < until:
            yield _step(run, row)


def _step(run: Run, row: Row) -> str:
    start, finish, number, option = row
    load = run.workload
    place = load.streams[number]
    frame = not load.prompts[number]
    state = " token" * (not frame and option.units == 1) + " late" * (frame and finish > load.deadlines[number])
    at = f'x="{_ms(start / 1e6)}" y="{LANE * option.unit + 1}" width="{_ms((finish - start) / 1e6)}" height="{BAR}"'
    tags = f'data-s="{place}" data-n="{load.indices[number]}"{_more(option)}'
    return f'<rect class="s{place % COLOURS}{state}" {at} {tags}/>'


def _more(option: Option) -> str:
    """What the page says of a step beside its stream and times."""
    tokens = f' data-k="{option.units}"' if option.units else ""
    return tokens + (f' data-v="{html.escape(option.variant, quote=True)}"' if option.variant else "")


def _drops(run: Run, until: float) -> Iterator[str]:
    load = run.workload
    top = LANE * len(load.setting.units) + 1
    for number, time in enumerate(run.dropped):
        if time != NEVER and time / 1e6 < until:
            place = load.streams[number]
            tags = f'data-s="{place}" data-n="{load.indices[number]}"'
            yield f'<path class="drop d{place % COLOURS}" d="M{_ms(time / 1e6)} {top}v{BAR}" {tags}/>'
