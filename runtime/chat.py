"""A conversation with a bundle: messages to a prompt, the reply as it comes, old turns dropped when it gets too long.

A prompt is the whole conversation rendered by the bundle's chat template. If it leaves too little room for a reply, the
oldest exchanges are left out of it, a quarter of the context at a time, so that the turns after have their prefix in
the cache again; the system message and the newest question always stay. The conversation itself forgets nothing.

    talk = Chat(open_bundle(Path("bundle")), system="Answer in one sentence.")
    for event in talk.reply("What is the capital of France?"):
        if isinstance(event, Piece):
            print(event.text, end="", flush=True)
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from rlkit.runtime.request import (
    SEEDS,
    Event,
    Finished,
    Guidance,
    Logprob,
    Prefilled,
    Reason,
    Request,
    Sampling,
    Token,
)
from rlkit.runtime.thoughts import Piece, Thoughts, opens_thought

ROLES = ("system", "user", "assistant")
VARIED = 0.7  # temperature of another reply where 0 would repeat the one there is


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

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """One generation, a bounded piece of work at a time."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is system, user or assistant; `thought` is what came before the answer and is never sent back.

    ValueError for another role.
    """

    role: str
    content: str
    thought: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is unknown; use system, user or assistant")

    def to_json(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Manner:
    """How replies are made: how long, how sampled, what ends them, what they follow, what is told of their tokens.

    ValueError for what no request takes.
    """

    max_new_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    guidance: Guidance | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self.request((0,), None)

    def request(self, prompt_ids: Sequence[int], adapter: str | None) -> Request:
        """A reply to this prompt (P,) in this manner."""
        return Request(
            tuple(prompt_ids),
            self.max_new_tokens,
            self.sampling,
            self.stop,
            guidance=self.guidance,
            adapter=adapter,
            logprobs=self.logprobs,
        )

    def again(self, attempt: int) -> Manner:
        """For another reply to the same message: the seed moves on by `attempt`, and temperature 0 becomes VARIED."""
        chosen = self.sampling
        seed = None if chosen.seed is None else (chosen.seed + attempt) % SEEDS
        return replace(self, sampling=replace(chosen, temperature=chosen.temperature or VARIED, seed=seed))


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a reply came; tokens_per_s counts from the second token on, None without one.

    `reused_tokens` of the prompt were in the cache since before.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float | None
    tokens_per_s: float | None
    reused_tokens: int = 0

    def __str__(self) -> str:
        reused = f" ({self.reused_tokens} reused)" if self.reused_tokens else ""
        parts = [f"{self.prompt_tokens} prompt tokens{reused}", f"{self.new_tokens} new"]
        if self.first_token_seconds is not None:
            parts.append(f"first after {self.first_token_seconds:.2f} s")
        if self.tokens_per_s is not None:
            parts.append(f"then {self.tokens_per_s:.1f} tokens/s")
        return ", ".join(parts)


def speed(prompt_tokens: int, seconds: Sequence[float], reused_tokens: int = 0) -> Speed:
    """The speed of a reply from the seconds of each of its tokens."""
    later = sum(seconds[1:])
    rate = (len(seconds) - 1) / later if later > 0 else None
    return Speed(prompt_tokens, len(seconds), seconds[0] if seconds else None, rate, reused_tokens)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply when it is over: what it answered and thought, how fast, why it ended (None: it was stopped).

    `left_out` earlier messages were not sent, for want of room. `logprobs` are of its tokens, where asked for.
    """

    text: str
    thought: str
    speed: Speed
    reason: Reason | None
    stop: str | None = None
    logprobs: tuple[Logprob, ...] = ()
    left_out: int = 0


