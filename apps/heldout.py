"""Held-out text as a measuring stick: the original's logits on it are kept once, then every form of the model is compared.

The token windows and the original's logits lie in one folder, so that a later process compares an exported file
without loading the original again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.profiles import text
from rlkit.profiles.divergence import CacheSpec, Divergence, LogitsFn, Reference, cached, compare, live
from rlkit.profiles.text import Batch
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import Tell, silent

Encode = Callable[[str], list[int]]
MAX_WINDOW = 256  # ids; keeps one batch of logits near 200 MB at a vocabulary of 50,000


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Text to measure on: its file, where windows and reference are kept, whose logits they are, and how many tokens."""

    text: Path
    folder: Path
    identity: str
    min_tokens: int = 4000

    def against(self, logits: LogitsFn, encode: Encode, tell: Tell = silent) -> Callable[[LogitsFn], dict[str, Any]]:
        """What `recover` wants: keep the original's logits, and return the measure of any other model."""
        if not self._windows.is_file():
            rows = text.windows(
                text.read_documents(self.text), encode, min_tokens=self.min_tokens, max_length=MAX_WINDOW
            )
            write_json(self._windows, rows)
        batches = self.batches()
        reference = cached(self._spec, logits, batches, tell)
        return lambda other: compare(reference, other, batches, tell).to_json()

    def divergence(self, logits: LogitsFn, tell: Tell = silent) -> Divergence:
        """The divergence of a model from the original, whose logits must have been kept before."""
        batches = self.batches()
        return compare(self._reference(batches), logits, batches, tell)

    def agreement(self, checkpoint: LogitsFn, logits: LogitsFn, tell: Tell = silent) -> Divergence:
        """The divergence of an exported file from its checkpoint on the same text."""
        batches = self.batches()
        return compare(live(checkpoint, batches), logits, batches, tell)

    def batches(self) -> list[Batch]:
        """The kept windows, padded."""
        return text.batches(json.loads(self._windows.read_text(encoding="utf-8")))

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(batch.predicted for batch in self.batches())

    @property
    def _windows(self) -> Path:
        return self.folder / "windows.json"

    @property
    def _spec(self) -> CacheSpec:
        return CacheSpec(self.folder, self.identity)

    def _reference(self, batches: list[Batch]) -> Reference:
        def absent(_ids: Any) -> Any:
            raise FileNotFoundError(f"{self.folder} lost the original's logits; measure the original again (--fresh)")

        return cached(self._spec, absent, batches)
