"""What a torch depth network says of images: bytes in, metres or pixels of disparity out, a map per stage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from rlkit.recover.anynet import STRIDE, AnyNet
from rlkit.recover.depthnets import DepthNet
from rlkit.recover.depthsample import Image, LogScale, Map, pad, planes

Predict = Callable[..., list[Map]]
"""Images (B, H, W, 3), one or a left and a right one -> maps (B, H, W) of every stage, the answer last."""

AT_ONCE = 8  # images


def predictor(network: nn.Module, scale: LogScale | None = None) -> Predict:
    """A function that asks a network, which must be in evaluation mode. `scale` is needed by those of one image.

    It raises ValueError for images smaller than the network's stride, and for another number of images.
    """
    wanted = 1 if isinstance(network, DepthNet) else 2
    stride = network.shape.stride if isinstance(network, DepthNet) else STRIDE
    device = next(network.parameters()).device

    @torch.no_grad()
    def predict(*images: Image) -> list[Map]:
        if len(images) != wanted:
            raise ValueError(f"{len(images)} images for a network of {wanted}; give {wanted}")
        padded = [pad(image, stride) for image in images]
        height, width = images[0].shape[-3:-1]
        parts: list[list[Map]] = []
        for start in range(0, len(images[0]), AT_ONCE):
            given = [torch.from_numpy(planes(each[start : start + AT_ONCE])).to(device) for each in padded]
            said = network(*given)
            stages = said if isinstance(network, AnyNet) else (said,)
            parts.append([stage[:, 0, :height, :width].cpu().numpy() for stage in stages])
        maps = [np.concatenate(each) for each in zip(*parts, strict=True)]
        return maps if scale is None else [scale.decode(each) for each in maps]

    return predict
