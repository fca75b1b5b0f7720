"""Every family: the builder's graph without matrices, filled from the float model, computes what torch computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

import families
import tiny
from rlkit.export import fill, skeleton, write
from rlkit.export.plan import plan_inventory
from rlkit.export.store import open_store
from rlkit.export.targets import target_named
from rlkit.recover.architectures import SUPPORTED
from rlkit.recover.source import resolve

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (1, 40))
Where = tuple[str, str | None, str | None]
CPU: Where = ("cpu", None, None)
WEBGPU: Where = ("igpu", "webgpu", "float32")
DML: Where = ("igpu", "dml", None)


def export(folder: Path, out: Path, where: Where, **options: str) -> ir.Model:
    """The float model's graph, written to out / model.onnx."""
    store, target = open_store(resolve(folder)), target_named(*where)
    made = skeleton.make_skeleton(store, target, options, out)
    fill.fill(made.model, store, plan_inventory(store.inventory, target=target))
    write.write(made.model, out / "model.onnx")
    return made.model


class Session:
    """The written file on the CPU provider, fed by hand."""

    def __init__(self, out: Path) -> None:
        decoder = json.loads((out / "built" / "genai_config.json").read_text())["model"]["decoder"]
        self.cache = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
        self.session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])

    def logits(self, ids: NDArray[np.int64], *steps: int) -> NDArray[np.float32]:
        """Logits (1, T, V), computed in as many steps as there are positions to stop at, with the cache between."""
        past: dict[str, NDArray[Any]] = {}
        found = []
        for start, stop in zip((0, *steps), (*steps, ids.shape[1]), strict=True):
            feeds = {}
            for value in self.session.get_inputs():
                kind = np.float16 if value.type == "tensor(float16)" else np.float32
                known = {
                    "input_ids": ids[:, start:stop],
                    "attention_mask": np.ones((1, stop), np.int64),
                    "position_ids": np.arange(start, stop)[None],
                }
                feeds[value.name] = known.get(value.name, past.get(value.name, np.zeros(self.cache, kind)))
            names = [value.name for value in self.session.get_outputs()]
            results = dict(zip(names, self.session.run(names, feeds), strict=True))
            found.append(results.pop("logits").astype(np.float32))
            past = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        return np.concatenate(found, axis=1)


def reference(name: str, graph: ir.Model) -> Any:
    """The torch model; experts have the values that the graph's packed ones stand for."""
    model = families.model(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            part = parameter_name.replace(".mlp.", ".moe.")
            packed, scales = (graph.graph.initializers[f"{part}.{what}"] for what in ("qweight", "scales"))
            assert packed.const_value is not None and scales.const_value is not None
            pairs, steps = packed.const_value.numpy(), scales.const_value.numpy().astype(np.float32)
            codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*steps.shape, -1).astype(np.float32) - 8
            values = (codes * steps[..., None]).reshape(*steps.shape[:2], -1)  # (E, N, K)
            parameter.data.copy_(torch.from_numpy(values.swapaxes(1, 2)))
    return model


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_graph_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    graph = export(families.folder(name, tmp_path / "model"), tmp_path, CPU)
    expected = tiny.logits(reference(name, graph), IDS)
    session = Session(tmp_path)
    assert expected.std() > 0.3
    np.testing.assert_allclose(session.logits(IDS), expected, atol=1e-4)
    np.testing.assert_allclose(session.logits(IDS, 25, 39), expected, atol=1e-4)


def test_long_rope_beyond_the_first_table(tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, (1, 100))  # the original length is 64
    export(families.folder("phi3-long", tmp_path / "model"), tmp_path, CPU)
    expected = tiny.logits(families.model("phi3-long"), ids)
    np.testing.assert_allclose(Session(tmp_path).logits(ids), expected, atol=1e-4)


ON_GPU = [(where, name) for where in (WEBGPU, DML) for name in families.FAMILIES if (where, name) != (DML, "gpt-oss")]


@pytest.mark.parametrize(("where", "name"), ON_GPU, ids=[f"{where[1]}-{name}" for where, name in ON_GPU])
def test_graphs_for_gpus_compute_the_same(where: Where, name: str, tmp_path: Path) -> None:
    """On the CPU provider, which has no operator for a norm of heads inside attention; DirectML's graph is float16."""
    graph = export(families.folder(name, tmp_path / "model"), tmp_path, where, fuse_qk_norm_gqa="false")
    expected = tiny.logits(reference(name, graph), IDS)
    tolerance = 2e-2 if where == DML else 1e-4
    session = Session(tmp_path)
    np.testing.assert_allclose(session.logits(IDS), expected, atol=tolerance)
    np.testing.assert_allclose(session.logits(IDS, 25, 39), expected, atol=tolerance)


def test_every_family_is_tried() -> None:
    assert {type(families.model(name)).__name__ for name in families.FAMILIES} == set(SUPPORTED)
