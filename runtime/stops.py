"""Stop strings in a text that comes in pieces: what may be the start of one is held back until that is decided."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Watches one reply for `strings`, none of them empty; without any, text passes through."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that ended it: the one that begins first."""
        text = self._held + piece
        found = [(at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            at, string = min(found)
            self._held = ""
            return text[:at], string
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def rest(self) -> str:
        """What is still held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of `text` begin `string`."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
