"""A conversation with a bundle: messages to a prompt, the reply as it comes, old turns dropped when it gets too long.

A prompt is the whole conversation rendered by the bundle's chat template. If it leaves too little room for a reply, the
oldest exchange is dropped until it fits; the system message and the newest question always stay.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlkit.runtime.session import Sampling, Token


class Model(Protocol):
    """What a conversation needs of a session."""

    @property
    def context_length(self) -> int:
        """Prompt and reply together hold at most this many tokens."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """What `adapter` may name."""

    def encode(self, text: str) -> list[int]:
        """Text to ids."""

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages to prompt text."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None,
        adapter: str | None,
    ) -> Generator[Token, None, None]:
        """Tokens of the reply."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant"):
            raise ValueError(f"role {self.role!r} is unknown; use system, user or assistant")

    def to_json(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a reply came; tokens_per_s counts from the second token on, None without one."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float | None
    tokens_per_s: float | None

    def __str__(self) -> str:
        parts = [f"{self.prompt_tokens} prompt tokens", f"{self.new_tokens} new"]
        if self.first_token_seconds is not None:
            parts.append(f"first after {self.first_token_seconds:.2f} s")
        if self.tokens_per_s is not None:
            parts.append(f"then {self.tokens_per_s:.1f} tokens/s")
        return ", ".join(parts)


def speed(prompt_tokens: int, seconds: Sequence[float]) -> Speed:
    """The speed of a reply from the seconds of each of its tokens."""
    later = sum(seconds[1:])
    rate = (len(seconds) - 1) / later if later > 0 else None
    return Speed(prompt_tokens, len(seconds), seconds[0] if seconds else None, rate)


def prompt_ids(model: Model, messages: Sequence[Message]) -> list[int]:
    """The prompt of a conversation, by the bundle's chat template."""
    return model.encode(model.apply_template([message.to_json() for message in messages]))


def fit(model: Model, messages: Sequence[Message], reply_tokens: int) -> tuple[list[Message], list[int]]:
    """The newest messages that leave room for `reply_tokens`, or a quarter of the context, and their prompt.

    Raises ValueError stating the tokens and the limit if even the newest question alone leaves no room for one token.
    """
    head = [message for message in messages[:1] if message.role == "system"]
    turns = list(messages[len(head) :])
    room = model.context_length - min(reply_tokens, model.context_length // 4)
    while True:
        ids = prompt_ids(model, [*head, *turns])
        if len(ids) <= room:
            return [*head, *turns], ids
        shorter = _without_oldest(turns)
        if shorter is None:
            break
        turns = shorter
    if len(ids) >= model.context_length:
        why = f"the message has {len(ids)} tokens with its template, but the context holds {model.context_length}"
        raise ValueError(f"{why} with the reply; shorten it")
    return [*head, *turns], ids


def _without_oldest(turns: list[Message]) -> list[Message] | None:
    """The turns from the second user message on; None if there is only one."""
    later = [index for index, message in enumerate(turns) if index > 0 and message.role == "user"]
    return turns[later[0] :] if later else None


class Chat:
    """A conversation that remembers; what a stopped reply had said is kept, and so is all when the adapter changes."""

    def __init__(self, model: Model, *, system: str | None = None, adapter: str | None = None) -> None:
        self._model = model
        self._adapter: str | None = None
        self.adapter = adapter
        self._system = [Message("system", system)] if system else []
        self.messages: list[Message] = list(self._system)
        self.last_speed: Speed | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters there are."""
        return self._model.adapters

    @property
    def adapter(self) -> str | None:
        """The adapter of the next reply, None the model as it is; ValueError where it is set to one there is not."""
        return self._adapter

    @adapter.setter
    def adapter(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            raise ValueError(f"no adapter {name!r} here; there are {', '.join(self.adapters) or 'none'}")
        self._adapter = name

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._system)

    def reply(
        self, text: str, *, max_new_tokens: int = 512, sampling: Sampling | None = None
    ) -> Generator[Token, None, None]:
        """Yield the reply to `text`, and remember both; closing the iterator stops it.

        Raises ValueError, remembering nothing, if the message does not fit the context.
        """
        chosen = sampling or Sampling()
        kept, ids = fit(self._model, [*self.messages, Message("user", text)], max_new_tokens)
        tokens = self._model.generate(
            ids,
            max_new_tokens,
            temperature=chosen.temperature,
            top_k=chosen.top_k,
            top_p=chosen.top_p,
            seed=chosen.seed,
            adapter=self._adapter,
        )
        return self._remembered(kept, len(ids), tokens)

    def _remembered(
        self, kept: list[Message], prompt_tokens: int, tokens: Generator[Token, None, None]
    ) -> Generator[Token, None, None]:
        said: list[str] = []
        seconds: list[float] = []
        try:
            for token in tokens:
                said.append(token.text)
                seconds.append(token.seconds)
                yield token
        finally:
            self.last_speed = speed(prompt_tokens, seconds)
            self.messages = [*kept, Message("assistant", "".join(said))]
