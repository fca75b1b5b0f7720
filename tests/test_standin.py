"""Random models have the shape asked for and can be read like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from rlkit.recover.model import load_model
from rlkit.recover.source import read_shape, resolve
from rlkit.recover.standin import QWEN3_06B, write_random


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_the_shape_is_the_one_asked_for(architecture: str, tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 600}
    qk_norm = architecture == "Qwen3ForCausalLM"
    shape = replace(QWEN3_06B, architecture=architecture, max_context=128, qk_norm=qk_norm, **sizes)
    source = resolve(write_random(shape, tiny.tokenizer(), tmp_path / "hf"))
    assert read_shape(source) == shape
    model, tokenizer = load_model(source)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    assert tokenizer.encode("the cat")
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 599]])).logits).all()
    with pytest.raises(FileExistsError):
        write_random(shape, tiny.tokenizer(), tmp_path / "hf")
