"""Whether a result is of a model: its shape, its vocabulary, and of full-precision folders the weights themselves.

Shape and vocabulary are the same for a model, its checkpoints and its bundles, but also for models that differ in
nothing but training; those are told apart where both are Hugging Face folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

from rlkit.recover.atomic import sha256
from rlkit.recover.source import Source, SourceKind, read_json, read_shape


@dataclass(frozen=True, slots=True)
class Identity:
    """What a model is known by; an empty string stands for what is not known."""

    name: str
    shape: dict[str, Any]
    vocabulary: str = ""
    weights: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Identity:
        """The inverse of `to_json`; KeyError for what is none."""
        return cls(**{item.name: table[item.name] for item in fields(cls)})

    def differs(self, other: Identity, *, trained: bool = True) -> str:
        """In what the other is another model, in words; empty if nothing says so. `trained` looks at weights too."""
        for name in sorted(self.shape.keys() & other.shape.keys()):
            if self.shape[name] != other.shape[name]:
                return f"{name} is {self.shape[name]} there and {other.shape[name]} here"
        if self.vocabulary and other.vocabulary and self.vocabulary != other.vocabulary:
            return "the vocabulary is another"
        return "the weights are others" if trained and self.weights and other.weights not in ("", self.weights) else ""


def identity_of(model: Source) -> Identity:
    """What a model on disk is known by; reads all of a full-precision folder."""
    shape = read_shape(model).to_json()
    weights = ""
    if model.kind is SourceKind.HF:
        weights = hashlib.sha256("".join(map(sha256, sorted(model.path.glob("*.safetensors")))).encode()).hexdigest()
    return Identity(model.reference, shape, _vocabulary(model), weights)


def _vocabulary(model: Source) -> str:
    """A digest of which token has which id, however its file is written; empty where there is no such file."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        words = read_json(model.path / "tokenizer.json")["model"]["vocab"]
        if isinstance(words, list):  # of a unigram model, with scores
            words = {word: number for number, (word, _score) in enumerate(words)}
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
    return ""
