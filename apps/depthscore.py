"""Depth networks held against truth: held-out data, baselines on the same data, scores, pictures.

Held out are scenes of a seed that no training uses, the Motorcycle pair, which is real, and a folder that a user
names. Predictions come as a function of images, whether torch or the runtime computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlkit.profiles import depthmetrics
from rlkit.profiles.depthmetrics import DepthScore, StereoScore
from rlkit.profiles.depthresult import LEADING, Data, Picture, Row, Score, Scored
from rlkit.recover import depthdata, scenes
from rlkit.recover.depthfile import Kind
from rlkit.recover.depthsample import DepthSample, Image, LogScale, Map, StereoSample, shrink
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.scenes import View

HELD_OUT_SEED = 2**31 - 1  # of scenes; trainings use smaller ones
SCENES, MOTORCYCLE = "scenes", "motorcycle"
CONSTANT, MATCHING = "constant", "semi-global matching"
LEARNED_FROM = 32  # training samples whose median is the constant

Sample = DepthSample | StereoSample
Predict = Callable[..., Sequence[Map]]
"""Images (B, H, W, 3), one or a left and a right one -> maps (B, H, W) of every stage, the answer last."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A data set in groups of one size: each a batch (B, H, W)."""

    data: Data
    groups: tuple[Sample, ...]


def held_scenes(kind: Kind, view: View, count: int) -> Held:
    """Scenes that no training sees."""
    render = scenes.depth if kind is Kind.MONO else scenes.stereo
    about = f"rendered rooms of {view.width}x{view.height}, seed {HELD_OUT_SEED}"
    return Held(Data(SCENES, about, count), (render(HELD_OUT_SEED, 0, count, view),))


def held_motorcycle(kind: Kind, width: int, tell: Tell = silent) -> Held:
    """The Motorcycle pair; for networks of one image shrunk to about their width, with the depth of its left image."""
    pair = depthdata.motorcycle(tell)
    if kind is Kind.STEREO:
        sample: Sample = pair
    else:
        sample = shrink(pair, max(1, round(pair.left.shape[1] / width))).depth()
    height, width = truth_of(sample).shape
    about = f"Middlebury 2014 Motorcycle, real, {width}x{height}, {share_known(sample):.0%} of the truth known"
    return Held(Data(MOTORCYCLE, about, 1), (_batched([sample]),))


def held_folder(kind: Kind, folder: Path, limit: int, size: tuple[int, int]) -> Held:
    """The first samples of a user's data set, in groups of one size; single images shrunk towards height and width."""
    found = [_fitted(sample, size) for sample in depthdata.samples(folder, limit)]
    wanted = DepthSample if kind is Kind.MONO else StereoSample
    if not all(isinstance(sample, wanted) for sample in found):
        needs = "single images with depth (DIODE)" if kind is Kind.MONO else "pairs (KITTI, SceneFlow)"
        raise ValueError(f"{folder} does not hold what {kind} networks are measured on; give a folder of {needs}")
    return Held(Data(folder.name, f"{folder}", len(found)), _grouped(found))


def held_samples(name: str, samples: Sequence[Sample], size: tuple[int, int]) -> Held:
    """Samples at hand, such as some that networks learned from; single images shrunk towards height and width."""
    data = Data(name, "samples at hand", len(samples), held_out=False)
    return Held(data, _grouped([_fitted(each, size) for each in samples]))


