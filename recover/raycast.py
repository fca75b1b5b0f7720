"""Pictures of flat rectangles and balls by casting a ray per pixel: depth is where the ray meets them, exactly.

A camera at (eye, 0, 0) looks along z (x to the right, y down; metres). The ray of column u and row v is
(x, y, 1) with x = (u - (W - 1) / 2) / focal, y likewise, so that how far along the ray is the depth. A rectangle with
centre c, normal n and unit axes a, b is met at

    t = n . (c - o) / n . d        if t > 0, |a . (o + t d - c)| <= half_a and |b . (o + t d - c)| <= half_b

and a ball of radius r at the smaller root of d.d t^2 - 2 t d.(c - o) + |c - o|^2 - r^2 = 0. Only the pixels that can
see a surface are asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlkit.recover import texture

Floats = NDArray[np.float32]
AMBIENT = np.float32(0.45)  # of light that comes from everywhere


@dataclass(frozen=True, slots=True, eq=False)
class Surfaces:
    """K rectangles and balls; infinite halves make a plane. A ball's axes carry its texture."""

    centre: Floats  # (K, 3)
    axis_a: Floats  # (K, 3)
    axis_b: Floats  # (K, 3)
    normal: Floats  # (K, 3)
    half: Floats  # (K, 2)
    radius: Floats  # (K,), 0 = a rectangle
    texture: NDArray[np.int32]  # (K,)
    texel: Floats  # (K,) metres
    shift: Floats  # (K, 2) texels
    dark: Floats  # (K, 3) RGB in 0..1 where the texture is 0
    light: Floats  # (K, 3) where it is 1


@dataclass(frozen=True, slots=True)
class Lens:
    """A camera's picture: its size, focal length in pixels, and where it stands on the x axis in metres."""

    height: int
    width: int
    focal: float
    eye: float = 0.0

    @property
    def columns(self) -> Floats:
        """x of each column's rays."""
        return ((np.arange(self.width) - (self.width - 1) / 2) / self.focal).astype(np.float32)

    @property
    def rows(self) -> Floats:
        """y of each row's rays."""
        return ((np.arange(self.height) - (self.height - 1) / 2) / self.focal).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """What each pixel sees: metres of depth (infinite for nothing) and which surface."""

    depth: Floats  # (H, W)
    which: NDArray[np.int32]  # (H, W)


def cast(surfaces: Surfaces, lens: Lens) -> Hits:
    """The nearest surface of every pixel."""
    depth = np.full((lens.height, lens.width), np.inf, np.float32)
    which = np.zeros((lens.height, lens.width), np.int32)
    eye = np.array([lens.eye, 0, 0], np.float32)
    columns, rows = lens.columns, lens.rows
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for index in range(len(surfaces.centre)):
            at = _window(surfaces, index, lens)
            meet = _ball if surfaces.radius[index] else _rectangle
            found = meet(surfaces, index, eye, columns[at[1]], rows[at[0], None])
            nearer = (found > 0) & (found < depth[at])
            np.copyto(depth[at], found, where=nearer)
            np.copyto(which[at], np.int32(index), where=nearer)
    return Hits(depth, which)


def _window(surfaces: Surfaces, index: int, lens: Lens) -> tuple[slice, slice]:
    """Rows and columns that may see a surface: those between its corners, all if one is not in front."""
    if radius := surfaces.radius[index]:
        corners = surfaces.centre[index] + radius * CUBE
    else:
        sides = surfaces.half[index] * SQUARE  # (4, 2)
        if not np.isfinite(sides).all():
            return slice(0, lens.height), slice(0, lens.width)
        corners = surfaces.centre[index] + sides @ np.stack([surfaces.axis_a[index], surfaces.axis_b[index]])
    if corners[:, 2].min() <= 0.01:
        return slice(0, lens.height), slice(0, lens.width)
    u = lens.focal * (corners[:, 0] - lens.eye) / corners[:, 2] + (lens.width - 1) / 2
    v = lens.focal * corners[:, 1] / corners[:, 2] + (lens.height - 1) / 2
    return _between(v, lens.height), _between(u, lens.width)


def _between(ends: Floats, size: int) -> slice:
    first, last = np.clip([np.floor(ends.min()), np.ceil(ends.max()) + 1], 0, size)
    return slice(int(first), int(last))


CUBE = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
SQUARE = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)], np.float32)


def _rectangle(surfaces: Surfaces, index: int, eye: Floats, x: Floats, y: Floats) -> Floats:
    to_eye, normal = eye - surfaces.centre[index], surfaces.normal[index]
    along = normal[0] * x + (normal[1] * y + normal[2])
    depth: Floats = -np.dot(normal, to_eye) / along
    for axis, half in zip((surfaces.axis_a[index], surfaces.axis_b[index]), surfaces.half[index], strict=True):
        if np.isfinite(half):
            outside = np.abs(depth * (axis[0] * x + (axis[1] * y + axis[2])) + np.dot(axis, to_eye)) > half
            depth[outside] = np.inf
    return depth


def _ball(surfaces: Surfaces, index: int, eye: Floats, x: Floats, y: Floats) -> Floats:
    centre = surfaces.centre[index] - eye
    square = x * x + (y * y + 1)
    half = centre[0] * x + (centre[1] * y + centre[2])
    rest = half * half - square * np.float32(np.dot(centre, centre) - surfaces.radius[index] ** 2)
    depth: Floats = np.where(rest >= 0, (half - np.sqrt(np.maximum(rest, 0))) / square, np.inf)
    return depth


def shade(surfaces: Surfaces, hits: Hits, lens: Lens, sun: Floats) -> Floats:
    """Colours (H, W, 3) in 0..1 of what is seen; `sun` is the unit vector towards the light."""
    which = hits.which
    point = (hits.depth * lens.columns + np.float32(lens.eye), hits.depth * lens.rows[:, None], hits.depth)
    u, v = (_along(surfaces, axis, which, point) for axis in (surfaces.axis_a, surfaces.axis_b))
    texel = surfaces.texel[which]
    u, v = u / texel + surfaces.shift[which, 0], v / texel + surfaces.shift[which, 1]
    level = np.rint(np.log2(hits.depth / (texel * np.float32(lens.focal)))).clip(0, texture.LEVELS - 1)
    value = texture.bank().look(surfaces.texture[which], level.astype(np.int32), u, v)
    facing = _facing(surfaces, which, point, sun)
    bright = AMBIENT + (1 - AMBIENT) * facing
    colour = surfaces.dark[which] + (surfaces.light - surfaces.dark)[which] * value[..., None]
    shaded: Floats = colour * bright[..., None]
    return shaded


def _along(surfaces: Surfaces, axis: Floats, which: NDArray[np.int32], point: tuple[Floats, Floats, Floats]) -> Floats:
    start = np.einsum("kc,kc->k", axis, surfaces.centre)
    total: Floats = -start[which]
    for part, values in zip(axis.T, point, strict=True):
        total = total + part[which] * values
    return total


def _facing(surfaces: Surfaces, which: NDArray[np.int32], point: tuple[Floats, Floats, Floats], sun: Floats) -> Floats:
    """Cosine between the surface and the light, rectangles from both sides, 0 where a ball faces away."""
    facing: Floats = np.abs(surfaces.normal @ sun)[which]
    for index in np.flatnonzero(surfaces.radius):
        at = np.nonzero(which == index)
        if len(at[0]):
            centre = surfaces.centre[index]
            parts = [(values[at] - centre[i]) * sun[i] for i, values in enumerate(point)]
            facing[at] = np.maximum(sum(parts) / surfaces.radius[index], 0)
    return facing
