"""How the server behaves: what the command line decides, and the bounds that keep it up."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Settings:
    """Who may ask, and how much at once. ValueError for an empty key or an origin that is none.

    `cors` are the origins whose pages may call the server, "*" for all. `reply_tokens` bounds a chat reply whose
    request names no limit, `choices` the replies of one request, `depth` the nesting of its JSON.
    """

    host: str = "127.0.0.1"
    api_key: str | None = None
    cors: tuple[str, ...] = ()
    body_nbytes: int = 16 << 20
    header_nbytes: int = 32 << 10
    depth: int = 64
    reply_tokens: int = 2048
    choices: int = 256
    grace_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise ValueError("the API key is empty, or has spaces at its ends or letters beyond ASCII; choose another")
        for origin in self.cors:
            parts = urlsplit(origin)
            if origin != "*" and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path):
                raise ValueError(f"{origin!r} is no origin; write it as https://example.org, or * for every page")

    @property
    def loopback(self) -> bool:
        """Whether only programs of this machine reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, as written: names are not looked up."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
