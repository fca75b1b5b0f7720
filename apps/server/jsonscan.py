"""Where a JSON value ends, found while it is still being written."""

from __future__ import annotations


class Ending:
    """Looks for the end of an object or array; text comes in pieces. `depth` brackets are open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._quoted, self._escaped = depth, False, False

    def feed(self, text: str) -> int | None:
        """How many characters of this piece still belong to the value; None if all do and it goes on."""
        for place, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = letter == "\\"
                self._quoted = letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None
