"""What a model thinks before it answers, told apart from the answer while both are still coming.

Models that reason write <think>...</think> at the beginning of a line, or their template has already opened the tag at
the end of the prompt. Tags within a line are taken for text: a reply may well be about them.
"""

from __future__ import annotations

from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a reply; a `thought` is not part of the answer."""

    text: str
    thought: bool = False


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends within a thought, as some models' templates do."""
    return prompt.rstrip().endswith(OPEN)


class Thoughts:
    """Splits text that comes in pieces: what may be the beginning of a tag is held back until that is known."""

    def __init__(self, *, thinking: bool = False) -> None:
        self._thinking = thinking
        self._held = ""
        self._blank = True  # nothing but spaces on this line so far
        self._after = False  # spaces after a thought belong to neither

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain now."""
        self._held += text
        found: list[Piece] = []
        while (cut := self._cut()) is not None:
            found.append(Piece(self._take(cut), self._thinking))
            self._held = self._held[len(CLOSE if self._thinking else OPEN) :]
            self._after, self._blank, self._thinking = self._thinking, True, not self._thinking
        tag = CLOSE if self._thinking else OPEN
        unsure = next((size for size in range(len(tag) - 1, 0, -1) if self._held.endswith(tag[:size])), 0)
        found.append(Piece(self._take(len(self._held) - unsure), self._thinking))
        return [piece for piece in found if piece.text]

    def rest(self) -> list[Piece]:
        """What was held back, at the end of the text."""
        found = Piece(self._take(len(self._held)), self._thinking)
        return [found] if found.text else []

    def _cut(self) -> int | None:
        """Where the next tag begins in the text that is held."""
        if self._thinking:
            at = self._held.find(CLOSE)
            return at if at >= 0 else None
        at = self._held.find(OPEN)
        while at >= 0:
            line_start = self._held.rfind("\n", 0, at) + 1
            if not self._held[line_start:at].strip() and (line_start or self._blank):
                return at
            at = self._held.find(OPEN, at + 1)
        return None

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        line = taken.rpartition("\n")
        self._blank = (self._blank or bool(line[1])) and not line[2].strip()
        if self._after and not self._thinking:
            taken = taken.lstrip()
            self._after = not taken
        return taken
