"""Who is let in: the first thing that sees a request.

A server on this machine's own address is reached by every page in its browser. So a Host header that names another
machine is refused (a page of evil.example whose name was made to point here, "DNS rebinding"), and so is an Origin that
is neither the server's own page nor allowed by `cors`.
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlkit.apps.server.metrics import Metrics
from rlkit.apps.server.refusals import Refusal
from rlkit.apps.server.settings import Settings, is_loopback

OPEN_PATHS = ("/", "/health", "/favicon.ico")  # without a key: the page has to be there to ask for it
OPEN_FOLDER = "/page/"


class Guard:
    """ASGI middleware: bounds headers, checks host, origin and key, and counts answers."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(scope["path"], message["status"])
            await send(message)

        try:
            self._check(scope)
        except Refusal as refusal:
            await refuse(refusal, counted)
            return
        await self._app(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._settings.header_nbytes:
            limit = self._settings.header_nbytes
            raise Refusal(431, f"the headers have more than {limit} bytes; send fewer", code="headers_too_large")
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._settings.loopback and not is_loopback(_host_name(host)):
            why = f"the Host header names {host[:100]!r}, but this server answers for this machine only"
            raise Refusal(403, f"{why}; use 127.0.0.1 or localhost", code="wrong_host")
        self._check_origin(headers.get(b"origin", b"").decode("latin-1"), host)
        path = scope["path"]
        if self._key is not None and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            self._check_key(headers.get(b"authorization", b""))

    def _check_origin(self, origin: str, host: str) -> None:
        allowed = {"", *self._settings.cors}
        if origin in allowed or "*" in allowed or origin.partition("://")[2] == host:
            return
        why = f"pages of {origin[:100]!r} may not call this server"
        raise Refusal(403, f"{why}; start it with --cors {origin[:100]} to let them", code="wrong_origin")

    def _check_key(self, authorization: bytes) -> None:
        kind, _, given = authorization.partition(b" ")
        assert self._key is not None
        # Both are always compared: what is refused sooner would tell how much of it was right.
        same = hmac.compare_digest(given.strip(), self._key)
        if kind.lower() != b"bearer" or not same:
            why = "the API key is missing or wrong"
            raise Refusal(401, f"{why}; send the header Authorization: Bearer KEY", code="invalid_api_key")


def _host_name(host: str) -> str:
    """A Host header without its port."""
    return host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host


async def refuse(refusal: Refusal, send: Send) -> None:
    """Send a refusal as the whole answer."""
    body = refusal.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
