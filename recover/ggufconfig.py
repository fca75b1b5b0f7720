"""The small files of a Hugging Face folder, made from a .gguf file: config.json, generation_config.json, tokenizer.

The configuration is written from the file's head. transformers' own reader takes seconds for it (it walks through all
token lists) and drops three things that change what the model computes: head sizes other than its class's default,
the scaling of rotary positions, and further end tokens. Llama 3's scaling is no metadata but a tensor of factors
(`rope_freqs.weight`), one per pair of dimensions:

    factor(f) = 1                           wavelength 2 pi / f below  context / high
                s                           above                      context / low
                1 / ((1 - t) / s + t)       between, t = (context f / 2 pi - low) / (high - low)

Only low = 1, high = 4, context = 8192 have been published; the file must agree with them or is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.recover.ggufheader import GgufHeader, Value, read_header
from rlkit.recover.source import ModelShape, Source, read_shape

ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


def write_model_files(source: Source, folder: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer with its chat template into `folder`, offline.

    Raises ValueError, one line, for a file whose configuration or tokenizer cannot be expressed.
    """
    import transformers

    from rlkit.recover.model import quiet_transformers

    header = read_header(source.file)
    values, ends = config_values(source, header), _end_tokens(header)
    config = getattr(transformers, values["architectures"][0].replace("ForCausalLM", "Config"))(**values)
    with quiet_transformers():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source.path, gguf_file=source.gguf_file, local_files_only=True, trust_remote_code=False
            )
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            first = str(error).strip().split("\n")[0][:200]
            raise ValueError(
                f"{source.file} has no tokenizer that transformers can read ({first}); use a file that has one"
            ) from error
        if len(tokenizer) > config.vocab_size:
            why = f"{len(tokenizer)} tokens, but an embedding of {config.vocab_size} rows"
            raise ValueError(f"{source.file} has {why}; it is damaged, so download another")
        for leftover in ("is_local", "local_files_only"):  # how it was loaded is no property of the tokenizer
            tokenizer.init_kwargs.pop(leftover, None)
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        generation = transformers.GenerationConfig.from_model_config(config)
        generation.eos_token_id = ends if len(ends) > 1 else config.eos_token_id
        generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def config_values(source: Source, header: GgufHeader) -> dict[str, Any]:
    """config.json of a .gguf file: what its shape, norms, rotary positions and special tokens are.

    Raises ValueError for a file of another architecture, or whose rotary positions no configuration expresses.
    """
    shape, facts = read_shape(source), _facts(header)
    epsilon = facts.get("attention.layer_norm_rms_epsilon")
    if not isinstance(epsilon, float):
        raise ValueError(f"{source.file} lacks attention.layer_norm_rms_epsilon; it is incomplete, so download another")
    return {
        "architectures": [shape.architecture],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.max_context,
        "rms_norm_eps": epsilon,
        "rope_parameters": rope_parameters(source.file, header, shape),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def rope_parameters(path: Path, header: GgufHeader, shape: ModelShape) -> dict[str, Any]:
    """transformers' `rope_parameters` of a .gguf file; ValueError for partial rotation or a scaling not known here."""
    facts = _facts(header)
    theta = float(facts.get("rope.freq_base", 10_000.0))
    turned = facts.get("rope.dimension_count", shape.head_dim)
    if turned != shape.head_dim:
        why = f"rotates {turned} of the {shape.head_dim} dimensions of a head"
        raise ValueError(f"{path} {why}, which {shape.architecture} does not; use another file of the model")
    kind = facts.get("rope.scaling.type", "none")
    factor = facts.get("rope.scaling.factor", facts.get("rope.scale_linear", 1.0))
    factors = read_factors(path, header)
    if factors is not None:
        return {"rope_type": "llama3", "rope_theta": theta, **_llama3(path, factors, theta, shape.head_dim)}
    if kind == "yarn":
        original = facts.get("rope.scaling.original_context_length")
        if not isinstance(original, int):
            raise ValueError(f"{path} scales positions by YaRN and lacks the original context length; use another file")
        values = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
        return {**values, "rope_theta": theta}
    if kind == "linear" or (kind == "none" and "rope.scale_linear" in facts):
        scaling = {"rope_type": "linear", "factor": float(factor)} if factor != 1.0 else {"rope_type": "default"}
        return {**scaling, "rope_theta": theta}
    if kind != "none":
        raise ValueError(f"{path} scales rotary positions by {kind!r}; only linear, yarn and llama3 are known here")
    return {"rope_type": "default", "rope_theta": theta}


def read_factors(path: Path, header: GgufHeader) -> NDArray[np.float32] | None:
    """The divisors (head_dim / 2,) of rotary frequencies that the file holds as a tensor, if it does."""
    for tensor in header.tensors:
        if tensor.name == ROPE_FACTORS:
            if tensor.type != "F32":
                raise ValueError(f"{path}: {ROPE_FACTORS} is {tensor.type}, not F32; download another file")
            return np.fromfile(path, "<f4", math.prod(tensor.shape), offset=tensor.start)
    return None


def _llama3(path: Path, factors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, float]:
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # (head_dim / 2,), radians per position
    scale, low, high = float(factors.max(initial=1.0)), LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    between = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - between) / scale + between)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(f"{path}: {ROPE_FACTORS} is not Llama 3's scaling, the only one known here; use another file")
    return {"factor": scale, **LLAMA3}


def _facts(header: GgufHeader) -> dict[str, Any]:
    """The metadata of the file's architecture, without its prefix."""
    prefix = f"{header.metadata.get('general.architecture')}."
    return {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}


def _end_tokens(header: GgufHeader) -> list[Value]:
    """Ids that end an answer, the one that ends the text first."""
    found = [header.metadata.get(f"tokenizer.ggml.{name}") for name in END_TOKENS]
    return list(dict.fromkeys(token for token in found if token is not None))
