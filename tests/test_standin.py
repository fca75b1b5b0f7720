"""Random models have the shape asked for and can be read like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from rlkit.recover.checkpoint import load_checkpoint
from rlkit.recover.model import load_model
from rlkit.recover.recipe import Recipe, Rule, Scheme
from rlkit.recover.source import read_shape, resolve
from rlkit.recover.standin import QWEN3_06B, SHAPES, W4W2_G128, write_packed, write_random


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


SMALL = {"layers": 2, "hidden": 128, "ffn": 256, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 5000}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_packed_checkpoint_is_one(architecture: str, tied: bool, tmp_path: Path) -> None:
    qk_norm = architecture == "Qwen3ForCausalLM"
    shape = replace(QWEN3_06B, architecture=architecture, max_context=128, qk_norm=qk_norm, tied=tied, **SMALL)
    made = resolve(write_packed(shape, W4W2_G128, tmp_path / "made"))
    assert made.kind == "checkpoint" and read_shape(made) == shape
    model, tokenizer = load_checkpoint(made.path)
    assert tokenizer.decode(tokenizer.encode("the cät")) == "the cät"
    gate = model.model.layers[1].mlp.gate_proj.weight
    assert len(gate.unique()) == 4 and len(model.lm_head.weight.unique()) == 16
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 4999]])).logits).all()


def test_a_tied_table_holds_what_the_head_stands_for(tmp_path: Path) -> None:
    shape = replace(QWEN3_06B, max_context=128, **SMALL)
    made = write_packed(shape, W4W2_G128, tmp_path / "made")
    table = load_file(made / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(table.float(), load_checkpoint(made)[0].lm_head.weight)
    other = load_file(write_packed(shape, W4W2_G128, tmp_path / "other", seed=1) / "model.safetensors")
    assert not torch.equal(table, other["model.embed_tokens.weight"])


def test_a_packed_checkpoint_has_no_float_linears(tmp_path: Path) -> None:
    shape = replace(QWEN3_06B, max_context=128, **SMALL)
    partly = Recipe("partly", (Rule(("*.mlp.*",), Scheme(4, 128)),))
    with pytest.raises(ValueError, match=r"leaves model\.layers\.0\.self_attn\.q_proj float"):
        write_packed(shape, partly, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_shapes_are_those_of_their_names() -> None:
    parameters = {name: round(shape.parameters / 1e9, 1) for name, shape in SHAPES.items()}
    assert parameters == {"qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-4b": 4.0}
