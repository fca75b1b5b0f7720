"""The encoder-decoder that reads depth from one image, in any widths and any number of levels.

The network of 2206.09071 (Patwari and Ly), which is that of the Keras example "Monocular depth estimation": per level
two 3x3 convolutions with batch norm, the second one's output added to the first one's before its norm, and a 2x2
maximum; two convolutions at the bottom; per level a nearest-neighbour doubling, the level's own output beside it, two
convolutions with batch norm; a 1x1 convolution and a tanh.

    widths                    values       against the first
    16/32/64/128, then 256    1,966,465
    16/32/64, then 128          489,089    -75.1 %

Values are counted as Keras counts them: running means and variances of the norms are among them. The published code
trains a tanh, which ends at 1, towards logarithms up to 5.7; here the truth is brought into its range first
(depthsample.py, LogScale).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

SLOPE = 0.2  # of the LeakyReLU
NORM_EPS = 1e-3  # Keras' default; its momentum of 0.99 would need thousands of steps, so torch's 0.9 stays


@dataclass(frozen=True, slots=True)
class DepthShape:
    """Channels of every convolution, so that a pruned network is one of these too.

    down: both convolutions of a level, which are added, fine to coarse. bottleneck: the two at the bottom. up: the two
    of a level, coarse to fine.
    """

    down: tuple[int, ...]
    bottleneck: tuple[int, int]
    up: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        widths = [*self.down, *self.bottleneck, *(width for pair in self.up for width in pair)]
        pairs = all(len(pair) == 2 for pair in (self.bottleneck, *self.up))
        if not self.down or len(self.up) != len(self.down) or not pairs:
            raise ValueError(f"{self} is no network; give levels down, as many up, and two widths for each up")
        if any(type(width) is not int or width < 1 for width in widths):
            raise ValueError(f"{self} has a width that is no number of channels; use whole numbers from 1")

    @classmethod
    def of(cls, *widths: int) -> Self:
        """The plain network: one width per level, fine to coarse, the last one that of the bottom."""
        return cls(widths[:-1], (widths[-1], widths[-1]), tuple((width, width) for width in reversed(widths[:-1])))

    @property
    def stride(self) -> int:
        """Height and width of an image must be multiples of it."""
        return int(2 ** len(self.down))

    def to_json(self) -> dict[str, Any]:
        """As plain lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Inverse of to_json; ValueError naming what is wrong."""
        try:
            up = tuple(tuple(pair) for pair in fields["up"])
            return cls(tuple(fields["down"]), tuple(fields["bottleneck"]), up)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{fields} is no depth network ({error!r}); give down, bottleneck and up") from error


FULL = DepthShape.of(16, 32, 64, 128, 256)
REDUCED = DepthShape.of(16, 32, 64, 128)


def value_count(network: nn.Module) -> int:
    """Weights and running statistics, Keras' "total params"."""
    statistics = (buffer for name, buffer in network.named_buffers() if name.endswith(("_mean", "_var")))
    return sum(value.numel() for value in (*network.parameters(), *statistics))


def need_multiple(images: torch.Tensor, stride: int) -> None:
    """Raise ValueError unless images (..., H, W) fit a network of that stride. While a graph is exported: nothing."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    height, width = images.shape[-2:]
    given = f"images of {width}x{height}"
    if min(height, width) < stride:
        raise ValueError(f"{given} are smaller than the network's stride of {stride}; use larger ones")
    if height % stride or width % stride:
        raise ValueError(f"{given} do not fit a network of stride {stride}; pad both sizes to multiples of it")


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _leaky(values: torch.Tensor) -> torch.Tensor:
    return functional.leaky_relu(values, SLOPE)


class Down(nn.Module):
    """One level down: (B, I, H, W) -> (B, C, H, W) for the way up and its maximum (B, C, H/2, W/2)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv_a, self.norm_a = _conv(inputs, width), nn.BatchNorm2d(width, NORM_EPS)
        self.conv_b, self.norm_b = _conv(width, width), nn.BatchNorm2d(width, NORM_EPS)

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.conv_a(values)
        second = _leaky(self.norm_b(self.conv_b(_leaky(self.norm_a(first)))))
        kept = first + second
        return kept, functional.max_pool2d(kept, 2)


class Up(nn.Module):
    """One level up: (B, I, H/2, W/2) and what that level kept (B, K, H, W) -> (B, widths[1], H, W)."""

    def __init__(self, inputs: int, kept: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.conv_a, self.norm_a = _conv(inputs + kept, widths[0]), nn.BatchNorm2d(widths[0], NORM_EPS)
        self.conv_b, self.norm_b = _conv(*widths), nn.BatchNorm2d(widths[1], NORM_EPS)

    def forward(self, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        both = torch.cat([functional.interpolate(values, scale_factor=2.0, mode="nearest"), kept], 1)
        return _leaky(self.norm_b(self.conv_b(_leaky(self.norm_a(self.conv_a(both))))))


class Bottleneck(nn.Module):
    """Two convolutions without norm at the coarsest level."""

    def __init__(self, inputs: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.conv_a, self.conv_b = _conv(inputs, widths[0]), _conv(*widths)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return _leaky(self.conv_b(_leaky(self.conv_a(values))))


class DepthNet(nn.Module):
    """RGB images (B, 3, H, W) in 0..1 -> depth on a LogScale (B, 1, H, W), strictly within -1..1."""

    def __init__(self, shape: DepthShape = FULL) -> None:
        super().__init__()
        self.shape = shape
        inputs = (3, *shape.down[:-1])
        self.down = nn.ModuleList(Down(before, width) for before, width in zip(inputs, shape.down, strict=True))
        self.bottleneck = Bottleneck(shape.down[-1], shape.bottleneck)
        inputs = (shape.bottleneck[1], *(pair[1] for pair in shape.up[:-1]))
        levels = zip(inputs, reversed(shape.down), shape.up, strict=True)
        self.up = nn.ModuleList(Up(before, kept, widths) for before, kept, widths in levels)
        self.head = nn.Conv2d(shape.up[-1][1], 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.head.weight, std=0.01)  # the tanh starts in its middle, where it learns

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As the class says; ValueError if H or W is no multiple of the stride."""
        need_multiple(images, self.shape.stride)
        kept, values = [], images
        for level in self.down:
            skip, values = level(values)
            kept.append(skip)
        values = self.bottleneck(values)
        for level, skip in zip(self.up, reversed(kept), strict=True):
            values = level(values, skip)
        return torch.tanh(self.head(values))
