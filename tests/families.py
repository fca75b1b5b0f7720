"""A tiny random model of every family: two layers, hidden 128, the tokenizer of `tiny`, every norm and bias random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import tiny
from rlkit.recover.model import quiet_transformers

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": tiny.VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_THETA = {"rope_theta": 10_000.0, "rope_type": "default"}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0}
_LONG = {"type": "longrope", "rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.5] * 16}
_ALTERNATING = ["sliding_attention", "full_attention"]

# name -> (model_type, what its configuration adds to SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": (
        "llama",
        {"rope_parameters": {**_THETA, **_LLAMA3, "original_max_position_embeddings": 64}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"head_dim": 32}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {"head_dim": 32, "original_max_position_embeddings": 256}),
    "phi3-long": (
        "phi3",
        {
            "head_dim": 32,
            "original_max_position_embeddings": 64,
            "rope_parameters": {**_THETA, **_LONG},
        },
    ),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": (
        "gemma3_text",
        {"tie_word_embeddings": True, "sliding_window": 8, "layer_types": _ALTERNATING, "query_pre_attn_scalar": 32},
    ),
    "smollm3": ("smollm3", {"tie_word_embeddings": True, "no_rope_layers": [1, 0]}),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
            "rope_parameters": {**_THETA, **_YARN, "original_max_position_embeddings": 64},
        },
    ),
    "ernie4.5": ("ernie4_5", {"tie_word_embeddings": True}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "olmo-clipped": ("olmo", {"head_dim": 32, "clip_qkv": 0.5}),
    "llama-yarn": ("llama", {"rope_parameters": {**_THETA, **_YARN, "original_max_position_embeddings": 64}}),
    "gemma3-long": (
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "sliding_attention": _THETA,
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "olmo": ("olmo", {"head_dim": 32}),
    "granite": (
        "granite",
        {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
}


def config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a family's tiny model."""
    kind, extra = FAMILIES[name]
    return AutoConfig.for_model(kind, **{**SIZES, **extra, **changes})


def model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model whose norms and biases are random too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    with quiet_transformers():
        made = AutoModelForCausalLM.from_config(config(name, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    made.config.architectures = [type(made).__name__]
    return made.eval()


def folder(name: str, path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write `model` with its tokenizer as a Hugging Face folder."""
    with quiet_transformers():
        model(name, seed=seed, **changes).save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
    return path
