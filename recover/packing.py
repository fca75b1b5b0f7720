"""Packed integer weights: codes <-> bytes <-> float, in numpy only, so that every room can read them.

    array     dtype    shape                      meaning
    codes     uint8    (N, K)                     one unsigned code of `bits` bits per weight
    qweight   uint8    (N, ceil(K * bits / 8))    the same, low bits first: code k sits at bit k * bits of its row
    scales    float32  (N, G)                     one per group of weights along K; G = ceil(K / group)
    zeros     uint8    (N, G)                     the code that means 0.0; left out, it is 2 ** (bits - 1)
    qzeros    uint8    (N, ceil(G * bits / 8))    zeros, packed as codes are
    blocks    uint8    (N, G, group * bits / 8)   qweight, rows padded to whole groups: input B of MatMulNBits

    weight[n, k] = (codes[n, k] - zeros[n, k // group]) * scales[n, k // group]

A row starts on a byte of its own; spare bits at its end are 0. `bits` is 2, 4 or 8. Nothing here chooses codes, except
`snap8`: the one 8-bit grid on which low-rank adapters live both in a checkpoint and in an exported graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = (2, 4, 8)
BLOCKS = (128, 64, 32)  # block sizes with fast kernels at every width, largest first
SNAP_ZERO = 128  # the code of 0.0 on the 8-bit grid, which is what MatMulNBits assumes where it is given no zero points
_SNAP_LARGEST = 1e38  # leaves room below float32's end for a scale rounded up

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def pack(codes: Bytes, bits: int) -> Bytes:
    """Codes (N, K) to bytes (N, ceil(K * bits / 8)), low bits first."""
    _check_bits(bits)
    _check_codes(codes, bits)
    per_byte = 8 // bits
    n, k = codes.shape
    width = -(-k // per_byte)
    padded = codes if k == width * per_byte else np.pad(codes, ((0, 0), (0, width * per_byte - k)))
    packed = np.zeros((n, width), np.uint8)
    for slot in range(per_byte):
        packed |= padded[:, slot::per_byte] << np.uint8(slot * bits)
    return packed


def unpack(packed: Bytes, bits: int, k: int) -> Bytes:
    """Bytes (N, ceil(k * bits / 8)) to codes (N, k): the inverse of `pack`."""
    _check_bits(bits)
    per_byte = 8 // bits
    if k < 1 or packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != -(-k // per_byte):
        want = f"uint8 (N, {-(-k // per_byte)})"
        raise ValueError(f"packed codes are {packed.dtype} {packed.shape}, but {k} codes of {bits} bits need {want}")
    codes = np.empty((packed.shape[0], packed.shape[1] * per_byte), np.uint8)
    for slot in range(per_byte):
        codes[:, slot::per_byte] = (packed >> np.uint8(slot * bits)) & np.uint8((1 << bits) - 1)
    return codes[:, :k]


def dequantize(qweight: Bytes, scales: NDArray[Any], qzeros: Bytes | None, bits: int, group: int, k: int) -> Floats:
    """The float32 matrix (N, k) that packed codes, scales (N, G) and packed zero points (N, ...) or None stand for."""
    codes = unpack(qweight, bits, k)
    if group < 1:
        raise ValueError(f"group = {group} is not a positive number of weights")
    n, groups = codes.shape[0], -(-k // group)
    if scales.shape != (n, groups):
        raise ValueError(
            f"scales are {scales.shape}, but {n} rows of {k} weights, groups of {group}, need {(n, groups)}"
        )
    if qzeros is None:
        zeros = np.full((n, groups), 1 << (bits - 1), np.uint8)
    elif qzeros.shape[0] == n:
        zeros = unpack(qzeros, bits, groups)
    else:
        raise ValueError(f"zero points have {qzeros.shape[0]} rows, but the weight has {n}")
    weight = codes.astype(np.float32)  # (N, K)
    weight -= _spread(zeros.astype(np.float32), group, k)
    weight *= _spread(scales.astype(np.float32), group, k)
    return weight


def blocks(codes: Bytes, bits: int, group: int) -> Bytes:
    """Codes (N, K) as the blocks (N, ceil(K / group), group * bits / 8) of MatMulNBits, a ragged end padded with 0."""
    if group < 1 or group * bits % 8:
        raise ValueError(f"a block of {group} codes of {bits} bits is not a whole number of bytes")
    n, k = codes.shape
    groups = -(-k // group)
    padded = codes if k == groups * group else np.pad(codes, ((0, 0), (0, groups * group - k)))
    return pack(padded, bits).reshape(n, groups, group * bits // 8)


@dataclass(frozen=True, slots=True)
class Snapped:
    """A matrix on the 8-bit grid: weight = (codes - 128) * scales, block by block, exactly."""

    codes: Bytes  # (N, K), 1..255
    scales: Floats  # (N, K / block)
    dequantized: Floats  # (N, K)
    block: int


def snap_block(k: int) -> int | None:
    """The block of the 8-bit grid for rows of `k` weights: the largest of 32/64/128 dividing k; None if none does."""
    return next((block for block in BLOCKS if k % block == 0), None)


def snap8(weight: NDArray[Any]) -> Snapped:
    """The nearest point of the symmetric 8-bit block grid to `weight` (N, K).

    scale = max|w| / 127 over the block, rounded up to 16 significant bits. Up, so that no code is clipped; to 16 bits,
    so that every product code * scale is exact in float32. Hence snapping a snapped matrix changes neither codes nor
    scales, and a reader of the float values sees what the kernel sees. Blocks whose scale would be below the smallest
    normal float32 become 0.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"the 8-bit grid needs a matrix (N, K), not shape {weight.shape}")
    n, k = weight.shape
    block = snap_block(k)
    if block is None:
        raise ValueError(f"rows of {k} weights do not split into blocks of 32; use a multiple of 32")
    exact = weight.astype(np.float64).reshape(n, k // block, block)
    largest = np.abs(exact).max(axis=2)  # (N, K / block)
    if not np.all(largest <= _SNAP_LARGEST):
        raise ValueError("the matrix holds NaN, infinite or enormous values, so it has no 8-bit grid")
    fraction, exponent = np.frexp(largest / 127)
    scales = np.ldexp(np.ceil(fraction * 2**16), exponent - 16)
    scales[scales < np.finfo(np.float32).tiny] = 0.0
    steps = np.rint(exact / np.where(scales == 0.0, np.inf, scales)[:, :, None])  # -127..127
    values = (steps * scales[:, :, None]).astype(np.float32)
    codes = (steps + SNAP_ZERO).astype(np.uint8)
    return Snapped(codes.reshape(n, k), scales.astype(np.float32), values.reshape(n, k), block)


def _spread(per_group: Floats, group: int, k: int) -> Floats:
    return np.repeat(per_group, group, axis=1)[:, :k]  # (N, G) -> (N, K)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits = {bits} cannot be packed; use one of {BITS}")


def _check_codes(codes: Bytes, bits: int) -> None:
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] == 0:
        raise ValueError(f"codes must be a uint8 matrix (N, K), not {codes.dtype} {codes.shape}")
    if bits < 8 and codes.size and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits (0..{(1 << bits) - 1})")
