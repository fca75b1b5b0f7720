"""Pictures with known depth or disparity, one or a batch: what scenes and data sets give, networks and metrics take.

A truth that is not known (NaN, infinite, not above 0) is not valid, and 0 where a number must stand. Disparity is in
pixels of the left image: what is at column x there is at x - disparity in the right one.

    depth in metres = focal_px * baseline_m / (disparity + offset_px)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""(..., H, W, 3) RGB."""

Map = NDArray[np.float32]
"""(..., H, W): metres, or pixels of disparity."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Camera:
    """A rectified pair of cameras; `offset_px` is the difference of their principal points' columns."""

    focal_px: float
    baseline_m: float
    offset_px: float = 0.0

    def depth(self, disparity: Map) -> Map:
        """Metres, infinite where the disparity plus offset is not above 0."""
        total = np.asarray(disparity, np.float32) + np.float32(self.offset_px)
        scale = np.float32(self.focal_px * self.baseline_m)
        metres: Map = np.divide(scale, total, out=np.full_like(total, np.inf), where=total > 0)
        return metres


def _size(image: NDArray[Any]) -> str:
    return f"{image.shape[-2]}x{image.shape[-3]}"


def _need_images(name: str, **images: Image) -> None:
    for which, image in images.items():
        if image.ndim < 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            given = f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"{name}: the {which} image is {given}; give RGB bytes of shape (..., height, width, 3)")


def _need_truth(name: str, what: str, image: Image, values: Map, valid: Mask) -> None:
    if values.shape != image.shape[:-1] or valid.shape != values.shape:
        there = "x".join(map(str, reversed(values.shape[-2:])))
        raise ValueError(f"{name}: {what} of {there} for an image of {_size(image)}; give a value per pixel")
    if not valid.any():
        raise ValueError(f"{name}: no pixel has a finite {what} above 0; give a truth that knows some")
    known = values[valid]
    if not np.isfinite(known).all() or known.min() <= 0:
        raise ValueError(f"{name}: {what} marked as valid is not finite and above 0; build the mask with `known`")


@dataclass(frozen=True, slots=True, eq=False)
class DepthSample:
    """An image and the depth of its pixels in metres, or a batch of them."""

    name: str
    image: Image  # (..., H, W, 3)
    depth: Map  # (..., H, W)
    valid: Mask  # (..., H, W)

    def __post_init__(self) -> None:
        _need_images(self.name, camera=self.image)
        _need_truth(self.name, "depth", self.image, self.depth, self.valid)


@dataclass(frozen=True, slots=True, eq=False)
class StereoSample:
    """A rectified pair and the disparity of the left image's pixels, or a batch of them.

    `occluded`, where it is known: left pixels whose point the right camera does not see. Their disparity is valid.
    """

    name: str
    left: Image  # (..., H, W, 3)
    right: Image  # (..., H, W, 3)
    disparity: Map  # (..., H, W)
    valid: Mask  # (..., H, W)
    occluded: Mask | None = None  # (..., H, W)
    camera: Camera | None = None

    def __post_init__(self) -> None:
        _need_images(self.name, left=self.left, right=self.right)
        if self.left.shape != self.right.shape:
            sizes = f"the left image is {_size(self.left)}, the right one {_size(self.right)}"
            raise ValueError(f"{self.name}: {sizes}; give a rectified pair of one size")
        _need_truth(self.name, "disparity", self.left, self.disparity, self.valid)

    def depth(self) -> DepthSample:
        """The left image with its depth; ValueError if the cameras are not known."""
        if self.camera is None:
            why = "disparity gives no depth without focal length and baseline"
            raise ValueError(f"{self.name}: {why}; use a set that has both")
        depth, valid = known(np.where(self.valid, self.camera.depth(self.disparity), np.nan))
        return DepthSample(self.name, self.left, depth, valid)


def known(values: NDArray[Any]) -> tuple[Map, Mask]:
    """A truth as float32, 0 where it is not known, and where it is known: finite and above 0."""
    given = np.asarray(values, np.float32)
    valid = np.isfinite(given) & (given > 0)
    return np.where(valid, given, np.float32(0)), valid


@dataclass(frozen=True, slots=True)
class LogScale:
    """Depth in metres <-> what a network with a tanh says: log depth, `near` at -REACH and `far` at REACH."""

    near: float = 0.5
    far: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far < np.inf:
            raise ValueError(f"depths from {self.near} to {self.far} m are no range; use 0 < near < far")

    @property
    def span(self) -> float:
        """From the smallest to the largest encoded value: the data range of SSIM."""
        return 2 * REACH

    def encode(self, depth: Map) -> Map:
        """Values in -REACH..REACH; depths outside the range, and 0 for unknown, count as its ends."""
        share = np.log(np.clip(depth, self.near, self.far) / self.near) / np.log(self.far / self.near)
        values: Map = (REACH * (2 * share - 1)).astype(np.float32)
        return values

    def decode(self, values: Map) -> Map:
        """Metres; values outside -REACH..REACH count as its ends."""
        share = np.clip((np.asarray(values, np.float64) / REACH + 1) / 2, 0, 1)
        return (self.near * (self.far / self.near) ** share).astype(np.float32)


REACH = 0.9  # a tanh gets here without saturating


def planes(images: Image) -> Map:
    """RGB bytes (..., H, W, 3) -> what the networks take, float32 (..., 3, H, W) in 0..1."""
    return np.ascontiguousarray(np.moveaxis(images, -1, -3), np.float32) / np.float32(255)


def pad(images: Image, stride: int) -> Image:
    """Repeat the last row and column until both sizes are multiples of `stride`; cut results to the old size.

    Raises ValueError if the images are smaller than the stride.
    """
    height, width = images.shape[-3:-1]
    if min(height, width) < stride:
        small = f"images of {_size(images)} are smaller than the network's stride of {stride}"
        raise ValueError(f"{small}; use larger ones")
    added = [(0, 0)] * (images.ndim - 3) + [(0, -height % stride), (0, -width % stride), (0, 0)]
    return np.pad(images, added, mode="edge")


def shrink(sample: StereoSample, factor: int) -> StereoSample:
    """The pair at 1/factor of its size: images by the mean of blocks, truth by the pixel in each block's middle.

    What a factor does not divide is cut off at the right and the bottom. ValueError if nothing is left.
    """
    height, width = (size // factor for size in sample.disparity.shape[-2:])
    if factor < 1 or not height or not width:
        raise ValueError(f"{sample.name}: {_size(sample.left)} cannot be shrunk by {factor}; use a smaller one, from 1")

    def blocks(image: Image) -> Image:
        cut = image[..., : height * factor, : width * factor, :]
        parts = cut.reshape(*cut.shape[:-3], height, factor, width, factor, 3)
        means: Image = np.rint(parts.mean((-4, -2), dtype=np.float32)).astype(np.uint8)
        return means

    middle = slice(factor // 2, None, factor)
    at = (..., middle, middle)

    def of(values: NDArray[Any]) -> NDArray[Any]:
        return values[at][..., :height, :width]

    camera = sample.camera and Camera(
        sample.camera.focal_px / factor, sample.camera.baseline_m, sample.camera.offset_px / factor
    )
    return StereoSample(
        sample.name,
        blocks(sample.left),
        blocks(sample.right),
        (of(sample.disparity) / factor).astype(np.float32),
        of(sample.valid),
        None if sample.occluded is None else of(sample.occluded),
        camera,
    )
