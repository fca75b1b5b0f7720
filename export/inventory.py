"""What a checkpoint folder holds, read from its headers only: no tensor is loaded, no torch is needed.

The same value can be made from a model's shape and a recipe, for a plan before there is a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.recover.contents import kind_of, read_safetensors_header
from rlkit.recover.recipe import Recipe
from rlkit.recover.source import ModelShape, Source, SourceKind, read_json, read_shape

_ADAPTER_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
EMBEDDING = "model.embed_tokens.weight"
_LINEAR_KINDS = ("attention", "gate_up", "down", "lm_head")
_PACKED_PARTS = ("qweight", "scales", "qzeros")


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized matrix (n, k) of the checkpoint."""

    module: str
    n: int
    k: int
    bits: int
    group: int
    zero_points: bool = True  # False: the middle code everywhere, which no reader needs to be told
    offsets: bool = False  # a float is added to every weight of a group, by a branch (export.offsets)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank branch y += scale * B (A x) beside `module`: A (rank, k), B (n, rank)."""

    module: str
    rank: int
    n: int
    k: int
    scale: float


@dataclass(frozen=True, slots=True)
class Inventory:
    """A checkpoint: the model's shape, quantized matrices, float tensors (name -> shape) and adapters, by module."""

    name: str
    shape: ModelShape
    packed: dict[str, Packed]
    floats: dict[str, tuple[int, ...]]
    adapters: dict[str, Adapter]

    @property
    def shares_embedding(self) -> bool:
        """Whether the embedding can read the rows of a quantized lm_head."""
        return self.shape.tied and "lm_head" in self.packed

    def weight_name(self, module: str) -> str:
        """The float tensor of a linear; a tied lm_head has the embedding's."""
        own = f"{module}.weight"
        return EMBEDDING if module == "lm_head" and own not in self.floats and self.shape.tied else own

    def float_linears(self) -> list[str]:
        """Linears that are float matrices here, a tied lm_head included."""
        found = [name.removesuffix(".weight") for name, shape in self.floats.items() if _is_linear(name, shape)]
        return [*found, "lm_head"] if self.shape.tied and "lm_head" not in {*found, *self.packed} else found

    def float_matrix(self, module: str) -> tuple[int, int]:
        """(N, K) of a float linear."""
        n, k = self.floats[self.weight_name(module)]
        return n, k


def read_checkpoint(path: Path) -> Inventory:
    """Read the headers of a checkpoint folder.

    Raises FileNotFoundError or ValueError, one line with the remedy, if the folder is not a checkpoint or is damaged.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {path}; make one with: rlkit recover MODEL -o {path}")
    if (path / "genai_config.json").exists():
        raise ValueError(f"{path} is an exported bundle already; give the checkpoint folder it was made from")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no config.json, so it is no checkpoint; make one with: rlkit recover MODEL"
        )
    quantization = _quantization(path, read_json(path / "config.json"))
    shape = read_shape(Source(str(path), SourceKind.CHECKPOINT, path))
    shapes = _all_shapes(path, "recover it again")
    packed = {name: _packed(name, shapes, quantization, path) for name in _modules_with(shapes, "qweight")}
    part_of_packed = {f"{module}.{part}" for module in packed for part in _PACKED_PARTS}
    floats = {name: shape for name, shape in shapes.items() if name not in part_of_packed}
    adapters = read_adapters(path / "adapter") if (path / "adapter").is_dir() else {}
    inventory = Inventory(str(path), shape, packed, floats, adapters)
    _check_adapters(inventory)
    return inventory


def read_float_model(source: Source) -> Inventory:
    """Read the headers of a float Hugging Face folder, an adapter beside the weights included.

    Raises FileNotFoundError or ValueError, one line with the remedy, for a folder that is damaged or quantized.
    """
    path, shape = source.path, read_shape(source)
    method = (read_json(path / "config.json").get("quantization_config") or {}).get("quant_method")
    if method:
        raise ValueError(f"{path} is quantized by {method!r}; name the float model it was made of, or a checkpoint")
    floats = _all_shapes(path, "fetch the model again")
    if wrong := [name for name, size in floats.items() if name == EMBEDDING and size != (shape.vocab, shape.hidden)]:
        raise ValueError(f"{path}: {wrong[0]} is {floats[wrong[0]]}, but config.json says otherwise; fetch it again")
    adapters = read_adapters(path / "adapter") if (path / "adapter").is_dir() else {}
    return Inventory(str(path), shape, {}, floats, adapters)


def _all_shapes(path: Path, remedy: str) -> dict[str, tuple[int, ...]]:
    """The tensors of all shards; an index must not name files or tensors that are not there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, dtype, shape, _nbytes in read_safetensors_header(file):
            if name.endswith((".qweight", ".qzeros")) and dtype != "U8":
                why = f"{name} is {dtype}, not packed uint8, and no fast kernel reads that"
                raise ValueError(f"{file}: {why}; round the zero points to integers and pack them")
            shapes[name] = tuple(shape)
    if not shapes:
        raise FileNotFoundError(f"{path} holds no *.safetensors file, so it has no weights; {remedy}")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{index} has no weight_map; {remedy}")
        for name, file_name in listed.items():
            if Path(str(file_name)).name != file_name:
                raise ValueError(f"{index} names the file {file_name!r} outside its folder; {remedy}")
            if name not in shapes:
                raise ValueError(f"{path} lacks {name} of {file_name}, so a shard is missing; {remedy}")
    return shapes


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    module = name.removesuffix(".weight")
    return module != name and len(shape) == 2 and kind_of(module) in _LINEAR_KINDS


