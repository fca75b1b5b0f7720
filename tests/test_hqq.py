"""Half-quadratic grids: whole zero points, least deviation in the lp sense, never worse than the full range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit.recover.hqq import POWER, quantize_hqq
from rlkit.recover.quantize import Quantized, quantize_plain
from rlkit.recover.recipe import Scheme

SCHEMES = [Scheme(bits, group, symmetric) for bits in (2, 4, 8) for group in (32, 128) for symmetric in (False, True)]


def bell(seed: int, n: int = 16, k: int = 128) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def deviation(weight: torch.Tensor, quantized: Quantized) -> torch.Tensor:
    """sum |W - D|^p of every group, (N, G)."""
    errors = (weight - quantized.dequantize()).abs().pow(POWER)
    return errors.view(len(weight), -1, quantized.scheme.group).sum(-1)


@given(st.integers(0, 2**31), st.sampled_from(SCHEMES), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from([0.0, 0.05]))
def test_never_deviates_more_than_the_full_range(seed: int, scheme: Scheme, size: float, offset: float) -> None:
    weight = (bell(seed, n=4) + offset) * size
    made = deviation(weight, quantize_hqq(weight, scheme))
    assert (made <= deviation(weight, quantize_plain(weight, scheme)) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("scheme", "share"), [(Scheme(2, 128), 0.85), (Scheme(4, 128), 0.97), (Scheme(2, 128, True), 0.95)]
)
def test_gains_on_the_full_range(scheme: Scheme, share: float) -> None:
    weight = bell(0, n=64)
    made, plain = (deviation(weight, f(weight, scheme)).sum() for f in (quantize_hqq, quantize_plain))
    assert made < share * plain


def test_an_outlier_pulls_the_grid_less() -> None:
    """One large weight per group: all others come out closer than on the full range, at its expense."""
    weight = bell(1, n=32)
    weight[:, 5] = 1.0
    hqq, plain = ((f(weight, Scheme(4, 128)).dequantize() - weight).square() for f in (quantize_hqq, quantize_plain))
    others = torch.arange(128) != 5
    assert hqq[:, others].mean() < 0.9 * plain[:, others].mean()
    assert hqq[:, 5].mean() > plain[:, 5].mean()


def test_scale_of_the_weights_does_not_matter() -> None:
    weight, scheme = bell(2), Scheme(2, 32)
    once, larger = quantize_hqq(weight, scheme), quantize_hqq(weight * 8, scheme)
    assert torch.equal(once.codes, larger.codes)
    assert torch.equal(once.scales * 8, larger.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    weight = bell(3)
    weight[4] = 0
    weight[6, :32] = 0
    made = quantize_hqq(weight, scheme).dequantize()
    assert torch.isfinite(made).all()
    assert not made[4].any()
    assert not made[6, :32].any()


def test_bad_weights_are_told_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^2048 of 2048 weights are NaN or infinite; .*$"):
        quantize_hqq(bell(0) * float("nan"), Scheme(2, 32))
    with pytest.raises(ValueError, match="does not divide into groups of 64"):
        quantize_hqq(bell(0, k=96), Scheme(2, 64))
