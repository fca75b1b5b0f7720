"""From bodies of requests to what the runtime takes; every value is checked, and named where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rlkit.apps.server.pool import Served
from rlkit.apps.server.refusals import Refusal, bad
from rlkit.apps.server.schemas import Common, ResponseFormat
from rlkit.apps.server.settings import Settings
from rlkit.runtime.request import SEEDS, Grammar, Guidance, Request, Sampling

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """An open bundle and the adapter that a request names, under the name that it used."""

    model: str
    loaded: Served
    adapter: str | None


def sampling_of(body: Common, vocab: int | None) -> Sampling:
    """How tokens are chosen: OpenAI's defaults, temperature 1 and every token."""
    return checked(
        lambda: Sampling(
            temperature=_or(body.temperature, 1.0),
            top_k=_or(body.top_k, 0),
            top_p=_or(body.top_p, 1.0),
            min_p=_or(body.min_p, 0.0),
            seed=body.seed,
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            bias=_bias(body.logit_bias or {}, vocab),
        )
    )


def _bias(given: dict[str, float], vocab: int | None) -> dict[int, float]:
    found = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10) or (vocab is not None and int(key) >= vocab):
            limit = "" if vocab is None else f", 0..{vocab - 1}"
            raise bad(f"logit_bias names {key[:40]!r}, which is no token; use ids{limit}", "logit_bias")
        found[int(key)] = value
    return found


def stops_of(body: Common) -> tuple[str, ...]:
    """The strings that end a reply."""
    if isinstance(body.stop, str):
        return (body.stop,)
    return tuple(body.stop or ())


def choices_of(body: Common, prompts: int, limit: int) -> int:
    """How many replies each prompt gets."""
    n = _or(body.n, 1)
    if n < 1:
        raise bad(f"n = {n} asks for no reply; use at least 1", "n")
    if n * prompts > limit:
        raise bad(f"{prompts} prompts with n = {n} ask for more than {limit} replies; send several requests", "n")
    return n


def guidance_of(form: ResponseFormat | None) -> Guidance | None:
    """The structure a reply must have."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_guidance({"type": "object"})
    if form.type == "json_schema":
        schema = form.json_schema and form.json_schema.schema_
        if schema is None:
            raise bad("response_format has no json_schema.schema; give the schema", "response_format.json_schema")
        return json_guidance(schema)
    kind, text = (Grammar.REGEX, form.regex) if form.type == "regex" else (Grammar.LARK, form.lark)
    if not text:
        raise bad(f"response_format has no {form.type}; give its text", f"response_format.{form.type}")
    return Guidance(kind, text)


def json_guidance(schema: Any) -> Guidance:
    """A JSON schema as guidance."""
    return Guidance(Grammar.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))


def fitting(ids: Sequence[int], loaded: Served, *, room: int = 1, param: str = "messages") -> tuple[int, ...]:
    """A prompt's ids, if they leave `room` in the context."""
    limit = loaded.session.context_length
    if not ids:
        raise bad("the prompt is empty; give at least one token", param)
    if len(ids) + room > limit:
        why = f"this model's maximum context length is {limit} tokens, but the prompt has {len(ids)}"
        raise bad(f"{why}; shorten it", param, "context_length_exceeded")
    return tuple(ids)


def seeded(request: Request, choice: int) -> Request:
    """The request for the choice-th reply: with a seed, each reply has another of its own."""
    seed = request.sampling.seed
    if not choice or seed is None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=(seed + choice) % SEEDS))


def checked(make: Callable[[], T]) -> T:
    """What `make` makes; a ValueError of it is the request's fault, and its first word names the field."""
    try:
        return make()
    except Refusal:
        raise
    except ValueError as error:
        text = str(error)
        param = text.split(" ", 1)[0]
        raise bad(text, param if param in Common.model_fields else None) from error


def limit_of(settings: Settings, *asked: int | None) -> int:
    """The longest reply: the first limit that is named, else the server's."""
    return next((limit for limit in asked if limit is not None), settings.reply_tokens)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
