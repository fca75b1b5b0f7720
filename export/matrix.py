"""A packed matrix in numpy: the form in which every source hands its integers to the exported graph.

    weight[n, k] = (code - zero) * scale     codes `bits` wide, low bits first; a scale and zero point per group of k

Rows do not depend on each other, so stacking and cutting them is exact, and so are wider fields for the same codes and
smaller groups with the same scale: none of these rounds anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.recover import packing
from rlkit.recover.packing import Bytes, Floats


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Codes, scales and zero points of a matrix (n, k).

    qweight: uint8 (n, ceil(k * bits / 8)); scales: float32 (n, groups); qzeros: uint8 (n, ceil(groups * bits / 8)).
    """

    qweight: Bytes
    scales: Floats
    qzeros: Bytes
    bits: int
    group: int
    k: int

    def __post_init__(self) -> None:
        packing.unpack(self.qweight[:0], self.bits, self.k)  # complains of a width that cannot be
        groups = -(-self.k // self.group)
        want = (self.n, groups), (self.n, -(-groups * self.bits // 8))
        if (self.scales.shape, self.qzeros.shape) != want:
            found = f"scales {self.scales.shape} and zero points {self.qzeros.shape}"
            raise ValueError(
                f"{found} do not fit {self.n} rows of {self.k} in groups of {self.group}; they need {want}"
            )

    @staticmethod
    def of(codes: Bytes, scales: Floats, zeros: Bytes, bits: int, group: int) -> Matrix:
        """From codes (n, k), scales and zero points (n, groups)."""
        return Matrix(packing.pack(codes, bits), scales, packing.pack(zeros, bits), bits, group, codes.shape[1])

    @property
    def n(self) -> int:
        """Rows: outputs."""
        return int(self.qweight.shape[0])

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return -(-self.k // self.group)

    @property
    def nbytes(self) -> int:
        """All that is stored for it."""
        return int(self.qweight.nbytes + self.scales.nbytes + self.qzeros.nbytes)

    def rows(self, start: int, stop: int) -> Matrix:
        """Some of the rows."""
        cut = slice(start, stop)
        return replace(self, qweight=self.qweight[cut], scales=self.scales[cut], qzeros=self.qzeros[cut])

    def widened(self, bits: int) -> Matrix:
        """The same numbers with codes in fields of `bits`; ValueError if those are narrower."""
        if bits < self.bits:
            raise ValueError(f"{self.bits}-bit codes do not fit in fields of {bits} bits; quantize the matrix again")
        if bits == self.bits:
            return self
        qweight = packing.pack(packing.unpack(self.qweight, self.bits, self.k), bits)
        qzeros = packing.pack(packing.unpack(self.qzeros, self.bits, self.groups), bits)
        return replace(self, qweight=qweight, qzeros=qzeros, bits=bits)

    def split(self, group: int) -> Matrix:
        """The same numbers in smaller groups, each with its old group's scale and zero point."""
        if group == self.group:
            return self
        if self.group % group:
            raise ValueError(f"groups of {self.group} do not split into groups of {group}; use a divisor")
        times, count = self.group // group, -(-self.k // group)
        zeros = packing.unpack(self.qzeros, self.bits, self.groups)
        spread: list[NDArray[Any]] = [np.repeat(part, times, axis=1)[:, :count] for part in (self.scales, zeros)]
        scales, wide = (np.ascontiguousarray(part) for part in spread)
        return replace(self, scales=scales, qzeros=packing.pack(wide, self.bits), group=group)

    def blocks(self) -> Bytes:
        """The codes as input B of MatMulNBits: uint8 (n, groups, group * bits / 8), a ragged end padded with 0."""
        size = self.group * self.bits // 8
        if self.k % self.group == 0:
            return self.qweight.reshape(self.n, self.groups, size)
        padding = self.groups * size - self.qweight.shape[1]
        return np.pad(self.qweight, ((0, 0), (0, padding))).reshape(self.n, self.groups, size)

    def dequantize(self) -> Floats:
        """The float32 matrix (n, k)."""
        return packing.dequantize(self.qweight, self.scales, self.qzeros, self.bits, self.group, self.k)

    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle code, which MatMulNBits assumes where it is given none."""
        zeros = packing.unpack(self.qzeros, self.bits, self.groups)
        return bool((zeros == 1 << (self.bits - 1)).all())


def stack(matrices: Sequence[Matrix]) -> Matrix:
    """One matrix of the rows of several, which must agree in bits, group and k."""
    first = matrices[0]
    if any((part.bits, part.group, part.k) != (first.bits, first.group, first.k) for part in matrices):
        kinds = [(part.bits, part.group, part.k) for part in matrices]
        raise ValueError(f"matrices of (bits, group, inputs) {kinds} cannot be stacked; give them one scheme")
    if len(matrices) == 1:
        return first
    qweight, scales, qzeros = (
        np.concatenate([getattr(part, name) for part in matrices]) for name in ("qweight", "scales", "qzeros")
    )
    return replace(first, qweight=qweight, scales=scales, qzeros=qzeros)
