from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import time

import pytest

from rlkit.apps import console
from rlkit.recover.progress import Progress


def lines_of(events: list[tuple[float, Progress]]) -> list[str]:
    written: list[str] = []
    times = iter([when for when, _event in events])
    listener = console.Lines(written.append, clock=lambda: next(times))
    for _when, event in events:
        listener.tell(event)
    return written


def test_a_log_gets_a_line_at_start_now_and_then_and_at_the_end() -> None:
    events = [(float(second), Progress("distill", second, 40, f"KL {second}")) for second in range(41)]
    assert lines_of(events) == [
        "distill:   0%  KL 0",
        "distill:  25%  KL 10  30 s left",
        "distill:  50%  KL 20  20 s left",
        "distill:  75%  KL 30  10 s left",
        "distill: 100%  KL 40  done in 40 s",
    ]


def test_stages_end_once_and_may_have_no_total() -> None:
    events = [
        (0.0, Progress("a", 0, 0)),
        (1.0, Progress("b", 0, 2)),
        (2.0, Progress("b", 2, 2)),
        (3.0, Progress("b", 2, 2)),
    ]
    assert lines_of(events) == ["a:   -%  done in 0.0 s", "b:   0%", "b: 100%  done in 1.0 s"]


def test_a_stage_may_come_again() -> None:
    events = [(0.0, 0), (8.0, 2), (9.0, 1), (14.0, 2), (15.0, 2)]
    assert lines_of([(when, Progress("a", done, 2)) for when, done in events]) == [
        "a:   0%",
        "a: 100%  done in 8.0 s",
        "a:  50%",
        "a: 100%  done in 5.0 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (185, "3:05"), (3723, "1:02:03")]
)
def test_duration(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(12, "12 B"), (1500, "1.5 kB"), (92871040, "92.9 MB"), (2.5e9, "2.50 GB")]
)
def test_nbytes_text(nbytes: float, text: str) -> None:
    assert console.nbytes_text(nbytes) == text


def test_json_goes_to_standard_output_and_refuses_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"a": [1.5, None]})
    console.say("talk")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": [1.5, None]} and err == "talk\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        console.emit_json(float("inf"))


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(quiet=True) as tell:
        tell(Progress("stage", 1, 2))
    assert capsys.readouterr() == ("", "")


def test_a_table_cuts_nothing_off(capsys: pytest.CaptureFixture[str]) -> None:
    word = "k2v2:kchannel:g32:min:w32"
    console.table(tuple("abcdef"), [(word,) * 6])
    out = capsys.readouterr().out
    assert "…" not in out and sum(out.count(letter) for letter in "w") == 6


def test_a_table_shows_markup_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("name", "n"), [("[red]x", 1), ("y", 22)], title="t")
    out = capsys.readouterr().out
    assert "[red]x" in out and "22" in out


def drained(terminal: int) -> bytes:
    """All that was written to a terminal whose writers are gone: it may come in several pieces."""
    found = b""
    with contextlib.suppress(OSError):  # which is how its end shows
        while piece := os.read(terminal, 1 << 16):
            found += piece
    return found


@pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")
def test_a_terminal_gets_bars_with_time_left() -> None:
    program = """
import time
from rlkit.apps import console
from rlkit.recover.progress import Progress
with console.progress() as tell:
    for done in range(4):
        tell(Progress("distill", done, 4, f"KL {done}"))
        time.sleep(0.05)
    tell(Progress("distill", 4, 4, "KL end"))
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b""
        assert process.wait(timeout=60) == 0
    os.close(theirs)
    seen = drained(ours).decode()
    os.close(ours)
    assert "distill" in seen and "100%" in seen and "KL end" in seen and "0:00:00" in seen


class Terminal(io.StringIO):
    """A terminal, as far as a program can tell."""

    def isatty(self) -> bool:
        return True


def test_bars_stay_on_the_terminal_when_a_library_is_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, trap = Terminal(), Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with console.progress() as tell, contextlib.redirect_stderr(trap):
        tell(Progress("builder", 1, 2))
        time.sleep(0.3)  # the bars are drawn ten times a second
    assert trap.getvalue() == ""
    assert "builder" in terminal.getvalue()
