"""Held-out text as a measuring stick: the original's logits are kept once, then every form of the model is compared.

The token windows and the original's logits lie in one folder, so that a later process compares an exported file
without loading the original again, and so that original and exported file are never in memory together.

`rlkit.apps.gate` says what an exported file is compared with, and how far from it it may be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlkit.profiles import text
from rlkit.profiles.divergence import CacheSpec, Divergence, LogitsFn, Reference, cached, compare
from rlkit.profiles.text import Batch
from rlkit.recover import assets, cache, memory, source
from rlkit.recover.atomic import sha256, write_json
from rlkit.recover.progress import Tell, silent

Encode = Callable[[str], list[int]]
Measure = Callable[[Path], dict[str, Any]]
BUILTIN = "builtin"
MAX_WINDOW = 256  # ids, also of a batch: its logits take 50 MB at a vocabulary of 50,000, 155 MB at 152,000


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Text to measure on, where its windows and the original's logits are kept, whose they are, and how many tokens.

    `name` is what manifests call the text, the file's own unless given.
    """

    text: Path
    folder: Path
    identity: str
    min_tokens: int = 4000
    name: str = ""

    def against(self, logits: LogitsFn, encode: Encode, tell: Tell = silent) -> Callable[[LogitsFn], dict[str, Any]]:
        """What `recover` wants: keep the original's logits, and return the measure of any other model."""
        if not self.windows.is_file():
            rows = text.windows(
                text.read_documents(self.text), encode, min_tokens=self.min_tokens, max_length=MAX_WINDOW
            )
            write_json(self.windows, rows)
        batches = self.batches()
        reference = cached(self._spec, logits, batches, tell)
        return lambda other: compare(reference, other, batches, tell).to_json()

    def divergence(self, logits: LogitsFn, tell: Tell = silent) -> Divergence:
        """The divergence of a model from the original, whose logits must have been kept before."""
        batches = self.batches()
        return compare(self._reference(batches), logits, batches, tell)

    def batches(self) -> list[Batch]:
        """The kept windows, padded."""
        return text.batches(json.loads(self.windows.read_text(encoding="utf-8")), max_ids=MAX_WINDOW)

    @property
    def label(self) -> str:
        """The text's name."""
        return self.name or self.text.name

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(batch.predicted for batch in self.batches())

    @property
    def windows(self) -> Path:
        """Where the text's token windows are kept."""
        return self.folder / "windows.json"

    @property
    def _spec(self) -> CacheSpec:
        return CacheSpec(self.folder, self.identity)

    @property
    def ready(self) -> bool:
        """Whether the original's logits are kept, so that it need not be loaded."""
        return self.windows.is_file() and self._spec.path(self.batches()).is_file()

    def _reference(self, batches: list[Batch]) -> Reference:
        def absent(_ids: Any) -> Any:
            raise FileNotFoundError(f"{self.folder} lost the original's logits; measure the original again (--fresh)")

        return cached(self._spec, absent, batches)


def find(model: source.Source, asked: str, *, min_tokens: int = 4000) -> HeldOut:
    """The measuring stick for `model` on the built-in text, a text asset or a file, kept in rlkit's cache folder.

    Raises FileNotFoundError if there is no such text or if the asset is not downloaded.
    """
    kept = find_text(asked)
    stamp = "".join(sha256(file) for file in [*_decisive(model), kept]) + str(min_tokens)
    identity = hashlib.sha256(stamp.encode()).hexdigest()
    name = asked if asked == BUILTIN else ""
    return HeldOut(kept, _home() / identity[:16], identity, min_tokens, name)


def find_text(asked: str) -> Path:
    """The file of a text: `builtin`, an asset's name, or a path.

    Raises FileNotFoundError if there is none or if the asset is not downloaded.
    """
    if asked == BUILTIN:
        return text.BUILTIN
    if asked in assets.registry():
        kept = assets.cached(assets.find(asked))
        if kept is None:
            raise FileNotFoundError(
                f"text {asked} is not downloaded yet; run `rlkit pull {asked}`, or use the text {BUILTIN}"
            )
        return kept
    if not Path(asked).is_file():
        raise FileNotFoundError(f"no text {asked!r}: no such file or asset; `rlkit assets` lists the texts")
    return Path(asked)


def _decisive(model: source.Source) -> list[Path]:
    """The files that decide a model's logits."""
    if model.gguf_file:
        return [model.file]
    files = sorted(model.path.glob("*.safetensors")) + sorted((model.path / "adapter").glob("*.safetensors"))
    return [*files, *model.path.glob("config.json")]


def _home() -> Path:
    return cache.cache_folder() / "held-out"


def keep_original(held_out: HeldOut, model: source.Source, tell: Tell = silent) -> None:
    """Make sure the original's logits are kept; loads it only if they are not."""
    if not held_out.ready:
        keep(held_out, load(model), tell)


def load(model: source.Source) -> tuple[LogitsFn, Encode]:
    """The logits of a float model, or of a checkpoint dequantized, and its tokenizer; ValueError if it is damaged."""
    from rlkit.recover.checkpoint import load_checkpoint
    from rlkit.recover.model import load_model, logits_fn

    loaded, tokenizer = load_checkpoint(model.path) if model.kind is source.SourceKind.CHECKPOINT else load_model(model)
    return logits_fn(loaded), tokenizer.encode


def keep(held_out: HeldOut, loaded: tuple[LogitsFn, Encode], tell: Tell = silent) -> None:
    """Keep the logits of what `load` gave."""
    held_out.against(*loaded, tell)


@contextlib.contextmanager
def borrowed(held_out: HeldOut) -> Iterator[HeldOut]:
    """The same text, cut into the same windows if it is cut, for another model's logits: kept until the block ends."""
    held_out.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="borrowed-", dir=held_out.folder.parent) as folder:
        own = replace(held_out, folder=Path(folder), identity="borrowed")
        if held_out.windows.is_file():
            shutil.copy(held_out.windows, own.windows)
        yield own


def measure_bundle(held_out: HeldOut, checkpoint: Path, tell: Tell = silent) -> Measure:
    """What `export_bundle` wants: the divergence of the exported file from the original and from its checkpoint.

    The original's logits must have been kept before (`keep_original`).
    """

    def measure(folder: Path) -> dict[str, Any]:
        with borrowed(held_out) as own:
            keep(own, load(source.resolve(checkpoint)), tell)
            memory.give_back()  # the exported file wants it
            logits = logits_of(folder)
            found = {**held_out.divergence(logits, tell).to_json(), "text": held_out.label}
            return {**found, "to_checkpoint": own.divergence(logits, tell).to_json()}

    return measure


def logits_of(bundle: Path) -> LogitsFn:
    """The logits of a bundle's graph by plain onnxruntime on the CPU: its weights are in memory once."""
    from rlkit.export.plan import default_threads
    from rlkit.runtime.plain import Plain

    config = source.read_json(bundle / "genai_config.json")
    return Plain(bundle, config["model"]["decoder"], default_threads()).logits
