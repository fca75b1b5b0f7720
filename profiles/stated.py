"""A bundle as its own files state it, ready to be forecast: what was joined, the bytes of every matrix, windows.

The manifest (rlkit.json) says for every module how wide its codes are, how many of them share a scale and how many
bytes all of it takes; the sizes n and k follow from the architecture. So a forecast made of this is of the file that
runs, whatever a recipe would have made of the model today. What it does not know: in which order a file holds them, and
whether the runtime packs them anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlkit.profiles.account import Model
from rlkit.profiles.architecture import Architecture, of_shape
from rlkit.profiles.bundle import MANIFEST
from rlkit.profiles.layer import Layer, Linear
from rlkit.profiles.places import HALF, Place
from rlkit.profiles.step import NAMED
from rlkit.profiles.storage import Format, Storage
from rlkit.profiles.weights import Block, Matrix, Weights, short_name
from rlkit.recover.recipe import Recipe
from rlkit.recover.source import ModelShape, read_json

_MODULE = re.compile(r"(.+?(?:_proj|\.router|embed_tokens)|lm_head)(?:\.(.+))?")
_JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_JOINED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_EMBEDDING = "model.embed_tokens"
_TABLES = re.compile(r"(?:cos|sin)_cache\w*")


@dataclass(frozen=True, slots=True)
class Stated:
    """A bundle's architecture, its weights as they are stored, its recipe's name, and which logits prefill computes."""

    name: str
    recipe: str
    architecture: Architecture
    weights: Weights
    storage: Storage
    target: str
    all_logits: bool

    def model_at(self, place: Place) -> Model:
        """The bundle where it runs: in its own storage, with nothing joined but what the file joins."""
        graph = NAMED.get(self.target, NAMED["cpu"])
        # Joined products are matrices of the file already, and no export has norms inside attention.
        options = replace(graph, fused_qkv=False, fused_gate_up=False, fused_qk_norm=False)
        here = replace(place, storage=self.storage, options=options)
        return Model(self.architecture, Recipe(self.recipe, ()), here, weights=self.weights)


def read_stated(folder: Path) -> Stated:
    """What a bundle folder states; FileNotFoundError or ValueError, one line, if it is none of rlkit's."""
    from rlkit.export.nodes import windows

    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}, so it is no rlkit bundle; make one with `rlkit export`")
    filename = read_json(folder / "genai_config.json")["model"]["decoder"]["filename"]
    return stated(read_json(path), folder.resolve().name, windows(folder / filename), str(path))


def stated(manifest: Mapping[str, Any], name: str, windows: Mapping[int, int], where: str = MANIFEST) -> Stated:
    """The same of a manifest; `windows`: layer -> tokens its attention sees, of those that do not see all."""
    try:
        shape = ModelShape.from_json(manifest["shape"])
        half = manifest["plan"]["dtype"] == "float16"
        tensors = _collected(manifest["tensors"])
        recipe = manifest["recipe"] or {}
        about = str(recipe.get("name", "none")), str(manifest["target"]), manifest.get("logits") == "all"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} states no shape or tensors ({error}); export the bundle again") from error
    architecture = of_shape(shape)
    layers = tuple(
        replace(layer, window=windows.get(index)).within(architecture.max_context)
        for index, layer in enumerate(architecture.layers)
    )
    storage = HALF if half else Storage()
    architecture = replace(architecture, layers=layers)
    try:
        weights = weights_of(architecture, storage, tensors)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; export the bundle again") from error
    return Stated(name, about[0], architecture, weights, storage, *about[1:])


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Everything stored for a module; bytes of its codes, scales and zero points are `nbytes`."""

    bits: int = 0
    group: int | None = None
    weights: int = 0
    nbytes: int = 0
    scales_nbytes: int = 0  # of experts, whose parts are rows apart; among nbytes
    bias_nbytes: int = 0
    down_weights: int = 0  # of a branch's first matrix
    adapter_nbytes: int = 0


def _collected(rows: Iterable[Mapping[str, Any]]) -> dict[str, _Tensor]:
    """The manifest's rows by module; those of norms and the like by their own name."""
    found: dict[str, _Tensor] = {}
    for row in rows:
        name, nbytes, weights = str(row["name"]), int(row["nbytes"]), int(row["weights"])
        match = _MODULE.fullmatch(name)
        module, part = (match[1], match[2] or "") if match else (name, "")
        before = found.get(module, _Tensor())
        if "lora_" in part or "offsets" in part:
            down = weights if "lora_A" in part else 0
            found[module] = replace(
                before, adapter_nbytes=before.adapter_nbytes + nbytes, down_weights=before.down_weights + down
            )
        elif part.endswith("bias"):
            found[module] = replace(before, bias_nbytes=before.bias_nbytes + nbytes)
        elif part.endswith("scales"):
            found[module] = replace(before, nbytes=before.nbytes + nbytes, scales_nbytes=nbytes)
        else:
            form = {"bits": int(row["bits"]), "group": row["group"], "weights": weights}
            found[module] = replace(before, **form, nbytes=before.nbytes + nbytes)
    return found


