"""The plan says what each tensor becomes, by headers alone, and its bytes are those of the exported file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from rlkit.export import inventory, plan, targets
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


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("",), "target '' does not exist; use cpu, igpu, npu"),
        (("tpu",), "target 'tpu' does not exist"),
        (("igpu", "cuda"), "igpu has no provider 'cuda'; use webgpu or dml"),
        (("cpu", "dml"), "cpu has no provider 'dml'; use cpu"),
        (("npu", "webgpu"), "npu has no provider 'webgpu'"),
        (("dml", None, "float32"), "dml has no dtype 'float32'; use float16"),
        (("cpu", None, "float16"), "cpu has no dtype 'float16'; use float32"),
    ],
)
def test_targets_that_do_not_exist_are_refused(asked: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan.target_named(*asked)


def test_devices_and_providers_name_targets() -> None:
    assert plan.target_named("igpu").name == plan.target_named("webgpu").name == "webgpu"
    assert plan.target_named("igpu", "dml") is plan.target_named("dml") is plan.TARGETS["dml"]
    assert plan.target_named("npu").device == "npu"
    assert plan.target_named("igpu", dtype="float32").dtype == "float32"
    assert plan.target_named("igpu").dtype == "float16"


@pytest.mark.parametrize("target", plan.TARGETS.values(), ids=plan.TARGETS)
def test_the_table_agrees_with_itself(target: plan.Target) -> None:
    assert target.supports <= set(targets.FEATURES)
    for bits in (2, 4, 8):
        stored = target.stored_bits(bits)
        fast = target.kernel(stored, 64, target.level, 128, 32)
        assert (fast is None) == (stored not in target.widths)
        assert str(stored) in target.remedy(bits)
    assert target.kernel(target.stored_bits(4), target.group, target.level) is not None


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


def test_float_linears_stay_float_where_they_run(source: Path, tmp_path: Path) -> None:
    some = recipe.parse('[[rule]]\nmatch = "*.down_proj"\nbits = 16\n[[rule]]\nbits = 4\n')
    folder = tiny.checkpoint(source, tmp_path / "ckpt", some)
    for name, width in (("cpu", 4), ("webgpu", 2)):
        down = next(t for t in plan.plan_checkpoint(folder, target=name).tensors if t.kind == "down")
        assert (down.bits, down.kernel, down.nbytes) == (8 * width, "float MatMul", width * 128 * 256)
    with pytest.raises(ValueError, match=r"down_proj is a float matrix, and npu multiplies packed weights of 4 bits"):
        plan.plan_checkpoint(folder, target="npu")


def test_two_bits_are_widened_where_they_have_no_kernel(checkpoint: Path) -> None:
    made = plan.plan_checkpoint(checkpoint, target="dml")
    gate = next(t for t in made.tensors if t.kind == "gate_up")
    assert (gate.bits, gate.group, gate.zero_points, gate.accuracy_level) == (4, 64, True, 0)
    assert "2 bits in 4-bit fields, lossless" in gate.reason
    assert gate.nbytes == 256 * (128 * 4 // 8 + 2 * 2 + 1)  # codes, float16 scales, zero points
    assert made.exact is False  # level 0 is what DirectML runs


def test_tied_embeddings_are_shared_where_they_can_be(checkpoint: Path) -> None:
    table = {}
    for name in ("webgpu", "dml"):
        made = {tensor.name: tensor for tensor in plan.plan_checkpoint(checkpoint, target=name).tensors}
        table[name] = made.get("model.embed_tokens")
        assert ("; shared: " in made["lm_head"].reason) == (name == "webgpu")
    assert table["webgpu"] is None
    assert table["dml"] is not None
    assert (table["dml"].kernel, table["dml"].nbytes) == ("Gather", 512 * 128 * 2)
    assert "dml has no GatherBlockQuantized" in table["dml"].reason


def test_the_npu_takes_no_branch_of_eight_bits(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"lora as a branch .* npu has no kernel for 8 bits; use 4; or merge it"):
        plan.plan_checkpoint(checkpoint, target="npu")
    held = inventory.read_checkpoint(checkpoint)
    apart = plan.plan_inventory(held, target="npu", adapters="files")
    kept = [tensor for tensor in apart.tensors if tensor.kind == "adapter"]
    assert {tensor.bits for tensor in kept} == {16}
    assert kept[0].nbytes == 2 * sum(
        held.adapters[kept[0].name.removesuffix(".lora")].rank * size for size in (128, 256)
    )
    merged = plan.plan_inventory(held, target="npu", adapters="merged")
    assert "adapter" not in merged.by_kind()
    assert {tensor.bits for tensor in merged.tensors} == {4, 16}
    with pytest.raises(ValueError, match="adapters = 'none' is no form of adapters; use branch, files, merged"):
        plan.plan_inventory(held, adapters="none")


@pytest.mark.parametrize(
    ("target", "bits", "group", "k", "stored"),
    [
        ("cpu", 2, 256, 512, (2, 128)),  # no kernel for 256 at 2 bits: two blocks with one scale
        ("cpu", 4, 256, 512, (4, 256)),
        ("cpu", 2, 64, 96, (2, 64)),  # a ragged last block is fine
        ("dml", 4, 128, 576, (4, 64)),  # 576 is no multiple of 128
        ("dml", 2, 64, 96, (4, 32)),
        ("npu", 4, 256, 512, (4, 128)),
    ],
)
def test_groups_are_split_where_a_kernel_asks_for_it(
    target: str, bits: int, group: int, k: int, stored: tuple[int, int]
) -> None:
    held = _inventory({"m.mlp.down_proj": inventory.Packed("m.mlp.down_proj", 32, k, bits, group)})
    made = next(t for t in plan.plan_inventory(held, target=target).tensors if t.kind == "down")
    assert (made.bits, made.group) == stored
    assert ("in blocks of" in made.reason) == (group != stored[1])
    blocks = -(-k // stored[1])
    scale = 4 if target == "cpu" else 2
    assert made.nbytes == 32 * (blocks * stored[0] * stored[1] // 8 + scale * blocks + -(-blocks * stored[0] // 8))


def test_groups_that_cannot_be_split_are_refused() -> None:
    held = _inventory({"m.mlp.down_proj": inventory.Packed("m.mlp.down_proj", 32, 128, 2, 16)})
    with pytest.raises(ValueError, match=r"down_proj: 2 bits in groups of 16 .* cpu runs 2 bits fast with"):
        plan.plan_inventory(held)
    held = _inventory({"m.mlp.down_proj": inventory.Packed("m.mlp.down_proj", 32, 72, 4, 32)})
    with pytest.raises(ValueError, match=r"for 72 inputs have no kernel; dml .* K a multiple of the block"):
        plan.plan_inventory(held, target="dml")


def test_zero_points_are_left_out_only_where_they_are_implied() -> None:
    plain = inventory.Packed("m.mlp.down_proj", 32, 128, 4, 32, zero_points=False)
    two = inventory.Packed("m.mlp.up_proj", 32, 128, 2, 32, zero_points=False)
    held = _inventory({plain.module: plain, two.module: two})
    written = {
        name: {t.kind: t.zero_points for t in plan.plan_inventory(held, target=name).tensors if t.group}
        for name in ("cpu", "dml", "npu")
    }
    assert written["cpu"] == {"lm_head": True, "down": False, "gate_up": False}
    assert written["dml"] == {
        "lm_head": True,
        "down": False,
        "gate_up": True,
    }
    assert written["npu"] == {"lm_head": True, "down": True, "gate_up": True}


def test_webgpu_says_which_path_a_size_takes() -> None:
    paths = {}
    for k in (576, 640):
        held = _inventory({"m.mlp.down_proj": inventory.Packed("m.mlp.down_proj", 64, k, 4, 64)})
        paths[k] = next(t for t in plan.plan_inventory(held, target="webgpu").tensors if t.kind == "down")
    assert paths[576].kernel == "WebGPU 4-bit x float"
    assert paths[640].kernel == "WebGPU 4-bit x int8 (DP4A)"
    assert "K % 128 = 0" in paths[640].reason


def test_a_quantized_embedding_is_looked_up_packed_or_as_a_float_table() -> None:
    table = inventory.Packed("model.embed_tokens", 512, 128, 8, 32)
    head = {"lm_head": inventory.Packed("lm_head", 512, 128, 4, 32)}
    for name, kernel, bits in (("cpu", "GatherBlockQuantized", 8), ("npu", "Gather", 16)):
        made = plan.plan_inventory(_inventory({table.module: table, **head}), target=name)
        found = next(t for t in made.tensors if t.kind == "embedding")
        assert (found.kernel, found.bits) == (kernel, bits)


@pytest.mark.parametrize("target", ["cpu", "webgpu", "dml"])
def test_a_plan_survives_json(checkpoint: Path, target: str) -> None:
    made = plan.plan_checkpoint(checkpoint, target=target)
    assert plan.Plan.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert sum(row["nbytes"] for row in made.summary()) == made.nbytes
    assert sum(row["tensors"] for row in made.summary()) == len(made.tensors)


def test_the_type_of_activations_survives_json(checkpoint: Path) -> None:
    narrow = plan.plan_checkpoint(checkpoint, target="webgpu")
    wide = plan.plan_checkpoint(checkpoint, target=plan.target_named("igpu", dtype="float32"))
    assert plan.Plan.from_json(wide.to_json()).target.dtype == "float32"
    assert wide.nbytes > narrow.nbytes


@pytest.mark.parametrize("value", [{}, {"target": "cpu"}, {"target": "cpu", "tensors": [{"name": 1}]}])
def test_what_is_no_plan_is_named(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="this is no plan"):
        plan.Plan.from_json(value)


def _inventory(packed: dict[str, inventory.Packed]) -> inventory.Inventory:
    shape = ModelShape("LlamaForCausalLM", 1, 128, 256, 4, 2, 32, 512, False, 256, False)
    head = {} if "lm_head" in packed else {"lm_head": inventory.Packed("lm_head", 512, 128, 4, 32)}
    return inventory.Inventory("some", shape, {**packed, **head}, {}, {})


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
