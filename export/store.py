"""Where an export's tensors come from, one at a time: a checkpoint, a float model, either of them under a recipe.

A store says what there is (its inventory) and hands out each tensor when asked, so that a whole model never lies in
memory. Files are mapped; names are Hugging Face's, whatever the file calls them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlkit.export.inventory import Inventory, Packed, adapter_tensor, read_checkpoint, read_float_model
from rlkit.export.matrix import Matrix
from rlkit.recover.atomic import write_json
from rlkit.recover.recipe import Recipe, Scheme
from rlkit.recover.source import Source, SourceKind, read_json

Floats = NDArray[np.float32]
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")
TEMPLATES = ("chat_template*", "generation_config.json")
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1"}


class Store(Protocol):
    """A model's tensors on demand."""

    @property
    def inventory(self) -> Inventory:
        """What there is."""

    @property
    def report(self) -> list[dict[str, Any]]:
        """What happened to tensors that were not taken as they are: rows of tensor, type, became, why."""

    @property
    def offset_modules(self) -> frozenset[str]:
        """Packed matrices that are complete only with `offsets`."""

    def offsets(self, module: str) -> Floats | None:
        """What is added to every weight of a group, (n, groups); None for a matrix that is complete."""

    def matrix(self, module: str) -> Matrix:
        """A packed matrix of the inventory."""

    def tensor(self, name: str) -> Floats:
        """A float tensor of the inventory, in float32."""

    def prepare(self, folder: Path) -> None:
        """Write what the graph builder reads: config.json (of a float model), generation config, tokenizer files."""


def open_store(
    source: Source, recipe: Recipe | None = None, *, adapters: str = "branch", carry_offsets: bool = True
) -> Store:
    """The store of a model on disk; the float matrices that `recipe` names are rounded on the way.

    Matrices with float offsets (GGUF's Q4_1) keep them (`carry_offsets`) or are rounded again.
    Its own adapter stays beside it ("branch"), is folded into float weights ("merged"), or left out (anything else).
    Raises ValueError or FileNotFoundError, one line with the remedy, for what is no model or damaged.
    """
    if source.kind is SourceKind.BUNDLE:
        raise ValueError(
            f"{source.reference} is an exported bundle already; name the model or checkpoint it was made of"
        )
    if source.kind is SourceKind.GGUF:
        from rlkit.export.ggufstore import GgufStore

        store: Store = GgufStore(source, carry_offsets=carry_offsets)
    else:
        folder = FolderStore(source)
        if adapters not in ("branch", "merged"):
            folder.inventory = replace(folder.inventory, adapters={})
        store = Merged(folder, source.path / "adapter") if adapters == "merged" else folder
    return store if recipe is None else Rounded(store, recipe)