def expected_inventory(shape: ModelShape, recipe: Recipe) -> Inventory:
    """What a checkpoint of such a model will hold if `recipe` is followed, adapters included."""
    packed: dict[str, Packed] = {}
    adapters: dict[str, Adapter] = {}
    floats: dict[str, tuple[int, ...]] = {}
    for module, n, k in shape.linears():
        scheme = recipe.scheme_for(module)
        if scheme is None:
            floats[f"{module}.weight"] = (n, k)
            continue
        scheme = scheme.resolve(k)
        packed[module] = Packed(module, n, k, scheme.bits, scheme.group)
        if scheme.adapter_rank:
            adapters[module] = Adapter(module, scheme.adapter_rank, n, k, 1.0)
    floats |= dict(shape.others())
    floats[EMBEDDING] = (shape.vocab, shape.hidden)
    return Inventory(f"{shape.architecture} by recipe {recipe.name}", shape, packed, floats, adapters)


def read_adapters(folder: Path) -> dict[str, Adapter]:
    """The adapters of a PEFT folder by module, from its config and the header of its tensors."""
    remedy = "remove the adapter folder, or write it again with: rlkit recover"
    file = folder / "adapter_model.safetensors"
    for needed in (folder / "adapter_config.json", file):
        if not needed.is_file():
            raise FileNotFoundError(f"{folder} holds no {needed.name}; {remedy}")
    config = read_json(folder / "adapter_config.json")
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in _shapes(file):
        match = _ADAPTER_NAME.fullmatch(name)
        if match is None or len(shape) != 2:
            raise ValueError(f"{file} holds {name!r} {shape}, which is no low-rank A or B; {remedy}")
        shapes.setdefault(match["module"], {})[match["letter"]] = shape
    adapters = {}
    for module, parts in shapes.items():
        if set(parts) != {"A", "B"} or parts["A"][0] != parts["B"][1]:
            raise ValueError(f"{file}: the A and B of {module} do not fit each other ({parts}); {remedy}")
        (rank, k), (n, _) = parts["A"], parts["B"]
        adapters[module] = Adapter(module, rank, n, k, _adapter_scale(config, module, rank))
    return adapters


def adapter_tensor(module: str, letter: str) -> str:
    """The PEFT name of an adapter's A or B."""
    return f"base_model.model.{module}.lora_{letter}.weight"


def _adapter_scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (float(rank) ** 0.5 if config.get("use_rslora") else float(rank))


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise ValueError(f"{path} is not quantized, so no checkpoint; quantize it with: rlkit recover {path} -o CKPT")
    method = quantization.get("quant_method")
    if method != "olive" or not {"bits", "group_size"} <= quantization.keys():
        raise ValueError(
            f"{path} is quantized by {method!r}, but export reads rlkit checkpoints ('olive' layout); start from rlkit"
            " recover"
        )
    return quantization


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, _dtype, shape, _nbytes in read_safetensors_header(file):
        yield name, tuple(shape)


def _modules_with(shapes: dict[str, tuple[int, ...]], part: str) -> list[str]:
    return [name.removesuffix(f".{part}") for name in shapes if name.endswith(f".{part}")]


def _packed(module: str, shapes: dict[str, tuple[int, ...]], quantization: dict[str, Any], path: Path) -> Packed:
    scheme = quantization | (quantization.get("overrides") or {}).get(module, {})
    bits, group = int(scheme["bits"]), int(scheme["group_size"])
    n, width = shapes[f"{module}.qweight"]
    k = width * 8 // bits
    groups = -(-k // group)
    expected = {"scales": (n, groups), "qzeros": (n, -(-groups * bits // 8))}
    for part, shape in expected.items():
        if shapes.get(f"{module}.{part}") != shape:
            found = shapes.get(f"{module}.{part}", "missing")
            why = f"{module}.{part} is {found}, but {bits} bits in groups of {group} need {shape}"
            raise ValueError(f"{path}: {why}; write the checkpoint again")
    if k % group:
        raise ValueError(f"{path}: {module} has {k} inputs, no multiple of its group {group}; use a group that divides")
    return Packed(module, n, k, bits, group)


def _check_adapters(inventory: Inventory) -> None:
    for module, adapter in inventory.adapters.items():
        base = inventory.packed.get(module)
        if base is None or (base.n, base.k) != (adapter.n, adapter.k):
            found = "not a quantized matrix here" if base is None else f"{(base.n, base.k)} here"
            why = f"its adapter is for {module} {(adapter.n, adapter.k)}, which is {found}"
            raise ValueError(f"{inventory.name}: {why}; give the adapter of this very checkpoint")
