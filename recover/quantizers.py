"""Quantizers by name, all of one shape: weight (N, K), input second moment (K, K), Scheme -> Quantized.

nearest          round-to-nearest on each group's full range: what tools do that look at nothing
search           round-to-nearest on a searched grid
hqq              half-quadratic grid without calibration (hqq.py)
gptq             error compensation in the order of the inputs' moments, then refinement (compensate.py); the default
gptq-act-order   the same without refinement: GPTQ with activation ordering, groups kept in place
awq              inputs scaled by what they carry (equalize.py), then a grid searched with H's diagonal as weights

Those that look at the moment lose less of the layer's output; what each loses at 2 bits is in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlkit.recover.compensate import Compensation, checked_moment, compensate
from rlkit.recover.equalize import equalize
from rlkit.recover.hqq import quantize_hqq
from rlkit.recover.quantize import Quantized, checked, quantize_nearest, quantize_plain
from rlkit.recover.recipe import Scheme

__all__ = ["QUANTIZERS", "Quantize", "Quantizer", "equalize", "find"]

Quantize = Callable[[torch.Tensor, torch.Tensor, Scheme], Quantized]


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A name, what it does in one line, its function, and whether `equalize` has to treat the layer before."""

    name: str
    about: str
    quantize: Quantize
    equalize: bool = False


def _blind(quantize: Callable[[torch.Tensor, Scheme], Quantized]) -> Quantize:
    """A quantizer that needs no moment in the common shape; a damaged moment is told all the same."""

    def quantized(weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme) -> Quantized:
        weight = checked(weight, scheme)
        checked_moment(moment, weight.shape[1])
        return quantize(weight, scheme)

    return quantized


def _compensated(options: Compensation) -> Quantize:
    def quantized(weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme) -> Quantized:
        return compensate(weight, moment, scheme, options)

    return quantized


def _weighted(weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme) -> Quantized:
    weight = checked(weight, scheme)
    return quantize_nearest(weight, scheme, checked_moment(moment, weight.shape[1]).diagonal())


QUANTIZERS = {
    quantizer.name: quantizer
    for quantizer in (
        Quantizer("nearest", "round-to-nearest on each group's full range", _blind(quantize_plain)),
        Quantizer("search", "round-to-nearest on a searched grid", _blind(quantize_nearest)),
        Quantizer("hqq", "half-quadratic grid, no calibration", _blind(quantize_hqq)),
        Quantizer("gptq", "error compensation in the inputs' order, refined", _compensated(Compensation())),
        Quantizer(
            "gptq-act-order",
            "error compensation in the inputs' order, not refined",
            _compensated(Compensation(rounds=0)),
        ),
        Quantizer("awq", "inputs scaled by what they carry, then a searched grid", _weighted, equalize=True),
    )
}


def find(name: str) -> Quantizer:
    """The quantizer called `name`; ValueError naming those there are."""
    if name not in QUANTIZERS:
        raise ValueError(f"there is no quantizer {name!r}; use one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]
