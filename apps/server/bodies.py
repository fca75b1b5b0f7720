"""Bodies of requests: read within bounds, then checked for what would harm further in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from rlkit.apps.server.refusals import Refusal, bad
from rlkit.apps.server.settings import Settings


async def read_object(request: Request, settings: Settings) -> dict[str, Any]:
    """The JSON object that a request carries. Refusal for one that is too big, too deep, or none."""
    return parse_object(await _read(request, settings.body_nbytes), settings.depth)


async def _read(request: Request, limit: int) -> bytes:
    too_big = Refusal(413, f"the request has more than {limit} bytes; send less at once", code="request_too_large")
    stated = request.headers.get("content-length", "0")
    if not stated.isascii() or not stated.isdigit() or int(stated[:20]) > limit:
        raise too_big
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_big
            parts.append(part)
    except ClientDisconnect as error:
        raise Refusal(499, "the client left before its request was complete") from error
    return b"".join(parts)


def parse_object(body: bytes, depth: int) -> dict[str, Any]:
    """Bytes to a JSON object: UTF-8, finite numbers, at most `depth` levels, no text that a tokenizer cannot take."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad(f"the body is not UTF-8 text (byte {error.start}); send JSON") from error
    except RecursionError as error:
        raise bad(f"the JSON is nested deeper than {depth} levels; flatten it") from error
    except json.JSONDecodeError as error:
        raise bad(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except ValueError as error:  # such as an integer of thousands of digits
        raise bad(f"the body is not JSON that can be read: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise bad(f"the body is a JSON {type(found).__name__}, but a request is an object")
    for text in _texts(found, depth):
        _check_text(text)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise bad(f"the JSON holds {name}, which is no number of JSON's; send finite numbers")


def _texts(found: Any, depth: int) -> Iterator[str]:
    """Every string of a JSON value, keys too, level by level: a value this deep may not be visited by recursion."""
    level: list[Any] = [found]
    for _ in range(depth):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                yield from value
                inner += value.values()
            else:
                inner += value
        yield from (value for value in inner if isinstance(value, str))
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return
    raise bad(f"the JSON is nested deeper than {depth} levels; flatten it")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise bad("a string holds the character NUL (\\u0000), where tokenizers stop reading; remove it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise bad("a string holds half a surrogate pair (\\ud800 to \\udfff); send whole characters") from error
