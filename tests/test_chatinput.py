"""What is typed: messages of several lines, history, completion; and the whole of it at a real terminal."""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlkit.apps import chatinput
from rlkit.apps.chatinput import History, Reader, Said
from rooms import Script


def said(*lines: str) -> list[Said]:
    script, found = Script(*lines), []
    while True:
        try:
            found.append(script.message())
        except EOFError:
            return found


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["one", " two "], [Said("one"), Said("two")]),
        (["/stats now", " /stats", "/a\nb"], [Said("/stats now", True), Said("/stats"), Said("/a\nb")]),
        (["a\\", "b\\", "", "c"], [Said("a\nb"), Said("c")]),
        (["a\\"], [Said("a")]),
        (["/save\\", "x"], [Said("/save\nx")]),
        (['"""', " a", "", "b ", '"""', "c"], [Said("a\n\nb"), Said("c")]),
        (['"""a"""', '""""""', '"""'], [Said("a"), Said(""), Said("")]),
        (['  """/quit', 'b"""  '], [Said("/quit\nb")]),
        (['"""a', "b"], [Said("a\nb")]),
        (['"""a\nb"""'], [Said("a\nb")]),
        (["x\ny\\", "z"], [Said("x\ny\nz")]),
        ([""], [Said("")]),
    ],
)
def test_lines_become_messages(lines: list[str], messages: list[Said]) -> None:
    assert said(*lines) == messages


def test_more_of_a_message_is_asked_for_differently() -> None:
    prompts: list[str] = []
    lines = iter(["a\\", "b", '"""c', 'd"""'])

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    reader = Reader(ask)
    assert [reader.message().text for _message in range(2)] == ["a\nb", "c\nd"]
    assert prompts == ["> ", ". ", "> ", ". "]


def test_history_is_kept_bounded_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatinput, "MOST_ENTRIES", 3)
    history = History(tmp_path / "chat" / "history.jsonl")
    assert history.entries() == []
    for text in ("one", "two\nlines", "two\nlines", "", "x" * 10_001, "thr\u00e9e\u2028", "four"):
        history.add(text)
    assert history.entries() == ["two\nlines", "thr\u00e9e\u2028", "four"]
    assert len(history.file.read_text().splitlines()) == 3
    if os.name == "posix":
        assert stat.S_IMODE(history.file.stat().st_mode) == 0o600
        assert stat.S_IMODE(history.file.parent.stat().st_mode) == 0o700
    assert [file.name for file in history.file.parent.iterdir()] == ["history.jsonl"]


def test_two_chats_share_the_history(tmp_path: Path) -> None:
    first, second = (History(tmp_path / "history.jsonl") for _chat in range(2))
    first.add("one")
    second.add("two")
    first.add("three")
    assert second.entries() == ["one", "two", "three"]


def test_a_damaged_history_is_what_is_left_of_it(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_bytes(b'"one"\n{"a"\n7\n\xff\xfe\n""\n' + b"[" * 100_000 + b'\n"two"\n')
    assert History(file).entries() == ["one", "two"]


def test_no_place_for_a_history_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "history.jsonl")
    history.add("one")
    assert history.entries() == []


APP = """
import sys
import time
sys.path.insert(0, sys.argv[1])
from functools import partial
from pathlib import Path
from rlkit.apps import chat, chatcommands, chatscreen
from rlkit.apps.chatinput import Keyboard
from rlkit.runtime.chat import Manner
from rooms import Echo, room

import time
class Slow(Echo):
    def _events(self, request, reused):
        for event in super()._events(request, reused):
            if "slow" in self.decode(request.prompt_ids):
                time.sleep(0.01)
            yield event

there = room(Slow(context_length=9000, reply=sys.argv[2]), screen=chatscreen.screen(), manner=Manner(4000))
chat.converse(there, Keyboard(partial(chatcommands.completions, there)))
print("left")
"""
pytestmark_terminal = pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")


