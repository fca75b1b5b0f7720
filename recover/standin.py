"""A model of a given shape with random weights, stored in bfloat16: to measure memory and speed without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlkit.recover.atomic import fresh_folder
from rlkit.recover.model import quiet_transformers
from rlkit.recover.source import ModelShape

QWEN3_06B = ModelShape("Qwen3ForCausalLM", 28, 1024, 3072, 16, 8, 128, 151_936, True, 40_960, True)


def write_random(shape: ModelShape, tokenizer: Any, folder: Path, *, seed: int = 0, force: bool = False) -> Path:
    """Write a Hugging Face folder of that shape; `tokenizer` may know fewer tokens than the shape has.

    Raises FileExistsError if the folder exists and not `force`.
    """
    import transformers

    config = getattr(transformers, shape.architecture.replace("ForCausalLM", "Config"))(
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
    torch.manual_seed(seed)
    with quiet_transformers(), fresh_folder(folder, force=force) as made:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return folder
