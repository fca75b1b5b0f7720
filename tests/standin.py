"""A stand-in for the model hub: serves the files of a folder under the hub's addresses, on a port of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server knows and what it was asked; `broken` files stop in the middle."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.requests: list[str] = []
        self.sent: dict[str, int] = {}  # file -> bytes sent in whole answers
        self.endpoint = ""


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` until the block ends."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_arguments: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if name in self.hub.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"}, body)
        elif name not in self.hub.models:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif path.startswith(f"api/models/{name}/tree/"):
            self._send(200, json.dumps(self._tree(name)).encode(), {}, body)
        elif path.startswith("api/models/"):
            files = [{"rfilename": entry["path"]} for entry in self._tree(name)]
            about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "private": False}
            self._send(200, json.dumps(about).encode(), {}, body)
        else:
            self._file(self.hub.models[name], path.split("/", 4)[4], body=body)

    def _tree(self, name: str) -> list[dict[str, object]]:
        folder = self.hub.models[name]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                "oid": _etag(path),
            }
            for path in files
        ]

    def _file(self, folder: Path, name: str, *, body: bool) -> None:
        data = (folder / name).read_bytes()
        headers = {"ETag": f'"{_etag(folder / name)}"', "X-Repo-Commit": COMMIT}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        whole = name not in self.hub.broken
        self.hub.sent[name] = self.hub.sent.get(name, 0) + (len(data) - start if body and whole else 0)
        self._send(206 if start else 200, data[start:], headers, body, whole=whole)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool, *, whole: bool = True) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data if whole else data[: len(data) // 2])
        if not whole:
            self.close_connection = True


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
