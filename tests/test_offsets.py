"""Branches of float offsets: on graphs made here, and a Q4_1 file exported whole against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

import tiny
from ggufs import always, mixed, opened, random_model, write
from rlkit.export import fill, passes, skeleton
from rlkit.export import write as writing
from rlkit.export.ggufstore import GgufStore
from rlkit.export.inventory import Inventory, Packed
from rlkit.export.matrix import Matrix
from rlkit.export.offsets import add_offsets
from rlkit.export.plan import plan_inventory
from rlkit.export.targets import target_named
from rlkit.recover.model import quiet_transformers
from rlkit.recover.source import ModelShape
from test_families import Session

SHAPE = ModelShape("LlamaForCausalLM", 1, 96, 64, 2, 2, 48, 32, False, 64, False)
RNG = np.random.default_rng(0)


class OneLayer:
    """A graph of packed matrices that read one x (1, T, 96), written out by hand."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}), ir_version=10)
        self.x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "tokens", 96]))
        self.model.graph.inputs.append(self.x)
        self.packed: dict[str, Packed] = {}
        self.matrices: dict[str, Matrix] = {}
        for module, n in sizes.items():
            codes = RNG.integers(0, 16, (n, 96)).astype(np.uint8)
            scales = RNG.normal(size=(n, 3)).astype(np.float32)
            self.matrices[module] = Matrix.of(codes, scales, np.full((n, 3), 8, np.uint8), 4, 32)
            self.packed[module] = Packed(module, n, 96, 4, 32, False)

    def node(self, name: str, *modules: str) -> None:
        """A node of the stacked rows of some modules, whose result is an output of the graph."""
        parts = [self.matrices[module] for module in modules]
        constants = {"qweight": [part.blocks() for part in parts], "scales": [part.scales for part in parts]}
        inputs: list[ir.Value | None] = [self.x]
        for part, arrays in constants.items():
            tensor = ir.tensor(np.concatenate(arrays), name=f"{name}.{part}")
            value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.model.graph.register_initializer(value)
            inputs.append(value)
        n = sum(part.n for part in parts)
        attributes = {"K": 96, "N": n, "bits": 4, "block_size": 32, "accuracy_level": 0}
        y = ir.Value(name=f"y{n}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "tokens", n]))
        path = f"/model/layers.0/{name}/MatMulNBits"
        made = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=path, outputs=[y])
        self.model.graph.append(made)
        self.model.graph.outputs.append(y)

    @property
    def inventory(self) -> Inventory:
        return Inventory("one layer", SHAPE, self.packed, {}, {})

    def run(self, path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
        writing.write(self.model, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, {"x": x}), strict=True))


def operators(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


def test_the_branch_adds_what_integers_cannot_say(tmp_path: Path) -> None:
    graph = OneLayer({f"model.layers.0.self_attn.{part}": n for part, n in zip(fill.QKV, (8, 4, 6), strict=True)})
    q, k, v = graph.matrices
    graph.node("attn/qkv_proj", q, k, v)
    offsets = {q: RNG.normal(size=(8, 3)).astype(np.float32), v: RNG.normal(size=(6, 3)).astype(np.float32)}
    add_offsets(graph.model, graph.inventory, frozenset(offsets), offsets.get)
    x = RNG.normal(size=(1, 5, 96)).astype(np.float32)
    weights = {
        module: matrix.dequantize() + np.repeat(offsets.get(module, np.zeros((matrix.n, 3))), 32, axis=1)
        for module, matrix in graph.matrices.items()
    }
    (found,) = graph.run(tmp_path / "model.onnx", x).values()
    np.testing.assert_allclose(found, x @ np.concatenate(list(weights.values())).T, rtol=1e-4, atol=1e-3)
    assert np.abs(x @ np.concatenate([m.dequantize() for m in graph.matrices.values()]).T - found).max() > 1


def test_matrices_that_read_the_same_share_the_sums(tmp_path: Path) -> None:
    graph = OneLayer({"model.layers.0.mlp.gate_proj": 8, "model.layers.0.mlp.up_proj": 6})
    gate, up = graph.matrices
    graph.node("mlp/gate_proj", gate)
    graph.node("mlp/up_proj", up)
    offsets = {gate: np.ones((8, 3), np.float32), up: np.ones((6, 3), np.float32)}
    add_offsets(graph.model, graph.inventory, frozenset(offsets), offsets.get)
    expected = ["Add", "Add", "MatMul", "MatMul", "MatMulNBits", "MatMulNBits", "ReduceSum", "Reshape"]
    assert operators(graph.model) == expected
    assert sorted(graph.run(tmp_path / "model.onnx", np.ones((1, 1, 96), np.float32))) == ["y6", "y8"]


def test_others_are_left_alone() -> None:
    graph = OneLayer({"model.layers.0.mlp.gate_proj": 8})
    graph.node("mlp/gate_proj", *graph.matrices)
    add_offsets(graph.model, graph.inventory, frozenset(), {}.get)
    assert operators(graph.model) == ["MatMulNBits"]


def test_offsets_without_a_node_are_refused() -> None:
    graph = OneLayer({"model.layers.0.mlp.gate_proj": 8, "model.layers.0.mlp.up_proj": 8})
    graph.node("mlp/gate_proj", "model.layers.0.mlp.gate_proj")
    with pytest.raises(ValueError, match=r"no packed node for model\.layers\.0\.mlp\.up_proj"):
        add_offsets(graph.model, graph.inventory, frozenset(graph.packed), {}.get)


def exported(store: GgufStore, out: Path, *, fuse: bool, last: bool = False) -> Session:
    """The file's graph, every matrix multiplied exactly, on the CPU provider."""
    target = target_named("cpu", None, None)
    made = skeleton.make_skeleton(store, target, {} if fuse else {"fuse_qkv": "false"}, out)
    if fuse:
        passes.join_gate_and_up(made.model, frozenset(f"model.layers.{layer}.mlp" for layer in range(2)))
    fill.fill(made.model, store, plan_inventory(store.inventory, target=target, accuracy_level=0))
    add_offsets(made.model, store.inventory, store.offset_modules, store.offsets)
    if last:
        passes.keep_last_logits(made.model)
    writing.write(made.model, out / "model.onnx")
    return Session(out)


@pytest.mark.parametrize(
    ("kind", "fuse", "tied"), [(Kind.Q4_1, True, False), (Kind.Q4_1, False, True), (None, False, True)]
)
def test_an_exported_file_computes_what_transformers_does(tmp_path: Path, kind: Any, fuse: bool, tied: bool) -> None:
    path = write(tmp_path / "model.gguf", random_model(tied=tied), mixed if kind is None else always(kind))
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids = np.random.default_rng(1).integers(3, 359, (1, 20))
    expected = tiny.logits(model, ids)
    exact = exported(opened(path, carry_offsets=True), tmp_path / "exact", fuse=fuse).logits(ids, 12)
    np.testing.assert_allclose(exact, expected, atol=2e-4 * np.abs(expected).max())
    rounded = exported(opened(path), tmp_path / "rounded", fuse=fuse).logits(ids, 12)
    assert np.abs(rounded - expected).max() > 50 * np.abs(exact - expected).max()


def test_only_the_last_logits(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", random_model(tied=False), always(Kind.Q4_1))
    store = opened(path, carry_offsets=True)
    ids = np.random.default_rng(1).integers(3, 359, (1, 9))
    whole = exported(store, tmp_path / "all", fuse=True).logits(ids)
    last = exported(store, tmp_path / "last", fuse=True, last=True).logits(ids)
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-5)
