"""The requests of one HTTP request on their way through the engine, seen from the event loop.

The engine's thread hands over events one by one; the loop wakes once for as many as there are, and for tokens after
the first at most once in FLUSH_SECONDS: waking takes a core from the threads that compute, for longer than a token of a
small model is worth, and nobody reads faster. Closing the generator cancels whatever still runs or waits, so a client
that leaves frees its slots at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple

from rlkit.apps.server.refusals import crowded
from rlkit.runtime.engine import Engine, QueueFull, Ticket, Told
from rlkit.runtime.request import Event, Request, Token

RETRY_SECONDS = 0.05  # between tries to place further replies of a request that has begun
FLUSH_SECONDS = 1 / 30  # smooth enough to read; what a model slower than this says is shown token by token


class Happening(NamedTuple):
    """An event of the reply `choice`, at a time of time.perf_counter."""

    choice: int
    at: float
    event: Event


class _Inbox:
    """A list that another thread fills and the event loop waits for.

    The first text of a reply, an end or an error wakes the loop at once. Later tokens wake it unless it has just
    looked; then it looks again by itself, `rest` seconds later.
    """

    def __init__(self, rest: float = FLUSH_SECONDS) -> None:
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._items: deque[tuple[int, float, Told]] = deque()
        self._told = False  # a wake-up is on its way
        self._rest, self._resting = rest, False
        self._said: set[int] = set()  # replies that have begun to say something

    def put(self, choice: int, outcome: Told) -> None:
        """From any thread."""
        self._items.append((choice, time.perf_counter(), outcome))
        # Looked at after the item is there, as the other side looks for items after it has ended its rest.
        waits = self._resting and isinstance(outcome, Token) and choice in self._said
        if isinstance(outcome, Token) and outcome.text:
            self._said.add(choice)
        if not waits and not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
                self._loop.call_soon_threadsafe(self._filled.set)

    async def take(self) -> list[tuple[int, float, Told]]:
        """All there is, at least one."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            self._told = False  # before looking, so that what is put after the look wakes us
            found = [self._items.popleft() for _ in range(len(self._items))]
            if found:
                if not self._resting:
                    self._resting = True
                    self._loop.call_later(self._rest, self._rested)
                return found

    def _rested(self) -> None:
        self._resting = False
        if self._items:
            self._filled.set()


async def happenings(
    engine: Engine, requests: Sequence[Request], at_once: int
) -> AsyncGenerator[list[Happening], None]:
    """Yield what happens to the requests, as much as there is at a time; at most `at_once` of them run or wait.

    Raises Refusal (429) where there is no room for the first, else whatever ends a reply before its time.
    """
    if any(request.guidance is not None for request in requests):
        # Compiling a grammar takes long; sound ones are remembered, and the loop goes on meanwhile.
        await asyncio.to_thread(engine.session.check, requests[0])
    placed = _Placed(engine, requests, at_once)
    try:
        while placed.place():
            found, failure = [], None
            for choice, at, told in await placed.take():
                if told is None:
                    placed.tickets.pop(choice, None)
                elif isinstance(told, Exception):
                    failure = failure or told
                else:
                    found.append(Happening(choice, at, told))
            yield found
            if failure is not None:
                raise failure
    finally:
        for ticket in placed.tickets.values():
            ticket.cancel()


class _Placed:
    """The requests that run or wait in the engine, as many as may and fit; the others follow in order."""

    def __init__(self, engine: Engine, requests: Sequence[Request], at_once: int) -> None:
        self._engine, self._at_once = engine, at_once
        self._inbox = _Inbox()
        self._later = deque(enumerate(requests))
        self._begun = False
        self.tickets: dict[int, Ticket] = {}

    def place(self) -> bool:
        """Place what fits; False once all are done. Refusal where nothing ever fitted."""
        while self._later and len(self.tickets) < self._at_once:
            choice, request = self._later[0]
            try:
                ticket = self._engine.submit(request)
            except QueueFull as error:
                if not self._begun:
                    raise crowded(str(error), error.retry_after_seconds) from error
                break
            self._later.popleft()
            self.tickets[choice], self._begun = ticket, True
            ticket.listen(_listener(self._inbox, choice))
        return bool(self._later or self.tickets)

    async def take(self) -> list[tuple[int, float, Told]]:
        """What happened since, waiting for something; nothing where none of them has a place now."""
        if not self.tickets:
            await asyncio.sleep(RETRY_SECONDS)
            return []
        return await self._inbox.take()


def _listener(inbox: _Inbox, choice: int) -> Callable[[Told], None]:
    return lambda told: inbox.put(choice, told)
