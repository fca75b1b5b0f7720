"""Thoughts and answers are told apart however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.runtime.thoughts import Piece, Thoughts, opens_thought


def split(parts: list[str], *, thinking: bool = False) -> tuple[str, str]:
    """The thought and the answer of a text in parts."""
    splitter = Thoughts(thinking=thinking)
    pieces = [piece for part in parts for piece in splitter.feed(part)] + splitter.rest()
    assert all(piece.text for piece in pieces)
    thought = "".join(piece.text for piece in pieces if piece.thought)
    return thought, "".join(piece.text for piece in pieces if not piece.thought)


CASES = [
    ("plain", "", "plain"),
    ("<think>hm</think>yes", "hm", "yes"),
    ("\n <think>hm</think>\n\n yes\n", "hm", "\n yes\n"),
    ("<think>hm", "hm", ""),
    ("<think>a < b </thin</think>c", "a < b </thin", "c"),
    ("write <think> first", "", "write <think> first"),
    ("so\n<think>more</think>done", "more", "so\ndone"),
    ("<think></think>\nyes", "", "yes"),
    ("<think>a</think><think>b</think>c", "ab", "c"),
    ("</think>yes", "", "</think>yes"),
    ("<thi", "", "<thi"),
    ("a <th", "", "a <th"),
]


@pytest.mark.parametrize(("text", "thought", "answer"), CASES)
def test_texts(text: str, thought: str, answer: str) -> None:
    expected = (thought, answer.lstrip("\n ") if text.startswith("\n") else answer)
    for parts in ([text], list(text), [text[:3], text[3:9], text[9:]]):
        found = split(parts)
        assert (found[0], found[1].lstrip("\n ") if text.startswith("\n") else found[1]) == expected


@given(st.data())
def test_cuts_change_nothing(data: st.DataObject) -> None:
    words = st.sampled_from(["<think>", "</think>", "\n", " ", "a", "<", "think>", "<think"])
    text = "".join(data.draw(st.lists(words, max_size=12)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for thinking in (False, True):
        assert split(parts, thinking=thinking) == split([text], thinking=thinking)


def test_text_without_tags_comes_at_once() -> None:
    assert Thoughts().feed("yes, a < b") == [Piece("yes, a < b")]
    assert Thoughts().feed("a <") == [Piece("a ")]


def test_a_prompt_may_end_within_a_thought() -> None:
    assert opens_thought("<|assistant|>\n<think>\n")
    assert not opens_thought("<|assistant|>\n<think>\n\n</think>\n\n")
    assert split(["hm</think>\n\nyes"], thinking=True) == ("hm", "yes")
