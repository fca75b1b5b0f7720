"""A server on a free port of this machine for tests, and a session whose replies are written down."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from rlkit.apps import serve
from rlkit.apps.server.app import create_app
from rlkit.apps.server.pool import Pool
from rlkit.apps.server.settings import Settings
from rlkit.runtime.engine import Engine
from rlkit.runtime.request import Event, Finished, Prefilled, Reason, Request, Token

WAIT_SECONDS = 20.0  # for what must happen; only a fault waits that long


@contextlib.contextmanager
def serving(pool: Pool, settings: Settings | None = None, at_once: int = 4) -> Iterator[str]:
    """Serve a pool until the block ends; yields the address."""
    chosen = settings or Settings()
    ready = threading.Event()
    with serve.listening(chosen.host, 0) as sock:
        server = serve.make_server(create_app(chosen, pool, at_once=at_once), chosen, ready.set)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            assert ready.wait(WAIT_SECONDS)
            yield serve.address_of(chosen.host, sock)
        finally:
            server.should_exit = True
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    """OpenAI's own client; it does not try again by itself."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=WAIT_SECONDS)


@dataclass
class Scripted:
    """A session whose tokens are the bytes of texts, and whose replies are what `script` says to a prompt.

    Every token waits for `allowed`; `streams` counts those that are open.
    """

    folder: Path
    script: Callable[[str], Iterable[str]] = lambda prompt: ["ok"]
    context_length: int = 1024
    nbytes: int = 1000
    allowed: threading.Semaphore | None = None
    asked: list[Request] = field(default_factory=list)
    open_streams: int = 0
    closed: bool = False
    stop_ids: tuple[int, ...] = (0,)

    def encode(self, text: str) -> list[int]:
        """The text's bytes."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes."""
        return bytes(ids).decode(errors="replace")

    def apply_template(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> str:
        """The messages as JSON lines; refuses a conversation that begins with a reply."""
        if messages[0]["role"] == "assistant":
            raise ValueError(f"{self.folder} has no chat template that takes these messages (roles); use --raw")
        lines = [json.dumps({"tools": list(tools)})] if tools else []
        return "\n".join([*lines, *map(json.dumps, messages)])

    def check(self, request: Request) -> None:
        """Refuses a schema that is none."""
        if request.guidance is not None and "broken" in request.guidance.text:
            raise ValueError(f"the schema of {self.folder} cannot be followed: broken; correct it")

    def stream(
        self, request: Request, *, chunk_tokens: Callable[[], int] = lambda: 512
    ) -> Generator[Event, None, None]:
        """The reply that the script has for the prompt."""
        self.asked.append(request)
        return self._events(request)

    def _events(self, request: Request) -> Generator[Event, None, None]:
        prompt = len(request.prompt_ids)
        self.open_streams += 1
        try:
            yield Prefilled(prompt, prompt, 0.01, reused=2)
            made = 0
            for piece in self.script(self.decode(request.prompt_ids)):
                if made >= request.max_new_tokens:
                    yield Finished(Reason.LENGTH, "", None, prompt, made, 2)
                    return
                if self.allowed is not None:
                    assert self.allowed.acquire(timeout=WAIT_SECONDS)
                yield Token(65, piece, 0.01, made)
                made += 1
            yield Finished(Reason.STOP, "", None, prompt, made, 2)
        finally:
            self.open_streams -= 1

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def folder_of(root: Path, name: str, *, template: str = "{{ tools }}", nbytes: int = 1000) -> Path:
    """The files of a bundle that the server reads itself."""
    folder = root / name
    (folder / "adapters").mkdir(parents=True)
    (folder / "genai_config.json").write_text(json.dumps({"model": {"vocab_size": 256, "context_length": 1024}}))
    (folder / "rlkit.json").write_text(json.dumps({"schema_version": 1, "recipe": "none", "tensors": [1, 2]}))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "model.onnx").write_bytes(bytes(nbytes))
    return folder


def pool_of(*sessions: Scripted, slots: int = 4, queue: int = 32, memory_nbytes: int | None = None) -> Pool:
    """A pool of scripted sessions, named by their folders."""
    known = {session.folder: session for session in sessions}

    def open_one(folder: Path) -> tuple[Any, Engine]:
        known[folder].closed = False
        return known[folder], Engine(known[folder], slots, queue)

    return Pool({session.folder.name: session.folder for session in sessions}, open_one, memory_nbytes)
