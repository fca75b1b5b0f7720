"""Real depth data: the Motorcycle pair that the package fetches, and folders of KITTI, SceneFlow and DIODE.

    KITTI 2015   training/{image_2, image_3, disp_occ_0 or disp_noc_0}/000000_10.png, 16-bit disparity
    KITTI 2012   training/{colored_0, colored_1, disp_occ or disp_noc}/000000_10.png
    SceneFlow    [monkaa_]frames_cleanpass/**/{left, right}/0001.png, [monkaa_]disparity/**/left/0001.pfm
    DIODE        [val/][indoors/]scene_*/scan_*/NAME.png, NAME_depth.npy (H, W, 1), NAME_depth_mask.npy (H, W)

`find` lists a folder's samples without reading them, `load` reads one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path

import numpy as np

from rlkit.recover import assets
from rlkit.recover.depthfiles import read_image, read_kitti, read_npy, read_npz, read_pfm
from rlkit.recover.depthsample import Camera, DepthSample, StereoSample, known
from rlkit.recover.progress import Tell, silent
from rlkit.recover.rectified import need_rectified

MOTORCYCLE = "motorcycle"
MEMBERS = {part: f"skimage/data/motorcycle_{part}" for part in ("left.png", "right.png", "disp.npz")}
# Middlebury 2014 at a quarter of its size, as scikit-image 0.17.2 states it (skimage.data.stereo_motorcycle). Its
# sentence on the direction is the wrong way round: left column x is right column x - disparity.
MOTORCYCLE_CAMERA = Camera(focal_px=994.978, baseline_m=0.193001, offset_px=31.086)


class Layout(StrEnum):
    """How a data set's folder is laid out."""

    KITTI = "kitti"
    SCENEFLOW = "sceneflow"
    DIODE = "diode"


@dataclass(frozen=True, slots=True)
class StereoFiles:
    """Where a pair and its left disparity are."""

    layout: Layout
    left: Path
    right: Path
    disparity: Path


@dataclass(frozen=True, slots=True)
class DepthFiles:
    """Where an image, its depth and its mask are."""

    layout: Layout
    image: Path
    depth: Path
    mask: Path


Files = StereoFiles | DepthFiles


def motorcycle(tell: Tell = silent) -> StereoSample:
    """The Motorcycle pair (500, 741, 3), fetched at the first call; 7 % of its disparities are not known."""
    wheel = assets.fetch(MOTORCYCLE, tell)
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(MEMBERS["left.png"]) as left, archive.open(MEMBERS["right.png"]) as right:
            images = read_image(left, MEMBERS["left.png"]), read_image(right, MEMBERS["right.png"])
        with archive.open(MEMBERS["disp.npz"]) as file:
            disparity, valid = known(read_npz(file, MEMBERS["disp.npz"]))
    return StereoSample(MOTORCYCLE, *images, disparity, valid, None, MOTORCYCLE_CAMERA)


def find(folder: Path) -> list[Files]:
    """Every sample of a folder, in the order of the names.

    Raises FileNotFoundError without such a folder, ValueError if it is laid out as none of the data sets, or a file
    that belongs to a sample is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give the folder of a data set")
    folder = folder.absolute()  # so that it has a parent
    for finder in FINDERS.values():
        if found := finder(folder):
            return found
    layouts = "KITTI (training/image_2 ...), SceneFlow (frames_cleanpass ...) or DIODE (scene_*/scan_* ...)"
    raise ValueError(f"{folder} is laid out as none of {layouts}; see rlkit.recover.depthdata for the folders expected")


def load(files: Files) -> StereoSample | DepthSample:
    """Read one sample; ValueError in one line if its files are damaged, differ in size or hold no truth."""
    if isinstance(files, DepthFiles):
        depth, mask = read_npy(files.depth), read_npy(files.mask)
        values, valid = known(depth.squeeze(-1) if depth.ndim == 3 and depth.shape[-1] == 1 else depth)
        if mask.shape != values.shape:
            raise ValueError(f"{files.mask} has shape {mask.shape}, the depth {values.shape}; fetch both files again")
        return DepthSample(str(files.image), read_image(files.image), np.where(mask > 0, values, 0), valid & (mask > 0))
    left, right = read_image(files.left), read_image(files.right)
    disparity, valid = known(READERS[files.layout](files.disparity))
    sample = StereoSample(str(files.left), left, right, disparity, valid)
    need_rectified(sample.name, left, right)
    return sample


def samples(folder: Path, limit: int | None = None) -> Iterator[StereoSample | DepthSample]:
    """Read a folder's samples one after the other, the first `limit` of them."""
    return map(load, islice(find(folder), limit))


