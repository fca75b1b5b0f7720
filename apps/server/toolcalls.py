"""Calls of tools in a model's reply, found as it comes, in the formats that common chat templates teach.

    Qwen, Hermes   text <tool_call>{"name": ..., "arguments": {...}}</tool_call> ...
    Llama          {"name": ..., "parameters": {...}}, alone or after <|python_tag|>, several with ; between
    Mistral        [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] or [TOOL_CALLS]name[ARGS]{...}

Arguments are passed on while they are written wherever the name comes first. What looks like a call and is none is text
after all: JSON without a tag counts only where it names one of the tools.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from rlkit.apps.server.jsonscan import Ending

TAGS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
CLOSING = "</tool_call>"
BETWEEN = " \n\r\t,;"
NAME_FIRST = re.compile(r'\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
FIRST_KEY = re.compile(r'\{\s*"([^"]*)"')
CALL_KEYS = {"name", "arguments", "parameters", "type", "function", "id"}
BEFORE_ARGUMENTS = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?(?=\{)")
MAYBE_NAME = re.compile(r"[\w.-]+[\[\]\w]*")


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of a call: the first has its id and name, all have more of its arguments (JSON text)."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Part = str | CallPart


class Calls:
    """Reads a reply; `names` are the tools there are, `forced` a reply that is made to be one call and nothing else."""

    def __init__(self, names: Collection[str], *, forced: bool = False, most: int | None = None) -> None:
        self._names, self._most = names, most
        self._held = ""
        self._step: Callable[[list[Part]], bool] = self._between if forced else self._start
        self._tag = ""  # what opened the calls; "" for JSON without a tag
        self._opening, self._called = "", False  # what was read since then, and whether a call came: else it is text
        self._forced = forced
        self._ending, self._scanned = Ending(), 0
        self._closing_depth = 0  # brackets of the call itself around its arguments
        self.found = 0

    def feed(self, text: str) -> list[Part]:
        """What the reply grew by: texts and pieces of calls, in order."""
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        if self._most is not None:
            parts = [part for part in parts if not (isinstance(part, CallPart) and part.index >= self._most)]
        return [part for part in parts if part != ""]

    def end(self) -> list[Part]:
        """What was held back, when the reply is over: a call that never became one is text."""
        held, self._held = self._held, ""
        if self._step in (self._start, self._text):
            return [held] if held.strip() or (held and not self.found) else []
        if self._step in (self._arguments, self._rest):
            return []
        if self._called:
            return [held] if self._step == self._object else []  # what is left of the last call's closing
        return [self._opening + held]

    # Steps: each takes from what is held, adds to the parts, and says whether another step can follow at once.

    def _start(self, parts: list[Part]) -> bool:
        """Nothing but space came so far: JSON here may be a call."""
        text = self._held.lstrip()
        if not text or any(tag.startswith(text) for tag in TAGS):
            return False
        if text[0] == "{" or re.match(r"\[\s*\{", text):
            self._held, self._step = text, self._between
        elif re.fullmatch(r"\[\s*", text):
            return False
        else:
            self._step = self._text
        return True

    def _text(self, parts: list[Part]) -> bool:
        places = {place: tag for tag in TAGS if (place := self._held.find(tag)) >= 0}
        if places:
            place = min(places)
            parts.append(self._held[:place].rstrip())
            self._tag, self._step = places[place], self._between
            self._opening, self._called = self._tag, False
            self._held = self._held[place + len(self._tag) :]
            return True
        size = held_back(self._held, TAGS)
        # Space before a tag belongs to no text.
        ready = self._held[: len(self._held) - size]
        kept = ready.rstrip()
        parts.append(kept)
        self._held = self._held[len(kept) :]
        return False

    def _between(self, parts: list[Part]) -> bool:
        """Inside a tag, before, between or after calls."""
        self._pass(len(self._held) - len(self._held.lstrip(BETWEEN)))
        if not self._held or any(tag.startswith(self._held) and tag != self._held for tag in TAGS):
            return False
        again = next((tag for tag in TAGS if self._held.startswith(tag)), None)
        if again is not None:
            self._tag = again
            self._pass(len(again))
            return True
        if self._held[0] in "[]":
            self._pass(1)
            return True
        if self._held[0] == "{":
            self._step, self._ending, self._scanned = self._object, Ending(), 0
            return True
        if self._tag == "<tool_call>" and CLOSING.startswith(self._held[: len(CLOSING)]):
            if len(self._held) < len(CLOSING):
                return False
            self._pass(len(CLOSING))
            return self._give_up(parts)
        if self._tag == "[TOOL_CALLS]":
            named = BEFORE_ARGUMENTS.match(self._held)
            if named:
                return self._begin(parts, named.group(1), named.end(), 0)
            if MAYBE_NAME.fullmatch(self._held):
                return False
        return self._give_up(parts)

    def _pass(self, count: int) -> None:
        """Leave out so many characters, which belong to a call if one comes."""
        self._opening += self._held[:count]
        self._held = self._held[count:]

    def _object(self, parts: list[Part]) -> bool:
        """A JSON object that should be a call."""
        header = NAME_FIRST.match(self._held)
        if header:
            name = str(json.loads(f'"{header.group(1)}"', strict=False))
            if self._tag or self._forced or name in self._names:
                return self._begin(parts, name, header.end(), 1)
            return self._give_up(parts)
        first = FIRST_KEY.match(self._held)
        if first and first.group(1) not in CALL_KEYS:
            return self._give_up(parts)
        end = self._ending.feed(self._held[self._scanned :])
        if end is None:
            self._scanned = len(self._held)
            return False
        end += self._scanned
        call = _call_of(self._held[:end])
        if call is None or not (self._tag or self._forced or call[0] in self._names):
            return self._give_up(parts)
        self._held, self._called = self._held[end:], True
        parts.append(CallPart(self.found, call[1], _new_id(), call[0]))
        self.found += 1
        self._step = self._between
        return True

    def _begin(self, parts: list[Part], name: str, taken: int, depth: int) -> bool:
        parts.append(CallPart(self.found, "", _new_id(), name))
        self._held, self._called, self._closing_depth = self._held[taken:], True, depth
        self._step, self._ending = self._arguments, Ending()
        return True

    def _arguments(self, parts: list[Part]) -> bool:
        end = self._ending.feed(self._held)
        taken = self._held[:end]
        if taken:
            parts.append(CallPart(self.found, taken))
        self._held = self._held[len(taken) :]
        if end is None:
            return False
        self.found += 1
        self._step, self._ending = self._rest, Ending(self._closing_depth)
        return True

    def _rest(self, _parts: list[Part]) -> bool:
        """What follows the arguments inside the call: a bracket, perhaps an id."""
        if self._closing_depth:
            end = self._ending.feed(self._held)
            if end is None:
                self._held = ""
                return False
            self._held = self._held[end:]
        self._step = self._between
        return True

    def _give_up(self, parts: list[Part]) -> bool:
        """What is held is no call: it is text, and so is what opened it, unless a call came since."""
        if not self._called:
            parts.append(self._opening)
        self._opening, self._step = "", self._text
        return True


def _call_of(text: str) -> tuple[str, str] | None:
    """Name and arguments (JSON text) of a complete call; None for an object that is none."""
    try:
        found: Any = json.loads(text, strict=False)
    except ValueError:
        return None
    inner = found.get("function")
    found = inner if isinstance(inner, dict) else found
    name = found.get("name") if isinstance(found.get("name"), str) else inner
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(name, str):
        return None
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def held_back(text: str, tags: Collection[str]) -> int:
    """How many characters at the end of a text may be the start of a tag."""
    longest = min(len(text), max(map(len, tags)) - 1)
    for size in range(longest, 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags if len(tag) > size):
            return size
    return 0


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"
