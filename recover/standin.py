"""Models of a given shape with random weights: to measure memory and speed without a download.

`write_random` makes a float model in bfloat16, `write_packed` a checkpoint whose codes are random, written tensor by
tensor, so that a model of any size needs the memory of its largest matrix and is never float.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlkit.recover import packing
from rlkit.recover.atomic import fresh_folder, write_json, write_text
from rlkit.recover.checkpoint import quantization_config
from rlkit.recover.model import quiet_transformers
from rlkit.recover.recipe import Recipe, Rule, Scheme
from rlkit.recover.source import ModelShape
from rlkit.recover.tensorfile import Entry, write_tensors

QWEN3_06B = ModelShape("Qwen3ForCausalLM", 28, 1024, 3072, 16, 8, 128, 151_936, True, 40_960, True)
QWEN3_17B = ModelShape("Qwen3ForCausalLM", 28, 2048, 6144, 16, 8, 128, 151_936, True, 40_960, True)
QWEN3_4B = ModelShape("Qwen3ForCausalLM", 36, 2560, 9728, 32, 8, 128, 151_936, True, 40_960, True)
SHAPES = {"qwen3-0.6b": QWEN3_06B, "qwen3-1.7b": QWEN3_17B, "qwen3-4b": QWEN3_4B}
W4W2_G128 = Recipe(
    "w4w2-g128",
    (Rule(("*.gate_proj", "*.up_proj"), Scheme(2, 128)), Rule(("*",), Scheme(4, 128))),
    "gate and up projections 2-bit, everything else 4-bit, groups of 128, no corrections",
)
SCALE = 2.0**-6  # of random codes; a power of two, so that float16 holds it
ROWS = 4096  # of an embedding that are dequantized at a time


def write_random(shape: ModelShape, tokenizer: Any, folder: Path, *, seed: int = 0, force: bool = False) -> Path:
    """Write a Hugging Face folder of that shape; `tokenizer` may know fewer tokens than the shape has.

    Raises FileExistsError if the folder exists and not `force`.
    """
    import transformers

    config = _config(shape)
    torch.manual_seed(seed)
    with quiet_transformers(), fresh_folder(folder, force=force) as made:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return folder


def write_packed(shape: ModelShape, recipe: Recipe, folder: Path, *, seed: int = 0, force: bool = False) -> Path:
    """Write a checkpoint folder of that shape with random codes, and a tokenizer of single bytes.

    Raises FileExistsError if the folder exists and not `force`, ValueError if the recipe leaves a linear float.
    """
    schemes: dict[str, Scheme] = {}
    for name, _n, k in shape.linears():
        scheme = recipe.scheme_for(name)
        if scheme is None:
            raise ValueError(f"recipe {recipe.name} leaves {name} float; give a recipe that quantizes every linear")
        schemes[name] = scheme.resolve(k)
    with quiet_transformers(), fresh_folder(folder, force=force) as made:
        _config(shape).save_pretrained(made)
        byte_tokenizer().save_pretrained(made)
        config = json.loads((made / "config.json").read_text(encoding="utf-8"))
        config |= {"architectures": [shape.architecture], "quantization_config": quantization_config(schemes)}
        write_json(made / "config.json", config)
        write_text(made / "recipe.toml", recipe.to_toml())
        write_tensors(made / "model.safetensors", _tensors(shape, schemes, seed), {"format": "pt"})
    return folder


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes, and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def _config(shape: ModelShape) -> Any:
    import transformers

    return getattr(transformers, shape.architecture.replace("ForCausalLM", "Config"))(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.max_context,
    )


Chunks = Callable[[], Iterator[bytes]]


def _tensors(shape: ModelShape, schemes: dict[str, Scheme], seed: int) -> Iterator[Entry]:
    """Every tensor of the checkpoint."""
    for number, (name, n, k) in enumerate(shape.linears()):
        bits, groups = schemes[name].bits, k // schemes[name].group
        zero = sum((1 << bits - 1) << at for at in range(0, 8, bits))  # the code in the middle, in every field
        yield Entry(f"{name}.qweight", "U8", (n, k * bits // 8), _random([seed, number], n * k * bits // 8))
        yield Entry(f"{name}.scales", "F32", (n, groups), _repeated(np.float32(SCALE), n * groups))
        width = -(-groups * bits // 8)
        yield Entry(f"{name}.qzeros", "U8", (n, width), _repeated(np.uint8(zero), n * width))
        if shape.qkv_bias and name[-6:] in ("q_proj", "k_proj", "v_proj"):
            yield Entry(f"{name}.bias", "BF16", (n,), _repeated(np.uint16(0), n))
    for name, width in _norms(shape):
        yield Entry(f"{name}.weight", "BF16", (width,), _repeated(np.uint16(0x3F80), width))  # 1.0
    table = [shape.vocab, shape.hidden]
    head = schemes["lm_head"], [seed, 7 * shape.layers]  # the last of the linears
    embedding = _dequantized(table, *head) if shape.tied else _repeated(np.float16(SCALE), shape.vocab * shape.hidden)
    yield Entry("model.embed_tokens.weight", "F16", tuple(table), embedding)


def _norms(shape: ModelShape) -> Iterator[tuple[str, int]]:
    for layer in range(shape.layers):
        base = f"model.layers.{layer}"
        yield f"{base}.input_layernorm", shape.hidden
        yield f"{base}.post_attention_layernorm", shape.hidden
        if shape.qk_norm:
            yield f"{base}.self_attn.q_norm", shape.head_dim
            yield f"{base}.self_attn.k_norm", shape.head_dim
    yield "model.norm", shape.hidden


def _random(seed: list[int], count: int) -> Chunks:
    return lambda: iter([np.random.default_rng(seed).bytes(count)])


def _repeated(value: np.generic, count: int) -> Chunks:
    return lambda: iter([np.full(count, value).tobytes()])


def _dequantized(table: list[int], scheme: Scheme, seed: list[int]) -> Chunks:
    """The float16 values (n, k) of random codes, some rows at a time."""
    n, k = table

    def chunks() -> Iterator[bytes]:
        codes = np.frombuffer(np.random.default_rng(seed).bytes(n * k * scheme.bits // 8), np.uint8).reshape(n, -1)
        for start in range(0, n, ROWS):
            rows = codes[start : start + ROWS]
            scales = np.full((len(rows), k // scheme.group), SCALE, np.float32)
            yield packing.dequantize(rows, scales, None, scheme.bits, scheme.group, k).astype(np.float16).tobytes()

    return chunks
