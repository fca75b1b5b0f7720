"""AnyNet: disparity of a rectified pair in four stages, each of which can be the answer when time is up.

The network of Wang et al. (1810.11408) in the size 2206.09071 reduces. A small U-Net gives features at 1/16, 1/8 and
1/4 of the image. Stage 1 compares them at 1/16 under 12 disparities, smooths the costs with 3D convolutions and takes
the mean disparity under softmax(-cost). Stages 2 and 3 double the map, compare under a few disparities around it and
add a mean correction. Stage 4 propagates stage 3's map along gates read from the left image (propagate.py).

    SPN channels          8         4         2         1      none
    parameters       43,269    36,933    35,277    34,827    34,629
                               -14.6 %   -18.5 %   -19.5 %   -20.0 %

    features 1,983; 3D nets 28,674 + 1,986 + 1,986; SPN 126 C^2 + 72 C for C channels

No weight differs from the published code, but three things do. There a correction of +k goes by the cost of disparity
d - k; here by that of d + k. Stages hand over maps of their own resolution instead of the image's. Stage 4 begins as
stage 3's map smoothed along its gates, not as noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from rlkit.recover.depthnets import need_multiple
from rlkit.recover.propagate import Propagate, gates, unrolled

STRIDE = 16
STRIDES = (16, 8, 4)  # of the features that stages 1 to 3 compare
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in 0..1, as the published code uses them


@dataclass(frozen=True, slots=True)
class AnyShape:
    """The sizes of an AnyNet.

    spn: channels of the propagation, 0 = no stage 4. features: channels at full resolution, which double three times.
    blocks: convolutions per level. volume: widths of the hidden 3D layers of stages 1 to 3. disparities: of stage 1,
    tried at 1/16 of the image; of stages 2 and 3, n tries -n + 1 ... n - 1.
    """

    spn: int = 8
    features: int = 1
    blocks: int = 2
    volume: tuple[tuple[int, ...], ...] = ((16,) * 5, (4,) * 5, (4,) * 5)
    disparities: tuple[int, int, int] = (12, 3, 3)

    def __post_init__(self) -> None:
        sizes = [self.features, self.blocks, *self.disparities, *(width for widths in self.volume for width in widths)]
        if any(type(size) is not int or size < 1 for size in sizes) or type(self.spn) is not int or self.spn < 0:
            raise ValueError(f"{self} has a size that is no count; use whole numbers from 1, spn from 0")
        if len(self.volume) != 3 or not all(self.volume) or len(self.disparities) != 3:
            raise ValueError(f"{self} is no AnyNet; give volume (with a layer each) and disparities for three stages")

    @property
    def stages(self) -> int:
        """How many answers the network gives."""
        return 4 if self.spn else 3

    @property
    def max_disparity(self) -> int:
        """The largest disparity in pixels that stage 1 can say."""
        return STRIDE * (self.disparities[0] - 1)

    def to_json(self) -> dict[str, Any]:
        """As plain numbers and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Inverse of to_json; ValueError naming what is wrong."""
        try:
            lists = {"volume": tuple(tuple(widths) for widths in fields["volume"])}
            return cls(**{**fields, **lists, "disparities": tuple(fields["disparities"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{fields} describes no AnyNet ({error!r}); see AnyShape for the fields") from error


class Before2d(nn.Sequential):
    """Batch norm and ReLU before a 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        super().__init__(nn.BatchNorm2d(inputs), nn.ReLU(), conv)


class Before3d(nn.Sequential):
    """Batch norm and ReLU before a 3x3x3 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.BatchNorm3d(inputs), nn.ReLU(), nn.Conv3d(inputs, outputs, 3, 1, 1, bias=False))


def _level(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    rest = [Before2d(outputs, outputs) for _ in range(blocks - 1)]
    return nn.Sequential(nn.MaxPool2d(2), Before2d(inputs, outputs), *rest)


class Features(nn.Module):
    """Images (B, 3, H, W) -> features (B, 8F, H/16, W/16), (B, 4F, H/8, W/8), (B, 2F, H/4, W/4), when asked for."""

    def __init__(self, first: int, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, first, 3, 1, 1), Before2d(first, first, 2))
        self.down = nn.ModuleList(_level(first << i, first << (i + 1), blocks) for i in range(3))
        ups = (2 * first, first)
        self.up = nn.ModuleList(nn.Sequential(Before2d(6 * n, 2 * n), Before2d(2 * n, 2 * n)) for n in ups)

    def forward(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the coarsest first; what a later one needs is computed when it is taken."""
        values, levels = self.enter(images), []
        for level in self.down:
            values = level(values)
            levels.append(values)
        yield values
        for level, skip in zip(self.up, reversed(levels[:-1]), strict=True):
            doubled = functional.interpolate(values, scale_factor=2.0, mode="bilinear", align_corners=True)
            values = level(torch.cat([skip, doubled], 1))
            yield values


class Volume(nn.Sequential):
    """Costs (B, 1, D, H, W) -> smoothed costs of the same shape."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        ends = (1, *widths, 1)
        super().__init__(*(Before3d(before, after) for before, after in pairwise(ends)))


class Refine(nn.Module):
    """Stage 4: the left image and a disparity map, both at 1/4, -> the map with values moved along the gates."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (3, 2 * channels, 2 * channels, 2 * channels, 3 * channels)
        convs = [nn.Conv2d(a, b, 3, 1, 1, bias=False) for a, b in pairwise(widths)]
        self.guide = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.ReLU(), convs[3])
        self.spread = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.gather = nn.Conv2d(channels, 1, 3, 1, 1, bias=False)
        self.propagate: Propagate = unrolled

    def forward(self, image: torch.Tensor, disparity: torch.Tensor) -> torch.Tensor:
        refined: torch.Tensor = self.gather(self.propagate(self.spread(disparity), gates(self.guide(image))))
        return refined

    @torch.no_grad()
    def start(self) -> None:
        """Let it begin as the mean of its channels, each of them the map moved along its own gates."""
        for conv, share in ((self.spread, 1.0), (self.gather, 1 / self.spread.out_channels)):
            conv.weight.zero_()
            conv.weight[:, :, 1, 1] = share


