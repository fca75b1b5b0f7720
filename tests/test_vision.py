"""Depth networks as ONNX files: what they say is what torch says, at one size and at any, and where that ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from rlkit.export import vision
from rlkit.export.visiongraph import ends
from rlkit.recover import depthfile
from rlkit.recover.anynet import AnyNet, AnyShape, UpTo
from rlkit.recover.depthfile import Description, Kind
from rlkit.recover.depthnets import DepthNet, DepthShape
from rlkit.recover.depthsample import DepthSample, LogScale, StereoSample
from rlkit.recover.propagate import unrolled
from rlkit.runtime import visionquant
from rlkit.runtime.visionquant import quantize_static
from rlkit.runtime.visionrun import open_depth

NEAR = (
    1e-4  # of the largest value of torch's answer: disparities are tens of pixels, where 1e-4 px is float32's last bit
)
WIDTHS = (4, 8, 12)


def settled(network: Any, images: int) -> Any:
    """The network after it has seen some noise, so that its batch norms are of use, and its gates are open."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(3):
            network.train()(*(torch.rand(2, 3, 32, 48) for _ in range(images)))
        for parameter in network.refine.parameters() if getattr(network, "refine", None) else ():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mono, stereo and plain (a stereo network without propagation)."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("networks")
    mono = settled(DepthNet(DepthShape.of(*WIDTHS)), 1)
    about = Description(Kind.MONO, mono.shape.to_json(), (32, 48), LogScale(), {"steps": 3})
    depthfile.save(root / "mono", mono, about)
    for name, spn in (("stereo", 2), ("plain", 0)):
        stereo = settled(AnyNet(AnyShape(spn=spn)), 2)
        depthfile.save(root / name, stereo, Description(Kind.STEREO, stereo.shape.to_json(), (32, 48)))
    return root


@pytest.fixture(scope="module")
def files(folders: Path) -> dict[str, Path]:
    """Each network for any size, and the mono and stereo ones for 32 x 48."""
    made = {name: vision.export_depth(folders / name, folders / f"{name}.onnx") for name in ("mono", "stereo", "plain")}
    for name in ("mono", "stereo"):
        made[f"{name}-fixed"] = vision.export_depth(folders / name, folders / f"{name}-fixed.onnx", size=(32, 48))
    return made


def compare(file: Path | bytes, network: Any, *shapes: tuple[int, int, int]) -> None:
    """The file's answers are torch's, and no more nor less than torch's shape."""
    session = ort.InferenceSession(file if isinstance(file, bytes) else str(file))
    torch.manual_seed(2)
    for batch, height, width in shapes:
        given = {value.name: torch.rand(batch, 3, height, width) for value in session.get_inputs()}
        with torch.no_grad():
            wanted = network(*given.values())
        wanted = (wanted[-1] if isinstance(wanted, tuple) else wanted).numpy()
        (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
        assert found.shape == wanted.shape == (batch, 1, height, width)
        assert np.abs(found - wanted).max() <= NEAR * np.abs(wanted).max()
        assert np.ptp(wanted) > 20 * NEAR * np.abs(wanted).max()  # an answer that could be wrong


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mono", [(1, 32, 48), (2, 64, 20), (1, 4, 4)]),
        ("stereo", [(1, 32, 48), (2, 48, 80), (1, 16, 16)]),
        ("plain", [(1, 32, 48), (2, 48, 80)]),
        ("mono-fixed", [(1, 32, 48)]),
        ("stereo-fixed", [(1, 32, 48)]),
    ],
)
def test_an_onnx_file_says_what_torch_says(
    folders: Path, files: dict[str, Path], name: str, shapes: list[tuple[int, int, int]]
) -> None:
    network, _ = depthfile.load(folders / name.removesuffix("-fixed"))
    compare(files[name], network, *shapes)


def test_a_loop_written_out_says_the_same_and_has_no_loop(folders: Path, files: dict[str, Path]) -> None:
    network, about = depthfile.load(folders / "stereo")
    made = vision.to_onnx(network, about, size=(32, 48), unroll=True)
    compare(made, network, (1, 32, 48))
    kinds = {node.op_type for node in onnx.load_from_string(made).graph.node}
    looped = {node.op_type for node in onnx.load(files["stereo"]).graph.node}
    assert "Scan" in looped and not kinds & {"Scan", "Loop", "If"}
    assert network.refine is not None and network.refine.propagate is unrolled  # what export changes it puts back


