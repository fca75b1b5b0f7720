"""The builder's graph from a configuration and the small tensors, for stores that hold a tiny torch model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from huggingface_hub import constants
from numpy.typing import NDArray

import families
import tiny
from rlkit.export.families import load_experts
from rlkit.export.inventory import Inventory
from rlkit.export.matrix import Matrix
from rlkit.export.skeleton import Skeleton, hollow, import_builder, make_skeleton
from rlkit.export.targets import target_named
from rlkit.recover.progress import Progress, silent
from rlkit.recover.source import read_shape, resolve

CPU = target_named("cpu")


class Memory:
    """A store over a torch model; it remembers what it was asked for."""

    def __init__(self, model: Any, folder: Path, *, tokenizer: bool = True) -> None:
        model.config.save_pretrained(folder)
        self.weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
        floats = {name: value.shape for name, value in self.weights.items()}
        self.inventory = Inventory("tiny", read_shape(resolve(folder)), {}, floats, {})
        self.report: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self._config, self._tokenizer = model.config, tokenizer

    def matrix(self, module: str) -> Matrix:
        raise AssertionError(f"nothing is packed here: {module}")

    def tensor(self, name: str) -> NDArray[np.float32]:
        self.asked.append(name)
        return self.weights[name]

    def prepare(self, folder: Path) -> None:
        self._config.save_pretrained(folder)
        if self._tokenizer:
            tiny.tokenizer().save_pretrained(folder)


def memory(tmp_path: Path, name: str = "llama", **changes: Any) -> Memory:
    return Memory(families.model(name, **changes), tmp_path / "config")


def skeleton_of(
    store: Memory, folder: Path, where: str = "cpu", provider: str | None = None, **options: str
) -> Skeleton:
    return make_skeleton(store, target_named(where, provider), options, folder)


def shapes(made: Skeleton) -> dict[str, tuple[int, ...]]:
    return {value.name or "": tuple(int(size) for size in value.shape or ()) for value in hollow(made.model)}


def test_matrices_have_a_shape_and_no_data(tmp_path: Path) -> None:
    store = memory(tmp_path)
    made = skeleton_of(store, tmp_path / "made", fuse_qkv="false")
    expected = {"model.embed_tokens.weight": (512, 128)}
    for module, n, k in store.inventory.shape.linears():
        expected[f"{module.replace('.self_attn.', '.attn.')}.MatMul.weight"] = (k, n)
    assert shapes(made) == expected
    assert not [name for name in store.asked if not name.endswith("norm.weight")]  # no matrix was read
    real = [value for value in made.model.graph.initializers.values() if value.const_value is not None]
    assert all(np.isfinite(np.asarray(value.const_value, np.float64)).all() for value in real)
    norm = made.model.graph.initializers["model.layers.1.input_layernorm.weight"].const_value
    np.testing.assert_array_equal(norm, store.weights["model.layers.1.input_layernorm.weight"])
    assert made.config["model"]["decoder"]["num_hidden_layers"] == 2
    assert (made.folder / "tokenizer.json").is_file()
    assert not list(tmp_path.rglob("*.onnx*")) and not (tmp_path / "made" / "cache").exists()


def test_query_key_and_value_are_one_matrix_unless_told(tmp_path: Path) -> None:
    found = shapes(skeleton_of(memory(tmp_path, "phi3"), tmp_path / "made"))
    assert found["model.layers.0.attn.qkv_proj.MatMul.weight"] == (128, 256)
    assert found["model.layers.0.mlp.gate_proj.MatMul.weight"] == (128, 192)  # Phi-3 fuses it with up_proj
    assert not [name for name in found if "gate_up" in name or "q_proj" in name]


@pytest.mark.parametrize(
    ("where", "provider", "dtype", "inputs"),
    [
        ("cpu", None, ir.DataType.FLOAT, {"input_ids", "attention_mask"}),
        ("igpu", "webgpu", None, {"input_ids", "attention_mask"}),
        ("igpu", "dml", ir.DataType.FLOAT16, {"input_ids", "attention_mask", "position_ids"}),
    ],
)
def test_types_and_inputs_are_the_targets(
    where: str, provider: str | None, dtype: ir.DataType | None, inputs: set[str], tmp_path: Path
) -> None:
    target = target_named(where, provider)
    made = make_skeleton(memory(tmp_path, "qwen2"), target, {}, tmp_path / "made")
    kind = ir.DataType.FLOAT16 if target.dtype == "float16" else ir.DataType.FLOAT
    assert dtype in (None, kind)
    assert {value.dtype for value in hollow(made.model)} == {kind}
    assert made.model.graph.initializers["model.layers.0.input_layernorm.weight"].dtype == kind
    names = {value.name or "" for value in made.model.graph.inputs}
    assert {name for name in names if not name.startswith("past")} == inputs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_webgpu_in_either_type(dtype: str, tmp_path: Path) -> None:
    target = target_named("igpu", "webgpu", dtype)
    made = make_skeleton(memory(tmp_path), target, {}, tmp_path / "made")
    assert {value.dtype for value in hollow(made.model)} == {ir.DataType[dtype.upper().replace("FLOAT32", "FLOAT")]}


def test_the_builders_options_are_passed_on(tmp_path: Path) -> None:
    made = skeleton_of(memory(tmp_path), tmp_path / "made", prune_lm_head="true")
    (logits,) = [value for value in made.model.graph.outputs if value.name == "logits"]
    assert logits.shape is not None and logits.shape[1] == 1


def test_every_layer_is_told(tmp_path: Path) -> None:
    told: list[Progress] = []
    make_skeleton(memory(tmp_path), CPU, {}, tmp_path / "made", told.append)
    assert [(event.stage, event.done, event.total) for event in told] == [("graph", 1, 2), ("graph", 2, 2)]


def test_nothing_of_the_builder_stays_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = import_builder()
    before, offline = dict(vars(builder)), constants.HF_HUB_OFFLINE
    skeleton_of(memory(tmp_path, "smollm3"), tmp_path / "made")
    with pytest.raises(ValueError, match="refuses"):
        skeleton_of(memory(tmp_path, "gpt-oss"), tmp_path / "refused", "igpu", "dml")
    assert dict(vars(builder)) == before
    assert offline == constants.HF_HUB_OFFLINE
    assert capsys.readouterr() == ("", "")


def refused(store: Memory, folder: Path, where: str = "cpu", provider: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        make_skeleton(store, target_named(where, provider), {}, folder, silent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_norm_and_one_of_another_size(tmp_path: Path) -> None:
    store = memory(tmp_path)
    store.inventory.floats["model.norm.weight"] = (64,)
    assert "model.norm.weight is (64,), the configuration asks for (128,)" in refused(store, tmp_path / "a")
    del store.inventory.floats["model.norm.weight"]
    assert "model.norm.weight is missing" in refused(store, tmp_path / "b")


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    store = Memory(families.model("llama"), tmp_path / "config", tokenizer=False)
    assert "the model builder refuses tiny: " in refused(store, tmp_path / "made")


def test_long_rope_elsewhere_than_in_phi3(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    assert "for Phi-3 alone" in refused(memory(tmp_path, rope_parameters=rope), tmp_path / "made")


def test_experts_have_no_operator_on_directml(tmp_path: Path) -> None:
    assert "export it for cpu or webgpu" in refused(memory(tmp_path, "gpt-oss"), tmp_path / "made", "igpu", "dml")


def test_mxfp4_experts_are_decoded_value_by_value(tmp_path: Path) -> None:
    store = memory(tmp_path, "gpt-oss")
    name, rng = "model.layers.0.mlp.experts.down_proj", np.random.default_rng(0)
    np.testing.assert_array_equal(load_experts(store, name), store.weights[name].swapaxes(1, 2))
    del store.inventory.floats[name]
    codes, scales = rng.integers(0, 16, (2, 3, 64)), rng.integers(120, 130, (2, 3, 2))
    pairs = codes.reshape(2, 3, 2, 16, 2)
    store.weights[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).astype(np.float32)
    store.weights[f"{name}_scales"] = scales.astype(np.float32)
    found = load_experts(store, name)
    for at in np.ndindex(2, 3, 64):
        sign, exponent, half = codes[at] >> 3, codes[at] >> 1 & 3, codes[at] & 1
        size = (1 + half / 2) * 2.0 ** (exponent - 1) if exponent else half / 2  # e2m1, bias 1
        assert found[at] == (-1) ** sign * size * 2.0 ** (scales[at[0], at[1], at[2] // 32] - 127)
