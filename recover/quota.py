"""How many rows of sampled text are still missing, and which of those sampled are used.

Filtered, counted, and sampled anew until there are as many rows as were asked for:
    loops       rows whose last max(16, T / 4) tokens repeat with a period of at most 16 tokens and half of that stretch
    duplicates  other rows with the same ids as an earlier one
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.recover.corpus import Ids
from rlkit.recover.progress import Progress, Tell

LOOP_TAIL, LOOP_PERIOD = 16, 16


class Quota:
    """What was sampled and filtered so far, and from that the size of the next batch; the same on every run."""

    def __init__(self, wanted: int, length: int, rows: int) -> None:
        """Ask for `wanted` rows of `length` tokens, at most `rows` of them in a batch."""
        self.finished = 0  # batches
        self.counts = {"sampled": 0, "loops": 0, "duplicates": 0}
        self._wanted, self._length, self._rows = wanted, length, rows
        self._usable = 0
        self._seen: set[bytes] = set()

    def next_count(self) -> int:
        """Rows to sample next: those asked for, then replacements of filtered ones; 0 when there are enough.

        Raises ValueError once so many were filtered that sampling twice the rows asked for cannot be enough.
        """
        sampled, missing = self.counts["sampled"], self._wanted - self._usable
        if self.counts["loops"] + self.counts["duplicates"] > self._wanted:
            raise ValueError(
                f"only {self._usable} of {sampled} sampled rows are usable: {self.counts['loops']} end in a loop, "
                f"{self.counts['duplicates']} repeat another row; raise the temperature, or top-k where it is set"
            )
        if missing == 0 or sampled < self._wanted:
            return min(self._rows, self._wanted - sampled) if missing else 0
        expected = math.ceil(missing * sampled / max(1, self._usable)) + 1  # so that one more batch will mostly do
        return min(self._rows, expected, 2 * self._wanted - sampled)

    def judge(self, ids: Ids) -> tuple[NDArray[np.int64], dict[str, int]]:
        """Which rows of a batch are used, and how many were sampled and filtered."""
        loops = find_loops(ids)
        fresh = np.zeros(len(ids), bool)
        seen = set(self._seen)
        for row in np.flatnonzero(~loops):
            fresh[row] = (key := _row_key(ids[row])) not in seen
            seen.add(key)
        usable = np.flatnonzero(fresh)[: self._wanted - self._usable]
        counts = {"sampled": len(ids), "loops": int(loops.sum()), "duplicates": int((~loops & ~fresh).sum())}
        return usable, counts

    def take(self, ids: Ids, counts: dict[str, int]) -> None:
        """Count a finished batch."""
        self._seen.update(_row_key(row) for row in ids)
        self._usable += len(ids)
        self.finished += 1
        for name in self.counts:
            self.counts[name] += counts[name]

    def telling(self, count: int, tell: Tell) -> Tell:
        """A listener for the positions done in a batch of `count` rows, which tells of all tokens."""
        stage, before, total = self.state(count)

        def step(event: Progress) -> None:
            done = before + event.done * count
            tell(Progress(stage, done, total, f"{done} tokens"))

        return step

    def state(self, count: int = 0) -> tuple[str, int, int]:
        """Stage, tokens sampled so far, and tokens to sample, with `count` rows to come next."""
        sampled, length = self.counts["sampled"], self._length
        stage = "synthesize" if sampled + count <= self._wanted else "replace filtered rows"
        return stage, sampled * length, max(self._wanted, sampled + count) * length


def _row_key(row: Ids) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(row, np.int32).tobytes()).digest()


def find_loops(ids: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows of (rows, T) end in a loop; see the module's docstring for the rule."""
    tail = ids[:, -max(LOOP_TAIL, ids.shape[1] // 4) :]
    loops = np.zeros(len(ids), bool)
    for period in range(1, min(LOOP_PERIOD, tail.shape[1] // 2) + 1):
        loops |= (tail[:, period:] == tail[:, :-period]).all(axis=1)
    return loops
