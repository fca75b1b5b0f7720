"""Frames timed in the plain runtime: made-up inputs, counting of work, sizes that a graph was not written for."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nodes
from rlkit.export.reshape import reshaped
from rlkit.runtime import framebench
from rlkit.runtime.framebench import Job, answer, count, counted, open_frame, time_frames

F = TensorProto.FLOAT


@pytest.fixture(scope="module")
def conv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x (N, 3, H, W) through 8 filters of 3 x 3; H and W fixed at 8."""
    weight = np.full((8, 3, 3, 3), 0.1, np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    path = tmp_path_factory.mktemp("onnx") / "conv.onnx"
    return nodes.save(path, [node], {"w": weight}, {"x": (F, ["batch", 3, 8, 8])})


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x (rows, 16) times (16, 4), scaled by a whole number."""
    weight = np.ones((16, 4), np.float32)
    made = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Cast", ["by"], ["b"], to=F),
        helper.make_node("Mul", ["p", "b"], ["y"]),
    ]
    inputs = {"x": (F, ["rows", 16]), "by": (TensorProto.INT64, [])}
    return nodes.save(tmp_path_factory.mktemp("onnx") / "product.onnx", made, {"w": weight}, inputs)


def test_a_convolution_is_counted_by_hand(conv: Path) -> None:
    """8 x 8 x 8 outputs of 27 multiply-adds; 3 x 64 inputs and 8 x 64 outputs move; 216 weights."""
    found = count(conv, {}, {})
    assert (found.flops, found.weights, found.moved, found.uncounted) == (2 * 512 * 27, 216, 192 + 512, ())
    assert count(conv, {"x": (2, 3, 8, 8)}, {}).flops == 2 * found.flops


def test_a_product_is_counted_by_hand(product: Path) -> None:
    found = count(product, {"x": (5, 16)}, {"by": 3})
    assert (found.flops, found.weights, found.moved) == (2 * 5 * 16 * 4, 64, 5 * 16 + 5 * 4)


def test_recurrent_and_unknown_operators() -> None:
    def node(op: str, *shapes: list[int]) -> dict[str, Any]:
        *ins, out = shapes
        return {
            "op_name": op,
            "input_type_shape": [{"float": one} for one in ins],
            "output_type_shape": [{"float": out}],
        }

    gru = node("GRU", [5, 1, 4], [1, 9, 4], [1, 9, 3], [5, 1, 1, 3])
    found = counted([gru, node("Einsum", [2, 2], [2, 2], [2, 2]), node("Relu", [3], [3]), {"op_name": "fence"}])
    assert found.flops == 2 * 5 * (36 + 27) and found.weights == 63
    assert (found.operators, found.uncounted) == (3, ("Einsum",))
    up = counted([node("ConvTranspose", [1, 8, 4, 4], [8, 2, 2, 2], [1, 2, 8, 8])])
    assert up.flops == 2 * 128 * 8  # each of 128 inputs meets 2 x 2 x 2 weights


def test_values_and_noise_are_fed(product: Path) -> None:
    frame = open_frame(product, values={"by": 3}, shapes={"x": (2, 16)})
    assert frame.feeds["by"] == 3 and frame.feeds["x"].shape == (2, 16)
    again = open_frame(product, values={"by": 3}, shapes={"x": (2, 16)})
    assert np.array_equal(frame.feeds["x"], again.feeds["x"])  # the same noise every time
    assert open_frame(product).feeds["by"] == 0


def test_other_sizes_than_the_graph_was_written_for(conv: Path) -> None:
    assert count(conv, {"x": (1, 3, 16, 8)}, {}).flops == 2 * 1024 * 27
    made = onnx.load_from_string(reshaped(conv.read_bytes(), {"x": (1, 3, 4, 4)}))
    sizes = [dim.dim_value for dim in made.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [1, 3, 4, 4]
    with pytest.raises(ValueError, match="no input 'z'; it has x"):
        reshaped(conv, {"z": (1,)})


def test_frames_are_timed_until_the_clock_says_so(conv: Path) -> None:
    times = iter(range(100))
    taken = time_frames(open_frame(conv), 20.0, clock=lambda: float(next(times)))
    assert taken == (1.0,) * 8  # five without asking, then three readings of the clock for each


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shapes": {"z": (1,)}}, "has no input 'z'; it has x"),
        ({"values": {"z": 1}}, "has no input 'z'; it has x"),
        ({"shapes": {"x": (1, 3)}}, "input x has 4 sizes, not 2"),
        ({"provider": "cuda"}, "here has no cuda"),
        ({"provider": "abacus"}, "here has no abacus"),
    ],
)
def test_what_does_not_fit_is_said(conv: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_frame(conv, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"bad\.onnx cannot be opened by onnxruntime"):
        open_frame(tmp_path / "bad.onnx")
    with pytest.raises(FileNotFoundError, match="no file"):
        open_frame(tmp_path / "none.onnx")
    node = helper.make_node("Relu", ["x"], ["y"])
    path = nodes.save(tmp_path / "open.onnx", [node], {}, {"x": (F, ["n", "length"])})
    with pytest.raises(ValueError, match=r"open sizes \(1,\?\); give them as --shape x="):
        open_frame(path)


def test_an_answer_is_one_line_of_json(
    conv: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = answer(Job(str(conv), seconds=0.0, count=True))
    assert len(found.seconds) == framebench.FEWEST and found.work is not None and found.load_seconds > 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"model": "none.onnx"})))
    framebench.serve(lambda job: answer(Job(**job)))
    assert json.loads(capfd.readouterr().out)["error"].startswith("no file none.onnx")
