"""How replies look: as they are, as Markdown on terminals of any size, and never with escapes where none belong."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rlkit.apps import chatscreen
from rlkit.runtime.request import Prefilled
from rlkit.runtime.thoughts import Piece

TEXT = """# Title

Some *text* with `code`
and a second line.

1. one

   more of one

2. two

```python
def f():

    return 1
```

| a | b |
|---|---|
| 1 | 2 |

<div>kept & kept</div>

[1]: https://example.org
"""


class Terminal(io.StringIO):
    """A terminal, as far as a program can tell."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """What makes standard output a terminal of 60 columns and 12 lines: called within a test, as pytest's own comes."""

    def make() -> Terminal:
        made = Terminal()
        monkeypatch.setattr("sys.stdout", made)
        for name, value in (("TERM", "xterm"), ("COLUMNS", "60"), ("LINES", "12")):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("NO_COLOR", raising=False)
        return made

    return make


def shown(raw: str, width: int, height: int) -> list[str]:
    """What a terminal with many lines of memory shows: the sequences that the screens use, and nothing else."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", raw):
        if part == "\n":
            row, column = row + 1, 0  # the terminal's driver adds the carriage return
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b["):
            kind, number = part[-1], int(part[2:-1]) if part[2:-1].isdigit() else 1
            if kind == "A":
                assert number < height, "goes further up than the terminal shows"
                row -= number
            elif kind == "K":
                lines[row] = ""
            else:
                assert kind in "mhl", part
        else:
            assert column + len(part) <= width or " " not in part.strip(), "wraps where the terminal would"
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def drawn(text: str, size: int, *, end: str = "") -> None:
    """Show a text in pieces, every one of which is drawn."""
    ticks = count()
    screen = chatscreen.Drawn(clock=lambda: float(next(ticks)), rest=0)
    for at in range(0, len(text), size):
        screen.show(Piece(text[at : at + size]))
    screen.end(end)


def whole(text: str, width: int) -> list[str]:
    """Markdown printed at once."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(chatscreen.markdown(text))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_markdown_in_pieces_ends_as_it_would_at_once(size: int, opened: Callable[[], Terminal]) -> None:
    terminal = opened()
    drawn(TEXT, size)
    found = [line for line in shown(terminal.getvalue(), 60, 12) if line]
    assert found == [line for line in whole(TEXT, 60) if line]
    text = "\n".join(found)
    for kept in (
        "Some text with code",
        "and a second line.",
        "2 two",
        "return 1",
        "<div>kept & kept</div>",
        "[1]: http",
    ):
        assert kept in text
    assert "**" not in text and "```" not in text


MARKS = (
    "# ",
    "\n",
    "\n\n",
    "- ",
    "1. ",
    "\n```\n",
    "**",
    "`code`",
    "<b>",
    "    ",
    "> ",
    "[x](y)",
    "\t",
    "[z]: y\n",
    "![i](y)",
)


@settings(max_examples=100)
@given(st.lists(st.sampled_from([*MARKS, "apple ", "pear "]), max_size=25))
def test_any_markdown_loses_no_word(parts: list[str]) -> None:
    text = "".join(parts)
    finished, last = chatscreen.blocks(text)
    assert text in (last, f"{finished}\n{last}")
    apart = " ".join(whole(finished, 200) + whole(last, 200))
    at_once = " ".join(whole(text, 200))
    for word in ("apple", "pear", "<b>"):
        assert at_once.count(word) == apart.count(word) == text.count(word)


def test_a_long_block_does_not_go_beyond_the_terminal(opened: Callable[[], Terminal]) -> None:
    terminal = opened()
    code = "```\n" + "".join(f"line {number}\n" for number in range(60)) + "```\n"
    drawn(code, 9)
    found = shown(terminal.getvalue(), 60, 12)
    assert [line.strip() for line in found if line.strip()] == [f"line {number}" for number in range(60)]


@pytest.mark.parametrize(
    ("begin", "line", "raw"),
    [("```\n", "- x {}\n", "•"), ("| a |\n|:--|\n", "| x {} |\n", "|"), ("", "- x {}\n", "-"), ("", "x {}\n", "|")],
)
def test_the_end_of_a_long_block_looks_as_the_whole(
    begin: str, line: str, raw: str, opened: Callable[[], Terminal]
) -> None:
    terminal = opened()
    screen = chatscreen.Drawn()
    screen.show(Piece(begin + "".join(line.format(number) for number in range(100))))
    drawn = shown(terminal.getvalue(), 60, 12)
    assert any("x 99" in row for row in drawn) and len(drawn) <= 12
    assert raw not in "".join(drawn)
    screen.end()
    assert [row.split()[-1] for row in shown(terminal.getvalue(), 60, 12) if " x " in f" {row}"] == [
        str(number) for number in range(100)
    ]


