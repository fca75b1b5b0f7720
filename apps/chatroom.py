"""One conversation at a terminal: who replies, in what manner, on which screen; and Ctrl-C, which stops the reply."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rlkit.apps import asking, chatscreen, console, errors
from rlkit.apps.chatscreen import Screen
from rlkit.runtime.chat import Chat, Manner, Reply
from rlkit.runtime.request import Prefilled, Reason
from rlkit.runtime.thoughts import Piece

# What a reply or a command may end with while the conversation goes on; the runtime's own faults are RuntimeErrors.
SURVIVED = (ValueError, OSError, RuntimeError, MemoryError)
Events = Generator[Prefilled | Piece, None, None]


@dataclass(slots=True)
class Room:
    """A conversation with all that its commands may change. `opened` opens another bundle."""

    talk: Chat
    bundle: Path
    manner: Manner = field(default_factory=Manner)
    opened: Callable[[Path], Any] | None = None
    screen: Callable[[], Screen] = field(default_factory=chatscreen.screen)
    json: bool = False
    replies: int = 0
    tokens: int = 0
    left_out: int = 0  # messages, as last told

    def say(self, text: str) -> None:
        """Reply to a message."""
        self._reply(lambda: self.talk.reply(text, self.manner))

    def retry(self) -> None:
        """Reply to the newest message once more."""
        self._reply(lambda: self.talk.retry(self.manner))

    def context(self) -> str:
        """How full the context is."""
        used, limit = self.talk.context_tokens, self.talk.model.context_length
        return f"context {used} of {limit} ({100 * used / limit:.0f} %)"

    def _reply(self, begin: Callable[[], Events]) -> None:
        screen, before = self.screen(), self.talk.last
        try:
            stopped = _shown(begin, screen)
        except SURVIVED as error:
            if screen.begun:
                screen.end()
            self._failed(error)
            return
        reply = self.talk.last
        screen.end(" (stopped)" if stopped else "")
        if reply is not None and reply is not before:
            self._told(reply, stopped)

    def _told(self, reply: Reply, stopped: bool) -> None:
        self.replies += 1
        self.tokens += reply.speed.new_tokens
        if self.json:
            about = asking.about(self.bundle, self.talk.model, self.talk.adapter)
            numbers = {"stopped": stopped, "context_tokens": self.talk.context_tokens}
            console.emit_json_line({**about, **asking.reply_json(reply, self.talk.model), **numbers})
            return
        if reply.left_out > self.left_out:
            chatscreen.aside(f"[the context is full: the oldest {reply.left_out} messages are not sent any more]")
        self.left_out = reply.left_out
        cut = f", cut at {reply.speed.new_tokens} tokens" if reply.reason is Reason.LENGTH else ""
        chatscreen.aside(f"[{reply.speed}{cut}; {self.context()}]")

    def _failed(self, error: BaseException) -> None:
        line = complain(error)
        if self.json:
            console.emit_json_line({"schema_version": 1, "error": line})


def complain(error: BaseException) -> str:
    """Say in one line what went wrong, and return the line."""
    explained = errors.explain(error)
    line = explained[0] if explained else " ".join(f"{type(error).__name__}: {error}".split())
    console.say(f"error: {line}")
    return line


def _shown(begin: Callable[[], Events], screen: Screen) -> bool:
    """Show a reply; whether it was stopped."""
    try:
        with _noted_interrupt() as interrupted, contextlib.closing(begin()) as events:
            for event in events:
                screen.show(event)
                if interrupted():
                    return True
    except KeyboardInterrupt:  # twice, or on a system where it could not be noted
        return True
    return False


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C be noted, so that it never falls into the middle of drawing or computing."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody else's
        yield lambda: False
        return
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            signal.default_int_handler(number, frame)
        noted.append(number)

    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # only the main thread may
        yield lambda: False
        return
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
