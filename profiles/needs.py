"""The memory that a model needs while it runs, and whether a place has it.

    weights       everything stored, all experts and the embedding; once per form in which units store them
    cache         keys and values of prompt and new tokens, of all sequences
    activations   what lives at once while the longest chunk of the prompt is read: a layer's input and residual, three
                  vectors of the widest MLP, the logits; eager attention's scores twice

What it does not know: the runtime's own memory, weights that it packs anew when it loads them, and fragmentation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlkit.profiles.architecture import Architecture
from rlkit.profiles.operators import cache_nbytes
from rlkit.profiles.places import Place


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that are needed, and the most there can be (None: not known)."""

    weights_nbytes: int
    cache_nbytes: int
    activations_nbytes: int
    limit_nbytes: int | None = None

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weights_nbytes + self.cache_nbytes + self.activations_nbytes

    @property
    def fits(self) -> bool | None:
        """Whether there is enough; None if that is not known."""
        return None if self.limit_nbytes is None else self.nbytes <= self.limit_nbytes

    @property
    def text(self) -> str:
        """The parts in one line."""
        parts = {"weights": self.weights_nbytes, "cache": self.cache_nbytes, "activations": self.activations_nbytes}
        said = " + ".join(f"{name} {nbytes / 1e9:.2f}" for name, nbytes in parts.items())
        return f"{said} = {self.nbytes / 1e9:.2f} GB"

    def check(self, what: str, where: str) -> None:
        """Raise ValueError with the reason if it does not fit."""
        if self.fits is False and self.limit_nbytes is not None:
            limit = f"{where} has {self.limit_nbytes / 1e9:.2f} GB at most"
            remedy = "use a smaller model, fewer bits, less context, --kv int8 or a smaller --chunk"
            if self.weights_nbytes > self.limit_nbytes:
                remedy = "use a smaller model or fewer bits"
            raise ValueError(f"{what} does not fit: {self.text}, but {limit}; {remedy}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "nbytes": self.nbytes, "fits": self.fits}


def cached_nbytes(model: Architecture, place: Place, tokens: int, batch: int) -> int:
    """Bytes of the cache for so many tokens of every sequence."""
    return cache_nbytes(model, place.storage.kv, tokens, batch)


def activations_nbytes(model: Architecture, place: Place, rows: int, logits: int, seen: int) -> int:
    """Live activations of a pass over `rows` tokens of all sequences, `logits` of them with logits.

    `seen`: pairs of query and key of all sequences in a layer without a window; eager attention stores their scores.
    """
    widest = max(
        layer.ffn or (layer.experts.active * layer.experts.ffn if layer.experts else 0) for layer in model.layers
    )
    live = rows * (2 * model.hidden + 3 * widest) + logits * model.vocab
    if place.options.attention == "eager":
        live += 2 * seen * max(layer.heads for layer in model.layers)
    return live * place.storage.activation_bits // 8
