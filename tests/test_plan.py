"""The plan says what each tensor becomes, by headers alone, and its bytes are those of the exported file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from rlkit.export import inventory, plan
from rlkit.recover import recipe
from rlkit.recover.source import ModelShape, Source, SourceKind, read_shape


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    return tiny.checkpoint(source, source.parent / "ckpt", tiny.W4W2)


def test_every_tensor_is_planned(checkpoint: Path) -> None:
    made = plan.plan_checkpoint(checkpoint)
    by_name = {tensor.name: tensor for tensor in made.tensors}
    gate = by_name["model.layers.0.mlp.gate_proj"]
    assert (gate.kind, gate.bits, gate.group, gate.kernel) == ("gate_up", 2, 64, "2-bit x int8 activations")
    assert gate.nbytes == 256 * (128 * 2 // 8 + 2 * 4 + 1)  # codes, scales, zero points
    assert "shared" in by_name["lm_head"].reason
    assert "model.embed_tokens" not in by_name
    adapter = by_name["model.layers.1.mlp.up_proj.lora"]
    assert (adapter.kind, adapter.bits, adapter.zero_points) == ("adapter", 8, False)
    assert sum(made.by_kind().values()) == made.nbytes
    json.dumps(made.to_json())


@pytest.mark.parametrize("name", recipe.NAMED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_recipe_is_planned_like_its_checkpoint(name: str, tied: bool, tmp_path: Path) -> None:
    asked = recipe.load(name)
    folder = tiny.checkpoint(tiny.llama(tmp_path / "hf", tied=tied), tmp_path / "ckpt", asked)
    shape = read_shape(Source(name, SourceKind.CHECKPOINT, folder))
    assert plan.plan_recipe(shape, asked) == plan.plan_checkpoint(folder)


def test_odd_rank_falls_back_to_float_and_says_so(source: Path, tmp_path: Path) -> None:
    folder = tiny.checkpoint(source, tmp_path / "ckpt", tiny.W4W2, adapter_rank=8)
    adapters = [tensor for tensor in plan.plan_checkpoint(folder).tensors if tensor.kind == "adapter"]
    assert {tensor.bits for tensor in adapters} == {32}
    assert "rank 8" in adapters[0].reason


def test_exact_level_is_allowed_and_named(checkpoint: Path) -> None:
    gate = next(t for t in plan.plan_checkpoint(checkpoint, accuracy_level=0).tensors if t.kind == "gate_up")
    assert gate.kernel == "dequantize, then float"


@pytest.mark.parametrize("target", ["npu", "igpu", ""])
def test_other_targets_are_refused(checkpoint: Path, target: str) -> None:
    with pytest.raises(ValueError, match=f"target '{target}' is not offered yet; use cpu"):
        plan.plan_checkpoint(checkpoint, target=target)


def test_slow_levels_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="have no kernel; cpu runs 2 bits fast with accuracy_level 4"):
        plan.plan_checkpoint(checkpoint, accuracy_level=1)
    with pytest.raises(ValueError, match="accuracy_level = 7 does not exist"):
        plan.plan_checkpoint(checkpoint, accuracy_level=7)


def test_alpha_scales_the_branch(source: Path, tmp_path: Path) -> None:
    folder = tiny.checkpoint(source, tmp_path / "ckpt", tiny.W4W2) / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    changed = config | {"lora_alpha": 16, "alpha_pattern": {"0.mlp.up_proj": 64}}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    scales = {module: adapter.scale for module, adapter in inventory.read_adapters(folder).items()}
    assert scales["model.layers.0.mlp.up_proj"] == 2.0
    assert scales["model.layers.0.mlp.gate_proj"] == 0.5


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bad_checkpoints_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        plan.plan_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        plan.plan_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="is not quantized"):
        plan.plan_checkpoint(source)
    folder = tiny.checkpoint(source, tmp_path / "ckpt", tiny.W4W2)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is truncated"):
        plan.plan_checkpoint(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        plan.plan_checkpoint(folder)
    weights.write_bytes(whole)
    _edit_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(ValueError, match="MambaForCausalLM is not supported"):
        plan.plan_checkpoint(folder)
    _edit_config(folder, architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantized by 'gptq'"):
        plan.plan_checkpoint(folder)
    (folder / "genai_config.json").write_text("{}")
    with pytest.raises(ValueError, match="exported bundle already"):
        plan.plan_checkpoint(folder)


def test_wrong_sizes_are_named(source: Path, tmp_path: Path) -> None:
    folder = tiny.checkpoint(source, tmp_path / "ckpt", tiny.W4W2)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization["overrides"]["lm_head"] = {"bits": 2, "group_size": 32}
    _edit_config(folder, quantization_config=quantization)
    with pytest.raises(ValueError, match=r"lm_head\.scales is"):
        plan.plan_checkpoint(folder)


def test_foreign_adapters_are_named(source: Path, tmp_path: Path) -> None:
    folder = tiny.checkpoint(source, tmp_path / "ckpt", tiny.W4W2)
    other = tiny.checkpoint(tiny.llama(tmp_path / "wider", intermediate_size=512), tmp_path / "other", tiny.W4W2)
    (folder / "adapter").rename(folder / "old")
    (other / "adapter").rename(folder / "adapter")
    with pytest.raises(ValueError, match="give the adapter of this very checkpoint"):
        plan.plan_checkpoint(folder)


def test_float_linears_are_refused(source: Path, tmp_path: Path) -> None:
    some = recipe.parse('[[rule]]\nmatch = "*.down_proj"\nbits = 16\n[[rule]]\nbits = 4\n')
    folder = tiny.checkpoint(source, tmp_path / "ckpt", some)
    with pytest.raises(ValueError, match="down_proj is not quantized"):
        plan.plan_checkpoint(folder)


def test_planning_imports_no_heavy_library() -> None:
    code = (
        "import sys, rlkit.export.plan\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_real_shape_takes_the_groups_that_divide() -> None:
    shape = ModelShape(
        architecture="LlamaForCausalLM",
        layers=30,
        hidden=576,
        ffn=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocab=49152,
        tied=True,
        max_context=8192,
        qk_norm=False,
    )
    groups = {t.kind: t.group for t in plan.plan_recipe(shape, recipe.load("w4w2-gateup")).tensors}
    assert groups["gate_up"] == 64
    wide = recipe.parse("[[rule]]\nbits = 4\ngroup = 128\n")
    assert {t.kind: t.group for t in plan.plan_recipe(shape, wide).tensors}["gate_up"] == 64
