"""The command `serve`: bundles behind an HTTP interface that OpenAI's clients speak, and a web page.

Standard output has the address with --json, and nothing else ever; everything said goes to standard error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlkit.apps import console, kvfrom
from rlkit.apps.server.settings import Settings
from rlkit.runtime.generation import CHUNK_TOKENS
from rlkit.runtime.session import Session, open_bundle, read_bundle

if TYPE_CHECKING:
    from rlkit.apps.server.pool import Pool
    from rlkit.runtime.engine import Engine

KEY_VARIABLE = "RLKIT_API_KEY"
MEMORY_SHARE = 0.75  # of this machine's memory, unless told
HEADER_NBYTES = 256 << 10  # where the HTTP parser gives up; the server says so itself long before


def serve(  # noqa: PLR0913, one parameter per option of the command
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundle folders, made by rlkit export.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY_VARIABLE, help="What clients must send; other programs see the option.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Let pages of this origin call; * for all.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Replies of one bundle that run at the same time.")] = 4,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait for a slot; more are told to come back.")] = 32,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="For all open bundles; default: three quarters of what there is.")
    ] = None,
    kv: Annotated[str | None, typer.Option(help="KV cache: float, or int8 or int4 where the bundle has it.")] = None,
    kv_from: Annotated[Path | None, typer.Option(help=kvfrom.HELP)] = None,
    device: Annotated[str, typer.Option(help="cpu, auto, or a device that rlkit doctor lists.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with; as the bundle says.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the address as one line of JSON when ready.")] = False,
) -> None:
    """Serve bundles at http://127.0.0.1:8080: OpenAI's chat and completions interface, and a web page.

    The first bundle is opened at once, others when they are asked for.

    Example: rlkit serve ./bundle --port 8080
    """
    from rlkit.apps.server.app import create_app

    settings = Settings(host, api_key, tuple(cors or ()))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")  # standard error
    kv, chunk = (kv, CHUNK_TOKENS) if kv_from is None else _chosen(kv, kv_from, bundles)
    opener = _opener(device, threads, kv)
    pool = make_pool(bundles, slots=slots, queue=queue, memory=memory, opener=opener, chunk_tokens=chunk)
    with listening(host, port) as sock, contextlib.closing(pool):
        address = address_of(host, sock)
        console.say(f"opening {pool.names[0]}")
        pool.give_back(pool.open(pool.names[0]))
        app = create_app(settings, pool, at_once=slots)
        run(app, settings, sock, lambda: _ready(address, pool, settings, json=json))


def make_pool(
    bundles: Sequence[Path],
    *,
    slots: int,
    queue: int,
    memory: float | None,
    opener: Callable[[Path], Session] = open_bundle,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Pool:
    """The pool of these folders, named by their last part. ValueError for no bundle, and for a name used twice."""
    from rlkit.apps.server.pool import Pool
    from rlkit.runtime.engine import Engine

    named: dict[str, Path] = {}
    for folder in bundles:
        read_bundle(folder, None)  # complains now, not when it is asked for
        name = Path(os.path.abspath(folder)).name  # a link's own name, so that one bundle may have several
        if name in named:
            raise ValueError(f"{folder} and {named[name]} have the same name {name}; rename one of the folders")
        named[name] = folder

    def open_one(folder: Path) -> tuple[Session, Engine]:
        session = opener(folder)
        return session, Engine(session, slots, queue, chunk_tokens=chunk_tokens)

    return Pool(named, open_one, _memory_nbytes(memory))


def _chosen(kv: str | None, kv_from: Path, bundles: Sequence[Path]) -> tuple[str, int]:
    """The cache and the tokens of a chunk that a result of `rlkit kv` says; it must be of every bundle's model."""
    chosen = kvfrom.chosen(kv, kv_from, bundles)
    return chosen.kv, chosen.chunk or CHUNK_TOKENS


def _memory_nbytes(asked: float | None) -> int:
    import psutil

    if asked is None:
        return int(MEMORY_SHARE * psutil.virtual_memory().total)
    if not 0 < asked < 1e6:
        raise ValueError(f"--memory {asked} GB is no amount of memory; give more than 0, or leave it out")
    return int(asked * 1e9)


def _opener(device: str, threads: int | None, kv: str | None) -> Callable[[Path], Session]:
    def opened(folder: Path) -> Session:
        session = open_bundle(folder, device=device, threads=threads, kv=kv)
        if device != "cpu":
            console.say(f"{folder.name} on {session.device}: {session.why}")
        return session

    return opened


@contextlib.contextmanager
def listening(host: str, port: int) -> Any:
    """A bound socket. ValueError where the address is none of this machine's or the port is taken."""
    try:
        family, _kind, _protocol, _name, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host} is no address ({error.strerror}); use 127.0.0.1 or 0.0.0.0") from error
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(where)
        except OSError as error:
            why = f"cannot listen at {host} port {port} ({error.strerror or error})"
            raise ValueError(f"{why}; choose another with --port, 0 takes a free one") from error
        sock.setblocking(False)
        yield sock


def address_of(host: str, sock: socket.socket) -> str:
    """Where a browser finds it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{sock.getsockname()[1]}"


def run(app: Any, settings: Settings, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal comes: what runs then has a few seconds to end."""
    with contextlib.suppress(KeyboardInterrupt):  # how a server is ended
        make_server(app, settings, ready).run([sock])


def make_server(app: Any, settings: Settings, ready: Callable[[], None]) -> Any:
    """A server for a bound socket; `ready` is called once it listens, `should_exit` ends it."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    return Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEADER_NBYTES,
            timeout_graceful_shutdown=int(settings.grace_seconds),
        )
    )


def _ready(address: str, pool: Pool, settings: Settings, *, json: bool) -> None:
    names = [name for bundle in pool.names for name in (bundle, *(f"{bundle}:{one}" for one in pool.adapters(bundle)))]
    first = pool.loaded()[0]
    console.say(f"listening at {address}: web page at /, OpenAI's interface at {address}/v1")
    console.say(f"models: {', '.join(names)}; {first.name} takes {first.nbytes / 1e9:.2f} GB")
    if not settings.loopback and settings.api_key is None:
        console.say(f"anyone who reaches this machine may use it: set {KEY_VARIABLE} to ask for a key")
    if json:
        console.emit_json_line({"schema_version": 1, "address": address, "models": names})
