"""The weights that a KV frontier combines with caches: a model as it is, by a recipe, or another folder made of it.

    float                the model itself; of a checkpoint or bundle the name is its folder's
    w8, w4, recipe.toml  rounded by a recipe, error compensated; w4:awq by another quantizer, w4:full recovered
    ./checkpoint         a checkpoint, a bundle or a Hugging Face folder of the same model

What a recipe makes is a checkpoint in the cache folder, made once. Bytes are those stored: codes and zero points as
they are, everything else at two bytes a number, a table that only repeats quantized values not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkit.apps.scorers import fingerprint
from rlkit.export.plan import plan_recipe
from rlkit.profiles.frontier.identity import identity_of
from rlkit.profiles.frontier.space import FLOAT
from rlkit.recover import assets, cache, contents, source
from rlkit.recover import recipe as recipes
from rlkit.recover.progress import Tell, silent
from rlkit.recover.recipe import METHODS, QUANTIZERS, Recipe
from rlkit.recover.source import Source, SourceKind, read_json

SEQUENCES = 128  # texts of 128 tokens that a recipe's errors are compensated on
HALF = 2  # bytes of a number that is no code


@dataclass(frozen=True, slots=True)
class Made:
    """Weights by a recipe: how the errors are treated, and the checkpoint they are in."""

    recipe: Recipe
    method: str
    quantizer: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights by the name that was given; `made` says what to make before `model` is there."""

    name: str
    model: Source
    made: Made | None = None

    @property
    def bundle(self) -> bool:
        """Whether the runtime runs them."""
        return self.model.kind is SourceKind.BUNDLE

    @property
    def ready(self) -> bool:
        """Whether there is nothing to make any more."""
        return self.made is None or self.made.folder.is_dir()

    @property
    def nbytes(self) -> int:
        """What they take; of weights that are not made yet what the recipe's bundle would."""
        if self.ready:
            return stored_nbytes(self.model)
        assert self.made is not None
        return plan_recipe(source.read_shape(self.model), self.made.recipe).nbytes


def find(model: Source, names: Sequence[str], tell: Tell = silent, *, download: bool = False) -> list[Weights]:
    """Weights by name, nothing made yet. Raises FileNotFoundError or ValueError for names that are none."""
    return [_named(model, name, tell, download=download) for name in names]


def _named(model: Source, name: str, tell: Tell, *, download: bool) -> Weights:
    if name == FLOAT:
        itself = model.kind in (SourceKind.HF, SourceKind.GGUF)
        return Weights(name if itself else model.file.name, model)
    base, *options = name.split(":")
    if base in recipes.NAMED or base.endswith(".toml"):
        return _by_recipe(model, name, base, options)
    found = source.resolve(name, download=download and name in assets.registry(), tell=tell)
    why = identity_of(model).differs(identity_of(found), trained=False)  # what a recovery left is meant to differ
    if why:
        raise ValueError(f"--weights {name} is another model ({why}); name weights of {model.reference}")
    return Weights(name, found)


def _by_recipe(model: Source, name: str, base: str, options: Sequence[str]) -> Weights:
    if model.kind not in (SourceKind.HF, SourceKind.GGUF):
        raise ValueError(f"--weights {name} rounds a float model, and {model.reference} is a {model.kind}")
    recipe, method, quantizer = recipes.load(base), "none", ""
    for option in options:
        if option in METHODS:
            method = option
        elif option in QUANTIZERS:
            quantizer = option
        else:
            known = ", ".join((*METHODS, *QUANTIZERS))
            raise ValueError(f"--weights {name}: {option!r} is no method or quantizer; use one of {known}")
    key = fingerprint(model, f"{recipe.to_toml()}\0{method}\0{quantizer}\0{SEQUENCES}")[:24]
    folder = cache.cache_folder() / "kv" / "weights" / f"{Path(base).stem}-{key}"
    made = Made(recipe, method, quantizer, folder)
    there = Source(str(folder), SourceKind.CHECKPOINT, folder) if folder.is_dir() else model
    return Weights(name, there, made)


def make(model: Source, weights: Weights, tell: Tell = silent) -> Weights:
    """The same weights with nothing left to make; an interrupted call goes on where it was."""
    if weights.ready:
        return weights
    from rlkit.recover.recovery import Settings, recover
    from rlkit.recover.synthesize import Sampling

    made = weights.made
    assert made is not None
    settings = Settings(method=made.method, quantizer=made.quantizer, sampling=Sampling(sequences=SEQUENCES))
    recover(model, made.recipe, made.folder, settings=settings, tell=tell)
    return Weights(weights.name, source.resolve(made.folder), made)


def stored_nbytes(model: Source) -> int:
    """What a model's weights take: see the module."""
    if model.kind is SourceKind.HF:
        return HALF * source.read_shape(model).parameters
    if model.kind is SourceKind.CHECKPOINT:
        return sum(_checkpoint_nbytes(model.path))
    if model.kind is SourceKind.BUNDLE:
        from rlkit.runtime.folder import graph_nbytes

        config = read_json(model.path / "genai_config.json")
        return graph_nbytes(model.path / str(config["model"]["decoder"]["filename"]))
    return sum(int(row["nbytes"]) for row in contents.describe(model)["tensors"])


def _checkpoint_nbytes(folder: Path) -> Iterator[int]:
    """Bytes of the tensors of a checkpoint, those of its adapter too."""
    adapter = folder / "adapter" / "adapter_model.safetensors"
    files = [folder / "model.safetensors", *([adapter] if adapter.is_file() else [])]
    for file in files:
        tensors = list(contents.read_safetensors_header(file))
        tied = any(name == "lm_head.qweight" for name, *_ in tensors) and bool(
            read_json(folder / "config.json").get("tie_word_embeddings")
        )
        for name, dtype, shape, nbytes in tensors:
            if not (tied and name == "model.embed_tokens.weight"):
                yield nbytes if dtype == "U8" else HALF * math.prod(shape)
