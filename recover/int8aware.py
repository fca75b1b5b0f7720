"""Training that sees int8 coming: what convolutions multiply is rounded as it will be, gradients go straight through.

    q = clip(round(x / s) + z),  x' = (q - z) s,  dL/dx = dL/dx'      (Jacob et al. 1712.05877, Bengio et al. 1308.3432)

Weights have an s per output channel, z = 0 and q in -127..127, as the runtime's quantizer gives them. A norm behind a
convolution, which export folds into it, scales whole output channels: the rounding is the same with it and without.
What a convolution reads has one s and z, from the range of the batch at hand (with 0 in it), and q in 0..255. So
there is nothing to calibrate or to keep, and a training goes on as it would have.

The float network teaches: its answers are what shall be kept. Afterwards the values are floats like any others, for
the runtime's own quantizer, which decides what becomes of them.

What it does not know: the quantizer's ranges, which may leave out extremes, and what else it rounds (sums, outputs).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rlkit.recover import depthtrain
from rlkit.recover.depthbatches import Samples
from rlkit.recover.depthsample import LogScale
from rlkit.recover.depthtrain import Lesson, Step, Training

WEIGHTS, READ = (-127, 127), (0, 255)
LEAST = torch.finfo(torch.float32).tiny  # of a scale: what is 0 throughout has none


class _Rounded(torch.autograd.Function):
    """Values to the nearest of the places that int8 has; ties to even, as the runtime does."""

    @staticmethod
    def forward(_ctx: Any, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, ends: Any) -> torch.Tensor:
        return ((values / scale).round() + zero).clamp(*ends).sub(zero).mul(scale)

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradients[0], None, None, None


def rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights (outputs, ...) as int8 has them."""
    most = weight.detach().abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1))
    scale = (most / WEIGHTS[1]).clamp(min=LEAST)
    return _apply(weight, scale, torch.zeros_like(scale), WEIGHTS)


def rounded_read(values: torch.Tensor) -> torch.Tensor:
    """What a convolution reads, as int8 has it."""
    low, high = values.detach().amin().clamp(max=0), values.detach().amax().clamp(min=0)
    scale = ((high - low) / (READ[1] - READ[0])).clamp(min=LEAST)
    return _apply(values, scale, (READ[0] - low / scale).round(), READ)


def _apply(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, ends: tuple[int, int]) -> torch.Tensor:
    rounded: torch.Tensor = _Rounded.apply(values, scale, zero, ends)  # type: ignore[no-untyped-call]
    return rounded


@contextlib.contextmanager
def simulated(network: nn.Module) -> Iterator[nn.Module]:
    """While it lasts, a depth network's convolutions multiply what int8 can say; its values keep their names.

    Norms use the statistics that they have, in training too: those of a few images differ by more than int8 does.
    """
    changed: list[nn.Module] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.forward = partial(_convolve, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.forward = partial(_normalize, module)  # type: ignore[method-assign]
        else:
            continue
        changed.append(module)
    try:
        yield network
    finally:
        for module in changed:
            del module.forward


def _convolve(conv: nn.Conv2d | nn.Conv3d, values: torch.Tensor) -> torch.Tensor:
    """In float32: bfloat16 has as few digits as int8."""
    with torch.autocast(values.device.type, enabled=False):
        read, weight = rounded_read(values.float()), rounded_weight(conv.weight)
        if isinstance(conv, nn.Conv2d):
            return functional.conv2d(read, weight, conv.bias, conv.stride, conv.padding)
        return functional.conv3d(read, weight, conv.bias, conv.stride, conv.padding)


def _normalize(norm: nn.BatchNorm2d | nn.BatchNorm3d, values: torch.Tensor) -> torch.Tensor:
    return functional.batch_norm(values, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def recover(
    network: nn.Module, samples: Samples, plan: Training, *, scale: LogScale | None = None, state: Path | None = None
) -> Iterator[Step]:
    """Train a network in place to say in int8 what it says now, yielding after every step (depthtrain.train).

    The plan's lesson must be the teacher, who is the network as it is when this is called. Raises what `train` raises.
    """
    if plan.lesson is not Lesson.TEACHER:
        raise ValueError(f"lesson {plan.lesson} has a truth in it; int8 is learned from the float network alone")
    teacher = copy.deepcopy(network).eval()
    steps = depthtrain.train(network, samples, plan, scale=scale, teacher=teacher, state=state)
    return _steps(network, steps)


def _steps(network: nn.Module, steps: Iterator[Step]) -> Iterator[Step]:
    with simulated(network), contextlib.closing(steps):  # type: ignore[type-var]
        yield from steps
