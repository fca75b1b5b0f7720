"""A stand-in for the server behind the web page: says what a test told it to, waits where a test wants to look.

Replies are lists of pieces: text, Thought, WAIT (until `go()` is called), Broken (the server reports an error), or CUT
(the connection ends). The next reply is the next of `replies`, and a plain one when there is none left.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "apps" / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
WAIT, CUT = object(), object()
PATIENCE = 30.0  # seconds until a test that never calls `go()` lets go of its threads
CONTEXT = 512
TENSORS = (
    ("gate_up", 2, 44_000_000),
    ("attention", 4, 21_500_000),
    ("down", 4, 18_300_000),
    ("lm_head", 8, 28_300_000),
    ("adapter", 8, 6_200_000),
    ("norm", 32, 140_000),
)
DIVERGENCE = {"kl_mean": 0.0312, "kl_stderr": 0.0008, "top1_agreement": 0.914, "tokens": 4096}
DIVERGENCE |= {"perplexity_original": 14.21, "perplexity_other": 14.66}


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Broken:
    """An error in the middle of a stream."""

    message: str


@dataclass(frozen=True, slots=True)
class Refused:
    """In place of a reply: a status and OpenAI's error shape."""

    status: int
    message: str
    retry_after: int | None = None


@dataclass
class Server:
    """What the test and the handlers share."""

    replies: deque[Any] = field(default_factory=deque)
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    visits: list[str] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)  # a client went before its reply ended
    measured: dict[str, Any] | None = None
    forecast: bool = True
    url: str = ""
    _gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def go(self) -> None:
        """Let one WAIT pass."""
        self._gate.release()

    def wait(self) -> None:
        """What a WAIT does."""
        self._gate.acquire(timeout=PATIENCE)

    def models(self) -> dict[str, Any]:
        """As /v1/models says."""
        names = ["smollm2-135m-w4", "smollm2-135m-w4:pirate", "smollm2-135m-w4:formal", "tiny"]
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "rlkit"} for name in names]}

    def profile(self, model: str) -> dict[str, Any]:
        """As /rlkit/profile/MODEL says, with numbers that belong to no machine."""
        tensors = [{"name": kind, "kind": kind, "bits": bits, "nbytes": nbytes} for kind, bits, nbytes in TENSORS]
        nbytes = sum(size for _, _, size in TENSORS)
        bundle = {"recipe": {"name": "w4w2-gateup"}, "target": "cpu", "created": "2026-11-22", "nbytes": nbytes}
        bundle |= {"source": {"reference": "/home/somebody/SmolLM2-135M-Instruct", "parameters": 134_515_008}}
        bundle |= {"plan": {"tensors": tensors}, "divergence": DIVERGENCE}
        made = {"workload": {"prompt_tokens": 512}, **_point(512), "roofline": _point(512), "label": "calibrated"}
        made |= {"decode": {"place": "here:cpu"}, "points": [_point(128 * 2**power) for power in range(6)]}
        return {
            "schema_version": 1,
            "model": model,
            "bundle": bundle,
            "context_length": CONTEXT,
            "nbytes": nbytes,
            "forecast": made if self.forecast else None,
            "forecast_missing": None if self.forecast else "this machine is not calibrated",
            "measured": self.measured,
        }

    def stats(self) -> dict[str, Any]:
        """As /rlkit/stats says."""
        one = {"active": 1, "waiting": 0, "failed": 0, "tokens": 1234, "prompt_tokens": 2000, "reused_tokens": 1500}
        closed = {"model": "tiny", "loaded": False, "nbytes": 1, "engine": None}
        return {"uptime_seconds": 60.0, "models": [{"model": "smollm2-135m-w4", "loaded": True, "engine": one}, closed]}


def _point(context: int) -> dict[str, float]:
    seconds = 0.009 + 1.2e-6 * context
    return {"context": context, "ttft_seconds": 0.0006 * context, "tpot_seconds": seconds, "tokens_per_s": 1 / seconds}


def _timing(prompt: int, reused: int, first_seconds: float, tokens_per_s: float) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "reused_tokens": reused, "new_tokens": 64, "prompt_seconds": first_seconds}
    return {**counts, "first_token_seconds": first_seconds, "tokens_per_s": tokens_per_s}


NEWEST = [_timing(140, 0, 0.08, 101.4), _timing(900, 0, 0.61, 93.1), _timing(300, 120, 0.19, 97.2)]
MEASURED = {"replies": 3, "ttft_seconds": 0.19, "tokens_per_s": 97.2, "last": NEWEST[-1], "newest": NEWEST}


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """A server at a free port of this machine until the block ends."""
    told = Server(**settings)

    class Handler(_Handler):
        server_told = told

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    told.url = f"http://127.0.0.1:{http.server_address[1]}/"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield told
    finally:
        for _ in range(100):
            told.go()  # whoever still waits
        http.shutdown()
        thread.join()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_told: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        told = self.server_told
        told.visits.append(self.path)
        if self.path == "/" or self.path.startswith("/page/"):
            self._file(self.path.removeprefix("/page/").strip("/") or "index.html")
        elif not self._admitted():
            self._json(401, {"error": {"message": "wrong API key", "type": "authentication_error"}})
        elif self.path == "/v1/models":
            self._json(200, told.models())
        elif self.path.startswith("/rlkit/profile/"):
            self._json(200, told.profile(self.path.rsplit("/", 1)[1].replace("%3A", ":")))
        elif self.path == "/rlkit/stats":
            self._json(200, told.stats())
        else:
            self._json(404, {"error": {"message": f"there is no {self.path}"}})

    def do_POST(self) -> None:
        told = self.server_told
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admitted():
            self._json(401, {"error": {"message": "wrong API key", "type": "authentication_error"}})
            return
        told.asked.append(body)
        reply = told.replies.popleft() if told.replies else ["Hello", ", I am a stand-in."]
        if isinstance(reply, Refused):
            extra = {} if reply.retry_after is None else {"Retry-After": str(reply.retry_after)}
            self._json(reply.status, {"error": {"message": reply.message}}, extra)
            return
        try:
            self._stream(reply)
        except OSError:
            told.left.set()

    def _stream(self, pieces: list[Any]) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in pieces:
            if piece is CUT:
                return
            if piece is WAIT:
                self.server_told.wait()
            elif isinstance(piece, Broken):
                self._event({"error": {"message": piece.message}})
            elif isinstance(piece, Thought):
                self._event(_chunk({"reasoning_content": piece.text}))
            else:
                self._event(_chunk({"content": piece}))
        self._event(_chunk({}, "stop"))
        usage = {"prompt_tokens": 40, "completion_tokens": len(pieces), "total_tokens": 40 + len(pieces)}
        timings = {"prompt_seconds": 0.21, "tokens_per_s": 42.5, "reused_tokens": 24}
        self._event({"object": "chat.completion.chunk", "choices": [], "usage": usage, "timings": timings})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _admitted(self) -> bool:
        return self.server_told.key is None or self.headers.get("Authorization") == f"Bearer {self.server_told.key}"

    def _file(self, name: str) -> None:
        path = PAGE / name
        if "/" in name or path.suffix not in TYPES or not path.is_file():
            self._json(404, {"error": {"message": f"there is no {name}"}})
            return
        self._send(200, path.read_bytes(), TYPES[path.suffix], {"Content-Security-Policy": POLICY})

    def _json(self, status: int, value: Any, extra: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", extra or {})

    def _send(self, status: int, body: bytes, kind: str, extra: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""


def _chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice], "usage": None}
