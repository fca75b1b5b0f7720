"""Held-out text as a measuring stick: the original's logits are kept once, then every form of the model is compared.

The token windows and the original's logits lie in one folder, so that a later process compares an exported file
without loading the original again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.profiles import text
from rlkit.profiles.divergence import CacheSpec, Divergence, LogitsFn, Reference, cached, compare, live
from rlkit.profiles.text import Batch
from rlkit.recover import assets, cache, source
from rlkit.recover.atomic import sha256, write_json
from rlkit.recover.progress import Tell, silent

Encode = Callable[[str], list[int]]
Measure = Callable[[Path], dict[str, Any]]
MAX_WINDOW = 256  # ids, also of a batch: its logits take 50 MB at a vocabulary of 50,000, 155 MB at 152,000


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Text to measure on, where its windows and the original's logits are kept, whose they are, and how many tokens."""

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
        return text.batches(json.loads(self._windows.read_text(encoding="utf-8")), max_ids=MAX_WINDOW)

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

    @property
    def ready(self) -> bool:
        """Whether the original's logits are kept, so that it need not be loaded."""
        return self._windows.is_file() and self._spec.path(self.batches()).is_file()

    def _reference(self, batches: list[Batch]) -> Reference:
        def absent(_ids: Any) -> Any:
            raise FileNotFoundError(f"{self.folder} lost the original's logits; measure the original again (--fresh)")

        return cached(self._spec, absent, batches)


def find(model: source.Source, asked: str, *, min_tokens: int = 4000) -> HeldOut:
    """The measuring stick for `model` on a text asset or file, kept in rlkit's cache folder.

    Raises FileNotFoundError if there is no such text or if the asset is not downloaded.
    """
    if asked in assets.registry():
        kept = assets.cached(assets.find(asked))
        if kept is None:
            raise FileNotFoundError(f"text {asked} is not downloaded yet; run `rlkit pull {asked}`")
    else:
        kept = Path(asked)
        if not kept.is_file():
            raise FileNotFoundError(f"no text {asked!r}: no such file or asset; `rlkit assets` lists the texts")
    weights = [model.file] if model.gguf_file else sorted(model.path.glob("*.safetensors"))
    identity = hashlib.sha256("".join(sha256(file) for file in [*weights, kept]).encode()).hexdigest()
    return HeldOut(kept, cache.cache_folder() / "held-out" / identity[:16], identity, min_tokens)


def keep_original(held_out: HeldOut, model: source.Source, tell: Tell = silent) -> None:
    """Make sure the original's logits are kept; loads it only if they are not."""
    if not held_out.ready:
        from rlkit.recover.model import load_model, logits_fn

        original, tokenizer = load_model(model)
        held_out.against(logits_fn(original), tokenizer.encode, tell)


def measure_bundle(held_out: HeldOut, checkpoint: Path, tell: Tell = silent) -> Measure:
    """What `export_bundle` wants: the divergence of the exported file from the original and from its checkpoint."""

    def measure(folder: Path) -> dict[str, Any]:
        from rlkit.recover.checkpoint import load_checkpoint
        from rlkit.recover.model import logits_fn
        from rlkit.runtime.session import open_session

        session = open_session(folder)
        model, _tokenizer = load_checkpoint(checkpoint)
        against_original = held_out.divergence(session.logits, tell)
        against_checkpoint = held_out.agreement(logits_fn(model), session.logits, tell)
        return {
            **against_original.to_json(),
            "text": held_out.text.name,
            "to_checkpoint": against_checkpoint.to_json(),
        }

    return measure
