"""/v1/chat/completions: messages to a plan, replies to OpenAI's objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlkit.apps.server import asking, tools
from rlkit.apps.server.answering import Plan, Reply
from rlkit.apps.server.asking import Target
from rlkit.apps.server.deltas import Delta, Reader
from rlkit.apps.server.refusals import bad
from rlkit.apps.server.schemas import ChatBody, Message
from rlkit.apps.server.settings import Settings
from rlkit.apps.server.wire import Head, chat_logprobs
from rlkit.runtime.request import MOST_LOGPROBS, Request
from rlkit.runtime.thoughts import Thoughts, opens_thought


def plan(body: ChatBody, target: Target, settings: Settings) -> Plan:
    """What a chat request asks for. Refusal (400) naming the field that is wrong; encoding long texts takes time."""
    choice = tools.choice_of(body)
    forced = choice.guidance()
    form = asking.guidance_of(body.response_format)
    if forced is not None and form is not None:
        raise bad("tool_choice and response_format both fix the reply; leave one of them out", "tool_choice")
    session = target.loaded.session
    with target.loaded.tokenizing:
        text = _prompt(body, target, choice)
        ids = asking.fitting(session.encode(text), target.loaded)
    count = asking.choices_of(body, 1, settings.choices)
    request = asking.checked(
        lambda: Request(
            ids,
            asking.limit_of(settings, body.max_completion_tokens, body.max_tokens),
            asking.sampling_of(body, target.loaded.vocab),
            stop=asking.stops_of(body),
            guidance=forced or form,
            adapter=target.adapter,
            logprobs=_logprobs(body),
        )
    )
    readers = tuple(_reader(index, choice, request, opens_thought(text)) for index in range(count))
    usage = bool(body.stream_options and body.stream_options.include_usage)
    made = _Form(Head.new("chatcmpl", "chat.completion", target, usage=usage), logprobs=bool(body.logprobs))
    requests = tuple(asking.seeded(request, index) for index in range(count))
    return Plan(target, requests, readers, count, made, usage)


def _reader(index: int, choice: tools.Choice, request: Request, opened: bool) -> Reader:
    # A reply that follows a grammar has no room for thoughts: it could not even close one that the prompt has opened.
    thoughts = Thoughts(thinking=opened) if request.guidance is None else None
    return Reader(index, thoughts, choice.calls(), choice.ends_with)


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs needs logprobs = true; set it", "top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MOST_LOGPROBS:
        raise bad(f"top_logprobs = {body.top_logprobs} is outside 0..{MOST_LOGPROBS}", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _prompt(body: ChatBody, target: Target, choice: tools.Choice) -> str:
    """The conversation by the bundle's template."""
    messages = [_message(message) for message in body.messages]
    offered = choice.offered or None
    if not target.loaded.knows_tools:
        messages = tools.told_in_words(messages, choice.offered)
        offered = None
    try:
        if offered is None:
            return target.loaded.session.apply_template(messages)
        return target.loaded.session.apply_template(messages, tools=offered)
    except ValueError as error:
        why = target.loaded.without_paths(str(error)).partition("; ")[0]
        raise bad(f"{why}; change their roles or order, or use /v1/completions", "messages") from error


def _message(message: Message) -> dict[str, Any]:
    """As chat templates take it: text content, arguments as objects. Thoughts of before are left out."""
    content = message.content
    text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
    found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text}
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
            for call in message.tool_calls
            for arguments in (_arguments(call.function.arguments),)
        ]
    for key in ("name", "tool_call_id"):
        value = getattr(message, key)
        if value is not None:
            found[key] = value
    return found


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # what a model wrote need not be JSON


class _Form:
    """How chat replies are written."""

    def __init__(self, head: Head, *, logprobs: bool) -> None:
        self._head, self._with_logprobs = head, logprobs
        self._name = head.target.loaded.name_of

    def begin(self, choice: int) -> str:
        return self._head.event(f'{{"index":{choice},"delta":{{"role":"assistant","content":""}},{END_NULL}}}')

    def chunk(self, delta: Delta, extra: str) -> str:
        if delta.end is None and not delta.logprobs and delta.call is None and not delta.thought:
            inner = f'{{"index":{delta.choice},"delta":{{"content":{json.dumps(delta.text)}}},{END_NULL}}}'
            return self._head.event(inner, extra)
        said: dict[str, Any] = {}
        if delta.text:
            said["content"] = delta.text
        if delta.thought:
            said["reasoning_content"] = delta.thought
        if delta.call is not None:
            said["tool_calls"] = [_call_part(delta)]
        logprobs = json.dumps(chat_logprobs(delta.logprobs, self._name)) if delta.logprobs else "null"
        ending = f'"logprobs":{logprobs},"finish_reason":{json.dumps(delta.end)}'
        return self._head.event(f'{{"index":{delta.choice},"delta":{json.dumps(said)},{ending}}}', extra)

    def closing(self, usage: dict[str, Any], extra: str) -> str:
        return self._head.closing(usage, extra)

    def whole(self, replies: Sequence[Reply], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(index, reply) for index, reply in enumerate(replies)]
        return self._head.whole(choices, usage)

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        text, thought = "".join(reply.texts), "".join(reply.thoughts)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if reply.calls else "")}
        if thought:
            message["reasoning_content"] = thought
        if reply.calls:
            message["tool_calls"] = [
                {"id": key, "type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
                for key, name, arguments in reply.calls
            ]
        logprobs = chat_logprobs(reply.logprobs, self._name) if self._with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reply.end}


END_NULL = '"logprobs":null,"finish_reason":null'


def _call_part(delta: Delta) -> dict[str, Any]:
    call = delta.call
    assert call is not None
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
