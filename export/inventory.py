"""What a checkpoint folder holds, read from its headers only: no tensor is loaded, no torch is needed.

The same value can be made from a model's shape and a recipe, for a plan before there is a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.recover.contents import read_safetensors_header
from rlkit.recover.recipe import Recipe
from rlkit.recover.source import ModelShape, Source, SourceKind, read_json, read_shape

_ADAPTER_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
_PACKED_PARTS = ("qweight", "scales", "qzeros")


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized matrix (n, k) of the checkpoint."""

    module: str
    n: int
    k: int
    bits: int
    group: int


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
        """Whether the embedding reads the rows of a quantized lm_head."""
        return self.shape.tied and "lm_head" in self.packed


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
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        shapes |= dict(_shapes(file))
    if not shapes:
        raise FileNotFoundError(f"{path} holds no *.safetensors file, so it has no weights; recover it again")
    packed = {name: _packed(name, shapes, quantization, path) for name in _modules_with(shapes, "qweight")}
    part_of_packed = {f"{module}.{part}" for module in packed for part in _PACKED_PARTS}
    floats = {name: shape for name, shape in shapes.items() if name not in part_of_packed}
    adapters = read_adapters(path / "adapter") if (path / "adapter").is_dir() else {}
    inventory = Inventory(str(path), shape, packed, floats, adapters)
    _check_adapters(inventory)
    return inventory


def expected_inventory(shape: ModelShape, recipe: Recipe) -> Inventory:
    """What a checkpoint of such a model will hold if `recipe` is followed, adapters included."""
    packed: dict[str, Packed] = {}
    adapters: dict[str, Adapter] = {}
    floats: dict[str, tuple[int, ...]] = {"model.norm.weight": (shape.hidden,)}
    for module, n, k in shape.linears():
        scheme = recipe.scheme_for(module)
        if scheme is None:
            floats[f"{module}.weight"] = (n, k)
            continue
        scheme = scheme.resolve(k)
        packed[module] = Packed(module, n, k, scheme.bits, scheme.group)
        if scheme.adapter_rank:
            adapters[module] = Adapter(module, scheme.adapter_rank, n, k, 1.0)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        floats[f"{prefix}.input_layernorm.weight"] = floats[f"{prefix}.post_attention_layernorm.weight"] = (
            shape.hidden,
        )
        if shape.qk_norm:
            floats[f"{prefix}.self_attn.q_norm.weight"] = floats[f"{prefix}.self_attn.k_norm.weight"] = (
                shape.head_dim,
            )
    floats["model.embed_tokens.weight"] = (shape.vocab, shape.hidden)
    if shape.qkv_bias:
        outputs = {module: n for module, n, _k in shape.linears() if module[-6:] in ("q_proj", "k_proj", "v_proj")}
        floats |= {f"{module}.bias": (n,) for module, n in outputs.items()}
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
