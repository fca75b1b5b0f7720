"""The depth networks of the table of model sizes are those of rlkit, and their scenario runs on a device."""

from __future__ import annotations

import pytest

from rlkit.export.vision import to_onnx
from rlkit.profiles.scheduling import modelsizes
from rlkit.recover.anynet import AnyNet
from rlkit.recover.depthfile import Description, Kind
from rlkit.recover.depthnets import FULL, REDUCED, DepthNet
from rlkit.recover.depthsample import LogScale
from rlkit.runtime.framebench import count


@pytest.mark.parametrize(("name", "shape"), [("depthnet", FULL), ("depthnet-reduced", REDUCED), ("anynet", None)])
def test_sizes_are_counted_in_the_exported_graph(name: str, shape: object) -> None:
    """At a quarter of both sides, times 16: convolutions go by pixels alone, and the loop has none."""
    size = modelsizes.built_in().models[name]
    network = AnyNet() if shape is None else DepthNet(shape)  # type: ignore[arg-type]
    kind, scale = (Kind.STEREO, None) if shape is None else (Kind.MONO, LogScale())
    (_batch, _channels, height, width), *_ = size.inputs.values()
    small = height // 4, width // 4
    made = to_onnx(network, Description(kind, network.shape.to_json(), small, scale), size=small)
    found = count(made, {}, {})
    assert size.flops == pytest.approx(16 * found.flops, rel=1e-9)
    assert size.weights == pytest.approx(found.weights)
    assert size.moved == pytest.approx(16 * found.moved, rel=1e-9)
    assert set(size.inputs) == ({"left", "right"} if shape is None else {"image"})
