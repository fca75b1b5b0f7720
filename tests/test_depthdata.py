"""Depth data: small folders laid out as KITTI, SceneFlow and DIODE, the Motorcycle pair, damaged and wrong files."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import wheels
from rlkit.recover import assets, depthdata, depthfiles, rectified, scenes
from rlkit.recover.depthdata import Layout
from rlkit.recover.depthsample import Camera, DepthSample, LogScale, StereoSample, known, pad, planes, shrink

HEIGHT, WIDTH = 48, 64
SCENE = scenes.stereo(2, 0, 1, scenes.View(HEIGHT, WIDTH, max_disparity=16.0))
LEFT, RIGHT, DISPARITY = SCENE.left[0], SCENE.right[0], SCENE.disparity[0]


def png(path: Path, values: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def pfm(path: Path, values: NDArray[Any], order: str = "<") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"Pf\n{values.shape[1]} {values.shape[0]}\n{'-1.0' if order == '<' else '1.0'}\n"
    path.write_bytes(header.encode() + values[::-1].astype(f"{order}f4").tobytes())


def kitti(folder: Path, names: tuple[str, str, str] = ("image_2", "image_3", "disp_occ_0")) -> Path:
    for frame in ("000000_10.png", "000001_10.png"):
        png(folder / "training" / names[0] / frame, LEFT)
        png(folder / "training" / names[1] / frame, RIGHT)
        truth = np.rint(DISPARITY * 256).astype(np.uint16)
        truth[:5] = 0
        png(folder / "training" / names[2] / frame, truth)
    png(folder / "training" / names[0] / "000000_11.png", LEFT)  # the next frame, which has no truth
    return folder


def sceneflow(folder: Path, prefix: str = "", truth: str = "disparity") -> Path:
    images = folder / f"{prefix}frames_cleanpass"
    for part in ("TRAIN/A/0000", "TRAIN/B/0001"):
        png(images / part / "left" / "0006.png", LEFT)
        png(images / part / "right" / "0006.png", RIGHT)
        pfm(folder / f"{prefix}{truth}" / part / "left" / "0006.pfm", DISPARITY)
    return folder


def diode(folder: Path, above: str = "val/indoors/") -> Path:
    for scan in ("scene_00019/scan_00183", "scene_00020/scan_00184"):
        image = folder / above / scan / "00019_00183_indoors_000_010.png"
        png(image, LEFT)
        np.save(image.with_name(f"{image.stem}_depth.npy"), (16 / DISPARITY)[..., None])
        mask = np.ones((HEIGHT, WIDTH))
        mask[:, :10] = 0
        np.save(image.with_name(f"{image.stem}_depth_mask.npy"), mask)
    return folder


def only(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


@pytest.mark.parametrize(
    "names",
    [("image_2", "image_3", "disp_occ_0"), ("colored_0", "colored_1", "disp_noc"), ("image_0", "image_1", "disp_occ")],
)
def test_kitti(tmp_path: Path, names: tuple[str, str, str]) -> None:
    files = depthdata.find(kitti(tmp_path, names))
    assert len(files) == 2 and depthdata.find(tmp_path / "training") == files
    sample = depthdata.load(files[1])
    assert isinstance(sample, StereoSample) and files[1].layout is Layout.KITTI
    np.testing.assert_array_equal(sample.left, LEFT)
    np.testing.assert_array_equal(sample.right, RIGHT)
    np.testing.assert_allclose(sample.disparity[5:], DISPARITY[5:], atol=1 / 512)
    assert not sample.valid[:5].any() and sample.valid[5:].all()


@pytest.mark.parametrize(("prefix", "truth"), [("", "disparity"), ("monkaa_", "disparity"), ("", "frames_disparity")])
def test_sceneflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, truth: str) -> None:
    folder = sceneflow(tmp_path / "monkaa", prefix, truth)
    files = depthdata.find(folder)
    assert len(files) == 2 and depthdata.find(folder / f"{prefix}frames_cleanpass") == files
    assert depthdata.find(tmp_path) == files  # of several parts side by side
    monkeypatch.chdir(folder)
    assert depthdata.find(Path()) == files
    sample = depthdata.load(files[0])
    assert isinstance(sample, StereoSample)
    np.testing.assert_array_equal(sample.disparity, DISPARITY)


@pytest.mark.parametrize("above", ["val/indoors/", "indoors/", ""])
def test_diode(tmp_path: Path, above: str) -> None:
    files = depthdata.find(diode(tmp_path, above))
    assert len(files) == 2
    assert depthdata.find(only(tmp_path, "scan_00183")) == files[:1]
    sample = next(depthdata.samples(tmp_path, 1))
    assert isinstance(sample, DepthSample)
    np.testing.assert_allclose(sample.depth[:, 10:], (16 / DISPARITY)[:, 10:])
    assert not sample.valid[:, :10].any() and sample.valid[:, 10:].all()


def damage_pfm(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def damage_header(path: Path) -> None:
    path.write_bytes(b"PF\n3 3\n-1.0\n" + bytes(108))


def colour_truth(path: Path) -> None:
    png(path, LEFT)


def smaller(path: Path) -> None:
    png(path, LEFT[:-8])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def all_zero(path: Path) -> None:
    png(path, np.zeros((HEIGHT, WIDTH), np.uint16))


def all_nan(path: Path) -> None:
    pfm(path, np.full((HEIGHT, WIDTH), np.nan))


def pickled(path: Path) -> None:
    np.save(path, np.array([print], object), allow_pickle=True)


def wrong_mask(path: Path) -> None:
    np.save(path, np.ones((3, 3)))


def lower(path: Path) -> None:
    """Rows five further down, as of a camera that was not rectified."""
    png(path, np.roll(np.asarray(Image.open(path)), 5, 0))


BAD: list[tuple[Callable[[Path], Path], str, Callable[[Path], None], str]] = [
    (kitti, "image_3/*_10.png", Path.unlink, r"has no right image: there is no .*image_3"),
    (kitti, "disp_occ_0/000001_10.png", Path.unlink, r"has no disparity: there is no .*000001_10\.png"),
    (kitti, "image_3/*_10.png", smaller, "the left image is 64x48, the right one 64x40; give a rectified pair"),
    (kitti, "disp_occ_0/*_10.png", smaller, "cannot be read as disparity of 16 bits: its mode is RGB"),
    (kitti, "disp_occ_0/*_10.png", all_zero, "no pixel has a finite disparity above 0"),
    (kitti, "image_2/*_10.png", cut, "cannot be read as image: .*; fetch the file again"),
    (kitti, "image_3/*_10.png", lower, "the pair is not rectified, .* points are about 5 rows away"),
    (sceneflow, "*.pfm", damage_pfm, "12280 bytes do not hold 64x48 values"),
    (sceneflow, "*.pfm", damage_header, "it does not begin with Pf, a size and a scale"),
    (sceneflow, "*.pfm", all_nan, "no pixel has a finite disparity above 0"),
    (sceneflow, "*.pfm", Path.unlink, "has no disparity"),
    (diode, "*_depth.npy", Path.unlink, r"has no .*_depth\.npy beside it"),
    (diode, "*_depth.npy", pickled, "cannot be read as NumPy array: .*allow_pickle"),
    (diode, "*_depth_mask.npy", wrong_mask, r"has shape \(3, 3\), the depth \(48, 64\)"),
    (diode, "*_depth.npy", cut, "cannot be read as NumPy array"),
]


@pytest.mark.parametrize(("make", "pattern", "damage", "words"), BAD)
def test_bad_files_are_named_in_one_line(
    tmp_path: Path,
    make: Callable[[Path], Path],
    pattern: str,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    make(tmp_path)
    damage(only(tmp_path, pattern))
    with pytest.raises(ValueError, match=words) as caught:
        list(depthdata.samples(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_no_data_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        depthdata.find(tmp_path / "none")
    png(tmp_path / "holiday.png", LEFT)
    with pytest.raises(ValueError, match="is laid out as none of KITTI"):
        depthdata.find(tmp_path)
    for name in ("image_2", "image_3"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        ValueError, match=r"has no disparity \(disp_occ_0 or disp_noc_0\); KITTI's testing part has none"
    ):
        depthdata.find(tmp_path)


def test_frames_without_a_disparity_folder(tmp_path: Path) -> None:
    png(tmp_path / "frames_cleanpass" / "a" / "left" / "1.png", LEFT)
    with pytest.raises(ValueError, match="frames_cleanpass has no disparity beside it"):
        depthdata.find(tmp_path)


def test_pfm_of_either_byte_order_and_grey_pictures(tmp_path: Path) -> None:
    for order in "<>":
        pfm(tmp_path / "a.pfm", DISPARITY, order)
        np.testing.assert_array_equal(depthfiles.read_pfm(tmp_path / "a.pfm"), DISPARITY)
    png(tmp_path / "a.png", LEFT[..., 0])
    np.testing.assert_array_equal(depthfiles.read_image(tmp_path / "a.png"), np.repeat(LEFT[..., :1], 3, 2))
    with pytest.raises(ValueError, match=r"there is no image .*none\.png"):
        depthfiles.read_image(tmp_path / "none.png")
    (tmp_path / "huge.pfm").write_bytes(b"Pf\n999999 999999\n-1.0\n" + struct.pack("<f", 1))
    with pytest.raises(ValueError, match="do not hold 999999x999999"):
        depthfiles.read_pfm(tmp_path / "huge.pfm")


def motorcycle_wheel(disparity: NDArray[Any]) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for part, image in (("left", LEFT), ("right", RIGHT)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        members[depthdata.MEMBERS[f"{part}.png"]] = file.getvalue()
    file = io.BytesIO()
    np.savez(file, arr_0=disparity)
    return {**members, depthdata.MEMBERS["disp.npz"]: file.getvalue()}


def test_motorcycle_is_read_from_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = assets.find(depthdata.MOTORCYCLE)
    assert asset.wheel == "scikit-image==0.17.2" and asset.python and asset.platform
    truth = DISPARITY.copy()
    truth[3, 4], truth[5, 6], truth[7, 8] = np.inf, np.nan, -np.inf
    name, version = asset.wheel.replace("-", "_").split("==")
    content = motorcycle_wheel(truth)
    wheel = wheels.build(tmp_path, content, name=name, version=version, tag=f"cp38-cp38-{asset.platform}").read_bytes()
    fitting = dataclasses.replace(asset, sha256=hashlib.sha256(wheel).hexdigest(), stored_nbytes=len(wheel))
    wheels.only(monkeypatch, tmp_path, tmp_path / "cache")
    monkeypatch.setitem(assets.registry(), asset.name, fitting)
    sample = depthdata.motorcycle()
    np.testing.assert_array_equal(sample.left, LEFT)
    assert sample.valid.sum() == HEIGHT * WIDTH - 3 and not sample.valid[3, 4]
    assert np.isfinite(sample.disparity).all() and sample.disparity[5, 6] == 0
    depth = sample.depth()
    np.testing.assert_allclose(depth.depth[0, 0], 994.978 * 0.193001 / (DISPARITY[0, 0] + 31.086), rtol=1e-6)
    np.testing.assert_array_equal(depth.valid, sample.valid)


def test_an_archive_with_pickles_is_refused() -> None:
    file = io.BytesIO()
    np.savez(file, arr_0=np.array([pickle.dumps], object))
    file.seek(0)
    with pytest.raises(ValueError, match=r"disp\.npz cannot be read as NumPy archive: .*allow_pickle"):
        depthfiles.read_npz(file, "disp.npz")


def test_turned_cameras_are_noticed_and_good_pairs_are_not() -> None:
    pairs = scenes.stereo(4, 0, 6, scenes.View(192, 256, max_disparity=40.0))
    for left, right in zip(pairs.left, pairs.right, strict=True):
        rectified.need_rectified("good", left, right)
    noticed = 0
    for left, right in zip(pairs.left, pairs.right, strict=True):
        turned = np.asarray(Image.fromarray(right).rotate(3))
        try:
            rectified.need_rectified("turned", left, turned)
        except ValueError:
            noticed += 1
    assert noticed >= 5
    flat = np.full_like(pairs.left[0], 90)
    rectified.need_rectified("flat", flat, flat)  # nothing to judge by
    rectified.need_rectified("tiny", flat[:8, :8], flat[:8, :8])


def test_unknown_truth_is_masked_and_a_sample_is_checked() -> None:
    truth, valid = known(np.array([[1.5, np.nan, np.inf, 0, -2]]))
    np.testing.assert_array_equal(truth, [[1.5, 0, 0, 0, 0]])
    np.testing.assert_array_equal(valid, [[True, False, False, False, False]])
    image = np.zeros((1, 5, 3), np.uint8)
    with pytest.raises(ValueError, match="depth of 4x1 for an image of 5x1"):
        DepthSample("it", image, truth[:, :4], valid[:, :4])
    with pytest.raises(ValueError, match="is float64 of shape"):
        DepthSample("it", image.astype(float), truth, valid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="marked as valid is not finite"):
        DepthSample("it", image, truth, np.ones_like(valid))
    with pytest.raises(ValueError, match="use a set that has both"):
        StereoSample("it", image, image, truth, valid).depth()
    assert np.isinf(Camera(10, 1, 2.0).depth(np.array([-2.0], np.float32)))[0]


def test_log_scale_there_and_back() -> None:
    scale = LogScale(0.5, 20)
    depth = np.array([0.5, 1, 5, 20], np.float32)
    values = scale.encode(depth)
    np.testing.assert_allclose(values[[0, -1]], [-0.9, 0.9])
    np.testing.assert_allclose(scale.decode(values), depth, rtol=1e-5)
    np.testing.assert_allclose(
        scale.decode(scale.encode(np.array([0, 0.1, 500], np.float32))), [0.5, 0.5, 20], rtol=1e-5
    )
    assert scale.span == pytest.approx(values[-1] - values[0])
    with pytest.raises(ValueError, match="use 0 < near < far"):
        LogScale(3, 2)


def test_planes_and_padding() -> None:
    values = planes(SCENE.left)
    assert values.shape == (1, 3, HEIGHT, WIDTH) and values.dtype == np.float32
    np.testing.assert_allclose(values[0, 1] * 255, LEFT[..., 1], atol=1e-4)
    padded = pad(LEFT[:-5, :-1], 16)
    assert padded.shape == (48, 64, 3)
    np.testing.assert_array_equal(padded[:-5, :-1], LEFT[:-5, :-1])
    np.testing.assert_array_equal(padded[-1, :-1], LEFT[-6, :-1])
    assert pad(SCENE.left, 16).shape == SCENE.left.shape
    with pytest.raises(ValueError, match="64x15 are smaller than the network's stride of 16"):
        pad(LEFT[:15], 16)


def test_a_smaller_pair_has_smaller_disparities_and_the_same_depth() -> None:
    small = shrink(SCENE, 2)
    assert small.left.shape == (1, 24, 32, 3) and small.occluded is not None and small.occluded.shape == (1, 24, 32)
    np.testing.assert_allclose(small.left[0, 3, 4], LEFT[6:8, 8:10].mean((0, 1)), atol=0.51)
    np.testing.assert_allclose(small.disparity[0], DISPARITY[1::2, 1::2] / 2)
    np.testing.assert_allclose(small.depth().depth[0], SCENE.depth().depth[0, 1::2, 1::2], rtol=1e-5)
    assert shrink(SCENE, 5).left.shape == (1, 9, 12, 3)
    with pytest.raises(ValueError, match="cannot be shrunk by 100"):
        shrink(SCENE, 100)
