"""The parts that OpenAI's objects share: heads, server-sent events, lists of logprobs."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.apps.server.asking import Target
from rlkit.runtime.request import Logprob

LEAST = -9999.0  # stands for a probability of 0, whose logarithm JSON has no number for
BROKEN = "\ufffd"  # a token that is part of a character has no text of its own


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer begins with; `usage` where chunks of a stream have that field."""

    id: str
    created: int
    kind: str
    target: Target
    opening: str  # of an event, up to its choices
    ending: str

    @classmethod
    def new(cls, prefix: str, kind: str, target: Target, *, usage: bool) -> Head:
        """A head with an id of its own."""
        key, now = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        chunk = f"{kind}.chunk" if kind == "chat.completion" else kind
        about = {"id": key, "object": chunk, "created": now, "model": target.model}
        opening = f'data: {json.dumps(about)[:-1]}, "choices":['
        return cls(key, now, kind, target, opening, ',"usage":null' if usage else "")

    def event(self, choice: str, extra: str = "") -> str:
        """An event with one choice (JSON text)."""
        return f"{self.opening}{choice}]{self.ending}{extra}}}\n\n"

    def closing(self, usage: dict[str, Any], extra: str) -> str:
        """The event after the last choice."""
        return f'{self.opening}],"usage":{json.dumps(usage)}{extra}}}\n\n'

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Everything in one object."""
        about = {"id": self.id, "object": self.kind, "created": self.created, "model": self.target.model}
        return {**about, "choices": list(choices), "usage": usage}


def chat_logprobs(found: Sequence[Logprob], name: Callable[[int], str]) -> dict[str, Any]:
    """Logprobs as chat replies list them."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text = name(token)
        return {"token": text, "logprob": max(value, LEAST), "bytes": None if BROKEN in text else list(text.encode())}

    listed = [
        {**entry(one.id, one.value), "top_logprobs": [entry(token, value) for token, value in one.top]} for one in found
    ]
    return {"content": listed, "refusal": None}


def completion_logprobs(
    found: Sequence[Logprob], name: Callable[[int], str], offset: int, first: str | None = None
) -> tuple[dict[str, Any], int]:
    """Logprobs as completions list them, and the offset behind them; `first` is a token without any before them.

    `top_logprobs` of a token hold it too, if it is not among the likeliest.
    """
    tokens = [] if first is None else [first]
    values: list[float | None] = [None for _ in tokens]
    tops: list[dict[str, float] | None] = [None for _ in tokens]
    for one in found:
        top: dict[str, float] = {}
        for token, value in (*one.top, (one.id, one.value)):
            top.setdefault(name(token), max(value, LEAST))
        tokens.append(name(one.id))
        values.append(max(one.value, LEAST))
        tops.append(top)
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset
