"""Training with simulated int8: the runtime's own rounding, gradients that pass, and networks that get better at it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import compute_scale_zp

from rlkit.export.vision import to_onnx
from rlkit.recover import depthbatches, depthfile, depthloss, depthtrain, int8aware
from rlkit.recover.depthbatches import Samples
from rlkit.recover.depthfile import Description, Kind
from rlkit.recover.depthnets import DepthNet, DepthShape
from rlkit.recover.depthsample import LogScale
from rlkit.recover.depthtrain import Lesson, Training
from rlkit.recover.scenes import View
from rlkit.runtime.visionquant import quantize_static

SHAPE = DepthShape.of(4, 6)
PLAN = Training(80, 4, (16, 32), 1e-3, warmup=2, lesson=Lesson.TEACHER, save_every=60)
ABOUT = Description(Kind.MONO, SHAPE.to_json(), (16, 32), LogScale())


def through_onnx(values: NDArray[np.float32], scale: Any, zero: NDArray[Any]) -> NDArray[np.float32]:
    """QuantizeLinear and DequantizeLinear of the runtime, per output channel where the scale is a vector."""
    constants = [
        numpy_helper.from_array(np.asarray(scale, np.float32), "s"),
        numpy_helper.from_array(np.asarray(zero), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape) for name in "xy"]
    graph = helper.make_graph(nodes, "qdq", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found: NDArray[np.float32] = ort.InferenceSession(model.SerializeToString()).run(None, {"x": values})[0]
    return found


@pytest.mark.parametrize("spread", [(-1.7, 3.1), (0.2, 5.0), (-4.0, -0.5)])
def test_what_is_read_is_rounded_as_the_runtime_does(spread: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(*spread, (2, 3, 20, 25)).astype(np.float32)
    low, high = np.float32(min(values.min(), 0)), np.float32(max(values.max(), 0))
    zero, scale = compute_scale_zp(low, high, *np.array([0, 255], np.uint8))
    ties = (np.arange(255, dtype=np.float32) - np.float32(zero) + np.float32(0.5)) * np.float32(scale)
    values.reshape(-1)[: len(ties)] = ties.clip(low, high)
    wanted = through_onnx(values, scale, np.array(zero, np.uint8))
    found = int8aware.rounded_read(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(found)) > 100 and np.abs(found - values).max() <= 0.5001 * scale


def test_weights_are_rounded_as_the_runtime_s_quantizer_does() -> None:
    weight = np.random.default_rng(1).normal(0, 1, (5, 3, 3, 3)).astype(np.float32)
    weight *= np.array([1, 10, 0.1, 0, 3], np.float32).reshape(-1, 1, 1, 1)
    most = np.abs(weight).max((1, 2, 3))
    pairs = [compute_scale_zp(-each, each, *np.array([-127, 127], np.int8), symmetric=True) for each in most]
    assert all(zero == 0 for zero, _ in pairs)
    scales = np.array([scale for _, scale in pairs], np.float32)
    found = int8aware.rounded_weight(torch.from_numpy(weight)).numpy()
    np.testing.assert_array_equal(found, through_onnx(weight, scales, np.zeros(5, np.int8)))
    assert (found[3] == 0).all() and (np.abs(found).max((1, 2, 3)) == most).all()


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    for rounded in (int8aware.rounded_read, int8aware.rounded_weight):
        values = torch.randn(3, 2, 3, 3, requires_grad=True)
        slopes = torch.randn(3, 2, 3, 3)
        (rounded(values) * slopes).sum().backward()
        assert values.grad is not None and torch.equal(values.grad, slopes)
    nothing = torch.zeros(2, 3, 4, 4)
    assert torch.equal(int8aware.rounded_read(nothing), nothing)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return depthbatches.of_scenes(Kind.MONO, View(16, 32, max_disparity=12.0), 0, 8)


@pytest.fixture(scope="module")
def lopsided(samples: Samples) -> dict[str, torch.Tensor]:
    """A trained network in which one channel is 60 times the others, which one scale for all of them cannot bear.

    A leaky ReLU takes a positive factor through, so that the float network says what it said.
    """
    network = depthfile.build(ABOUT)
    list(depthtrain.train(network, samples, replace(PLAN, steps=30, rate=1e-2, lesson=Lesson.TRUTH)))
    assert isinstance(network, DepthNet)
    image = torch.rand(1, 3, 16, 32)
    with torch.no_grad():
        before = network(image)
        level: Any = network.up[0]
        channel = int(network.head.weight[0, :, 0, 0].abs().argmin())
        for each in (level.norm_b.weight, level.norm_b.bias):
            each[channel] *= 60
        network.head.weight[:, channel] /= 60
        torch.testing.assert_close(network(image), before, rtol=1e-4, atol=1e-4)
    return {name: value.clone() for name, value in network.state_dict().items()}


def made(values: dict[str, torch.Tensor]) -> Any:
    network = depthfile.build(ABOUT)
    network.load_state_dict(values)
    return network.eval()


def test_simulation_lasts_as_long_as_it_is_asked_for(lopsided: dict[str, torch.Tensor]) -> None:
    network, image = made(lopsided), torch.rand(2, 3, 16, 32)
    with torch.no_grad():
        plain = network(image)
        with int8aware.simulated(network):
            assert list(network.state_dict()) == list(lopsided)
            rounded = network(image)
        assert torch.equal(network(image), plain)
    assert float((rounded - plain).abs().mean()) > 1e-3
    with pytest.raises(RuntimeError, match="spoiled"), int8aware.simulated(network):
        raise RuntimeError("spoiled")
    assert all("forward" not in vars(module) for module in network.modules())


def off(values: dict[str, torch.Tensor], teacher: Any, samples: Samples, folder: Path) -> tuple[float, float]:
    """Loss towards the teacher with simulated int8, and how far the runtime's int8 file is from it, as RMS."""
    network = made(values)
    image = torch.cat([depthbatches.batch(samples, PLAN.cut, step).images[0] for step in range(2)])
    with torch.no_grad():
        wanted = teacher(image)
        with int8aware.simulated(network):
            said = network(image)
    loss = float(depthloss.mono(said, wanted, torch.ones_like(wanted, dtype=torch.bool)))
    floats = folder / "float.onnx"
    floats.write_bytes(to_onnx(network, ABOUT))
    shown = [samples.get(index) for index in range(4)]
    quantize_static(floats, folder / "int8.onnx", shown, methods=("minmax",), keeps=("none",))
    (found,) = ort.InferenceSession(str(folder / "int8.onnx")).run(None, {"image": image.numpy()})
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(folder / "int8.onnx").graph.node}
    return loss, float(np.sqrt(np.mean((found - wanted.numpy()) ** 2)))


def test_a_network_that_int8_hurts_recovers_part_of_it_and_goes_on_after_an_interruption(
    lopsided: dict[str, torch.Tensor], samples: Samples, tmp_path: Path
) -> None:
    teacher, network = made(lopsided), made(lopsided)
    losses = [step.loss for step in int8aware.recover(network, samples, PLAN)]
    assert len(losses) == PLAN.steps and not network.training
    assert all("forward" not in vars(module) for module in network.modules())
    learned = network.state_dict()
    before, after = (off(values, teacher, samples, tmp_path) for values in (lopsided, learned))
    assert after[0] < 0.8 * before[0] and after[1] < 0.85 * before[1]

    state = tmp_path / "state"
    cut = made(lopsided)
    steps = int8aware.recover(cut, samples, PLAN, state=state)
    for _ in range(65):
        next(steps)
    steps.close()
    assert not cut.training and all("forward" not in vars(module) for module in cut.modules())
    again = made(lopsided)
    assert [step.index for step in int8aware.recover(again, samples, PLAN, state=state)] == list(range(61, 81))
    assert all(torch.equal(value, learned[name]) for name, value in again.state_dict().items())


def test_only_the_teacher_is_asked(lopsided: dict[str, torch.Tensor], samples: Samples) -> None:
    with pytest.raises(ValueError, match="lesson both has a truth in it"):
        int8aware.recover(made(lopsided), samples, replace(PLAN, lesson=Lesson.BOTH))
