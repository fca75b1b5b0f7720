"""What is answered where a request cannot be: errors in the shape of OpenAI's, which its clients turn into exceptions.

{"error": {"message", "type", "param", "code"}}
"""

from __future__ import annotations

import json
import math
from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that is not answered: an HTTP status and one line with the reason and the remedy."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self._retry_after_seconds = retry_after_seconds

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        found = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self._retry_after_seconds is not None:
            found["retry-after"] = str(max(1, math.ceil(self._retry_after_seconds)))
        return found

    def to_json(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The same as bytes."""
        return json.dumps(self.to_json()).encode()


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """A request that says something wrong."""
    return Refusal(400, message, param=param, code=code)


def crowded(message: str, seconds: float) -> Refusal:
    """A request that comes while there is no room for it."""
    return Refusal(429, message, code="rate_limit_exceeded", retry_after_seconds=seconds)


def failed(error: BaseException) -> Refusal:
    """What happened to a request while it was worked on: bad values are its own fault, everything else ours."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValueError):
        return bad(" ".join(str(error).split()))
    return Refusal(500, f"the server failed ({type(error).__name__}); its log says more", code="internal_error")
