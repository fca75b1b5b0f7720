"""What a reply grows by, made of the runtime's events: the one source of streamed and of whole answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rlkit.apps.server.toolcalls import CallPart, Calls
from rlkit.runtime.request import Event, Finished, Logprob, Prefilled, Reason, Token
from rlkit.runtime.thoughts import Piece, Thoughts


@dataclass(frozen=True, slots=True)
class Delta:
    """What a reply grows by: text, thought, or a piece of a call; `end` with the last. Logprobs are of its tokens.

    `echo` says that it is the prompt, whose first token has no logprob.
    """

    choice: int
    text: str = ""
    thought: str = ""
    call: CallPart | None = None
    logprobs: tuple[Logprob, ...] = ()
    end: str | None = None
    echo: bool = False


@dataclass(slots=True)
class Counts:
    """Tokens of a reply; `prompt_seconds` is spent on its prompt alone."""

    prompt: int = 0
    reused: int = 0
    new: int = 0
    thought: int = 0
    prompt_seconds: float = 0.0


@dataclass(slots=True)
class Reader:
    """Turns one reply's events into deltas; `thoughts` and `calls` where they are to be told apart from text.

    `called` is what a reply with calls ends with, `echo` the prompt's text where the reply begins with it.
    """

    choice: int
    thoughts: Thoughts | None = None
    calls: Calls | None = None
    called: str = "tool_calls"
    echo: str | None = None
    counts: Counts = field(default_factory=Counts)
    _logprobs: list[Logprob] = field(default_factory=list)
    _thinking: bool = False
    _said: bool = False
    _thought: bool = False

    def feed(self, event: Event) -> list[Delta]:
        """The deltas of an event; none while text may still be part of a tag."""
        if isinstance(event, Token):
            return self._token(event)
        if isinstance(event, Finished):
            return self._finish(event)
        return self._prefilled(event)

    def _token(self, token: Token) -> list[Delta]:
        self.counts.new += 1
        if token.logprob is not None:
            self._logprobs.append(token.logprob)
        if self.thoughts is None and self.calls is None:  # the usual case, once per token
            return [Delta(self.choice, token.text, logprobs=self._take())] if token.text else []
        found = list(self._deltas(self._pieces(token.text)))
        self.counts.thought += self._thinking
        return found

    def _pieces(self, text: str) -> list[Piece]:
        if self.thoughts is not None:
            return self.thoughts.feed(text)
        return [Piece(text)] if text else []

    def _deltas(self, pieces: list[Piece]) -> Iterator[Delta]:
        for piece in pieces:
            self._thinking = piece.thought
            if piece.thought:
                # The line breaks that separate tag and thought belong to neither.
                text = piece.text if self._thought else piece.text.lstrip()
                self._thought = self._thought or bool(text)
                if text:
                    yield Delta(self.choice, thought=text, logprobs=self._take())
            elif self.calls is None:
                yield Delta(self.choice, piece.text, logprobs=self._take())
            else:
                yield from self._calls(self.calls.feed(piece.text))

    def _calls(self, parts: list[str | CallPart]) -> Iterator[Delta]:
        for part in parts:
            if isinstance(part, CallPart):
                yield Delta(self.choice, call=part, logprobs=self._take())
            else:
                yield Delta(self.choice, part, logprobs=self._take())

    def _finish(self, finished: Finished) -> list[Delta]:
        found = list(self._deltas(self._pieces(finished.text)))
        if self.thoughts is not None:
            found += self._deltas(self.thoughts.rest())
        if self.calls is not None:
            found += self._calls(self.calls.end())
        self.counts.prompt, self.counts.new = finished.prompt_tokens, finished.new_tokens
        self.counts.reused = finished.reused_tokens
        called = self.calls is not None and self.calls.found and finished.reason is Reason.STOP
        end = self.called if called else finished.reason.value
        return [*found, Delta(self.choice, logprobs=self._take(), end=end)]

    def _prefilled(self, event: Prefilled) -> list[Delta]:
        self.counts.prompt, self.counts.reused = event.total, event.reused
        self.counts.prompt_seconds += event.seconds
        if self.echo is None or event.done < event.total:
            return []
        return [Delta(self.choice, self.echo, logprobs=event.logprobs, echo=True)]

    def _take(self) -> tuple[Logprob, ...]:
        if not self._logprobs:
            return ()
        taken = tuple(self._logprobs)
        self._logprobs.clear()
        return taken