def costs_from_zero(left: torch.Tensor, right: torch.Tensor, count: int) -> torch.Tensor:
    """L1 distance of features (B, C, H, W) under disparities 0 ... count - 1: (B, count, H, W); outside is 0."""
    width = left.shape[-1]
    padded = functional.pad(right, (count - 1, 0))
    shifted = torch.stack([padded[..., k : k + width] for k in range(count - 1, -1, -1)], 1)
    return (left.unsqueeze(1) - shifted).abs().sum(2)


def costs_around(left: torch.Tensor, right: torch.Tensor, disparity: torch.Tensor, reach: int) -> torch.Tensor:
    """L1 distance under disparity (B, 1, H, W) + k, k = -reach + 1 ... reach - 1: (B, 2 reach - 1, H, W).

    Right features at x - disparity - k are interpolated linearly between columns, 0 outside. All k share one fraction,
    so one gather of 2 * reach columns serves them.
    """
    batch, channels, height, width = left.shape
    at = torch.arange(width, device=left.device, dtype=left.dtype) - disparity  # (B, 1, H, W)
    floor = at.detach().floor()
    offsets = torch.arange(reach, -reach, -1, device=left.device, dtype=left.dtype).view(1, 1, 1, -1, 1)
    columns = (floor.unsqueeze(3) + offsets).long().clamp(-1, width) + 1  # (B, 1, H, 2 reach, W), of NaN some column
    columns = columns.reshape(batch, 1, height, -1).expand(-1, channels, -1, -1)
    seen = functional.pad(right, (1, 1)).gather(3, columns).reshape(batch, channels, height, 2 * reach, width)
    between = torch.lerp(seen[:, :, :, 1:], seen[:, :, :, :-1], (at - floor).unsqueeze(3))
    return (left.unsqueeze(3) - between).abs().sum(1).transpose(1, 2)


def mean_disparity(costs: torch.Tensor, first: int) -> torch.Tensor:
    """Mean of first, first + 1, ... under softmax(-costs), costs (B, D, H, W) -> (B, 1, H, W)."""
    values = torch.arange(first, first + costs.shape[1], device=costs.device, dtype=costs.dtype).view(1, -1, 1, 1)
    return (torch.softmax(-costs, 1) * values).sum(1, keepdim=True)


def _enlarge(values: torch.Tensor, factor: int) -> torch.Tensor:
    return functional.interpolate(values, scale_factor=float(factor), mode="bilinear", align_corners=False)


class AnyNet(nn.Module):
    """RGB pairs, each (B, 3, H, W) in 0..1 -> disparities in pixels of the left image, (B, 1, H, W) per stage."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, shape: AnyShape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or AnyShape()
        self.features = Features(shape.features, shape.blocks)
        self.volumes = nn.ModuleList(Volume(widths) for widths in shape.volume)
        self.refine = Refine(shape.spn) if shape.spn else None
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):  # as He et al., by what a weight sends out
                nn.init.normal_(module.weight, std=math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
        if self.refine:
            self.refine.start()

    def anytime(self, left: torch.Tensor, right: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield each stage's disparities when they are ready; a stage not taken costs nothing."""
        need_multiple(left, STRIDE)
        if left.shape != right.shape:
            sizes = f"left images are {tuple(left.shape)}, right ones {tuple(right.shape)}"
            raise ValueError(f"{sizes}; give rectified pairs of one size")
        left, right = (left - self.mean) / self.std, (right - self.mean) / self.std
        low = left.new_zeros(0)
        pairs = zip(self.features(left), self.features(right), strict=True)
        for stage, (of_left, of_right) in enumerate(pairs):
            count = self.shape.disparities[stage]
            if stage == 0:
                low = mean_disparity(self._smooth(0, costs_from_zero(of_left, of_right, count)), 0)
            else:
                low = 2 * _enlarge(low, 2)  # now in pixels of this stage's features
                costs = self._smooth(stage, costs_around(of_left, of_right, low, count))
                low = low + mean_disparity(costs, 1 - count)
            yield _enlarge(low * STRIDES[stage], STRIDES[stage])
        if self.refine:
            small = functional.interpolate(left, scale_factor=0.25, mode="bilinear", align_corners=False)
            yield _enlarge(self.refine(small, low * 4), 4)

    def _smooth(self, stage: int, costs: torch.Tensor) -> torch.Tensor:
        smoothed: torch.Tensor = self.volumes[stage](costs.unsqueeze(1)).squeeze(1)
        return smoothed

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every stage's disparities, coarsest first; ValueError if sizes differ or are no multiples of the stride."""
        return tuple(self.anytime(left, right))


class UpTo(nn.Module):
    """A network that stops at a stage, 1 for the first, and gives that stage's disparities alone."""

    def __init__(self, network: AnyNet, stage: int) -> None:
        super().__init__()
        if not 1 <= stage <= network.shape.stages:
            raise ValueError(f"stage {stage} is none of this network's; use 1 to {network.shape.stages}")
        self.network, self.stage = network, stage
        self.train(network.training)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Pairs as AnyNet takes them -> (B, 1, H, W)."""
        answers = self.network.anytime(left, right)
        for _ in range(self.stage - 1):
            next(answers)
        return next(answers)
