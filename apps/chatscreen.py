"""How a reply looks while it comes: as it is, or its Markdown drawn block by block, or nothing at all.

Markdown of a finished block is printed for good; only the block that may still grow is drawn anew, and of that only as
many lines as the terminal shows, so nothing has to be undone further up than the terminal can. Where standard output is
no terminal, the answer goes there as it is and thoughts go to standard error.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from rlkit.apps import console
from rlkit.runtime.request import Prefilled
from rlkit.runtime.thoughts import CLOSE, OPEN, Piece

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.markdown import Markdown

NARROW = 30  # columns; a terminal with fewer gets replies as they are
DRAW_SECONDS, DRAW_REST = 0.1, 24.0  # drawn so often; a 25th of the time at most, which the model lacks
CLEAR_LINE = "\r\x1b[2K"
CODE_THEME = "monokai"
# What a terminal would obey instead of showing: control characters other than line feed and tab.
CONTROLS = dict.fromkeys([*(code for code in range(32) if code not in (9, 10)), *range(127, 160)])


class Screen(Protocol):
    """Where one reply is shown."""

    @property
    def begun(self) -> bool:
        """Whether there is anything to end."""

    def show(self, event: Prefilled | Piece) -> None:
        """The next of the reply."""

    def end(self, note: str = "") -> None:
        """The reply is over; `note` says how, where that needs saying."""


class Nothing:
    """Shows nothing: for output as JSON, which is written when the reply is over."""

    begun = False

    def show(self, event: Prefilled | Piece) -> None:
        """Show nothing."""

    def end(self, note: str = "") -> None:
        """Show nothing."""


class Plain:
    """Text as it comes, thoughts dim."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._thinking = self._waiting = self.begun = False

    def show(self, event: Prefilled | Piece) -> None:
        """Write it; of a long prompt, how much has been read."""
        self.begun = True
        if isinstance(event, Prefilled):
            self._read(event)
            return
        self._clear_status()
        if event.thought:
            self._think(event.text)
        else:
            self._end_thought()
            self._say(event.text)

    def end(self, note: str = "") -> None:
        """End the line, with the note."""
        self._clear_status()
        self._end_thought()
        self._close(note)

    def _say(self, text: str) -> None:
        _write(sys.stdout, printable(text) if self._terminal else text)

    def _close(self, note: str) -> None:
        console.emit(note)

    def _think(self, text: str) -> None:
        stream = sys.stdout if self._terminal else sys.stderr
        tag = "" if self._thinking or styled(stream) else f"{OPEN}\n"
        self._thinking = True
        _write(stream, dim(tag + text, stream))

    def _end_thought(self) -> None:
        if self._thinking:
            stream = sys.stdout if self._terminal else sys.stderr
            _write(stream, "\n\n" if styled(stream) else f"\n{CLOSE}\n\n")
            self._thinking = False

    def _read(self, event: Prefilled) -> None:
        self._clear_status()
        if event.done < event.total and styled(sys.stderr):
            _write(sys.stderr, dim(f"reading: {event.done} of {event.total} tokens", sys.stderr))
            self._waiting = True

    def _clear_status(self) -> None:
        if self._waiting:
            _write(sys.stderr, CLEAR_LINE)
            self._waiting = False


class Drawn(Plain):
    """Markdown, drawn on a terminal."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, rest: float = DRAW_REST) -> None:
        from rich.console import Console

        super().__init__()
        self._console = Console(file=sys.stdout, highlight=False)
        markdown("")  # what it imports is not waited for within the reply, whose speed is told
        self._clock = clock
        self._live: Live | None = None
        self._text = ""  # not printed for good yet
        self._rest = rest  # of the time that drawing took, before it is drawn again
        self._next = 0.0
        self._printed = False

    def _say(self, text: str) -> None:
        self._text += printable(text)
        now = self._clock()
        if now >= self._next:
            self._draw()
            later = self._clock()
            self._next = later + max(DRAW_SECONDS, self._rest * (later - now))

    def _draw(self) -> None:
        finished, self._text = blocks(self._text)
        live = self._started()
        if finished.strip():
            self._print(finished)
        end = _end(self._text, self._console.size.height)
        live.update(_Tail(markdown(end), space=self._printed), refresh=True)

    def _close(self, note: str) -> None:
        if self._live is not None:
            self._live.update("", refresh=True)
            self._live.stop()
            self._live = None
        if self._text.strip():
            self._print(self._text)
        if note or not self._printed:
            console.emit(note)

    def _print(self, text: str) -> None:
        if self._printed:
            self._console.print()
        self._console.print(markdown(text))
        self._printed = True

    def _started(self) -> Live:
        from rich.live import Live

        if self._live is None:
            self._live = Live("", console=self._console, auto_refresh=False, transient=True, redirect_stderr=False)
            self._live.start()
        return self._live


class _Tail:
    """The last lines of something, as many as a terminal shows below what is there already."""

    def __init__(self, drawn: Markdown, *, space: bool) -> None:
        self._drawn, self._space = drawn, space

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        lines = console.render_lines(self._drawn, options.update(height=None), pad=False)
        room = max(console.size.height - 2 - self._space, 1)
        if self._space:
            yield Segment.line()
        for index, line in enumerate(lines[-room:]):
            if index:
                yield Segment.line()
            yield from line


def screen(*, plain: bool = False, json: bool = False) -> Callable[[], Screen]:
    """What makes the screen of each reply; Markdown is drawn only where a terminal can."""
    if json:
        return Nothing

    def suited() -> Screen:
        return Plain() if plain or not styled(sys.stdout) or _columns() < NARROW else Drawn()

    return suited


def styled(stream: TextIO) -> bool:
    """Whether escape sequences mean something there."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def dim(text: str, stream: TextIO) -> str:
    """Text that stands back, where it can."""
    return f"\x1b[2m{printable(text)}\x1b[22m" if styled(stream) else text


def aside(text: str) -> None:
    """A line beside the conversation, on standard error."""
    console.say(dim(text, sys.stderr))


def printable(text: str) -> str:
    """Text without what a terminal would obey instead of showing."""
    return text.translate(CONTROLS)


def markdown(text: str) -> Markdown:
    """Text as Markdown that loses nothing: line ends stay, HTML and definitions of links are text."""
    from rich.markdown import Markdown

    drawn = Markdown("", code_theme=CODE_THEME, hyperlinks=False)
    drawn.parsed = _rules().parse(text)
    for token in drawn.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return drawn


def blocks(text: str) -> tuple[str, str]:
    """The blocks of Markdown that cannot change any more, and the last one, which can."""
    found = _rules().disable(["inline", "text_join"]).parse(text)
    begins = [token.map[0] for token in found if token.level == 0 and token.nesting >= 0 and token.map]
    if len(begins) < 2:
        return "", text
    lines = text.split("\n")
    return "\n".join(lines[: begins[-1]]), "\n".join(lines[begins[-1] :])


def _end(text: str, lines: int) -> str:
    """So much of a block that its last lines look as they would: what begins a code block or a table, and the end."""
    rows = text.split("\n")
    if len(rows) <= 2 * lines:
        return text
    fenced = rows[0].lstrip().startswith(("```", "~~~"))
    table = rows[1].strip() and not rows[1].strip("|-: ")
    return "\n".join([*rows[: 1 if fenced else 2 if table else 0], *rows[-lines:]])


def _rules() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline", "reference"])


def _columns() -> int:
    from rich.console import Console

    return Console(file=sys.stdout).width


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
