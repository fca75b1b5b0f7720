"""/v1/completions: prompts as they are, each with as many replies as asked for; what evaluation harnesses use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.apps.server import asking
from rlkit.apps.server.answering import Plan, Reply
from rlkit.apps.server.asking import Target
from rlkit.apps.server.deltas import Delta, Reader
from rlkit.apps.server.refusals import bad
from rlkit.apps.server.schemas import CompletionBody
from rlkit.apps.server.settings import Settings
from rlkit.apps.server.wire import Head, completion_logprobs
from rlkit.runtime.request import MOST_LOGPROBS, Logprob, Request

DEFAULT_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: tuple[int, ...]
    text: str


def plan(body: CompletionBody, target: Target, settings: Settings) -> Plan:
    """What a request asks for. Refusal (400) with the field that is wrong; encodes text, so long ones take time."""
    _check(body)
    prompts = _prompts(body, target)
    count = asking.choices_of(body, len(prompts), settings.choices)
    if body.best_of not in (None, count):
        raise bad("best_of is not offered; ask for n replies and choose", "best_of")
    echo = bool(body.echo)
    requests: list[Request] = []
    readers: list[Reader] = []
    for prompt in prompts:
        request = _request(body, target, prompt)
        for choice in range(count):
            requests.append(asking.seeded(request, choice))
            readers.append(Reader(len(readers), echo=prompt.text if echo else None))
    usage = bool(body.stream_options and body.stream_options.include_usage)
    head = Head.new("cmpl", "text_completion", target, usage=usage)
    firsts = [target.loaded.name_of(prompt.ids[0]) for prompt in prompts for _ in range(count)]
    form = _Form(head, firsts if echo else None, logprobs=body.logprobs is not None)
    return Plan(target, tuple(requests), tuple(readers), count, form, usage)


def _check(body: CompletionBody) -> None:
    if body.suffix:
        raise bad("suffix is not offered; put all text into the prompt", "suffix")
    if body.logprobs is not None and not 0 <= body.logprobs <= MOST_LOGPROBS:
        raise bad(f"logprobs = {body.logprobs} is outside 0..{MOST_LOGPROBS}", "logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise bad("max_tokens = 0 asks for nothing; set echo to score the prompt, or use at least 1", "max_tokens")


def _prompts(body: CompletionBody, target: Target) -> list[_Prompt]:
    given = body.prompt
    if given is None or given == []:
        raise bad("there is no prompt; give text, token ids, or a list of either", "prompt")
    one = isinstance(given, str) or isinstance(given[0], int)
    listed: Sequence[Any] = [given] if one else given
    room = 0 if body.max_tokens == 0 else 1
    session, found = target.loaded.session, []
    vocab = target.loaded.vocab
    with target.loaded.tokenizing:
        for prompt in listed:
            encoded = session.encode(prompt) if isinstance(prompt, str) else prompt
            ids = asking.fitting(encoded, target.loaded, room=room, param="prompt")
            if vocab is not None and max(ids) >= vocab:
                raise bad(f"the prompt has the id {max(ids)}, but this model's tokens are 0..{vocab - 1}", "prompt")
            found.append(_Prompt(ids, prompt if isinstance(prompt, str) else session.decode(ids)))
    return found


def _request(body: CompletionBody, target: Target, prompt: _Prompt) -> Request:
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    scored = body.logprobs if body.echo and body.logprobs is not None else None
    if limit == 0 and scored is None:
        scored = 0
    # Harnesses score a prompt with one token behind it and drop that token: it has to be there, even if it would be
    # the one that ends the reply and is not shown otherwise.
    dropped = limit == 1 and bool(body.echo) and body.logprobs is not None
    return asking.checked(
        lambda: Request(
            prompt.ids,
            limit,
            asking.sampling_of(body, target.loaded.vocab),
            stop=asking.stops_of(body),
            guidance=asking.guidance_of(body.response_format),
            adapter=target.adapter,
            logprobs=body.logprobs,
            prompt_logprobs=scored,
            ignore_stop=dropped,
        )
    )


class _Form:
    """How completions are written; `firsts` are the first tokens of echoed prompts."""

    def __init__(self, head: Head, firsts: Sequence[str] | None, *, logprobs: bool) -> None:
        self._head, self._firsts, self._with_logprobs = head, firsts, logprobs
        self._name = head.target.loaded.name_of
        self._offsets: dict[int, int] = {}

    def begin(self, choice: int) -> str:
        return ""

    def chunk(self, delta: Delta, extra: str) -> str:
        logprobs = "null"
        if self._with_logprobs and (delta.logprobs or delta.echo):
            logprobs = json.dumps(self._logprobs(delta.choice, delta.logprobs, echo=delta.echo))
        text = json.dumps(delta.text)
        inner = (
            f'{{"index":{delta.choice},"text":{text},"logprobs":{logprobs},"finish_reason":{json.dumps(delta.end)}}}'
        )
        return self._head.event(inner, extra)

    def closing(self, usage: dict[str, Any], extra: str) -> str:
        return self._head.closing(usage, extra)

    def whole(self, replies: Sequence[Reply], usage: dict[str, Any]) -> dict[str, Any]:
        return self._head.whole([self._choice(index, reply) for index, reply in enumerate(replies)], usage)

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        logprobs = None
        if self._with_logprobs:
            logprobs = self._logprobs(index, reply.logprobs, echo=self._firsts is not None)
        text = "".join(reply.texts)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reply.end}

    def _logprobs(self, choice: int, found: Sequence[Logprob], *, echo: bool) -> dict[str, Any]:
        first = self._firsts[choice] if echo and self._firsts is not None else None
        made, self._offsets[choice] = completion_logprobs(found, self._name, self._offsets.get(choice, 0), first)
        return made