def weights_of(architecture: Architecture, storage: Storage, tensors: Mapping[str, _Tensor]) -> Weights:
    """The matrices of a manifest; ValueError naming one that it does not state, or states with other sizes."""
    found: Counter[tuple[Layer, tuple[Matrix, ...]]] = Counter()
    for index, layer in enumerate(architecture.layers):
        prefix = f"model.layers.{index}."
        found[layer, tuple(_matrices(layer, architecture.hidden, prefix, tensors, storage))] += 1
    vocab, table = architecture.vocab, tensors.get(_EMBEDDING)
    head = _matrix("lm_head", [Linear("lm_head", vocab, architecture.hidden)], _head(tensors), storage)
    vectors = [t.nbytes for name, t in tensors.items() if not _MODULE.fullmatch(name) and not _TABLES.fullmatch(name)]
    return Weights(
        blocks=tuple(Block(count, layer, matrices) for (layer, matrices), count in found.items()),
        head=head,
        embedding_nbytes=table.nbytes if table and "lm_head" in tensors else 0,
        row_nbytes=(table.nbytes if table else head.nbytes) // vocab,
        vector_nbytes=sum(vectors),
    )


def _head(tensors: Mapping[str, _Tensor]) -> _Tensor:
    found = tensors.get("lm_head") or tensors.get(_EMBEDDING)
    if found is None:
        raise ValueError("it states no lm_head")
    return found


def _matrices(
    layer: Layer, hidden: int, prefix: str, tensors: Mapping[str, _Tensor], storage: Storage
) -> Iterator[Matrix]:
    """A layer's products, in the order of the model: those of one stored module are one."""
    products: dict[str, list[Linear]] = {}
    for linear in replace(layer, fused=False).linears(hidden):  # the export takes apart what a model joins itself
        products.setdefault(_stored_name(prefix + linear.module, tensors), []).append(linear)
    for name, parts in products.items():
        module, last = parts[0].module.rpartition(".")[0], name.rpartition(".")[2]
        yield _matrix(f"{module}.{last}", parts, tensors[name], storage)


def _stored_name(module: str, tensors: Mapping[str, _Tensor]) -> str:
    """The manifest's name of what holds a linear: its own, the builder's for experts, or that of joined ones."""
    for name in (module, module.replace(".mlp.", ".moe.")):
        base, _dot, last = name.rpartition(".")
        for candidate in (name, f"{base}.{_JOINED.get(last, last)}"):
            if candidate in tensors:
                return candidate
    raise ValueError(f"it states no tensor for {module}")


def _matrix(name: str, parts: list[Linear], tensor: _Tensor, storage: Storage) -> Matrix:
    first, n, copies = parts[0], sum(part.n for part in parts), parts[0].copies
    expert = copies > 1
    if tensor.weights and not expert and tensor.weights < n * first.k:
        raise ValueError(f"it states {tensor.weights} weights for {name}, which has {n} x {first.k}")
    return Matrix(
        name=short_name(name),
        n=n,
        k=first.k,
        format=_format(tensor, n, first.k, copies, storage),
        nbytes=tensor.nbytes // copies,
        bias_nbytes=tensor.bias_nbytes // copies,
        rank=tensor.down_weights // first.k,
        adapter_nbytes=tensor.adapter_nbytes // copies,
        count=copies,
        active=first.active,
        experts=copies if expert else 0,
    )


def _format(tensor: _Tensor, n: int, k: int, copies: int, storage: Storage) -> Format:
    """Codes with scales, and zero points if there are bytes for them; or plain floats."""
    bits, group, size = tensor.bits, tensor.group, storage.scale_bits
    if tensor.scales_nbytes:  # experts' codes are rows of bytes
        groups = max(8 * tensor.scales_nbytes // (size * copies * n), 1)
        bits, group = 8 * (tensor.nbytes - tensor.scales_nbytes) // (copies * n * k), -(-k // groups)
        return Format(f"w{bits}g{group}", bits, group, size)
    if group is None:
        return Format(f"fp{bits}", bits)
    groups = -(-k // group)
    rest = tensor.nbytes - n * (-(-groups * group * bits // 8) + groups * size // 8)
    return Format(f"w{bits}g{group}", bits, group, size, bits if rest > 0 else 0)