class FolderStore:
    """A Hugging Face folder: a checkpoint with packed matrices, or a float model."""

    offset_modules: frozenset[str] = frozenset()

    def __init__(self, source: Source) -> None:
        self._folder = source.path
        packed = source.kind is SourceKind.CHECKPOINT
        self.inventory = read_checkpoint(source.path) if packed else read_float_model(source)
        self.report: list[dict[str, Any]] = []
        self._places = _places(source.path)

    def offsets(self, _module: str) -> None:
        """None: zero points are integers here."""

    def matrix(self, module: str) -> Matrix:
        """A packed matrix as the checkpoint holds it."""
        packed = self.inventory.packed[module]
        qweight, scales, qzeros = (self._read(f"{module}.{part}") for part in ("qweight", "scales", "qzeros"))
        return Matrix(qweight, scales.astype(np.float32), qzeros, packed.bits, packed.group, packed.k)

    def tensor(self, name: str) -> Floats:
        """A float tensor in float32."""
        found: Floats = self._read(name).astype(np.float32, copy=False)
        return found

    def _read(self, name: str) -> NDArray[Any]:
        file, dtype, shape, offset = self._places[name]
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is of type {dtype}, which export does not read; use {', '.join(DTYPES)}")
        found: NDArray[Any] = np.memmap(file, DTYPES[dtype], "r", offset, shape) if 0 not in shape else np.zeros(shape)
        if dtype == "BF16":  # the upper half of a float32
            return (found.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(found)

    def prepare(self, folder: Path) -> None:
        """Copy configuration and tokenizer."""
        config = read_json(self._folder / "config.json")
        config.pop("quantization_config", None)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
        for pattern in (*TOKENIZER_FILES, *TEMPLATES):
            for file in self._folder.glob(pattern):
                shutil.copy(file, folder / file.name)


class Merged:
    """Another store whose adapter is folded into its float matrices: W + scale * B A."""

    def __init__(self, store: Store, adapter: Path) -> None:
        self._store, self.report = store, store.report
        inventory = store.inventory
        if not inventory.adapters:
            raise ValueError(f"{inventory.name} has no adapter to merge; leave --adapters out")
        if packed := sorted(module for module in inventory.adapters if module in inventory.packed):
            why = (
                f"{packed[0]} has {inventory.packed[packed[0]].bits}-bit codes, which a merged adapter would be lost in"
            )
            raise ValueError(f"{inventory.name}: {why}; keep it as a branch (--adapters branch)")
        self.offset_modules = store.offset_modules
        self._adapters = {inventory.weight_name(module): part for module, part in inventory.adapters.items()}
        self._factors = load_adapter(adapter)
        self.inventory = replace(inventory, adapters={})

    def offsets(self, module: str) -> Floats | None:
        """As the other store has them."""
        return self._store.offsets(module)

    def matrix(self, module: str) -> Matrix:
        """As the other store has it."""
        return self._store.matrix(module)

    def tensor(self, name: str) -> Floats:
        """A float tensor of the other store, with what the adapter adds to it."""
        weight = self._store.tensor(name)
        adapter = self._adapters.get(name)
        if adapter is None:
            return weight
        a, b = (self._factors[adapter_tensor(adapter.module, letter)] for letter in "AB")
        merged: Floats = weight + np.float32(adapter.scale) * (b @ a)
        return merged

    def prepare(self, folder: Path) -> None:
        """As the other store does."""
        self._store.prepare(folder)


def load_adapter(folder: Path) -> dict[str, Floats]:
    """The tensors of a PEFT folder in float32, by their names there."""
    from safetensors.numpy import load_file

    return {name: array.astype(np.float32) for name, array in load_file(folder / "adapter_model.safetensors").items()}


class Rounded:
    """Another store whose float matrices are packed by a recipe when they are asked for."""

    def __init__(self, store: Store, recipe: Recipe) -> None:
        self._store, self.report = store, store.report
        inventory = store.inventory
        if inventory.adapters:
            raise ValueError(f"{inventory.name} has adapters already, so no recipe can be applied; leave --recipe out")
        self._schemes = _schemes(inventory, recipe)
        self.offset_modules = store.offset_modules
        self._last: tuple[str, Matrix] | None = None
        packed = {**inventory.packed}
        for module, scheme in self._schemes.items():
            n, k = inventory.float_matrix(module)
            packed[module] = Packed(module, n, k, scheme.bits, scheme.group)
        gone = {f"{module}.weight" for module in self._schemes}
        floats = {name: shape for name, shape in inventory.floats.items() if name not in gone}
        self.inventory = replace(inventory, packed=packed, floats=floats)

    def offsets(self, module: str) -> Floats | None:
        """As the other store has them."""
        return self._store.offsets(module)

    def matrix(self, module: str) -> Matrix:
        """A packed matrix; rounding takes time, so the last one is kept."""
        scheme = self._schemes.get(module)
        if scheme is None:
            return self._store.matrix(module)
        if self._last is None or self._last[0] != module:
            from rlkit.recover.rounding import round_matrix

            weight = self._store.tensor(self._store.inventory.weight_name(module))
            try:
                codes, scales, zeros = round_matrix(weight, scheme)
            except ValueError as error:
                raise ValueError(f"{self.inventory.name}: {module}: {error}") from error
            self._last = module, Matrix.of(codes, scales, zeros, scheme.bits, scheme.group)
        return self._last[1]

    def tensor(self, name: str) -> Floats:
        """A float tensor of the other store."""
        return self._store.tensor(name)

    def prepare(self, folder: Path) -> None:
        """As the other store does."""
        self._store.prepare(folder)


def _schemes(inventory: Inventory, recipe: Recipe) -> dict[str, Scheme]:
    """The recipe's scheme of every float linear, its group fitted to the matrix."""
    schemes: dict[str, Scheme] = {}
    for module in inventory.float_linears():
        scheme = recipe.scheme_for(module)
        if scheme is not None:
            try:
                schemes[module] = replace(scheme.resolve(inventory.float_matrix(module)[1]), adapter_rank=0)
            except ValueError as error:
                raise ValueError(f"{inventory.name}: {module}: {error}") from error
    return schemes


def _places(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...], int]]:
    """Every tensor's file, type, shape and position; headers were checked when the inventory was read."""
    places: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start = 8 + length + int(entry["data_offsets"][0])
                places[name] = file, entry["dtype"], tuple(entry["shape"]), start
    return places
