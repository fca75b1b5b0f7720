"""Several requests at once on one session: one thread pulls at their streams in turn, one event each.

    with Engine(session) as engine:
        ticket = engine.submit(request)
        for event in ticket:
            ...

A piece of work is a chunk of a prompt or a token, so nobody waits longer for a turn than the others' pieces take; while
more than one stream is active, chunks are smaller. Submitting, listening and cancelling work from every thread.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rlkit.runtime.generation import CHUNK_TOKENS
from rlkit.runtime.request import Event, Finished, Prefilled, Request, Token

SHARED_CHUNK_TOKENS = 128  # of a prompt while others wait for their turn
REMEMBERED = 32  # replies whose seconds say how long the next one will take
Told = Event | Exception | None  # what a listener is called with; None is the end
Listener = Callable[[Told], None]
Stream = Generator[Event, None, None]


class Streaming(Protocol):
    """What an engine needs of a session."""

    def check(self, request: Request) -> None:
        """ValueError for a request that cannot run."""

    def stream(self, request: Request, *, chunk_tokens: Callable[[], int]) -> Stream:
        """Events, one bounded piece of work each."""


class QueueFull(RuntimeError):
    """All slots are taken and so are the places to wait for one."""

    def __init__(self, waiting: int, retry_after_seconds: float) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"{waiting} requests are waiting already; try again in {math.ceil(retry_after_seconds)} s")


@dataclass(frozen=True, slots=True)
class Stats:
    """An engine's counts since it was made; `busy_seconds` is the time that its thread computed.

    `prompt_tokens` are those of prompts that are in a cache, `reused_tokens` those of them that had been there before.
    """

    slots: int
    queue: int
    active: int = 0
    waiting: int = 0
    done: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    busy_seconds: float = 0.0


class Ticket:
    """One submitted request: iterate over its events, or have a function called with them, but not both."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request = request
        self._engine = engine
        self._arrived = threading.Condition()
        self._told: deque[Told] = deque()
        self._listener: Listener | None = None
        self._ended = False
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether it ended, or will, before its stream did."""
        return self._cancelled

    def cancel(self) -> None:
        """Give the slot back at once; the end is told after the piece of work that is being done, if one is."""
        self._engine._cancel(self)

    def listen(self, listener: Listener) -> None:
        """Call `listener` for every event, an exception if one ends it, and None at the end, from the engine's thread.

        What has happened until now is told at once, from the caller's. A listener that raises cancels the request.
        """
        with self._arrived:
            self._listener = listener
            while self._told:
                listener(self._told.popleft())

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, waiting for them; raises what ended the stream. Stopping early does not cancel."""
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._told)
                event = self._told.popleft()
                if event is None:
                    self._told.append(None)  # for whoever asks again
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event

    def _tell(self, told: Told) -> bool:
        """Pass something on, unless the end was told; False where the listener is gone."""
        with self._arrived:
            if self._ended:
                return True
            self._ended = told is None
            if self._listener is None:
                self._told.append(told)
                self._arrived.notify_all()
                return True
            try:
                self._listener(told)
            except Exception:
                self._listener = _deaf
                return False
            return True