def _kitti(folder: Path) -> list[Files]:
    for base in (folder / "training", folder):
        for left, right, truths in KITTI_FOLDERS:
            if not ((base / left).is_dir() and (base / right).is_dir()):
                continue
            truth = next((base / name for name in truths if (base / name).is_dir()), None)
            if truth is None:
                expected = " or ".join(truths)
                raise ValueError(f"{base} has no disparity ({expected}); KITTI's testing part has none, use training")
            frames = sorted((base / left).glob("*_10.png"))  # _11 is the frame after it, without a truth
            return [_stereo(Layout.KITTI, path, base / right / path.name, truth / path.name) for path in frames]
    return []


KITTI_FOLDERS = (
    ("image_2", "image_3", ("disp_occ_0", "disp_noc_0")),
    ("colored_0", "colored_1", ("disp_occ", "disp_noc")),
    ("image_0", "image_1", ("disp_occ", "disp_noc")),
)


def _sceneflow(folder: Path) -> list[Files]:
    found: list[Files] = []
    for around in (folder.parent, folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())):
        for images in sorted(around.glob("*frames_*pass")):
            if around == folder.parent and images != folder:
                continue
            kind = "cleanpass" if images.name.endswith("cleanpass") else "finalpass"
            names = (images.name.replace(f"frames_{kind}", "disparity"), images.name.replace(kind, "disparity"))
            truth = next((images.with_name(name) for name in names if images.with_name(name).is_dir()), None)
            if truth is None:
                raise ValueError(f"{images} has no disparity beside it; expected the folder {names[0]} or {names[1]}")
            for left in sorted(images.glob("**/left/*.png")):
                right = left.parent.with_name("right") / left.name
                disparity = (truth / left.relative_to(images)).with_suffix(".pfm")
                found.append(_stereo(Layout.SCENEFLOW, left, right, disparity))
    return found


def _diode(folder: Path) -> list[Files]:
    found: list[Files] = []
    for pattern in ("*.png", "scan_*/*.png", *("*/" * above + "scene_*/scan_*/*.png" for above in range(3))):
        for image in sorted(folder.glob(pattern)):
            depth, mask = (image.with_name(f"{image.stem}_{part}.npy") for part in ("depth", "depth_mask"))
            if pattern == "*.png" and not depth.is_file():
                continue  # a folder of pictures, not a scan
            for path in (depth, mask):
                if not path.is_file():
                    raise ValueError(f"{image} has no {path.name} beside it; every image of DIODE needs depth and mask")
            found.append(DepthFiles(Layout.DIODE, image, depth, mask))
    return found


def _stereo(layout: Layout, left: Path, right: Path, disparity: Path) -> StereoFiles:
    for what, path in (("right image", right), ("disparity", disparity)):
        if not path.is_file():
            raise ValueError(f"{left} has no {what}: there is no {path}; complete the data set or remove the image")
    return StereoFiles(layout, left, right, disparity)


FINDERS: dict[Layout, Callable[[Path], list[Files]]] = {
    Layout.KITTI: _kitti,
    Layout.SCENEFLOW: _sceneflow,
    Layout.DIODE: _diode,
}
READERS = {Layout.KITTI: read_kitti, Layout.SCENEFLOW: read_pfm}