def test_every_stage_is_a_file_of_its_own(folders: Path) -> None:
    network, about = depthfile.load(folders / "stereo")
    sizes = []
    for stage in (1, 3):
        made = vision.to_onnx(network, about, stage=stage)
        compare(made, UpTo(network, stage), (1, 32, 48), (2, 48, 64))
        sizes.append(len(made))
    assert sizes[0] < sizes[1] < len(vision.to_onnx(network, about))


def test_equal_networks_give_equal_bytes(folders: Path, files: dict[str, Path]) -> None:
    network, about = depthfile.load(folders / "mono")
    assert vision.to_onnx(network, about) == files["mono"].read_bytes()


def test_what_cannot_be_exported_is_said(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"

    def refused(why: str, name: str = "mono", **how: Any) -> None:
        with pytest.raises(ValueError, match=why):
            vision.export_depth(folders / name, out, **how)
        assert not out.exists()

    refused("46x32 .* stride of 4; use multiples", size=(32, 46))
    refused("8x8 .* stride of 16", "stereo", size=(8, 8))
    refused("only networks of pairs have stages", stage=1)
    refused("stage 5 is none", "stereo", stage=5)
    refused("stage 4 is none", "plain", stage=4)
    refused("unknown length cannot be unrolled", "stereo", unroll=True)
    with pytest.raises(FileNotFoundError, match=r"no network\.json"):
        vision.export_depth(tmp_path, out)


# --- running them ---------------------------------------------------------------------------------------------------


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


def test_any_size_is_padded_and_cut(folders: Path, files: dict[str, Path]) -> None:
    image = noise(30, 45, 3)
    depth = open_depth(files["mono"])(image)
    assert depth.shape == (30, 45) and depth.dtype == np.float32
    assert 0.5 <= depth.min() < depth.max() <= 20  # metres of the scale
    padded = np.pad(image, [(0, 2), (0, 3), (0, 0)], mode="edge")
    network, about = depthfile.load(folders / "mono")
    with torch.no_grad():
        said = network(torch.from_numpy(padded).permute(2, 0, 1)[None] / 255)[0, 0, :30, :45].numpy()
    assert about.scale is not None
    np.testing.assert_allclose(depth, about.scale.decode(said), rtol=1e-4)
    pair = noise(2, 2, 30, 45, 3)
    run = open_depth(files["stereo"])
    assert run(*pair).shape == (2, 30, 45)
    np.testing.assert_allclose(run(*pair)[1], run(pair[0, 1], pair[1, 1]), rtol=1e-4, atol=1e-4)


def test_wrong_images_are_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    stereo, fixed = open_depth(files["stereo"]), open_depth(files["mono-fixed"])
    assert fixed(noise(31, 46, 3)).shape == (31, 46)  # padded to what it takes
    for run, images, why in (
        (stereo, [noise(32, 48, 3)], "1 images for a network of left and right"),
        (stereo, [noise(32, 48, 3), noise(32, 64, 3)], "48x32 and 64x32 are no rectified pair"),
        (stereo, [noise(8, 8, 3)] * 2, "8x8 are smaller than the network's stride of 16"),
        (fixed, [noise(64, 96, 3)], "96x64 for a file of 48x32"),
    ):
        with pytest.raises(ValueError, match=why):
            run(*images)
    plain = onnx.load(files["mono"])
    for value, why in ((None, "does not say what it estimates"), ("{}", "is damaged")):
        del plain.metadata_props[:]
        if value is not None:
            plain.metadata_props.append(onnx.StringStringEntryProto(key=vision.META, value=value))
        onnx.save(plain, tmp_path / "plain.onnx")
        with pytest.raises(ValueError, match=why):
            open_depth(tmp_path / "plain.onnx")
    (tmp_path / "none.onnx").write_bytes(b"none")
    with pytest.raises(ValueError, match="cannot be opened"):
        open_depth(tmp_path / "none.onnx")
    with pytest.raises(FileNotFoundError, match=r"no file .*gone"):
        open_depth(tmp_path / "gone.onnx")


# --- int8 -----------------------------------------------------------------------------------------------------------


def samples(kind: Kind) -> Iterator[DepthSample | StereoSample]:
    rng = np.random.default_rng(4)
    for index in range(3):
        first, second = rng.integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
        truth, valid = np.ones((32, 48), np.float32), np.ones((32, 48), bool)
        pair = StereoSample(str(index), first, second, truth, valid)
        yield pair if kind is Kind.STEREO else DepthSample(str(index), first, truth, valid)


@pytest.fixture(scope="module")
def int8(files: dict[str, Path]) -> dict[Kind, tuple[Path, visionquant.Quantized]]:
    """Both networks in int8, and how that went."""
    made = {}
    for kind in Kind:
        out = files[str(kind)].with_suffix(".int8.onnx")
        made[kind] = out, quantize_static(files[str(kind)], out, samples(kind))
    return made


@pytest.mark.parametrize("kind", list(Kind))
def test_int8_answers_nearly_alike(
    files: dict[str, Path], int8: dict[Kind, tuple[Path, visionquant.Quantized]], kind: Kind
) -> None:
    out, found = int8[kind]
    assert (found.float_nbytes, found.nbytes) == (files[str(kind)].stat().st_size, out.stat().st_size)
    assert found.chosen == min(found.trials, key=lambda trial: trial.error)
    assert {(trial.method, trial.keep) for trial in found.trials} == {
        (method, keep) for method in ("minmax", "percentile") for keep in visionquant.KEEPS
    }
    floats, integers = open_depth(files[str(kind)]), open_depth(out)
    one = next(samples(kind))
    (wanted,), (got,) = (run.session.run(None, run.feeds_of(one)) for run in (floats, integers))
    assert 0 < np.sqrt(np.mean((got - wanted) ** 2)) < 0.5 * wanted.std()
    assert integers.facts.description == floats.facts.description  # the file still says what it is


def test_int8_weights_are_per_channel_and_ends_stay_float(
    files: dict[str, Path], int8: dict[Kind, tuple[Path, visionquant.Quantized]]
) -> None:
    first, last = ends(files["mono"])
    assert len(first) == len(last) == 1 and "down" in first[0] and "head" in last[0]
    (ends_kept,) = {trial.kept for trial in int8[Kind.MONO][1].trials if trial.keep == "ends"}
    assert ends_kept == (*first, *last)
    out = files["mono"].with_name("ends.onnx")
    quantize_static(files["mono"], out, samples(Kind.MONO), methods=("minmax",), keeps=("ends",))
    model = onnx.load(out)
    constants = {each.name: each for each in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    floats = [node.name for node in convolutions if node.input[1] in constants]
    assert sorted(floats) == sorted(ends_kept)
    for node in convolutions:
        if node.name not in floats:
            weight, scale, _zero = made[node.input[1]].input
            assert constants[weight].data_type == onnx.TensorProto.INT8
            assert list(constants[scale].dims) == [constants[weight].dims[0]]


def test_what_cannot_be_quantized_is_said(
    files: dict[str, Path], int8: dict[Kind, tuple[Path, visionquant.Quantized]], tmp_path: Path
) -> None:
    out = tmp_path / "x.onnx"
    for model, given, options, why in (
        (files["mono"], [], {}, "0 samples to calibrate on"),
        (files["mono"], list(samples(Kind.MONO)) * 6, {}, "18 samples to calibrate on; give 1 to 16"),
        (files["mono"], list(samples(Kind.MONO)), {"methods": ("best",)}, "method best is not known"),
        (files["mono"], list(samples(Kind.MONO)), {"keeps": ()}, "keep of no name"),
        (int8[Kind.MONO][0], list(samples(Kind.MONO)), {}, "is quantized already"),
        (files["mono"], list(samples(Kind.STEREO)), {}, "2 images for a network of image"),
    ):
        with pytest.raises(ValueError, match=why):
            quantize_static(model, out, given, **options)
    assert not out.exists()


def test_the_metadata_is_plain(files: dict[str, Path]) -> None:
    (prop,) = onnx.load(files["stereo"]).metadata_props
    facts = json.loads(prop.value)
    assert (prop.key, facts["kind"], facts["stride"], facts["stage"]) == (vision.META, "stereo", 16, None)
