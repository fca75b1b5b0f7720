"""Stores: the tensors of folders on demand, rounded or merged on the way, and what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import tiny
from rlkit.export import store
from rlkit.recover import recipe
from rlkit.recover.adapter import save_adapters
from rlkit.recover.correct import LowRank
from rlkit.recover.quantize import quantize_nearest
from rlkit.recover.source import resolve


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("store") / "hf")


def test_a_checkpoint_is_handed_out_as_it_is(source: Path, tmp_path: Path) -> None:
    folder = tiny.checkpoint(source, tmp_path / "ckpt", tiny.W4W2)
    found = store.open_store(resolve(folder))
    model = tiny.dequantized(folder)
    for module in ("model.layers.0.self_attn.q_proj", "lm_head"):
        np.testing.assert_array_equal(found.matrix(module).dequantize(), model.get_submodule(module).weight.detach())
    norm = "model.layers.1.input_layernorm.weight"
    np.testing.assert_array_equal(found.tensor(norm), model.get_parameter(norm).detach())
    assert found.matrix("model.layers.0.mlp.up_proj").bits == 2
    assert found.inventory.adapters and not store.open_store(resolve(folder), adapters="none").inventory.adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_tensors_of_every_type_and_shard(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = LlamaForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    tiny.tokenizer().save_pretrained(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    found = store.open_store(resolve(tmp_path / "hf"))
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(found.tensor(name), parameter.detach().float())


def test_a_recipe_rounds_on_the_way(source: Path) -> None:
    found = store.open_store(resolve(source), recipe.load("w4w2-gateup"))
    model = LlamaForCausalLM.from_pretrained(source)
    for module, bits in (("model.layers.1.mlp.gate_proj", 2), ("model.layers.1.self_attn.o_proj", 4), ("lm_head", 4)):
        scheme = recipe.load("w4w2-gateup").scheme_for(module)
        assert scheme is not None and scheme.bits == bits
        weight = model.get_submodule(module).weight.detach()
        expected = quantize_nearest(weight, scheme.resolve(weight.shape[1])).dequantize()
        np.testing.assert_array_equal(found.matrix(module).dequantize(), expected)
    assert found.inventory.shares_embedding
    assert "model.layers.1.mlp.gate_proj.weight" not in found.inventory.floats


def test_an_adapter_is_merged_into_float_weights_only(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    rng = torch.Generator().manual_seed(0)
    low_ranks = {
        "model.layers.0.self_attn.q_proj": LowRank(
            torch.randn(4, 128, generator=rng), torch.randn(128, 4, generator=rng)
        ),
        "model.layers.1.mlp.down_proj": LowRank(torch.randn(4, 256, generator=rng), torch.randn(128, 4, generator=rng)),
    }
    save_adapters(folder / "adapter", low_ranks, "hf")
    model = LlamaForCausalLM.from_pretrained(source)
    found = store.open_store(resolve(folder), adapters="merged")
    assert not found.inventory.adapters
    for module, low_rank in low_ranks.items():
        weight = model.get_submodule(module).weight.detach()
        np.testing.assert_allclose(found.tensor(f"{module}.weight"), weight + low_rank.product(), rtol=0, atol=1e-5)
    untouched = "model.layers.0.mlp.gate_proj.weight"
    np.testing.assert_array_equal(found.tensor(untouched), model.get_parameter(untouched).detach())
    with pytest.raises(ValueError, match="has no adapter to merge"):
        store.open_store(resolve(source), adapters="merged")
    checkpoint = tiny.checkpoint(source, tmp_path / "ckpt", tiny.W4W2)
    with pytest.raises(ValueError, match="2-bit codes, which a merged adapter would be lost in"):
        store.open_store(resolve(checkpoint), adapters="merged")


def test_what_the_builder_reads_is_a_float_model(source: Path, tmp_path: Path) -> None:
    folder = tiny.checkpoint(source, tmp_path / "ckpt")
    store.open_store(resolve(folder)).prepare(tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".safetensors", ".toml")) for name in names)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def sharded(source: Path, folder: Path) -> Path:
    LlamaForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="200KB")
    return folder


def test_shards_that_are_missing_or_elsewhere(source: Path, tmp_path: Path) -> None:
    folder = sharded(source, tmp_path / "hf")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name = next(iter(listed["weight_map"]))
    for trick in ("../model.safetensors", "/etc/passwd", "a/b.safetensors"):
        index.write_text(json.dumps({**listed, "weight_map": {**listed["weight_map"], name: trick}}))
        with pytest.raises(ValueError, match="outside its folder"):
            store.open_store(resolve(folder))
    index.write_text(json.dumps({"weight_map": ["no", "map"]}))
    with pytest.raises(ValueError, match="has no weight_map"):
        store.open_store(resolve(folder))
    index.write_text(json.dumps(listed))
    (folder / listed["weight_map"][name]).unlink()
    with pytest.raises(ValueError, match="so a shard is missing"):
        store.open_store(resolve(folder))


def test_folders_that_are_no_float_model(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantized by 'gptq'"):
        store.open_store(resolve(folder))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is \(512, 128\)"):
        store.open_store(resolve(folder))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rounded = store.open_store(resolve(folder), tiny.W4)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: 1 of .* weights are NaN"):
        rounded.matrix("model.layers.0.mlp.up_proj")


def test_float_zero_points_are_refused(source: Path, tmp_path: Path) -> None:
    folder = tiny.checkpoint(source, tmp_path / "ckpt")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.qzeros"] = tensors["lm_head.qzeros"].float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.qzeros is F32, not packed uint8"):
        store.open_store(resolve(folder))
