"""Small charts as inline SVG text: axes, lines, marks and words, coloured by the page's style sheet.

Everything is plain text that a page contains, so charts follow its light and dark colours, and equal numbers give equal
text. Series are told apart by colour (classes c0, c1, ...) and by the shape of their marks.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

SHAPES = 6  # marks that differ; colours repeat after COLOURS
COLOURS = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`; `log` for powers of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        place = self._way(value) - self._way(self.low)
        whole = self._way(self.high) - self._way(self.low)
        return self.start + (self.end - self.start) * place / (whole or 1.0)

    def _way(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within: 1, 2 or 5 times a power of ten."""
        if self.log:
            return _powers(self.low, self.high, most)
        step = nice((self.high - self.low) / most or 1.0)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _powers(low: float, high: float, most: int) -> list[float]:
    """Round values between two others on a scale of powers: every power of ten, and 2 and 5 times it if few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) <= most + 1:
            return found
    return found


def nice(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten that is no less."""
    power = 10.0 ** math.floor(math.log10(value))
    return next((factor * power for factor in (1.0, 2.0, 5.0) if factor * power >= value * (1 - 1e-9)), 10.0 * power)


def from_zero(values: Iterable[float], start: float, end: float) -> Scale:
    """A scale from 0 to a round value above all others."""
    most = max(values, default=1.0) or 1.0
    step = nice(most / 4)
    return Scale(0.0, step * math.ceil(most / step - 1e-9), start, end)


def powers(values: Sequence[float], start: float, end: float, room: float = 1.5) -> Scale:
    """A scale of powers with some room at both ends."""
    return Scale(min(values) / room, max(values) * room, start, end, log=True)


def number(value: float) -> str:
    """A tick's text: 0, 0.5, 20, 1.5k."""
    if value >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"


def pixel(value: float) -> str:
    """A coordinate without needless digits."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def words(x: float, y: float, text: str, anchor: str = "middle", name: str = "t") -> str:
    """A text at a place; `name` is its class."""
    return f'<text class="{name}" x="{pixel(x)}" y="{pixel(y)}" text-anchor="{anchor}">{html.escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, name: str = "grid") -> str:
    """A straight line."""
    ends = " ".join(f'{key}="{pixel(v)}"' for key, v in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2)))
    return f'<line class="{name}" {ends}/>'


def path(points: Sequence[tuple[float, float]], series: int) -> str:
    """A line through points in the colour of a series."""
    at = " ".join(f"{pixel(x)},{pixel(y)}" for x, y in points)
    return f'<polyline class="line c{series % COLOURS}" points="{at}"/>'


def mark(x: float, y: float, series: int, title: str = "", size: float = 4.0) -> str:
    """A point in the colour and shape of a series; `title` is shown when it is pointed at."""
    told = f"<title>{html.escape(title)}</title>" if title else ""
    name = f'class="mark c{series % COLOURS}"'
    if series % SHAPES == 0:
        return f'<circle {name} cx="{pixel(x)}" cy="{pixel(y)}" r="{pixel(size)}">{told}</circle>'
    at = " ".join(f"{pixel(x + size * dx)},{pixel(y + size * dy)}" for dx, dy in _SHAPES[series % SHAPES - 1])
    return f'<polygon {name} points="{at}">{told}</polygon>'


_ARM = ((1.2, -0.5), (1.2, 0.5), (0.5, 0.5))  # a plus is four of them, each a quarter turn from the one before
_SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
    ((0.0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    ((0.0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
    (*_ARM, *((-y, x) for x, y in _ARM), *((-x, -y) for x, y in _ARM), *((y, -x) for x, y in _ARM)),
)


def legend_mark(series: int) -> str:
    """A series' mark alone, to stand in a line of text."""
    size = 'viewBox="0 0 14 14" width="14" height="14"'
    return f'<svg class="key" {size} aria-hidden="true">{mark(7, 7, series, size=5)}</svg>'


@dataclass(frozen=True, slots=True)
class Frame:
    """The area of a chart: its size and margins in pixels."""

    width: float
    height: float
    left: float = 44.0
    right: float = 12.0
    top: float = 26.0
    bottom: float = 34.0

    @property
    def x(self) -> tuple[float, float]:
        """From the left edge to the right one."""
        return self.left, self.width - self.right

    @property
    def y(self) -> tuple[float, float]:
        """From the lower edge to the upper one."""
        return self.height - self.bottom, self.top

    def rows(self, scale: Scale, text: Callable[[float], str] = number) -> list[str]:
        """Lines across at the ticks of the vertical scale, with their values."""
        made = []
        for value in scale.ticks():
            made += [line(self.left, scale(value), self.width - self.right, scale(value))]
            made += [words(self.left - 6, scale(value) + 4, text(value), "end")]
        return made

    def columns(self, scale: Scale, ticks: Sequence[float], text: Callable[[float], str] = number) -> list[str]:
        """Lines down at ticks of the horizontal scale, with their values."""
        made = []
        for value in ticks:
            made += [line(scale(value), self.top, scale(value), self.height - self.bottom)]
            made += [words(scale(value), self.height - self.bottom + 16, text(value))]
        return made

    def drawn(self, parts: Iterable[str], description: str) -> str:
        """The parts as one <svg> with its description for those who cannot see it."""
        box = f"0 0 {pixel(self.width)} {pixel(self.height)}"
        label = html.escape(description, quote=True)
        return f'<svg class="chart" role="img" aria-label="{label}" viewBox="{box}">{"".join(parts)}</svg>'
