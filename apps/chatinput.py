"""What a person types: messages of one or several lines, what was typed before, completion of commands.

A line that ends with a backslash goes on with the next; a block between triple quotes is one message. History is a file
of the cache folder with one JSON string a line, readable by its owner only and bounded; without readline (or without a
place to write) there is none.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.recover.cache import cache_folder

FIRST, MORE, QUOTES = "> ", ". ", '"""'
MOST_ENTRIES, MOST_LETTERS = 1000, 10_000
Complete = Callable[[str], Sequence[str]]  # the line up to the cursor -> what its last word may become


@dataclass(frozen=True, slots=True)
class Said:
    """A message, or a command: one line, typed as it is, that begins with a slash."""

    text: str
    command: bool = False


class Reader:
    """Puts lines together to messages; `ask` takes a prompt and returns a line, or raises EOFError."""

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask
        self.midway = False  # within a message of several lines

    def message(self) -> Said:
        """The next message; EOFError when there is none."""
        self.midway = False
        line = self._ask(FIRST)
        if line.lstrip().startswith(QUOTES):
            return Said(self._block(line.lstrip().removeprefix(QUOTES)))
        several = line.endswith("\\") or "\n" in line
        return Said(self._continued(line).strip(), not several and line.startswith("/"))

    def _continued(self, line: str) -> str:
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            if (more := self._more()) is None:
                break
            lines.append(more)
        return "\n".join(lines)

    def _block(self, line: str) -> str:
        lines: list[str] = []
        following: str | None = line
        while following is not None:
            if following.rstrip().endswith(QUOTES):
                lines.append(following.rstrip().removesuffix(QUOTES))
                break
            lines.append(following)
            following = self._more()
        return "\n".join(lines).strip()

    def _more(self) -> str | None:
        self.midway = True
        try:
            return self._ask(MORE)
        except EOFError:
            return None


class History:
    """What was typed, the newest last; shared by all chats of this person."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def entries(self) -> list[str]:
        """The entries there are; a damaged line is none."""
        found: list[str] = []
        with contextlib.suppress(OSError):
            for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    entry = json.loads(line)
                    if isinstance(entry, str) and entry:
                        found.append(entry)
        return found[-MOST_ENTRIES:]

    def add(self, text: str) -> None:
        """Keep one more; a message too long for a history is none, nor is the newest once more."""
        entries = self.entries()
        if not text or len(text) > MOST_LETTERS or entries[-1:] == [text]:
            return
        with contextlib.suppress(OSError):  # a folder that cannot be written: then there is no history
            self._write([*entries, text][-MOST_ENTRIES:])

    def _write(self, entries: Sequence[str]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(prefix=".history.", suffix=".part", dir=self.file.parent)  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="ascii") as out:
                out.writelines(json.dumps(entry) + "\n" for entry in entries)
            os.replace(name, self.file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


class Keyboard:
    """A person at a terminal, or the lines of a pipe."""

    def __init__(self, complete: Complete, history: History | None = None) -> None:
        self.interactive = sys.stdin.isatty()
        self._history = history or History(cache_folder() / "chat" / "history.jsonl")
        self._readline = _readline() if self.interactive and sys.stdout.isatty() else None
        self._reader = Reader(self._ask)
        if self._readline is not None:
            self._set_up(self._readline, complete)

    def message(self) -> Said:
        """The next message; EOFError at the end, KeyboardInterrupt where it was given up."""
        said = self._reader.message()
        if self._readline is not None and said.text:
            self._readline.add_history(said.text)
            self._history.add(said.text)
        return said

    @property
    def empty(self) -> bool:
        """Whether nothing of a message had been typed when it was given up."""
        typed = self._readline.get_line_buffer() if self._readline is not None else ""
        return not self._reader.midway and not typed

    def _ask(self, prompt: str) -> str:
        if self._readline is not None:
            return input(prompt)
        if self.interactive:  # standard output is not the terminal: the prompt is no part of it
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def _set_up(self, readline: Any, complete: Complete) -> None:
        readline.set_auto_history(False)  # a message of several lines is one entry
        for entry in self._history.entries():
            readline.add_history(entry)
        readline.set_completer_delims(" \t\n")
        found: list[str] = []

        def completer(word: str, state: int) -> str | None:
            if state == 0:
                found[:] = complete(readline.get_line_buffer()[: readline.get_endidx()])
            return found[state] if state < len(found) else None

        readline.set_completer(completer)
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def _readline() -> Any:
    try:
        import readline
    except ImportError:  # Windows
        return None
    return readline
