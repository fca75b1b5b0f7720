"""The checkpoint folder: what `recover` writes and `export` reads, a Hugging Face folder that others can read too.

    config.json         quantization_config = {quant_method: olive, bits, group_size, symmetric, overrides}
    model.safetensors   <module>.qweight uint8 (N, K*bits/8), .scales float32 (N, G), .qzeros uint8 (N, ceil(G*bits/8));
                        every other tensor under its own name
    adapter/            PEFT folder of the low-rank corrections, if there are any
    recipe.toml         the recipe that made it
    recovery.json       what was done: settings, seeds, counts, seconds, divergence by stage, provenance

A tied embedding is stored once, as the quantized `lm_head`, plus its dequantized values as `model.embed_tokens.weight`
(float16) for readers that want a float table; `load_checkpoint` takes the exact integers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from rlkit.recover import adapter, packing
from rlkit.recover.atomic import need_space, write_json, write_text
from rlkit.recover.contents import read_safetensors_header
from rlkit.recover.correct import LowRank
from rlkit.recover.model import quiet_transformers
from rlkit.recover.quantize import BLOCK, Quantized
from rlkit.recover.recipe import Recipe, Scheme
from rlkit.recover.tensorfile import Entry, write_tensors

SCHEMA_VERSION = 1
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Recovered:
    """Everything a checkpoint holds: by module name the quantized weights and corrections, and all other tensors."""

    quantized: Mapping[str, Quantized]
    low_ranks: dict[str, LowRank]
    tensors: dict[str, torch.Tensor]


def write_checkpoint(
    folder: Path, recovered: Recovered, model: Any, tokenizer: Any, recipe: Recipe, recovery: dict[str, Any]
) -> None:
    """Write the files into the existing, empty `folder` (see atomic.fresh_folder)."""
    schemes: dict[str, Scheme] = {}
    entries = [_plain(name, tensor) for name, tensor in recovered.tensors.items()]
    for name, quantized in recovered.quantized.items():  # read from disk one by one, here and when they are written
        schemes[name] = quantized.scheme
        entries += _packed(name, quantized, recovered.quantized)
        del quantized  # the last one is the largest
    if model.config.tie_word_embeddings and "lm_head" in recovered.quantized:
        entries.append(_table(recovered.quantized))
    need_space(folder, sum(entry.nbytes for entry in entries) + 64_000_000)
    with quiet_transformers():
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(schemes)
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", entries, {"format": "pt"})
    if recovered.low_ranks:
        adapter.save_adapters(folder / "adapter", recovered.low_ranks, str(recovery["source"]["reference"]))
    write_text(folder / "recipe.toml", recipe.to_toml())
    write_json(folder / "recovery.json", {"schema_version": SCHEMA_VERSION, **recovery})


def _plain(name: str, tensor: torch.Tensor) -> Entry:
    def chunks() -> Iterator[bytes]:
        yield tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return Entry(name, DTYPES[tensor.dtype], tuple(tensor.shape), chunks)


def _packed(name: str, like: Quantized, states: Mapping[str, Quantized]) -> list[Entry]:
    """The three tensors of a matrix, whose shapes are those of `like`, read again when they are written."""
    n, k = like.codes.shape
    bits, groups = like.scheme.bits, like.scales.shape[1]

    def part(read: Callable[[Quantized], torch.Tensor | NDArray[np.uint8]]) -> Callable[[], Iterator[bytes]]:
        def chunks() -> Iterator[bytes]:
            yield np.ascontiguousarray(read(states[name])).tobytes()

        return chunks

    return [
        Entry(f"{name}.qweight", "U8", (n, k * bits // 8), part(lambda state: packing.pack(state.codes.numpy(), bits))),
        Entry(f"{name}.scales", "F32", (n, groups), part(lambda state: state.scales)),
        Entry(f"{name}.qzeros", "U8", (n, -(-groups * bits // 8)), part(lambda s: packing.pack(s.zeros.numpy(), bits))),
    ]


def _table(states: Mapping[str, Quantized]) -> Entry:
    """A tied embedding's values in float16, for readers that want a float table; some rows at a time."""

    def chunks() -> Iterator[bytes]:
        state = states["lm_head"]
        step = max(1, BLOCK // state.codes.shape[1])
        for start in range(0, len(state.codes), step):
            rows = slice(start, start + step)
            part = Quantized(state.codes[rows], state.scales[rows], state.zeros[rows], state.scheme)
            yield part.dequantize(torch.float16).numpy().tobytes()

    n, k = states["lm_head"].codes.shape
    return Entry("model.embed_tokens.weight", "F16", (n, k), chunks)


def quantization_config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The `quantization_config` of config.json: the most common bits and group globally, the rest as overrides."""
    kinds = Counter((scheme.bits, scheme.group) for scheme in schemes.values())
    bits, group = kinds.most_common(1)[0][0]
    overrides = {
        name: {"bits": scheme.bits, "group_size": scheme.group}
        for name, scheme in schemes.items()
        if (scheme.bits, scheme.group) != (bits, group)
    }
    symmetric = all(scheme.symmetric for scheme in schemes.values())
    return {
        "quant_method": "olive",
        "bits": bits,
        "group_size": group,
        "symmetric": symmetric,
        "overrides": overrides,
    }


def load_checkpoint(folder: Path) -> tuple[Any, Any]:
    """The checkpoint as a float32 torch model (dequantized weights plus corrections) and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = folder / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no checkpoint: it has no model.safetensors; make one with `rlkit recover`"
        )
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        quantization = config.__dict__.pop("quantization_config", None)
        if not quantization:
            raise ValueError(
                f"{folder / 'config.json'} has no quantization_config; name a folder that rlkit recover made"
            )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    state = _float_tensors(folder, quantization)
    shared = state.get("lm_head.weight", state.get("model.embed_tokens.weight"))
    if config.tie_word_embeddings and shared is not None:
        state |= {"lm_head.weight": shared, "model.embed_tokens.weight": shared}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{folder} does not fit its config.json: {', '.join(wrong[:3])}; make it again")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), tokenizer


def _float_tensors(folder: Path, quantization: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the stored tensors and adapters stand for, by parameter name."""
    read_safetensors_header(folder / "model.safetensors")  # says what is wrong with a damaged file
    try:
        state = _dequantized(load_file(folder / "model.safetensors"), quantization)
        for name, low_rank in adapter.load_adapters(folder / "adapter").items():
            state[f"{name}.weight"] += low_rank.product()
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} lacks {error} or has it in another shape; make it again") from error
    return state


def _dequantized(tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in ("scales", "qzeros"):
            continue
        if part != "qweight":
            state[name] = tensor.float()
            continue
        override = quantization["overrides"].get(module, {})
        bits = override.get("bits", quantization["bits"])
        group = override.get("group_size", quantization["group_size"])
        scales, zeros = tensors[f"{module}.scales"].numpy(), tensors[f"{module}.qzeros"].numpy()
        weight = packing.dequantize(tensor.numpy(), scales, zeros, bits, group, tensor.shape[1] * 8 // bits)
        state[f"{module}.weight"] = torch.from_numpy(weight)
    return state
