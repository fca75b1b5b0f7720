"""What a reply to a question answers: rules that find a number or a letter in generated text, and its verdict.

    number  the first number in the line after the last "answer is", "answer:", "####" or "\\boxed"; after the line's
            last "=", if it has one. Without such words the last number of the reply, if it came to its end.
    letter  the one after the last "answer is", "answer:" or "\\boxed"; else the one that the reply begins with, if
            no other begins a line; else the only one that stands in it as "(B)", "B.", "B)", "option B" or "choice B".

Numbers are the same if their values are: 1,000.0 and $1000. A thought (<think>...</think>) is no part of a reply. A
reply without an answer is wrong, and is counted: nobody should take a model that does not keep to the form for one that
does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.taskscore import NO_GOLD, Verdict
from rlkit.runtime.thoughts import CLOSE, OPEN

ANSWER = re.compile(r"(?i:answer\s*(?:is\b|:))|####|\\boxed")
NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
OPENING = r"[\s:*(\[{\"'$]*(?:\\\w+\{)*\(?"  # marks before a letter: bold, brackets, LaTeX
NAMED = re.compile(rf"(?:(?i:answer(?:\s+is\b|\s*:))|\\boxed){OPENING}([A-J])\b")
FIRST = re.compile(rf"{OPENING}([A-J])(?:[\s*)\]}}\"'$]*$|[).:,*\]\"']|\s*\n)")
LISTED = re.compile(r"^[\s*(]*([A-J])[.):]", re.MULTILINE)  # the question's choices repeated are no answer
MARKED = re.compile(r"\(([A-J])\)|\b([A-J])[.)](?=\s|$|\*)|(?i:option|choice)(?i:\s+is\b)?[\s:*(]*([A-J])\b")


@dataclass(frozen=True, slots=True)
class Said:
    """A reply to an item; `ended` is False where it was cut at the most tokens or at the end of the context.

    `why` says why there is none; it is not kept then.
    """

    id: str
    text: str
    tokens: int
    ended: bool
    why: str = ""


class Talker(Protocol):
    """A model that is talked to, as the evaluation sees it."""

    def replies(self, texts: Mapping[str, str], most: int) -> Iterator[Said]:
        """Replies to messages of a user by item, each to a talk of its own, in any order; `most` new tokens each."""


def answer(text: str, rule: Rule, *, ended: bool = True, choices: int = 10) -> str | None:
    """What a reply answers, a number as the text of its value; None if it answers nothing. `choices` letters count."""
    said = _without_thought(text)
    return _number(said, ended=ended) if rule is Rule.NUMBER else _letter(said, choices)


def _without_thought(text: str) -> str:
    if CLOSE in text:
        return text.rpartition(CLOSE)[2]
    return "" if text.lstrip().startswith(OPEN) else text


def _number(text: str, *, ended: bool) -> str | None:
    marks = list(ANSWER.finditer(text))
    if marks:
        line = text[marks[-1].end() :].strip(" \n\t*:").partition("\n")[0]
        found = NUMBER.search(line.rpartition("=")[2]) or NUMBER.search(line)
        if found:
            return _value(found[0])
    numbers = NUMBER.findall(text) if ended else []
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> str:
    """A number in the one way of writing it."""
    bare = Decimal(number.replace(",", "").replace("$", ""))
    return f"{bare.normalize() + 0:f}"  # + 0: no negative zero


def _letter(text: str, choices: int) -> str | None:
    letters = "ABCDEFGHIJ"[:choices]
    named = [letter for letter in NAMED.findall(text) if letter in letters]
    if named:
        return str(named[-1])
    first = FIRST.match(text)
    if first and first[1] in letters and set(LISTED.findall(text)) <= {first[1]}:
        return first[1]
    marked = {letter for found in MARKED.findall(text) for letter in found if letter} & set(letters)
    return marked.pop() if len(marked) == 1 else None


def judge_reply(item: Item, said: Said, rule: Rule) -> tuple[Verdict, bool]:
    """An item's verdict by what was replied, and whether the reply holds an answer at all."""
    if not item.answer:
        return Verdict(None, why=NO_GOLD), True
    found = answer(said.text, rule, ended=said.ended, choices=len(item.choices))
    right = _value(item.answer) if rule is Rule.NUMBER else item.answer
    return Verdict(float(found == right)), found is not None
