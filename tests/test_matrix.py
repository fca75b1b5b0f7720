"""Packed matrices: every change of form is exact."""

from __future__ import annotations

import numpy as np
import pytest

from rlkit.export.matrix import Matrix, stack

RNG = np.random.default_rng(0)


def matrix(n: int = 6, k: int = 256, bits: int = 2, group: int = 64) -> Matrix:
    top, groups = 1 << bits, -(-k // group)
    codes = RNG.integers(0, top, (n, k), dtype=np.uint8)
    scales = RNG.random((n, groups), np.float32)
    return Matrix.of(codes, scales, RNG.integers(0, top, (n, groups), dtype=np.uint8), bits, group)


@pytest.mark.parametrize(("bits", "wide"), [(2, 2), (2, 4), (2, 8), (4, 8)])
def test_wider_fields_hold_the_same_numbers(bits: int, wide: int) -> None:
    found = matrix(bits=bits)
    widened = found.widened(wide)
    assert widened.bits == wide
    assert widened.qweight.shape == (6, 256 * wide // 8)
    np.testing.assert_array_equal(widened.dequantize(), found.dequantize())


@pytest.mark.parametrize("k", [256, 192, 160])
def test_smaller_groups_hold_the_same_numbers(k: int) -> None:
    found = matrix(k=k, group=128)
    split = found.split(32)
    assert split.scales.shape == (6, k // 32)
    np.testing.assert_array_equal(split.dequantize(), found.dequantize())


def test_rows_are_cut_and_stacked_exactly() -> None:
    found = matrix(n=10)
    again = stack([found.rows(0, 3), found.rows(3, 4), found.rows(4, 10)])
    np.testing.assert_array_equal(again.dequantize(), found.dequantize())
    assert again.nbytes == found.nbytes


def test_blocks_are_padded_at_a_ragged_end() -> None:
    found = matrix(k=160, bits=4, group=64)
    blocks = found.blocks()
    assert blocks.shape == (6, 3, 32)
    np.testing.assert_array_equal(blocks.reshape(6, -1)[:, :80], found.qweight)
    assert not blocks.reshape(6, -1)[:, 80:].any()


def test_symmetric_means_every_zero_point_in_the_middle() -> None:
    found = matrix(bits=4)
    middle = Matrix.of(np.zeros((2, 64), np.uint8), np.ones((2, 1), np.float32), np.full((2, 1), 8, np.uint8), 4, 64)
    assert middle.is_symmetric() and not found.is_symmetric()


def test_what_does_not_fit_is_refused() -> None:
    found = matrix(bits=4)
    with pytest.raises(ValueError, match="4-bit codes do not fit in fields of 2 bits"):
        found.widened(2)
    with pytest.raises(ValueError, match="groups of 64 do not split into groups of 48"):
        found.split(48)
    with pytest.raises(ValueError, match="cannot be stacked"):
        stack([found, matrix(bits=2)])
    with pytest.raises(ValueError, match="do not fit 6 rows of 256 in groups of 64"):
        Matrix(found.qweight, found.scales[:, :2], found.qzeros, 4, 64, 256)
