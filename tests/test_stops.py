"""Stop strings however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.runtime.stops import Stops


def shown(pieces: list[str], strings: tuple[str, ...]) -> tuple[str, str | None]:
    """All that is shown of a text in pieces, and the stop that ended it."""
    stops, text = Stops(strings), ""
    for piece in pieces:
        part, stop = stops.push(piece)
        text += part
        if stop is not None:
            assert stops.rest() == ""
            return text, stop
    return text + stops.rest(), None


@pytest.mark.parametrize(
    ("pieces", "strings", "text", "stop"),
    [
        (["hello"], (), "hello", None),
        (["hel", "lo wo", "rld"], ("lo w",), "hel", "lo w"),
        (["a", "b", "c", "d"], ("bcx",), "abcd", None),
        (["aab"], ("ab",), "a", "ab"),
        (["a", "a", "b"], ("ab",), "a", "ab"),
        (["one two"], ("two", "one"), "", "one"),
        (["abc", "d"], ("abcdef", "cd"), "ab", "cd"),
        (["x\n", "\nUser:"], ("\n\n", "User:"), "x", "\n\n"),
        (["é", "ü"], ("éü",), "", "éü"),
        ([""], ("a",), "", None),
    ],
)
def test_what_is_shown(pieces: list[str], strings: tuple[str, ...], text: str, stop: str | None) -> None:
    assert shown(pieces, strings) == (text, stop)


def test_what_may_begin_a_stop_waits() -> None:
    stops = Stops(("</end>",))
    assert stops.push("well <") == ("well ", None)
    assert stops.push("/en") == ("", None)
    assert stops.push("!") == ("</en!", None)
    assert stops.push("</") == ("", None)
    assert stops.rest() == "</"
    assert stops.rest() == ""


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_no_stop_is_ever_shown_and_nothing_else_is_lost(pieces: list[str], strings: list[str]) -> None:
    whole = "".join(pieces)
    text, stop = shown(pieces, tuple(strings))
    assert whole.startswith(text)
    assert not any(string in text for string in strings)
    if stop is None:
        assert text == whole
    else:
        assert stop in strings
        assert whole.startswith(text + stop)
