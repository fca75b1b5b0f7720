"""What a person sees while rlkit works: bars with time left on a terminal, plain lines in a log, nothing with --json.

Talk goes to standard error, results to standard output.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlkit.recover.progress import Progress, Tell, silent

LINE_SECONDS = 10.0  # a log gets a line at most this often within one stage


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Tell]:
    """Yield a listener for progress that suits where standard error goes."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as tell:
            yield tell
    else:
        yield Lines(say).tell


@contextlib.contextmanager
def _bars() -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    what = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), BarColumn(bar_width=24))
    figures = (TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[note]}"))
    # The file as it is now: what redirects sys.stderr meanwhile would otherwise catch the bars, or feed them to itself.
    screen = Console(file=sys.stderr)
    with Bars(*what, *figures, TimeElapsedColumn(), TimeRemainingColumn(), console=screen) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(event: Progress) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, note="")
            elif bars.tasks[tasks[event.stage]].finished and event.done < event.total:  # a second stage of that name
                bars.reset(tasks[event.stage])
            bars.update(tasks[event.stage], completed=event.done, total=event.total, note=event.note)

        yield tell


class Lines:
    """Progress as lines for a log: the start of a stage, now and then, and its end."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._stage, self._begun, self._last, self._ended = "", 0.0, 0.0, False

    def tell(self, event: Progress) -> None:
        """Write a line if this event deserves one."""
        now = self._clock()
        again = self._ended and event.done < event.total  # a second stage of that name
        if event.stage != self._stage or again:
            self._stage, self._begun, self._last, self._ended = event.stage, now, now, False
        elif self._ended or (event.done < event.total and now - self._last < LINE_SECONDS):
            return
        self._last, self._ended = now, event.done >= event.total
        share = f"{100 * event.done / event.total:3.0f}%" if event.total else "  -%"
        parts = [f"{event.stage}: {share}", event.note, self._timing(event, now)]
        self._write("  ".join(part for part in parts if part))

    def _timing(self, event: Progress, now: float) -> str:
        seconds = now - self._begun
        if event.done >= event.total:
            return f"done in {duration(seconds)}"
        return f"{duration(seconds * (event.total - event.done) / event.done)} left" if event.done and seconds else ""


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.4 s, 12 s, 3:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def nbytes_text(nbytes: float) -> str:
    """Bytes in decimal units: 93 MB, 1.20 GB."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"


def say(text: str) -> None:
    """A line of talk, on standard error."""
    print(text, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """A line of result, on standard output."""
    print(text, flush=True)


def emit_json(value: Any) -> None:
    """The result as indented JSON on standard output; NaN and infinity are refused, as JSON has none."""
    emit(json.dumps(value, indent=2, allow_nan=False))


def emit_json_line(value: Any) -> None:
    """One of several results, as one line of JSON."""
    emit(json.dumps(value, allow_nan=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """A table on standard output; columns whose cells are all numbers or empty are right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        figures = all(_is_figure(row[index]) for row in rows)
        drawn.add_column(name, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    width = None if sys.stdout.isatty() else 120
    Console(file=sys.stdout, width=width).print(drawn)


def _is_figure(cell: object) -> bool:
    return str(cell)[:1] in "+-0123456789.~"
