"""What depth networks are shown while they learn: samples by number, cut to one size, varied, as tensors.

Step `s` of a seed shows the same whenever it is asked for, so a training that goes on after an interruption sees what
it would have seen. Variation: a place for the cut, mirror images (of a single image only: a mirrored pair would be a
pair for the other eye), gain and gamma of the colours, which a pair has in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover import depthdata, scenes
from rlkit.recover.depthfile import Kind
from rlkit.recover.depthsample import DepthSample, Image, LogScale, Map, Mask, StereoSample, planes
from rlkit.recover.scenes import View

GAIN, GAMMA = 0.2, 0.25  # colours ** (1 +- GAMMA) * (1 +- GAIN)
KEPT = 64  # samples of a folder that stay in memory

Sample = DepthSample | StereoSample


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Samples by number, 0 to count - 1; `identity` says which, for the key of a training."""

    kind: Kind
    count: int
    identity: Any
    get: Callable[[int], Sample]

    def first(self, count: int) -> list[Sample]:
        """The first so many, or all of fewer."""
        return [self.get(index) for index in range(min(self.count, count))]


@dataclass(frozen=True, slots=True)
class Cut:
    """How samples become a batch: how many, height and width, and the seed of their order and variation."""

    batch: int
    size: tuple[int, int]
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Images (B, 3, H, W) in 0..1, the right ones of pairs; truth (B, 1, H, W): disparity, or depth on a LogScale."""

    images: tuple[torch.Tensor, ...]
    truth: torch.Tensor
    valid: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        images = tuple(each.to(device) for each in self.images)
        return Batch(images, self.truth.to(device), self.valid.to(device))


def of_scenes(kind: Kind, view: View, seed: int, count: int) -> Samples:
    """Rendered when first asked for, then kept."""
    render = scenes.depth if kind is Kind.MONO else scenes.stereo

    @lru_cache(count)
    def get(index: int) -> Sample:
        return _first(render(seed, index, 1, view))

    return Samples(kind, count, ["scenes", seed, count, repr(view)], get)


def of_folder(kind: Kind, folder: Path, limit: int | None = None) -> Samples:
    """A data set's folder, read when asked for; ValueError if its samples are of the other kind."""
    files = depthdata.find(folder)[:limit]
    first = depthdata.load(files[0])
    if kind is Kind.STEREO and not isinstance(first, StereoSample):
        raise ValueError(f"{folder} has single images, and a stereo network needs pairs; use KITTI or SceneFlow")
    if kind is Kind.MONO and not isinstance(first, DepthSample):
        raise ValueError(f"{folder} has pairs without depth in metres; use DIODE for networks that see one image")

    @lru_cache(KEPT)
    def get(index: int) -> Sample:
        return depthdata.load(files[index])

    return Samples(kind, len(files), ["folder", [str(each) for each in files]], get)


def _first(sample: Sample) -> Sample:
    """The only one of a batch of one."""
    if isinstance(sample, DepthSample):
        return DepthSample(sample.name, sample.image[0], sample.depth[0], sample.valid[0])
    occluded = None if sample.occluded is None else sample.occluded[0]
    parts = (sample.left[0], sample.right[0], sample.disparity[0], sample.valid[0])
    return StereoSample(sample.name, *parts, occluded, sample.camera)


def numbers(cut: Cut, step: int, count: int) -> list[int]:
    """Which samples a step shows: every epoch has all of them, in an order of its own."""
    wanted = range(step * cut.batch, (step + 1) * cut.batch)
    orders = {at // count: np.random.default_rng((cut.seed, at // count)).permutation(count) for at in wanted}
    return [int(orders[at // count][at % count]) for at in wanted]


def batch(samples: Samples, cut: Cut, step: int, scale: LogScale | None = None) -> Batch:
    """The batch of a step, counted from 0; mono truths need the scale. ValueError for images smaller than the cut."""
    rng = np.random.default_rng((cut.seed, step, 1))
    shown = [_cut(samples.get(index), cut.size, rng) for index in numbers(cut, step, samples.count)]
    images = tuple(torch.from_numpy(np.stack(each)) for each in zip(*(images for images, *_ in shown), strict=True))
    truth = np.stack([values for _, values, _ in shown])[:, None]
    valid = np.stack([known for _, _, known in shown])[:, None]
    truth = np.where(valid, truth, np.float32(0))  # what is not known may be NaN, which gradients would spread
    truth = truth if scale is None else scale.encode(truth)
    return Batch(images, torch.from_numpy(np.ascontiguousarray(truth)), torch.from_numpy(np.ascontiguousarray(valid)))


Shown = tuple[list[Map], Map, Mask]


def _cut(sample: Sample, size: tuple[int, int], rng: np.random.Generator) -> Shown:
    """One sample: its images as planes, truth and mask, cut and varied."""
    mono = isinstance(sample, DepthSample)
    images, truth = _parts(sample)
    factor = min(truth.shape[0] // size[0], truth.shape[1] // size[1])
    if factor < 1:
        given = f"{truth.shape[1]}x{truth.shape[0]}"
        raise ValueError(f"{sample.name}: {given} is smaller than the cut of {size[1]}x{size[0]}; use a smaller --size")
    if not mono:
        factor = 1  # disparities are learned at the size that they are asked for at
    top, left = (int(rng.integers(have - factor * want + 1)) for have, want in zip(truth.shape, size, strict=True))
    window = (slice(top, top + factor * size[0]), slice(left, left + factor * size[1]))
    middles = (slice(factor // 2, None, factor),) * 2
    flip = -1 if mono and rng.random() < 0.5 else 1
    gamma, gain = 1 + GAMMA * rng.uniform(-1, 1), 1 + GAIN * rng.uniform(-1, 1)
    vary = [_varied(_shrunk(planes(image[window]), factor), gamma, gain)[..., ::flip] for image in images]
    return vary, truth[window][middles][:, ::flip], sample.valid[window][middles][:, ::flip]


def _parts(sample: Sample) -> tuple[list[Image], Map]:
    if isinstance(sample, DepthSample):
        return [sample.image], sample.depth
    return [sample.left, sample.right], sample.disparity


def _shrunk(values: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Means of blocks of planes (3, H, W)."""
    if factor == 1:
        return values
    _, height, width = values.shape
    blocks = values.reshape(3, height // factor, factor, width // factor, factor)
    means: NDArray[np.float32] = blocks.mean((2, 4), dtype=np.float32)
    return means


def _varied(values: NDArray[np.float32], gamma: float, gain: float) -> NDArray[np.float32]:
    varied: NDArray[np.float32] = (values ** np.float32(gamma) * np.float32(gain)).clip(0, 1)
    return varied
