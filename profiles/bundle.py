"""What a bundle's manifest says about its size: bytes by kind of tensor, and what one token reads.

A decode step reads every matrix and norm once; of the embedding only a row, of the rotary tables next to nothing. An
embedding without an lm_head of its own is read whole, as lm_head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.profiles.operators import Storage
from rlkit.recover.source import ModelShape, read_json

MANIFEST = "rlkit.json"
UNREAD = ("embedding", "other")  # kinds of which a decode step reads rows at most


@dataclass(frozen=True, slots=True)
class BundleSize:
    """Bytes of a bundle by kind of tensor; `lowest_bits` is the narrowest code among them."""

    recipe: str
    shape: ModelShape
    nbytes_by_kind: dict[str, int]
    lowest_bits: int

    @property
    def nbytes(self) -> int:
        """All tensors together."""
        return sum(self.nbytes_by_kind.values())

    @property
    def streamed_nbytes(self) -> int:
        """Weight bytes that one token reads."""
        unread = UNREAD if "lm_head" in self.nbytes_by_kind else ("other",)
        return sum(nbytes for kind, nbytes in self.nbytes_by_kind.items() if kind not in unread)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and adapters included, over the model's parameters; tables are left out."""
        stored = sum(nbytes for kind, nbytes in self.nbytes_by_kind.items() if kind != "other")
        return 8.0 * stored / self.shape.parameters

    def nbytes_at(self, depth: int, storage: Storage | None = None) -> int:
        """What one token reads after `depth` others: weights and cache."""
        return self.streamed_nbytes + depth * (storage or Storage()).kv_token_nbytes(self.shape)


def read_size(folder: Path) -> BundleSize:
    """Read a bundle's manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}, so it is no rlkit bundle; make one with `rlkit export`")
    return size_of(read_json(path), str(path))


def size_of(manifest: dict[str, Any], where: str = MANIFEST) -> BundleSize:
    """The sizes that a manifest states."""
    try:
        by_kind: dict[str, int] = {}
        for tensor in manifest["tensors"]:
            by_kind[tensor["kind"]] = by_kind.get(tensor["kind"], 0) + int(tensor["nbytes"])
        recipe = manifest.get("recipe") or {}
        name = recipe if isinstance(recipe, str) else str(recipe.get("name", "unknown"))
        lowest = min(int(tensor["bits"]) for tensor in manifest["tensors"])
        return BundleSize(name, ModelShape.from_json(manifest["shape"]), by_kind, lowest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} states no tensor sizes or shape ({error}); export the bundle again") from error
