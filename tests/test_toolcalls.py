"""Calls of tools found in replies, however the text is cut into pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlkit.apps.server.toolcalls import CallPart, Calls

NAMES = ("weather", "add")
PARIS = {"city": 'Paris {"]}', "days": [1, 2]}
ONE = json.dumps({"name": "weather", "arguments": PARIS})
TWO = json.dumps({"name": "add", "arguments": {"a": 1}})
CASES = {
    "text": ("Hello <b>you</b> [1] {x}", "Hello <b>you</b> [1] {x}", []),
    "hermes": (f"<tool_call>\n{ONE}\n</tool_call>", "", [("weather", PARIS)]),
    "hermes after text": (f"Let me see.\n\n<tool_call>\n{ONE}\n</tool_call>", "Let me see.", [("weather", PARIS)]),
    "hermes twice": (
        f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>",
        "",
        [("weather", PARIS), ("add", {"a": 1})],
    ),
    "arguments first": ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", {"a": 1})]),
    "more after arguments": ('<tool_call>{"name": "add", "arguments": {}, "id": "}"}</tool_call>', "", [("add", {})]),
    "llama": ('{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    "llama with type": (
        '\n{"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}',
        "",
        [("add", {"a": 1})],
    ),
    "llama tag": (
        '<|python_tag|>{"name": "add", "parameters": {}}; {"name": "weather", "parameters": {}}',
        "",
        [("add", {}), ("weather", {})],
    ),
    "mistral": (f"[TOOL_CALLS][{ONE}, {TWO}]", "", [("weather", PARIS), ("add", {"a": 1})]),
    "mistral, its token not shown": (f"[{ONE}]", "", [("weather", PARIS)]),
    "mistral new": ('[TOOL_CALLS]add[ARGS]{"a": 1}', "", [("add", {"a": 1})]),
    "mistral id": (
        '[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1}[TOOL_CALLS]weather[ARGS]{}',
        "",
        [("add", {"a": 1}), ("weather", {})],
    ),
    "json of another name": ('{"name": "Ada", "arguments": {}}', '{"name": "Ada", "arguments": {}}', []),
    "other json": ('{"city": "Paris"}', '{"city": "Paris"}', []),
    "a list": ("[1, 2]", "[1, 2]", []),
    "no call in a tag": ("<tool_call>{oops}</tool_call>", "<tool_call>{oops}</tool_call>", []),
    "an open tag": ("see <tool_call", "see <tool_call", []),
    "cut in its name": ('<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
}


def read(pieces: list[str], calls: Calls | None = None) -> tuple[str, list[tuple[str, str]]]:
    """(text, [(name, arguments)]) of a reply in pieces."""
    reader = calls or Calls(NAMES)
    parts = [part for piece in pieces for part in reader.feed(piece)] + reader.end()
    text = "".join(part for part in parts if isinstance(part, str))
    found: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallPart):
            if part.name is not None:
                assert part.id is not None and part.index == len(found)
                found.append([part.name, ""])
            found[part.index][1] += part.arguments
    return text, [(name, arguments) for name, arguments in found]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_formats(case: str, size: int) -> None:
    reply, text, calls = CASES[case]
    pieces = [reply[start : start + size] for start in range(0, len(reply), size)]
    found, made = read(pieces)
    assert found.strip() == text
    assert [(name, json.loads(arguments)) for name, arguments in made] == calls


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 200), max_size=6))
def test_where_a_reply_is_cut_changes_nothing(case: str, cuts: list[int]) -> None:
    reply = CASES[case][0]
    places = sorted({0, len(reply), *(cut for cut in cuts if cut < len(reply))})
    assert read([reply[a:b] for a, b in pairwise(places)]) == read([reply])


@example("[{")
@example("<tool_call></tool_call>[]")
@example("[TOOL_CALLS][ , text")
@given(st.text(alphabet='<>tool_c/al{}[]"name:, \nargs|pyh', max_size=60))
def test_text_without_calls_is_kept(reply: str) -> None:
    text, made = read(list(reply))
    if not made:
        assert "".join(text.split()) == "".join(reply.split())


def test_arguments_come_while_they_are_written() -> None:
    reader = Calls(NAMES)
    seen: list[str] = []
    for piece in ['<tool_call>{"name": "add", "argu', 'ments": {"a": ', '"x', 'y"', "}}</tool_call>"]:
        seen.append("".join(part.arguments for part in reader.feed(piece) if isinstance(part, CallPart)))
    assert seen == ["", '{"a": ', '"x', 'y"', "}"]


def test_a_forced_reply_is_a_call_whatever_its_name() -> None:
    text, made = read(['{"name":"other","arguments":{}}'], Calls(NAMES, forced=True))
    assert (text, made) == ("", [("other", "{}")])


def test_no_more_calls_than_allowed() -> None:
    _, made = read([f"[TOOL_CALLS][{ONE}, {TWO}]"], Calls(NAMES, most=1))
    assert [name for name, _ in made] == ["weather"]


def test_arguments_cut_off_stay_cut_off() -> None:
    _, made = read(['<tool_call>{"name": "add", "arguments": {"a": [1'])
    assert made == [("add", '{"a": [1')]
