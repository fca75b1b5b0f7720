"""One request from its plan to its bytes: the deltas of all its replies, streamed as they come or folded into one."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlkit.apps.server.asking import Target
from rlkit.apps.server.deltas import Delta, Reader
from rlkit.apps.server.flow import Happening, happenings
from rlkit.apps.server.metrics import Timings
from rlkit.runtime.request import Logprob, Request, Token

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Reply:
    """A whole reply, made of its deltas. `calls` are (id, name, arguments)."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[tuple[str, str, list[str]]] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    end: str | None = None

    def add(self, delta: Delta) -> None:
        """Grow."""
        self.texts.append(delta.text)
        self.thoughts.append(delta.thought)
        self.logprobs += delta.logprobs
        self.end = delta.end or self.end
        if delta.call is not None:
            if delta.call.name is not None:
                self.calls.append((str(delta.call.id), delta.call.name, []))
            self.calls[-1][2].append(delta.call.arguments)


class Form(Protocol):
    """How an endpoint writes what it answers."""

    def begin(self, choice: int) -> str:
        """The chunk before a reply's first; "" for none."""

    def chunk(self, delta: Delta, extra: str) -> str:
        """A delta as a server-sent event; `extra` goes into its object, as JSON text with a comma before."""

    def closing(self, usage: dict[str, Any], extra: str) -> str:
        """The chunk after all others, which has the usage."""

    def whole(self, replies: Sequence[Reply], usage: dict[str, Any]) -> dict[str, Any]:
        """All replies as one object."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request asks of an open bundle: `requests` and their `readers` by choice, `per_prompt` for each prompt."""

    target: Target
    requests: tuple[Request, ...]
    readers: tuple[Reader, ...]
    per_prompt: int
    form: Form
    include_usage: bool = False


@dataclass(slots=True)
class _Clock:
    """When the tokens of a request came."""

    began: float
    first: float | None = None
    last: float = 0.0
    later: int = 0  # tokens that came after the first of their reply
    begun: set[int] = field(default_factory=set)

    def saw(self, happening: Happening) -> None:
        if self.first is None:
            self.first = happening.at
        self.last = happening.at
        self.later += happening.choice in self.begun
        self.begun.add(happening.choice)

    def timings(self, plan: Plan) -> Timings:
        counts = [reader.counts for reader in plan.readers]
        firsts = counts[:: plan.per_prompt]
        since = self.last - (self.first or 0.0)
        return Timings(
            prompt_tokens=sum(count.prompt for count in firsts),
            reused_tokens=sum(count.reused for count in firsts),
            new_tokens=sum(count.new for count in counts),
            prompt_seconds=sum(count.prompt_seconds for count in counts),
            first_token_seconds=None if self.first is None else self.first - self.began,
            tokens_per_s=self.later / since if self.later and since > 0 else None,
        )


class Answering:
    """The work on one request; `timings` once it is done."""

    def __init__(self, plan: Plan, at_once: int, began: float | None = None) -> None:
        self._plan, self._at_once = plan, at_once
        self._clock = _Clock(time.perf_counter() if began is None else began)
        self.timings: Timings | None = None

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """What the replies grow by, as much as there is at a time; an empty list says that something happens."""
        plan = self._plan
        async with contextlib.aclosing(happenings(plan.target.loaded.engine, plan.requests, self._at_once)) as batches:
            async for batch in batches:
                found = []
                for happening in batch:
                    if isinstance(happening.event, Token):
                        self._clock.saw(happening)
                    found += plan.readers[happening.choice].feed(happening.event)
                yield found
        self.timings = self._clock.timings(plan)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        form, begun, open_replies = self._plan.form, set[int](), len(self._plan.readers)
        async with contextlib.aclosing(self.deltas()) as batches:
            async for batch in batches:
                if not begun:
                    begun.add(0)
                    yield form.begin(0).encode()
                chunks = []
                for delta in batch:
                    if delta.choice not in begun:
                        begun.add(delta.choice)
                        chunks.append(form.begin(delta.choice))
                    extra = ""
                    if delta.end is not None:
                        open_replies -= 1
                        if not open_replies and not self._plan.include_usage:
                            extra = self._extra()
                    chunks.append(form.chunk(delta, extra))
                if chunks:
                    yield "".join(chunks).encode()
        if self._plan.include_usage:
            yield form.closing(self._usage(), self._extra()).encode()
        yield DONE

    async def whole(self) -> AsyncGenerator[bytes, None]:
        """The answer as one JSON object, at the end."""
        replies = [Reply() for _ in self._plan.readers]
        async with contextlib.aclosing(self.deltas()) as batches:
            async for batch in batches:
                for delta in batch:
                    replies[delta.choice].add(delta)
        found = self._plan.form.whole(replies, self._usage())
        yield json.dumps({**found, "timings": self._timings().to_json()}).encode()

    def _timings(self) -> Timings:
        return self.timings or self._clock.timings(self._plan)

    def _extra(self) -> str:
        return f',"timings":{json.dumps(self._timings().to_json())}'

    def _usage(self) -> dict[str, Any]:
        timings = self._timings()
        return {
            "prompt_tokens": timings.prompt_tokens,
            "completion_tokens": timings.new_tokens,
            "total_tokens": timings.prompt_tokens + timings.new_tokens,
            "prompt_tokens_details": {"cached_tokens": timings.reused_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(one.counts.thought for one in self._plan.readers)},
        }
