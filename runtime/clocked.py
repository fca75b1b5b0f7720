"""Generation by the clock, for measuring: a cache that is filled beforehand and kept, then a prompt and new tokens.

genai computes logits when tokens are appended and, later, when the next token is asked for; so the first new token
takes a pass over the prompt and a choice, each later one a pass over one token and a choice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlkit.runtime.session import Session

FILL_TOKENS = 512  # appended at a time, so that filling a deep cache sets no peak of memory


class Clocked:
    """Times generations of an open bundle; what fills the cache stays until other tokens are asked to."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._generator: Any = None
        self._fill: list[int] = []
        self._room = 0

    def generate(self, fill: list[int], prompt: list[int], new_tokens: int, room: int) -> Iterator[float]:
        """Seconds of each of `new_tokens`, the first from the start of `prompt`; `fill` is in the cache before.

        `room` is how many tokens the cache is made for. Raises ValueError where they do not fit, or there is no prompt.
        """
        needed = len(fill) + len(prompt) + new_tokens
        if not prompt or new_tokens < 1 or needed > room or room > self._session.context_length:
            why = f"{len(fill)} + {len(prompt)} + {new_tokens} tokens in a cache of {room}"
            raise ValueError(f"{why} do not fit a context of {self._session.context_length}; ask for fewer")
        self._prepare(fill, room)
        ids = np.asarray([prompt], np.int32)
        began = time.perf_counter()
        self._generator.append_tokens(ids)
        for _ in range(new_tokens):
            self._generator.generate_next_token()
            now = time.perf_counter()
            yield now - began
            began = time.perf_counter()

    def _prepare(self, fill: list[int], room: int) -> None:
        if self._generator is None or fill != self._fill or room != self._room:
            self._generator = None  # its cache goes before another is made
            self._generator = self._session.generator(room)
            self._fill, self._room = fill, room
            for start in range(0, len(fill), FILL_TOKENS):
                self._generator.append_tokens(np.asarray([fill[start : start + FILL_TOKENS]], np.int32))
        else:
            self._generator.rewind_to(len(fill))
