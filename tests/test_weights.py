"""The float tensors of a folder, read by name one at a time, whole or cut into files, tied or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from rlkit.recover import weights
from rlkit.recover.source import resolve


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["1GB", "300KB"])
def test_every_parameter_has_its_tensor(tied: bool, size: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path / "hf", tied=tied), dtype=torch.float16)
    model.save_pretrained(tmp_path / "cut", max_shard_size=size)
    found = weights.Weights(resolve(tmp_path / "cut"))
    state = model.state_dict()
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert name in found
        assert found[name].dtype == torch.float16 and torch.equal(found[name], tensor)
    assert "model.layers.9.mlp.up_proj.weight" not in found
    with pytest.raises(KeyError):
        found["model.layers.9.mlp.up_proj.weight"]


def test_rewriting_copies_what_is_no_weight_and_no_fact(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "hf")
    for name in ("recovery.json", "corruption.json", "LICENSE", "pytorch_model.bin", "modeling.py", "other.gguf"):
        (folder / name).write_text("{}")
    (folder / "recovery.json").unlink()
    (folder / "onnx").mkdir()
    (tmp_path / "out").mkdir()
    weights.rewrite(resolve(folder), tmp_path / "out", lambda name, tensor: tensor * 2 if "norm" in name else tensor)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"LICENSE", "config.json", "tokenizer.json", "model.safetensors"}
    assert names.isdisjoint({"corruption.json", "pytorch_model.bin", "modeling.py", "onnx", "other.gguf"})
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], before[name] * (2 if "norm" in name else 1)) for name in before)


def test_identity_is_the_weights_alone(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "hf")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").unlink()
    other = tiny.llama(tmp_path / "other", seed=1)
    found = [weights.identity(resolve(path)) for path in (folder, tmp_path / "copy", other)]
    assert found[0] == found[1] != found[2]


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "hf")
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="names no file"):
        weights.need_float(resolve(folder))
