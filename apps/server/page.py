"""The files of the web page: read once, served by exact name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import PurePosixPath

from starlette.responses import Response

from rlkit.apps.server.refusals import Refusal

INDEX = "index.html"
FOLDER = "page"
KINDS = {  # written down: what a system's own table says of them differs
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".ico": "image/x-icon",
    ".png": "image/png",
}
HEADERS = {
    # The page loads nothing from elsewhere, and no other page may frame it.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def read_files() -> dict[str, bytes]:
    """The page's files by name; none where it was not installed."""
    folder = resources.files("rlkit.apps").joinpath(FOLDER)
    if not folder.is_dir():
        return {}
    return {file.name: file.read_bytes() for file in folder.iterdir() if _kind(file.name) and file.is_file()}


def answer(files: Mapping[str, bytes], name: str) -> Response:
    """A file as it is. Refusal (404) for a name that is none of them: no path is ever made of it."""
    found = files.get(name)
    if found is None:
        raise Refusal(404, f"the page has no file {name[:100]!r}", code="not_found")
    return Response(found, media_type=_kind(name), headers=HEADERS)


def _kind(name: str) -> str | None:
    return KINDS.get(PurePosixPath(name).suffix)
