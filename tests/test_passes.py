"""Changes to the graph: the last token's logits, gate and up as one product; and the file of a graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import tiny
from rlkit.export import passes, write
from rlkit.export.build import export_bundle
from rlkit.recover import recipe
from rlkit.recover.progress import Progress

W2 = recipe.parse('[[rule]]\nmatch = ["*.gate_proj", "*.up_proj"]\nbits = 2\ngroup = 64\n[[rule]]\nbits = 4\n')
IDS = np.random.default_rng(3).integers(3, tiny.VOCAB, (2, 24))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("passes")
    return tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", W2)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return export_bundle(checkpoint, checkpoint.parent / "bundle", accuracy_level=0)


def run(file: Path, ids: np.ndarray = IDS) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    past = np.zeros((len(ids), 2, 0, 32), np.float32)
    feeds = {value.name: known.get(value.name, past) for value in session.get_inputs()}
    return np.asarray(session.run(["logits"], feeds)[0])


def test_the_last_logits_are_the_last_of_all(bundle: Path) -> None:
    every, last = run(bundle / "logits.onnx"), run(bundle / "model.onnx")
    assert every.shape == (2, 24, tiny.VOCAB) and last.shape == (2, 1, tiny.VOCAB)
    np.testing.assert_allclose(last[:, 0], every[:, -1], rtol=0, atol=1e-5)


def test_both_graphs_read_one_data_file(bundle: Path) -> None:
    assert (bundle / "logits.onnx").stat().st_size < (bundle / "model.onnx.data").stat().st_size
    for name in ("model.onnx", "logits.onnx"):
        found = onnx.load(bundle / name, load_external_data=False).graph.initializer
        places = {entry.value for value in found for entry in value.external_data if entry.key == "location"}
        assert places == {"model.onnx.data"}


def test_all_logits_need_one_graph(checkpoint: Path, tmp_path: Path) -> None:
    out = export_bundle(checkpoint, tmp_path / "b", accuracy_level=0, logits="all")
    assert not (out / "logits.onnx").exists()
    assert run(out / "model.onnx").shape == (2, 24, tiny.VOCAB)
    assert json.loads((out / "rlkit.json").read_text())["logits"] == "all"


def test_gate_and_up_as_one_product_compute_the_same(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    apart = export_bundle(checkpoint, tmp_path / "b", accuracy_level=0, fuse=False)
    joined = export_bundle(checkpoint, tmp_path / "c", accuracy_level=0, fuse=True)
    nodes = {node.name for node in onnx.load(joined / "model.onnx", load_external_data=False).graph.node}
    assert "/model/layers.1/mlp/gate_up_proj/MatMulNBits" in nodes
    assert not any("gate_proj" in name for name in nodes)
    np.testing.assert_allclose(run(joined / "logits.onnx"), run(apart / "logits.onnx"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rules",
    [
        '[[rule]]\nmatch = "*.gate_proj"\nbits = 2\ngroup = 64\n[[rule]]\nbits = 4\n',
        '[[rule]]\nmatch = ["*.gate_proj", "*.up_proj"]\nbits = 2\ngroup = 64\nadapter_rank = 32\n[[rule]]\nbits = 4\n',
    ],
    ids=["two widths", "adapters"],
)
def test_what_differs_stays_apart(rules: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tiny.llama(tmp_path / "hf"), tmp_path / "ckpt", recipe.parse(rules))
    out = export_bundle(folder, tmp_path / "b", accuracy_level=0, fuse=True)
    nodes = {node.name for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node}
    assert "/model/layers.1/mlp/gate_proj/MatMulNBits" in nodes
    expected = tiny.logits(tiny.dequantized(folder), IDS)
    assert np.abs(run(out / "logits.onnx") - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_graph_without_head_has_no_last_logits() -> None:
    with pytest.raises(ValueError, match="has no lm_head"):
        passes.keep_last_logits(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10))


def lazy(name: str, load: Callable[[], np.ndarray], like: np.ndarray) -> ir.Value:
    kind = ir.DataType.from_numpy(like.dtype)
    tensor = ir.LazyTensor(lambda: ir.tensor(load(), name=name), dtype=kind, shape=ir.Shape(like.shape), name=name)
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(like.shape), const_value=tensor)


def test_constants_are_loaded_one_by_one_in_the_order_of_use(tmp_path: Path) -> None:
    arrays = {f"w{index}": np.full((600, 600), float(index), np.float32) for index in range(3)}
    order: list[str] = []

    def loader(name: str) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            order.append(name)
            return arrays[name]

        return load

    values = {name: lazy(name, loader(name), array) for name, array in arrays.items()}
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 600]))
    nodes, last = [], x
    for name in ("w2", "w0", "w1"):
        nodes.append(ir.node("MatMul", [last, values[name]], name=name))
        last = nodes[-1].outputs[0]
    last.name, last.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [last], nodes=nodes, initializers=list(values.values()), opset_imports={"": 20}, name="g")
    events: list[Progress] = []
    write.write(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", tell=events.append)
    assert order == ["w2", "w0", "w1"]
    assert events[-1].done == events[-1].total
    stored = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    offsets = {v.name: int(e.value) for v in stored for e in v.external_data if e.key == "offset"}
    assert offsets["w2"] < offsets["w0"] < offsets["w1"] and not any(value % write.PAGE for value in offsets.values())
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((1, 600), np.float32)})[0].max() == 0.0  # through w0