class Counting(chatscreen.Drawn):
    """Counts how often it draws."""

    drawn = 0

    def _draw(self) -> None:
        self.drawn += 1
        super()._draw()


def test_drawing_takes_a_small_share_of_the_time(opened: Callable[[], Terminal]) -> None:
    terminal = opened()
    halves = count()  # every look at the clock is half a second later, so drawing seems to take that long
    screen = Counting(clock=lambda: next(halves) / 2)
    for _piece in range(100):
        screen.show(Piece("word "))
    assert 3 <= screen.drawn <= 5
    screen.end()
    assert "".join(shown(terminal.getvalue(), 60, 12)).count("word") == 100


def test_a_stopped_reply_shows_what_there_was(opened: Callable[[], Terminal]) -> None:
    terminal = opened()
    drawn("para\n\n- one\n- tw", 3, end=" (stopped)")
    found = [line for line in shown(terminal.getvalue(), 60, 12) if line]
    assert found == ["para", " • one", " • tw", " (stopped)"]


@pytest.mark.parametrize("columns", [1, 5, 20, 29])
def test_a_narrow_terminal_gets_text_as_it_is(
    columns: int, opened: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = opened()
    monkeypatch.setenv("COLUMNS", str(columns))
    assert type(chatscreen.screen()()) is chatscreen.Plain
    monkeypatch.setenv("COLUMNS", "30")
    assert type(chatscreen.screen()()) is chatscreen.Drawn
    drawn(TEXT, 4)
    assert shown(terminal.getvalue(), 30, 12)


def test_the_screen_suits_where_it_is(opened: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    opened()
    assert type(chatscreen.screen()()) is chatscreen.Drawn
    assert type(chatscreen.screen(plain=True)()) is chatscreen.Plain
    assert type(chatscreen.screen(json=True)()) is chatscreen.Nothing
    monkeypatch.setenv("TERM", "dumb")
    assert type(chatscreen.screen()()) is chatscreen.Plain
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert type(chatscreen.screen()()) is chatscreen.Plain


@pytest.mark.parametrize("plain", [True, False])
def test_a_reply_cannot_command_the_terminal(plain: bool, opened: Callable[[], Terminal]) -> None:
    terminal = opened()
    screen = chatscreen.screen(plain=plain)()
    screen.show(Piece("think \x1b[2J\x07", thought=True))
    screen.show(Piece("a\x1b]0;title\x07b\x9b2J\rc\td"))
    screen.end()
    assert not re.search(
        r"\x1b(?!\[(2|22|0|1A|2K|\?25[hl]|\d+)?[mAKhl]?)|\x07|\x9b|\x1b\[2J|\x1b\]", terminal.getvalue()
    )
    assert "a]0;titleb2Jc" in terminal.getvalue()


def test_thoughts_are_dim_on_a_terminal(opened: Callable[[], Terminal]) -> None:
    terminal = opened()
    for plain in (True, False):
        screen = chatscreen.screen(plain=plain)()
        screen.show(Piece("hm ", thought=True))
        screen.show(Piece("so", thought=True))
        screen.show(Piece("It is."))
        screen.end()
    out = terminal.getvalue()
    assert out.count("\x1b[2mhm \x1b[22m\x1b[2mso\x1b[22m\n\n") == 2
    assert "\x1b[2mIt" not in out and "<think>" not in out


def test_thoughts_are_no_part_of_piped_output(capsys: pytest.CaptureFixture[str]) -> None:
    screen = chatscreen.screen()()
    screen.show(Piece("hm", thought=True))
    screen.show(Piece("# It \x1b is."))
    screen.end()
    assert capsys.readouterr() == ("# It \x1b is.\n", "<think>\nhm\n</think>\n\n")


def test_reading_a_long_prompt_is_told_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, says in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("sys.stderr", stream)
        screen = chatscreen.Plain()
        screen.show(Prefilled(512, 1500, 1.0))
        screen.show(Prefilled(1500, 1500, 2.0))
        assert ("reading: 512 of 1500 tokens" in stream.getvalue()) == says
        assert stream.getvalue().endswith("\r\x1b[2K") == says


def test_an_aside_is_dim_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream, line in ((Terminal(), "\x1b[2mnote\x1b[22m\n"), (io.StringIO(), "note\n")):
        monkeypatch.setattr("sys.stderr", stream)
        chatscreen.aside("note")
        assert stream.getvalue() == line
