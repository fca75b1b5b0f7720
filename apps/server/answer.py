"""The HTTP answer whose work lasts as long as its client listens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rlkit.apps.server.guard import refuse
from rlkit.apps.server.refusals import Refusal, failed

LOG = logging.getLogger("rlkit.server")
STREAM_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
JSON_HEADERS = ((b"content-type", b"application/json"),)


class Answer(Response):
    """Sends what `parts` yields; closes it as soon as the client has left, `left` is called then.

    The status is sent with the first part: what goes wrong before has a status of its own, what goes wrong later ends
    the stream with an error in the same shape.
    """

    def __init__(
        self, parts: Callable[[], AsyncGenerator[bytes, None]], *, stream: bool, left: Callable[[], None]
    ) -> None:
        super().__init__()
        self._parts, self._stream, self._left = parts, stream, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self._left()
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        started = False
        try:
            async with contextlib.aclosing(self._parts()) as parts:
                async for part in parts:
                    if not started:
                        headers = STREAM_HEADERS if self._stream else JSON_HEADERS
                        length = () if self._stream else ((b"content-length", str(len(part)).encode()),)
                        await send({"type": "http.response.start", "status": 200, "headers": [*headers, *length]})
                        started = True
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except Exception as error:
            refusal = failed(error)
            if refusal.status == 500:
                LOG.exception("a request failed")
            await self._refuse(refusal, send, started=started)

    async def _refuse(self, refusal: Refusal, send: Send, *, started: bool) -> None:
        if not started:
            await refuse(refusal, send)
            return
        if self._stream:
            await send({"type": "http.response.body", "body": b"data: " + refusal.body() + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
