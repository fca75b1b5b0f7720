"""Textures of synthetic scenes: noise and patterns that repeat without a seam, each with its smaller versions.

A surface point takes its value from the version whose texels are about as large as a pixel is there, so that both
images of a pair see the same value where their pixels fall differently.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 256  # texels across; a power of two, so that coordinates wrap with a mask
LEVELS = 6  # halvings that are kept, the first of them none
COUNT = 24
SEED = 20  # the textures are the same in every scene set; which surface takes which is drawn per scene

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Every texture at every level, one after the other in `texels`, values in 0..1; `start` (COUNT, LEVELS)."""

    texels: Values
    start: NDArray[np.int32]

    def look(self, texture: NDArray[np.int32], level: NDArray[np.int32], u: Values, v: Values) -> Values:
        """Values at u, v (texels of level 0), interpolated linearly between four texels; all arrays of one shape."""
        scale = np.ldexp(np.float32(1), -level)
        mask = (SIZE >> level) - 1
        u, v = (u + np.float32(0.5)) * scale - np.float32(0.5), (v + np.float32(0.5)) * scale - np.float32(0.5)
        left, top = np.floor(u), np.floor(v)
        u, v = u - left, v - top
        column, row = left.astype(np.int32), top.astype(np.int32)
        start, size = self.start[texture, level], mask + 1
        upper, lower = start + (row & mask) * size, start + ((row + 1) & mask) * size
        column, after = column & mask, (column + 1) & mask
        above = self.texels[upper + column] * (1 - u) + self.texels[upper + after] * u
        below = self.texels[lower + column] * (1 - u) + self.texels[lower + after] * u
        mixed: Values = above * (1 - v) + below * v
        return mixed


@functools.cache
def bank() -> Bank:
    """The textures of all scenes, made once."""
    rng = np.random.default_rng(SEED)
    texels, start, done = [], np.zeros((COUNT, LEVELS), np.int32), 0
    for index in range(COUNT):
        values = _texture(rng, index)
        for level in range(LEVELS):
            start[index, level] = done
            texels.append(values.ravel())
            done += values.size
            values = values.reshape(values.shape[0] // 2, 2, -1, 2).mean((1, 3))
    return Bank(np.concatenate(texels), start)


def _texture(rng: np.random.Generator, index: int) -> Values:
    """Two of three are noise of some roughness; the others are patterns under a little of it."""
    values = _noise(rng, 0.6 + 1.0 * rng.random())
    if index % 3 == 2:
        values = 0.3 * values + 0.7 * PATTERNS[index // 3 % len(PATTERNS)](rng)
    low, high = np.quantile(values, (0.02, 0.98))
    clipped: Values = np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
    return clipped


def _noise(rng: np.random.Generator, slope: float) -> Values:
    """Noise whose amplitude falls with frequency to the power of -slope, standard deviation 1."""
    across = np.fft.fftfreq(SIZE)
    frequency = np.hypot(across[:, None], across[None, : SIZE // 2 + 1])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((SIZE, SIZE))) * frequency**-slope
    values = np.fft.irfft2(spectrum, (SIZE, SIZE))
    even: Values = (values / values.std()).astype(np.float32)
    return even


def _bricks(rng: np.random.Generator) -> Values:
    height, width = 1 << rng.integers(3, 6), 1 << rng.integers(4, 7)
    row, column = np.mgrid[:SIZE, :SIZE]
    course = row // height
    tone = rng.standard_normal((SIZE // height, SIZE // width))
    brick = (column + course % 2 * (width // 2)) % SIZE
    joint = (row % height < 2) | (brick % width < 2)
    return np.where(joint, -2, tone[course, brick // width]).astype(np.float32)


def _stripes(rng: np.random.Generator) -> Values:
    tone = np.repeat(rng.standard_normal(SIZE // 8), 8)
    return np.broadcast_to(tone[:, None] + 0.7 * np.roll(tone, 40)[None, :], (SIZE, SIZE)).astype(np.float32)


def _spots(rng: np.random.Generator) -> Values:
    spots: Values = np.sign(_noise(rng, 1.2) - np.float32(0.5))
    return spots


def _tiles(rng: np.random.Generator) -> Values:
    size = 1 << rng.integers(3, 6)
    return np.kron(rng.standard_normal((SIZE // size,) * 2), np.ones((size, size))).astype(np.float32)


PATTERNS = (_bricks, _stripes, _spots, _tiles)