class Hearing:
    """Folds the events of one stream into a Reply; `thinking` None takes all text for the answer."""

    def __init__(self, prompt_tokens: int, *, thinking: bool | None = False) -> None:
        self._prompt_tokens = prompt_tokens
        self._thoughts = None if thinking is None else Thoughts(thinking=thinking)
        self._pieces: list[Piece] = []
        self._seconds: list[float] = []
        self._logprobs: list[Logprob] = []
        self._reused = 0
        self._end: Finished | None = None

    def hear(self, event: Event) -> list[Piece]:
        """What there is to show of an event."""
        if isinstance(event, Prefilled):
            self._reused = event.reused
            return []
        if isinstance(event, Token):
            self._seconds.append(event.seconds)
            if event.logprob is not None:
                self._logprobs.append(event.logprob)
        else:
            self._end = event
        return self._kept(self._split(event.text))

    def rest(self) -> list[Piece]:
        """What was held back for a tag that did not come."""
        return self._kept(self._thoughts.rest() if self._thoughts else [])

    def reply(self, left_out: int = 0) -> Reply:
        """The reply so far."""
        said = "".join(piece.text for piece in self._pieces if not piece.thought)
        thought = "".join(piece.text for piece in self._pieces if piece.thought).strip()
        return Reply(
            said.lstrip() if thought else said,
            thought,
            speed(self._prompt_tokens, self._seconds, self._reused),
            self._end.reason if self._end else None,
            self._end.stop if self._end else None,
            tuple(self._logprobs),
            left_out,
        )

    def _split(self, text: str) -> list[Piece]:
        if self._thoughts is not None:
            return self._thoughts.feed(text)
        return [Piece(text)] if text else []

    def _kept(self, pieces: list[Piece]) -> list[Piece]:
        self._pieces += pieces
        return pieces


def prompt_ids(model: Model, messages: Sequence[Message]) -> list[int]:
    """The prompt of a conversation, by the bundle's chat template."""
    return model.encode(_prompt(model, messages))


