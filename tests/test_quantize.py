"""Codes stay in range, scales are float16 values, and the searched grid is never worse than the full range."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit.recover import packing
from rlkit.recover.quantize import Quantized, on_grid, quantize_nearest, quantize_plain, search_grid, snap_scales
from rlkit.recover.recipe import Scheme

SCHEMES = [Scheme(bits, group, symmetric) for bits in (2, 4, 8) for group in (32, 64) for symmetric in (False, True)]
SHAPES = {
    "bell": lambda w: w,
    "one-sided": lambda w: w.abs() + 0.1,
    "other side": lambda w: -w.abs(),
    "skewed": lambda w: torch.where(w > 0, 8 * w, w),
    "heavy-tailed": lambda w: w**3,
    "all zero": lambda w: 0 * w,
    "constant": lambda w: 0 * w + 0.7,
    "tiny": lambda w: w * 1e-9,
    "large": lambda w: w * 1e4,
}


def weights(seed: int, shape: str, n: int = 6, k: int = 128) -> torch.Tensor:
    return SHAPES[shape](torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))


def full_range(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Plain min/max quantization, written out a second time."""
    grouped = weight.view(len(weight), -1, scheme.group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    top, middle = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    if scheme.symmetric:
        return on_grid(weight, snap_scales(torch.maximum(-low, high) / middle), torch.full_like(low, middle), scheme)
    scale = ((high - low) / top).clamp(min=1e-12)
    return on_grid(weight, snap_scales(scale), (-low / scale).round().clamp(0, top), scheme)


def errors(weight: torch.Tensor, quantized: Quantized, importance: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of every group, (N, G)."""
    squared = (weight - quantized.dequantize()).square() * importance
    return squared.view(len(weight), -1, quantized.scheme.group).sum(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search_is_never_worse_than_the_full_range(scheme: Scheme, shape: str) -> None:
    weight = weights(0, shape)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 4
    plain = errors(weight, full_range(weight, scheme), importance)
    searched = errors(weight, quantize_nearest(weight, scheme, importance), importance)
    assert (searched <= plain * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_plain_rounding_spans_the_full_range(scheme: Scheme, shape: str) -> None:
    weight = weights(2, shape)
    plain, expected = quantize_plain(weight, scheme), full_range(weight, scheme)
    assert torch.equal(plain.codes, expected.codes)
    assert torch.equal(plain.dequantize(), expected.dequantize())


@pytest.mark.parametrize("quantize", [quantize_plain, quantize_nearest])
def test_bad_weights_are_told_in_one_line(quantize: Callable[[torch.Tensor, Scheme], Quantized]) -> None:
    weight = weights(0, "bell")
    weight[2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^1 of 768 weights are NaN or infinite; .*$"):
        quantize(weight, Scheme(4, 32))
    with pytest.raises(ValueError, match=r"shape \(6, 96\) does not divide into groups of 64 .*bits = 16$"):
        quantize(weights(0, "bell", k=96), Scheme(4, 64))
    with pytest.raises(ValueError, match="bits = 16 has no codes"):
        quantize(weights(0, "bell"), Scheme(16, 64))


@given(st.integers(0, 2**31), st.sampled_from(sorted(SHAPES)), st.sampled_from(SCHEMES))
def test_parts_hold_what_the_format_allows(seed: int, shape: str, scheme: Scheme) -> None:
    weight = weights(seed, shape, n=3)
    quantized = quantize_nearest(weight, scheme)
    top = 2**scheme.bits - 1
    assert quantized.codes.dtype == quantized.zeros.dtype == torch.uint8
    assert quantized.codes.shape == weight.shape
    assert quantized.scales.shape == quantized.zeros.shape == (3, 128 // scheme.group)
    assert int(quantized.codes.max()) <= top
    assert int(quantized.zeros.max()) <= top
    assert not scheme.symmetric or bool((quantized.zeros == 2 ** (scheme.bits - 1)).all())
    assert torch.equal(quantized.scales.half().float(), quantized.scales)
    assert (quantized.scales > 0).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_search_gains_much_on_heavy_tails(bits: int) -> None:
    weight, scheme, ones = weights(0, "bell", n=64), Scheme(bits, 64), torch.ones(128)
    plain = errors(weight, full_range(weight, scheme), ones).sum()
    searched = errors(weight, quantize_nearest(weight, scheme), ones).sum()
    assert searched < (0.75 if bits == 2 else 0.95) * plain


def test_importance_moves_the_grid_towards_what_counts() -> None:
    weight = weights(0, "heavy-tailed", n=32, k=64)
    importance = torch.ones(64)
    importance[:8] = 1000.0
    scheme = Scheme(2, 64)
    plain, weighted = quantize_nearest(weight, scheme), quantize_nearest(weight, scheme, importance)
    assert errors(weight, weighted, importance).sum() < 0.8 * errors(weight, plain, importance).sum()
    assert errors(weight, plain, torch.ones(64)).sum() < errors(weight, weighted, torch.ones(64)).sum()


@given(st.integers(0, 2**31), st.sampled_from(SCHEMES))
def test_codes_are_the_nearest_ones_of_the_grid(seed: int, scheme: Scheme) -> None:
    weight = weights(seed, "skewed", n=2, k=64)
    scales, zeros = search_grid(weight, scheme)
    quantized = on_grid(weight, scales, zeros, scheme)
    levels = torch.arange(2**scheme.bits)[None, :, None] - zeros.repeat_interleave(scheme.group, 1)[:, None]
    values = levels * scales.repeat_interleave(scheme.group, 1)[:, None]  # (N, levels, K)
    nearest = (values - weight[:, None]).abs().amin(1)
    np.testing.assert_allclose((quantized.dequantize() - weight).abs(), nearest, rtol=0, atol=1e-5)


def test_a_matrix_on_a_grid_comes_back_exactly() -> None:
    scheme = Scheme(4, 32)
    once = quantize_nearest(weights(0, "bell"), scheme)
    again = on_grid(once.dequantize(), once.scales, once.zeros.float(), scheme)
    assert torch.equal(again.codes, once.codes)
    assert torch.equal(again.dequantize(), once.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_packed_form_means_the_same_weight(scheme: Scheme) -> None:
    quantized = quantize_nearest(weights(0, "bell"), scheme)
    qweight = packing.pack(quantized.codes.numpy(), scheme.bits)
    qzeros = packing.pack(quantized.zeros.numpy(), scheme.bits)
    unpacked = packing.dequantize(qweight, quantized.scales.numpy(), qzeros, scheme.bits, scheme.group, 128)
    np.testing.assert_array_equal(unpacked, quantized.dequantize().numpy())


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-5, 0.1, 1e30, float("inf")])
def test_scales_are_normal_float16_values(value: float) -> None:
    snapped = snap_scales(torch.tensor([value]))
    assert 2.0**-14 <= float(snapped) <= 65504.0
    assert float(snapped.half()) == float(snapped)
