"""A conversation at a terminal without one: scripted messages, a model that echoes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlkit.apps import chat, chatscreen
from rlkit.apps.chatinput import Reader, Said
from rlkit.apps.chatroom import Room
from rlkit.runtime.chat import Chat
from test_chat import Echo

Line = str | type[BaseException]


class Script:
    """Types these lines, or raises these exceptions; then the input ends."""

    def __init__(self, *lines: Line, interactive: bool = False, empty: bool = True) -> None:
        self._lines = list(lines)
        self._reader = Reader(self._ask)
        self.interactive, self._empty = interactive, empty

    @property
    def empty(self) -> bool:
        return self._empty and not self._reader.midway

    def message(self) -> Said:
        return self._reader.message()

    def _ask(self, _prompt: str) -> str:
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    @property
    def unread(self) -> int:
        return len(self._lines)


def room(model: Echo | None = None, **changes: Any) -> Room:
    """A room where `model` replies, on a plain screen unless told."""
    talk = changes.pop("talk", None) or Chat(model or Echo())
    screen = changes.pop("screen", None) or chatscreen.screen(plain=True, json=changes.get("json", False))
    return Room(talk, Path("echo"), screen=screen, **changes)


def held(there: Room, *lines: Line, **how: Any) -> Script:
    """Hold a conversation of these lines."""
    script = Script(*lines, **how)
    chat.converse(there, script)
    return script