def fit(model: Model, messages: Sequence[Message], reply_tokens: int) -> tuple[list[Message], list[int]]:
    """The newest messages that leave room for `reply_tokens`, or a quarter of the context, and their prompt.

    Where some must go, enough go to leave another quarter free. Raises ValueError stating the tokens and the limit if
    even the newest question alone leaves no room for one token.
    """
    head = [message for message in messages[:1] if message.role == "system"]
    turns = list(messages[len(head) :])
    limit = model.context_length
    room = limit - min(reply_tokens, limit // 4)
    ids = prompt_ids(model, messages)
    target = room if len(ids) <= room else room - limit // 4
    while len(ids) > target and (shorter := _without_oldest(turns)) is not None:
        turns = shorter
        ids = prompt_ids(model, [*head, *turns])
    if len(ids) >= limit:
        why = f"the message has {len(ids)} tokens with its template, but the context holds {limit}"
        raise ValueError(f"{why} with the reply; shorten it")
    return [*head, *turns], ids


def _prompt(model: Model, messages: Sequence[Message]) -> str:
    return model.apply_template([message.to_json() for message in messages])


def _without_oldest(turns: list[Message]) -> list[Message] | None:
    """The turns from the second user message on; None if there is only one."""
    later = [index for index, message in enumerate(turns) if index > 0 and message.role == "user"]
    return turns[later[0] :] if later else None


class Chat:
    """A conversation that remembers: what a stopped reply had said, and all of it when model or adapter change."""

    def __init__(self, model: Model, *, system: str | None = None, adapter: str | None = None) -> None:
        self._model = model
        self._adapter: str | None = None
        self.adapter = adapter
        self._system = system or None
        self._turns: list[Message] = []
        self._left_out = 0  # so many turns at the beginning have no room in the context any more
        self._attempts = 0  # other replies to the newest message
        self.last: Reply | None = None

    @property
    def model(self) -> Model:
        """What replies."""
        return self._model

    @property
    def messages(self) -> list[Message]:
        """The conversation, the system message first where there is one."""
        return [*([Message("system", self._system)] if self._system else []), *self._turns]

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

    @property
    def system(self) -> str | None:
        """Instructions that come before the conversation."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system, self._left_out = text or None, 0

    @property
    def context_tokens(self) -> int:
        """The tokens that the last reply left in the context."""
        return self.last.speed.prompt_tokens + self.last.speed.new_tokens if self.last else 0

    def use(self, model: Model) -> None:
        """Let another model go on with the conversation; an adapter that it does not have is left."""
        self._model, self._left_out = model, 0
        if self._adapter not in model.adapters:
            self._adapter = None

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.restore([], self._system)

    def restore(self, turns: Sequence[Message], system: str | None) -> None:
        """Take over a conversation of questions and answers in turns; ValueError where they are not."""
        for index, message in enumerate(turns):
            expected = ROLES[1 + index % 2]
            if message.role != expected:
                why = f"message {index + 1} is of the {message.role} where one of the {expected} belongs"
                raise ValueError(f"{why}; let them take turns")
        if len(turns) % 2:
            raise ValueError("the last message has no reply; leave it out and send it again")
        self._turns, self._system = list(turns), system or None
        self._left_out, self._attempts, self.last = 0, 0, None

    def undo(self) -> str:
        """Forget the newest message and its reply, and return the message; ValueError where there is none."""
        if not self._turns:
            raise ValueError("nothing has been said yet; there is nothing to undo")
        question = self._turns[-2].content
        del self._turns[-2:]
        self._left_out, self._attempts, self.last = 0, 0, None  # there may be room for older ones again
        return question

    def reply(self, text: str, manner: Manner | None = None) -> Generator[Prefilled | Piece, None, None]:
        """Yield the reply to `text`, and remember both; closing the iterator stops it.

        Raises ValueError, remembering nothing, if the message does not fit the context or cannot be answered so.
        """
        self._attempts = 0
        return self._answer(self._turns, Message("user", text), manner or Manner())

    def retry(self, manner: Manner | None = None) -> Generator[Prefilled | Piece, None, None]:
        """Yield another reply to the newest message, which takes the place of the one there is once it begins.

        Sampled as `Manner.again` says. Raises ValueError where nothing has been said yet.
        """
        if not self._turns:
            raise ValueError("nothing has been said yet; say something first")
        self._attempts += 1
        return self._answer(self._turns[:-2], self._turns[-2], (manner or Manner()).again(self._attempts))

    def answer(self, text: str, manner: Manner | None = None) -> str:
        """The whole reply to `text`, without what was thought."""
        for _event in self.reply(text, manner):
            pass
        return self.last.text if self.last else ""

    def _answer(
        self, before: Sequence[Message], question: Message, manner: Manner
    ) -> Generator[Prefilled | Piece, None, None]:
        head = [Message("system", self._system)] if self._system else []
        left_out = min(self._left_out, len(before))
        kept, ids = fit(self._model, [*head, *before[left_out:], question], manner.max_new_tokens)
        left_out = len(head) + len(before) + 1 - len(kept)
        hearing = Hearing(len(ids), thinking=opens_thought(_prompt(self._model, kept)))
        events = self._model.stream(manner.request(ids, self._adapter))
        return self._remembered([*before, question], left_out, hearing, events)

    def _remembered(
        self, turns: list[Message], left_out: int, hearing: Hearing, events: Generator[Event, None, None]
    ) -> Generator[Prefilled | Piece, None, None]:
        failed = False
        try:
            with contextlib.closing(events):
                for event in events:
                    if isinstance(event, Prefilled):
                        yield event
                    yield from hearing.hear(event)
            yield from hearing.rest()
        except Exception:
            failed = True
            raise
        finally:
            if not failed:
                hearing.rest()  # of a reply that was stopped
                self.last = hearing.reply(left_out)
                self._turns = [*turns, Message("assistant", self.last.text, self.last.thought)]
                self._left_out = left_out
