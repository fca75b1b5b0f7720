"""What steps of a real run do: a frame is one run of an ONNX session, a request goes on along its bundle's stream.

Sessions are opened on the thread of their unit, before the run. Every unit has its own session of a frame's model. A
bundle that runs on one thread of the processor is open once for all such units: whoever calls computes, so a request
goes from one to another as it is. Elsewhere its cache stays with its session, and a step on another unit reads the text
again first. Prompts are made up: what they say changes no step's time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from rlkit.runtime import framebench
from rlkit.runtime.crew import Threads
from rlkit.runtime.jobs import Job, Kind, Option
from rlkit.runtime.request import Event, Prefilled, Request, Token
from rlkit.runtime.session import open_bundle

__all__ = ["Model", "Place", "RealWork", "Reply", "Streaming", "shared"]

READ_TOKENS = 512  # of a text that is read again, at a time
FIRST_ID = 3  # the ids before are special in most vocabularies


@dataclass(frozen=True, slots=True)
class Place:
    """Where a unit computes; `processors` it is bound to, () for none."""

    provider: str
    threads: int
    processors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """An .onnx file whose frames are run, with sizes and values of inputs; or a folder, which is a bundle."""

    path: Path
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


class Running(Protocol):
    """An open model that computes frames."""

    def run(self) -> None:
        """One frame."""


class Streaming(Protocol):
    """What a request needs of a session."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""

    def stream(self, request: Request, *, chunk_tokens: Callable[[], int]) -> Generator[Event, None, None]:
        """Chunks of the prompt, then tokens."""


Workload = Mapping[int, tuple[int, int]]  # by number of the job: tokens of the prompt and of the reply


def shared(place: Place) -> bool:
    """Whether all units of this kind use one session of a bundle."""
    return place.provider == "cpu" and place.threads == 1


class RealWork:
    """Steps of real models; `models` by stream, `lengths` of requests by number. Open it with a crew, then close it."""

    def __init__(self, places: Sequence[Place], models: Sequence[Model], lengths: Workload) -> None:
        self._places, self._models, self._lengths = places, models, lengths
        self.frames: dict[tuple[int, int], Running] = {}  # by stream and unit
        self.sessions: dict[tuple[int, int], Streaming] = {}  # by stream and unit
        self._replies: dict[int, Reply] = {}

    def open(self, crew: Threads, options: Sequence[Sequence[Option]]) -> None:
        """Open every model where an option of its stream may run it; ValueError or OSError for one that cannot be."""
        opened: dict[tuple[Path, int | Place], Streaming] = {}
        frames: dict[tuple[Path, int], Running] = {}
        for stream, (model, choices) in enumerate(zip(self._models, options, strict=True)):
            for unit in sorted({option.unit for option in choices}):
                place = self._places[unit]
                if model.path.suffix == ".onnx":
                    if (model.path, unit) not in frames:
                        frames[model.path, unit] = crew.call(unit, partial(_frame, model, place))
                    self.frames[stream, unit] = frames[model.path, unit]
                    continue
                key = model.path, Place(place.provider, place.threads) if shared(place) else unit
                if key not in opened:
                    opened[key] = crew.call(unit, partial(_session, model, place))
                self.sessions[stream, unit] = opened[key]

    def step(self, job: Job, option: Option) -> None:
        """Run a job's next step; ValueError for a provider that cannot read a prompt in chunks."""
        if job.kind is Kind.FRAME:
            self.frames[job.stream, option.unit].run()
            return
        session = self.sessions[job.stream, option.unit]
        reply = self._replies.get(job.number)
        if reply is None:
            prompt, output = self._lengths[job.number]
            reply = self._replies[job.number] = Reply(prompt_ids(session.vocab_size, prompt, job.number), output)
        if job.kind is Kind.PREFILL:
            reply.read(session, option.units)
        else:
            reply.say(session)
        if reply.over:
            del self._replies[job.number]

    def leave(self, job: Job) -> None:
        """A request was given up between its steps."""
        if (reply := self._replies.pop(job.number, None)) is not None:
            reply.close()

    def forget(self, lengths: Workload) -> None:
        """End what a run has left, and be ready for another one's requests."""
        for reply in self._replies.values():
            reply.close()
        self._replies.clear()
        self._lengths = lengths

    def close(self) -> None:
        """Give all memory back."""
        self.forget({})
        self.frames.clear()
        self.sessions.clear()


class Reply:
    """A request under way, on whichever session its next step runs."""

    def __init__(self, ids: tuple[int, ...], output: int) -> None:
        self._prompt, self._ids, self._output = len(ids), list(ids), output
        self._session: Streaming | None = None
        self._events: Generator[Event, None, None] | None = None
        self._done = 0  # tokens of the prompt that are in the cache
        self._chunk = 1

    @property
    def over(self) -> bool:
        """Whether all tokens were made."""
        return len(self._ids) - self._prompt >= self._output

    def read(self, session: Streaming, tokens: int) -> None:
        """A chunk of the prompt; the last one makes the first token as well."""
        events = self._on(session, self._done)
        self._read(events, self._done + tokens, tokens)
        self._done += tokens
        if self._done == self._prompt:
            self._token(events)

    def say(self, session: Streaming) -> None:
        """The next token."""
        self._token(self._on(session, len(self._ids)))

    def close(self) -> None:
        """Give the cache back."""
        if self._events is not None:
            self._events.close()
        self._events = self._session = None

    def _on(self, session: Streaming, done: int) -> Generator[Event, None, None]:
        """The stream, on this session; where it is another than before, with `done` tokens read again."""
        if self._events is None or session is not self._session:
            self.close()
            made = len(self._ids) - self._prompt
            request = Request(tuple(self._ids), self._output - made, ignore_stop=True)
            self._session, self._events = session, session.stream(request, chunk_tokens=lambda: self._chunk)
            for start in range(0, done, READ_TOKENS):
                self._read(self._events, min(start + READ_TOKENS, done), min(READ_TOKENS, done - start))
        return self._events

    def _read(self, events: Generator[Event, None, None], until: int, tokens: int) -> None:
        self._chunk = tokens
        event = next(events)
        if not isinstance(event, Prefilled) or event.done != until:
            raise ValueError("prompts are read at once there, not in chunks; run the bundle on the processor")

    def _token(self, events: Generator[Event, None, None]) -> None:
        event = next(events)
        assert isinstance(event, Token)
        self._ids.append(event.id)
        if self.over:
            self.close()


def prompt_ids(vocab: int, tokens: int, seed: int) -> tuple[int, ...]:
    """A prompt that is made up, (tokens,)."""
    return tuple(np.random.default_rng(seed).integers(min(FIRST_ID, vocab - 1), vocab, tokens).tolist())


def _frame(model: Model, place: Place) -> Running:
    frame = framebench.open_frame(
        model.path, provider=place.provider, threads=place.threads, shapes=model.shapes, values=model.values
    )
    for _ in range(framebench.WARM_UPS):
        frame.run()
    return frame


def _session(model: Model, place: Place) -> Streaming:
    session = open_bundle(model.path, device=place.provider, threads=place.threads)
    session.keep_caches(0)  # every prompt is read
    Reply(prompt_ids(session.vocab_size, 2 * FIRST_ID, 0), 2).read(session, 2 * FIRST_ID)  # and closed with it
    return session
