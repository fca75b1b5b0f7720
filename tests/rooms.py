"""A conversation without a model or a terminal: one answer to everything, messages by script. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from rlkit.apps import chat, chatscreen
from rlkit.apps.chatinput import Reader, Said
from rlkit.apps.chatroom import Room
from rlkit.runtime.chat import Chat
from rlkit.runtime.request import Event, Finished, Logprob, Prefilled, Reason, Request, Token

Line = str | type[BaseException]


class Echo:
    """A model without weights: one id per character, and it answers `reply`."""

    def __init__(self, context_length: int = 200, reply: str = "yes!", adapters: tuple[str, ...] = ()) -> None:
        self.context_length = context_length
        self.reply = reply
        self.adapters = adapters
        self.requests: list[Request] = []
        self.closed = 0  # streams that were ended

    @property
    def prompts(self) -> list[str]:
        return ["".join(map(chr, request.prompt_ids)) for request in self.requests]

    @property
    def adapted(self) -> list[str | None]:
        return [request.adapter for request in self.requests]

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        return "".join(f"{message['role'][0]}:{message['content']}\n" for message in messages) + "a:"

    def stream(self, request: Request) -> Generator[Event, None, None]:
        prompts = self.prompts
        self.requests.append(request)
        reused = 0
        for prompt in prompts:
            both = zip(prompt, self.decode(request.prompt_ids), strict=False)
            reused = max(reused, next((at for at, (a, b) in enumerate(both) if a != b), len(prompt)))
        return self._events(request, reused)

    def _events(self, request: Request, reused: int) -> Generator[Event, None, None]:
        total, wanted = len(request.prompt_ids), request.logprobs
        try:
            yield Prefilled(total, total, 0.25, reused)
            said = self.reply[: request.max_new_tokens]
            for index, letter in enumerate(said):
                top = tuple((ord(letter) + step, -0.5 - step) for step in range(wanted or 0))
                logprob = None if wanted is None else Logprob(ord(letter), -0.5, top)
                yield Token(ord(letter), letter, 0.5 if index == 0 else 0.25, index, logprob)
            reason = Reason.LENGTH if len(said) < len(self.reply) else Reason.STOP
            yield Finished(reason, "", None, total, len(said), reused)
        finally:
            self.closed += 1


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