class Engine:
    """Runs up to `slots` streams of a session in turn, and up to `queue` more wait for a slot.

    Nothing else may stream from the session meanwhile. `clock` returns seconds. `chunk_tokens` of a prompt are read at
    once, fewer while others wait.
    """

    def __init__(
        self,
        session: Streaming,
        slots: int = 4,
        queue: int = 32,
        clock: Callable[[], float] = time.perf_counter,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        if slots < 1 or queue < 0:
            raise ValueError(f"{slots} slots and {queue} places cannot serve; use at least 1 and 0")
        self.session = session
        self._clock = clock
        self._chunk = chunk_tokens
        self._stats = {name: 0 for name in ("done", "cancelled", "failed", "tokens", "prompt", "reused")}
        self._busy = 0.0
        self._slots, self._queue = slots, queue
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[Ticket] = deque()
        self._active: deque[Ticket] = deque()  # in the order of their turns
        self._cancels: list[Ticket] = []  # to be closed and told so
        self._closed = False
        self._streams: dict[Ticket, Stream] = {}  # the thread's own, as is _worked
        self._worked: dict[Ticket, float] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the runtime must not be computing when the process ends

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, request: Request) -> Ticket:
        """Have a request done. Raises QueueFull, ValueError where it cannot run, RuntimeError once closed."""
        self.session.check(request)
        ticket = Ticket(self, request)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed and takes no more requests")
            if len(self._active) + len(self._waiting) >= self._slots + self._queue:
                raise QueueFull(len(self._waiting), self._wait_seconds())
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def stats(self) -> Stats:
        """Counts until now."""
        with self._changed:
            counts = self._stats
            return Stats(
                self._slots,
                self._queue,
                min(len(self._active) + len(self._waiting), self._slots),
                max(len(self._active) + len(self._waiting) - self._slots, 0),
                counts["done"],
                counts["cancelled"],
                counts["failed"],
                counts["tokens"],
                counts["prompt"],
                counts["reused"],
                self._busy,
            )

    def close(self) -> None:
        """Cancel everything and end the thread; again, nothing. The session stays open."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            for ticket in (*self._active, *self._waiting):
                self._drop(ticket)
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._drop(ticket)
            self._changed.notify()

    def _drop(self, ticket: Ticket) -> None:
        """Take a ticket out of its slot or queue; the thread does the rest."""
        for place in (self._active, self._waiting):
            if ticket in place:
                place.remove(ticket)
                ticket._cancelled = True
                self._stats["cancelled"] += 1
                self._cancels.append(ticket)

    def _wait_seconds(self) -> float:
        """When a place should be free: however many share the thread, one ends per mean time of a reply."""
        return max(1.0, sum(self._seconds) / len(self._seconds)) if self._seconds else 1.0

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._active or self._waiting or self._cancels or self._closed)
                cancels, self._cancels = self._cancels, []
                self._admit()
                ticket = self._active[0] if self._active else None
                closed = self._closed
            for cancelled in cancels:
                self._end(cancelled)
            if ticket is not None:
                self._turn(ticket)
            elif closed:
                return

    def _turn(self, ticket: Ticket) -> None:
        """One event of a stream, and the next in line is another."""
        began = self._clock()
        event: Told = None
        try:
            if ticket not in self._streams:
                self._streams[ticket] = self.session.stream(ticket.request, chunk_tokens=self._chunk_tokens)
            event = next(self._streams[ticket])
        except Exception as error:
            event = error
        spent = self._clock() - began
        self._worked[ticket] = self._worked.get(ticket, 0.0) + spent
        with self._changed:
            self._busy += spent
            going = self._account(ticket, event)
        if not ticket._cancelled:
            heard = ticket._tell(event)
            if not going:
                self._end(ticket)
            elif not heard:
                self._cancel(ticket)

    def _account(self, ticket: Ticket, event: Told) -> bool:
        """Count an event, and move its ticket to the end of the line or out of it; False for the last one."""
        if isinstance(event, Token):
            self._stats["tokens"] += 1
        elif isinstance(event, Prefilled) and event.done == event.total:
            self._stats["prompt"] += event.total
            self._stats["reused"] += event.reused
        if ticket not in self._active:  # cancelled meanwhile
            return False
        if isinstance(event, Finished):
            self._stats["done"] += 1
            self._seconds.append(self._worked[ticket])
        elif isinstance(event, Exception):
            self._stats["failed"] += 1
        else:
            self._admit()  # who comes now has its first turn before this one's next
            self._active.rotate(-1)
            return True
        self._active.remove(ticket)
        return False

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._slots:
            self._active.append(self._waiting.popleft())

    def _end(self, ticket: Ticket) -> None:
        """Close a ticket's stream and tell the end."""
        stream = self._streams.pop(ticket, None)
        self._worked.pop(ticket, None)
        try:
            if stream is not None:
                stream.close()
        except Exception as error:
            ticket._tell(error)
        ticket._tell(None)

    def _chunk_tokens(self) -> int:
        with self._changed:
            return self._chunk if len(self._active) + len(self._waiting) < 2 else min(self._chunk, SHARED_CHUNK_TOKENS)


def _deaf(told: Told) -> None:
    """Listens in place of one that failed."""