def _grouped(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(truth_of(sample).shape, []).append(sample)
    return tuple(_batched(each) for each in groups.values())


def _batched(samples: Sequence[Sample]) -> Sample:
    name, valid = samples[0].name, np.stack([each.valid for each in samples])
    truth = np.stack([truth_of(each) for each in samples])
    first, *rest = (np.stack(each) for each in zip(*map(images_of, samples), strict=True))
    return StereoSample(name, first, rest[0], truth, valid) if rest else DepthSample(name, first, truth, valid)


def _fitted(sample: Sample, size: tuple[int, int]) -> Sample:
    """Single images shrunk by whole numbers towards the size that networks learn at; pairs as they are."""
    if isinstance(sample, StereoSample):
        return sample
    factor = max(1, min(have // want for have, want in zip(sample.depth.shape, size, strict=True)))
    height, width = (have // factor for have in sample.depth.shape)
    middles = (slice(factor // 2, height * factor, factor), slice(factor // 2, width * factor, factor))
    blocks = sample.image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    image = np.rint(blocks.mean((1, 3), dtype=np.float32)).astype(np.uint8)
    return DepthSample(sample.name, image, sample.depth[middles], sample.valid[middles])


def images_of(sample: Sample) -> tuple[Image, ...]:
    """What a network is shown."""
    return (sample.image,) if isinstance(sample, DepthSample) else (sample.left, sample.right)


def truth_of(sample: Sample) -> Map:
    """Depth or disparity."""
    return sample.depth if isinstance(sample, DepthSample) else sample.disparity


def share_known(sample: Sample) -> float:
    """How much of the truth is known."""
    return float(sample.valid.mean())


def scores(held: Iterable[Held], predict: Predict, scale: LogScale | None) -> tuple[Scored, ...]:
    """The answer's scores on every data set, and those of earlier stages; `scale` for networks of one image."""
    found: list[Scored] = []
    for each in held:
        said = [predict(*images_of(group)) for group in each.groups]
        count = len(said[0])
        for stage in range(count):
            parts = [_score(maps[stage], group, scale) for maps, group in zip(said, each.groups, strict=True)]
            found.append(Scored(each.data.name, _pooled(parts), None if stage == count - 1 else stage + 1))
    return tuple(found)


def leading(kind: Kind, found: Iterable[Scored]) -> float | None:
    """The figure that leads among scores of one data set: SSIM, or the three-pixel error."""
    answer = next(each for each in found if each.stage is None)
    value = getattr(answer.score, LEADING[kind])
    return None if value is None else float(value)


def worse(kind: Kind, found: float | None, best: float | None) -> float | None:
    """How much worse one leading figure is: share of the SSIM, or three-pixel errors' difference; both in 0..1.

    None where one is not known, and for a share of an SSIM that is not above 0.
    """
    if found is None or best is None or (kind is Kind.MONO and best <= 0):
        return None
    return 1 - found / best if kind is Kind.MONO else found - best


def _score(predicted: Map, sample: Sample, scale: LogScale | None) -> Score:
    if scale is None:
        return depthmetrics.score_stereo(predicted, truth_of(sample), sample.valid)
    return depthmetrics.score_depth(predicted, truth_of(sample), sample.valid, scale)


def _pooled(parts: Sequence[Score]) -> Score:
    """One score of several groups of images, which count by their pixels."""
    if len(parts) == 1:
        return parts[0]
    pixels = sum(part.pixels for part in parts)

    def mean(name: str, power: int = 1) -> float:
        total = sum(part.pixels * getattr(part, name) ** power for part in parts)
        return float((total / pixels) ** (1 / power))

    if isinstance(parts[0], StereoScore):
        return StereoScore(mean("three_pixel"), mean("epe"), pixels)
    known = [part for part in parts if isinstance(part, DepthScore) and part.ssim is not None]
    similar = (
        sum(part.pixels * (part.ssim or 0) for part in known) / sum(part.pixels for part in known) if known else None
    )
    return DepthScore(mean("abs_rel"), mean("delta_1_25"), mean("rmse_m", 2), similar, pixels)


def constant(learned: Sequence[Sample]) -> Predict:
    """Says the median of some training truths everywhere."""
    value = np.float32(depthmetrics.constant([(truth_of(each), each.valid) for each in learned]))
    return lambda *images: [np.full(images[0].shape[:-1], value, np.float32)]


def matching(left: Image, right: Image) -> list[Map]:
    """Semi-global matching, pair by pair."""
    pairs = zip(left, right, strict=True)
    return [np.stack([depthmetrics.semi_global(*pair)[0] for pair in pairs])]


def baselines(
    held: Sequence[Held], learned: Sequence[Sample], scale: LogScale | None, tell: Tell = silent
) -> list[Row]:
    """What can be had without a network, on the same data."""
    known: dict[str, tuple[str, Predict]] = {CONSTANT: ("median of training truths, everywhere", constant(learned))}
    if scale is None:
        known[MATCHING] = ("OpenCV's StereoSGBM, gaps filled", matching)
    rows = []
    for index, (name, (how, predict)) in enumerate(known.items(), start=1):
        rows.append(Row(name, how, scores(held, predict, scale)))
        tell(Progress("baselines", index, len(known)))
    return rows


def pictures(held: Iterable[Held], predicts: Mapping[str, Predict]) -> tuple[Picture, ...]:
    """The first image of every data set, with what each of the named says of it."""
    found = []
    for each in held:
        group = each.groups[0]
        images = tuple(image[:1] for image in images_of(group))
        said = {name: np.asarray(predict(*images)[-1][0], np.float32) for name, predict in predicts.items()}
        found.append(Picture(each.data.name, images[0][0], truth_of(group)[0], group.valid[0], said))
    return tuple(found)
