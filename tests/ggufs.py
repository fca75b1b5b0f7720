"""GGUF files of tiny random models, laid out as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tiny
from rlkit.export.ggufstore import GgufStore
from rlkit.recover import source

MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
}
Types = Callable[[str], Kind]


def mixed(name: str) -> Kind:
    """Every way a matrix can go: exact, with offsets, dequantized, float."""
    if name.endswith(("norm.weight", ".bias")):
        return Kind.F32
    wanted = {"attn_q": Kind.Q4_0, "attn_k": Kind.Q8_0, "attn_v": Kind.Q4_1, "attn_output": Kind.BF16}
    wanted |= {"ffn_gate": Kind.Q4_1, "ffn_up": Kind.Q5_0, "ffn_down": Kind.Q4_0}
    return wanted.get(name.split(".")[-2], Kind.Q8_0)


def always(kind: Kind) -> Types:
    return lambda name: Kind.F32 if name.endswith(("norm.weight", ".bias")) else kind


def random_model(architecture: str = "llama", *, tied: bool = True, **changes: int) -> Any:
    config, model = MODELS[architecture]
    torch.manual_seed(0)
    made = model(config(**{**SIZES, **changes}, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("norm.weight", ".bias")):  # ones and zeros would hide a mistake
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def write(path: Path, model: Any, types: Types = mixed, *, architecture: str = "llama", **changes: Any) -> Path:
    """A complete GGUF of a torch model, as llama.cpp's converter lays it out."""
    writer = gguf.GGUFWriter(path, architecture)
    add_facts(writer, {**facts_of(model.config), **changes}, architecture)
    add_tokenizer(writer)
    for name, array in gguf_tensors(model, architecture).items():
        kind = types(name)
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    return close(writer, path)


def facts_of(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", SIZES["head_dim"])  # Qwen2 has none of its own
    return {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }


def add_facts(writer: gguf.GGUFWriter, facts: dict[str, Any], architecture: str) -> None:
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in facts.items():
        if value is not None:
            add[type(value)](key if key.startswith(("tokenizer.", "general.")) else f"{architecture}.{key}", value)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = tiny.tokenizer()
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tiny.SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in inner["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)


def gguf_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        base, _, part = name.rpartition(".")
        array = parameter.detach().numpy()
        if architecture == "llama" and base.endswith(("q_proj", "k_proj")):
            array = interleaved(array)
        found[f"{names.get_name(base)}.{part}"] = array
    return found


def interleaved(array: np.ndarray) -> np.ndarray:
    """Rows of each head as llama.cpp wants them: first and second half take turns."""
    heads = array.reshape(-1, SIZES["head_dim"], *array.shape[1:])
    half = SIZES["head_dim"] // 2
    turns = [row for pair in zip(range(half), range(half, 2 * half), strict=True) for row in pair]
    return np.ascontiguousarray(heads[:, turns].reshape(array.shape))


def close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(path: Path, **options: Any) -> GgufStore:
    return GgufStore(source.resolve(path), **options)


def with_tensor(path: Path, name: str, array: np.ndarray, **changes: Any) -> Path:
    """A float file without a tokenizer that holds one tensor more, or lacks one if `array` is empty."""
    model = random_model()
    writer = gguf.GGUFWriter(path, "llama")
    add_facts(writer, {**facts_of(model.config), **changes}, "llama")
    for each, values in {**gguf_tensors(model, "llama"), name: array}.items():
        if values.size:
            writer.add_tensor(each, values)
    return close(writer, path)


def with_blocks(path: Path, raw: np.ndarray, kind: Kind, *, hidden: int, ffn: int) -> GgufStore:
    """A float file without a tokenizer in which `DOWN` is these bytes (hidden, ...)."""
    config = LlamaConfig(**{**SIZES, "hidden_size": hidden, "intermediate_size": ffn}, tie_word_embeddings=True)
    writer = gguf.GGUFWriter(path, "llama")
    add_facts(writer, facts_of(config), "llama")
    for name, array in gguf_tensors(LlamaForCausalLM(config), "llama").items():
        if name == "blk.1.ffn_down.weight":
            writer.add_tensor(name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    return opened(close(writer, path))


def by_hand(kind: Kind, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of random bits of a type of 32 weights: raw rows, integers (n, k) as ggml defines them, scales."""
    rng = np.random.default_rng(n * k)
    scales = rng.normal(size=(n, k // 32)).astype(np.float16)
    if kind == Kind.Q8_0:
        numbers = rng.integers(-128, 128, (n, k // 32, 32)).astype(np.int8)
        body = numbers.view(np.uint8)
    else:
        numbers = rng.integers(0, 16, (n, k // 32, 32)).astype(np.int8)
        body = (numbers[..., :16] | (numbers[..., 16:] << 4)).view(np.uint8)
        numbers = numbers - np.int8(8)
    raw = np.concatenate([scales[..., None].view(np.uint8), body], axis=-1)
    return raw.reshape(n, -1), numbers.reshape(n, k), scales.astype(np.float32)
