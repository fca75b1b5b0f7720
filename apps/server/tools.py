"""Tools of a chat request: what the model is told of them, and what its reply is made to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.apps.server import asking
from rlkit.apps.server.refusals import bad
from rlkit.apps.server.schemas import ChatBody, ToolChoice
from rlkit.apps.server.toolcalls import Calls
from rlkit.runtime.request import Guidance

ANY = {"type": "object"}
IN_WORDS = (
    "You can call functions. Each line describes one:\n{}\n"
    'To call one, reply with <tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call> and nothing else.'
)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tools a reply may call (`offered`, as templates take them) and must call (`forced`, their names)."""

    offered: list[dict[str, Any]]
    forced: tuple[str, ...] = ()
    named: bool = False
    parallel: bool = True

    @property
    def ends_with(self) -> str:
        """The reason that a reply with calls ends for, as OpenAI names it: one that named its tool just stops."""
        return "stop" if self.named else "tool_calls"

    def guidance(self) -> Guidance | None:
        """The structure of a reply that must be a call."""
        if not self.forced:
            return None
        functions = {tool["function"]["name"]: tool["function"] for tool in self.offered}
        several = len(self.forced) > 1
        schemas = []
        for place, name in enumerate(self.forced):
            at = f"#/anyOf/{place}/properties/arguments" if several else "#/properties/arguments"
            arguments = _moved(functions[name].get("parameters") or ANY, at)
            properties = {"name": {"const": name}, "arguments": arguments}
            required = ["name", "arguments"]
            schemas.append({**ANY, "properties": properties, "required": required, "additionalProperties": False})
        return asking.json_guidance({"anyOf": schemas} if several else schemas[0])

    def calls(self) -> Calls | None:
        """What finds the calls in a reply."""
        if not self.offered:
            return None
        names = [tool["function"]["name"] for tool in self.offered]
        return Calls(names, forced=bool(self.forced), most=None if self.parallel else 1)


def choice_of(body: ChatBody) -> Choice:
    """The tools of a request. Refusal (400) for a choice among tools that are not there."""
    offered = [_offer(tool.function.model_dump(exclude_none=True)) for tool in body.tools or ()]
    names = tuple(tool["function"]["name"] for tool in offered)
    parallel = body.parallel_tool_calls is not False
    chosen = body.tool_choice
    if len(set(names)) < len(names):
        raise bad("two tools have the same name; rename one", "tools")
    if isinstance(chosen, ToolChoice):
        name = chosen.function.name
        if name not in names:
            raise bad(f"tool_choice names {name[:100]!r}, which is none of the tools", "tool_choice")
        return Choice(offered, (name,), named=True, parallel=parallel)
    if chosen == "required":
        if not names:
            raise bad("tool_choice is required, but there are no tools; give tools", "tool_choice")
        return Choice(offered, names, parallel=parallel)
    return Choice([] if chosen == "none" else offered, parallel=parallel)


def told_in_words(messages: Sequence[dict[str, Any]], offered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: they are described in the system message, calls are texts."""
    found = [_in_words(message) for message in messages]
    if not offered:
        return found
    about = IN_WORDS.format("\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in offered))
    if found and found[0]["role"] == "system":
        return [{**found[0], "content": f"{found[0]['content']}\n\n{about}"}, *found[1:]]
    return [{"role": "system", "content": about}, *found]


def _in_words(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>{message['content']}</tool_response>"}
    calls = [f"<tool_call>{json.dumps(call['function'])}</tool_call>" for call in message.get("tool_calls", ())]
    return {"role": message["role"], "content": "\n".join([*filter(None, [message["content"]]), *calls])}


def _offer(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"description": "", "parameters": {**ANY, "properties": {}}, **function}}


def _moved(schema: Any, place: str) -> Any:
    """A schema that has become part of another, at `place`: its references begin there now."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