class Pty:
    """The app at a terminal of its own."""

    def __init__(self, cache: Path, reply: str) -> None:
        import pty

        self.pid, self.terminal = pty.fork()
        if self.pid == 0:  # pragma: no cover, the other process
            os.environ.update(TERM="xterm", COLUMNS="80", LINES="24", RLKIT_CACHE=str(cache))
            os.execv(sys.executable, [sys.executable, "-c", APP, str(Path(__file__).parent), reply])
        self.seen = ""

    def until(self, text: str, patience: int = 60) -> str:
        """Read until a text comes, and return all since the last such call."""
        while text not in self.seen:
            ready, _writable, _wrong = select.select([self.terminal], [], [], patience)
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.terminal, 1 << 16).decode(errors="replace")
            except OSError:  # which is how its end shows
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from None
        end = self.seen.index(text) + len(text)
        before, self.seen = self.seen[:end], self.seen[end:]
        return before

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C at a prompt until it is noticed: Python's readline loses one that comes before it waits."""
        for attempt in range(5):
            time.sleep(0.3)
            self.type("\x03")
            try:
                self.until(text, patience=10)
            except AssertionError:
                if attempt == 4:
                    raise
            else:
                return


@pytest.fixture
def reply() -> str:
    return "**yes** and\n\n- no\n"


@pytest.fixture
def at_terminal(tmp_path: Path, reply: str) -> Iterator[Pty]:
    made = Pty(tmp_path, reply)
    made.until("> ")
    yield made
    os.close(made.terminal)
    os.kill(made.pid, signal.SIGKILL)  # where a test failed before it left
    os.waitpid(made.pid, 0)


@pytestmark_terminal
def test_a_conversation_at_a_terminal(at_terminal: Pty, tmp_path: Path) -> None:
    at_terminal.type("hello\n")
    said = at_terminal.until("context ")
    assert "\x1b[1myes\x1b[0m" in said and "\x1b[2m[" in said and "**yes**" not in said.split("\x1b[2m[")[-1]
    at_terminal.until("> ")
    at_terminal.type('"""one\n')
    at_terminal.until(". ")
    at_terminal.type('two"""\n')
    at_terminal.until("context ")
    at_terminal.until("> ")
    at_terminal.type("/st\t\n")  # completed
    assert "2 replies, " in at_terminal.until(" (1 %)")
    at_terminal.until("> ")
    at_terminal.type("\x1b[A\x1b[A\n")  # two back: the message of two lines, as one entry
    assert "one" in at_terminal.until("context ")
    at_terminal.until("> ")
    at_terminal.type("\x04")
    at_terminal.until("left")
    kept = [json.loads(line) for line in (tmp_path / "chat" / "history.jsonl").read_text().splitlines()]
    assert kept == ["hello", "one\ntwo", "/stats", "one\ntwo"]


@pytestmark_terminal
@pytest.mark.parametrize("reply", ["so " * 800])
def test_ctrl_c_at_a_terminal(at_terminal: Pty) -> None:
    at_terminal.type("slow\n")
    at_terminal.until("so so")
    at_terminal.type("\x03")
    at_terminal.until("(stopped)")
    at_terminal.until("> ")
    at_terminal.type("half a line")
    at_terminal.until("line")
    at_terminal.interrupt("> ")
    at_terminal.interrupt("Ctrl-C once more leaves")
    at_terminal.until("> ")
    at_terminal.type("/stats\n")
    at_terminal.until("1 replies")
    at_terminal.until("> ")
    at_terminal.interrupt("Ctrl-C once more leaves")
    at_terminal.until("> ")
    at_terminal.interrupt("left")


@pytestmark_terminal
def test_the_prompt_is_no_part_of_piped_output(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", APP, str(Path(__file__).parent), "**yes**"]
    environment = {**os.environ, "TERM": "xterm", "RLKIT_CACHE": str(tmp_path)}
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment) as app:
        os.close(theirs)
        os.write(ours, b"hello\n/quit\n")
        assert app.stdout is not None
        assert app.stdout.read() == b"**yes**\nleft\n"
        assert app.wait(60) == 0
    os.close(ours)
