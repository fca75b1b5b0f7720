"""Rooms with boxes, balls and boards, drawn at random and rendered with their exact depth: endless training data.

A scene is a closed room (floor, ceiling, three walls, turned and tilted) with textured objects that stand on the floor
or float, so that one image holds what depth is read from (perspective, contact with the floor, shading, occlusion) and
a pair holds disparities from the far wall's to `max_disparity`. Scene `index` of `seed` is the same whenever and in
whichever batch it is rendered. Sensor noise, blur and a difference in exposure come after the geometry: the truth is
that of the rays through the middle of the pixels (raycast.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlkit.recover import texture
from rlkit.recover.depthsample import Camera, DepthSample, Image, Map, Mask, StereoSample
from rlkit.recover.raycast import Floats, Hits, Lens, Surfaces, cast, shade

SLACK = 0.85  # objects stay this much behind `near`, which tilting the room then does not pass
EYE_HEIGHT = (1.2, 1.7)  # metres above the floor, and below the ceiling
PITCH, YAW = np.radians(6), np.radians(30)
STANDING = 0.6  # share of boxes and balls that stand on the floor


@dataclass(frozen=True, slots=True)
class View:
    """What the cameras see and how well. Sizes in pixels, depths in metres, `noise` and `exposure` in parts of white.

    The focal length is the larger side (53 degrees); the baseline makes the disparity at `near` max_disparity.
    """

    height: int = 256
    width: int = 256
    near: float = 1.2
    far: float = 10.0
    max_disparity: float = 60.0
    objects: tuple[int, int] = (5, 10)
    noise: float = 0.02
    blur: float = 0.15
    exposure: float = 0.05

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 8:
            raise ValueError(f"scenes of {self.width}x{self.height} show nothing; use at least 8x8")
        if not 0 < 4 * self.near <= self.far < np.inf:
            raise ValueError(f"depths from {self.near} to {self.far} m leave no room; make far at least 4 times near")
        if not 0 < self.max_disparity < self.width:
            raise ValueError(f"max_disparity = {self.max_disparity} is outside the image; use 1 to {self.width - 1}")
        if not 0 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects = {self.objects} is no range; use (fewest, most)")
        if not (0 <= self.noise <= 1 and 0 <= self.blur <= 1 / 3 and 0 <= self.exposure < 1):
            raise ValueError(f"noise {self.noise}, blur {self.blur}, exposure {self.exposure}: use 0..1, 0..1/3, 0..1")

    @property
    def camera(self) -> Camera:
        """Focal length and baseline of the pair."""
        focal = float(max(self.height, self.width))
        return Camera(focal, self.max_disparity * self.near / focal)

    def lens(self, eye: float = 0.0) -> Lens:
        """The picture taken from `eye` metres to the right of the left camera."""
        return Lens(self.height, self.width, self.camera.focal_px, eye)


def depth(seed: int, first: int, count: int, view: View = View()) -> DepthSample:
    """Scenes first ... first + count - 1 as images (count, H, W, 3) with the depth of every pixel."""
    images, depths = [], []
    for index in _indices(seed, first, count):
        rng = np.random.default_rng((seed, index))
        surfaces, sun = _world(rng, view)
        hits = cast(surfaces, view.lens())
        images.append(_photograph(np.random.default_rng((seed, index, 1)), surfaces, hits, view.lens(), sun, view))
        depths.append(hits.depth)
    depth = np.stack(depths)
    return DepthSample(_name(seed, first, count), np.stack(images), depth, np.ones(depth.shape, np.bool_))


def stereo(seed: int, first: int, count: int, view: View = View()) -> StereoSample:
    """The same scenes as pairs (count, H, W, 3) with the disparity and the occlusion of every left pixel."""
    lefts: list[Image] = []
    rights: list[Image] = []
    disparities, occlusions = [], []
    camera = view.camera
    scale = np.float32(camera.focal_px * camera.baseline_m)
    lenses = (view.lens(), view.lens(camera.baseline_m))
    for index in _indices(seed, first, count):
        rng = np.random.default_rng((seed, index))
        surfaces, sun = _world(rng, view)
        seen = [cast(surfaces, lens) for lens in lenses]
        for eye, images in enumerate((lefts, rights)):
            of_eye = np.random.default_rng((seed, index, 1 + eye))
            images.append(_photograph(of_eye, surfaces, seen[eye], lenses[eye], sun, view))
        left, right = (scale / hits.depth for hits in seen)
        disparities.append(left)
        occlusions.append(_hidden(left, right))
    disparity = np.stack(disparities)
    valid = np.ones(disparity.shape, np.bool_)
    name = _name(seed, first, count)
    return StereoSample(name, np.stack(lefts), np.stack(rights), disparity, valid, np.stack(occlusions), camera)


def _indices(seed: int, first: int, count: int) -> range:
    if seed < 0 or first < 0 or count < 1:
        raise ValueError(f"seed {seed}, first {first}, count {count}: use a seed and a first from 0 and a count from 1")
    return range(first, first + count)


def _name(seed: int, first: int, count: int) -> str:
    return f"scenes {first} to {first + count - 1} of seed {seed}"


def _hidden(left: Map, right: Map) -> Mask:
    """Left pixels without a partner: outside the right image, or that place shows something nearer or farther.

    The partner's disparity is the same up to the slant between two columns: within one pixel at either of them.
    """
    width = left.shape[1]
    at = np.arange(width, dtype=np.float32) - left
    column = np.floor(at).astype(np.int64)
    agrees = np.zeros(left.shape, np.bool_)
    for beside in (column, column + 1):
        there = np.take_along_axis(right, beside.clip(0, width - 1), 1)
        agrees |= (np.abs(there - left) <= 1) & (beside >= 0) & (beside < width)
    return ~agrees


def _photograph(rng: np.random.Generator, surfaces: Surfaces, hits: Hits, lens: Lens, sun: Floats, view: View) -> Image:
    """What the sensor makes of a picture: blur, exposure, noise, bytes."""
    colours = shade(surfaces, hits, lens, sun)
    if view.blur:
        for axis in (0, 1):
            colours = _blur(colours, axis, np.float32(view.blur))
    colours = colours * np.float32(1 + view.exposure * rng.uniform(-1, 1))
    if view.noise:
        colours = colours + np.float32(view.noise * rng.random()) * rng.standard_normal(colours.shape, np.float32)
    return np.rint(colours.clip(0, 1) * np.float32(255)).astype(np.uint8)


def _blur(colours: Floats, axis: int, share: np.float32) -> Floats:
    """Give `share` of every pixel to each neighbour along an axis."""
    rows = colours.swapaxes(0, axis)
    wide = np.concatenate([rows[:1], rows, rows[-1:]])
    blurred: Floats = rows * (1 - 2 * share) + share * (wide[:-2] + wide[2:])
    return blurred.swapaxes(0, axis)


@dataclass(slots=True)
class _Builder:
    """Collects surfaces; `turn` is applied to whatever is added."""

    rng: np.random.Generator
    focal: float
    turn: NDArray[np.float64]  # (3, 3)
    rows: list[tuple[NDArray[np.float64], ...]] = field(default_factory=list)

    def add(
        self,
        centre: NDArray[np.float64],
        axes: NDArray[np.float64],
        half: tuple[float, float],
        look: NDArray[np.float64],
        radius: float = 0.0,
    ) -> None:
        """A rectangle whose axes (a, b, normal) are the rows of `axes`, or a ball."""
        turned = np.eye(3) if radius else axes @ self.turn.T
        self.rows.append((self.turn @ centre, *turned, np.array([*half, radius]), look))

    def look(self, depth: float) -> NDArray[np.float64]:
        """A texture, with texels of 1 to 4 pixels at that depth, and its two colours."""
        rng = self.rng
        dark, light = rng.random(3) * 0.5, 0.3 + 0.7 * rng.random(3)
        light = dark + (light - dark) * rng.uniform(0.4, 1)
        texel = depth / self.focal * 4 ** rng.random()
        return np.array([rng.integers(texture.COUNT), texel, *(rng.random(2) * texture.SIZE), *dark, *light])

    def surfaces(self) -> Surfaces:
        """Everything added so far."""
        centre, a, b, normal, size, look = (np.array(part, np.float32) for part in zip(*self.rows, strict=True))
        return Surfaces(
            centre, a, b, normal, size[:, :2], size[:, 2], look[:, 0].astype(np.int32), look[:, 1], look[:, 2:4],
            look[:, 4:7], look[:, 7:],
        )  # fmt: skip


def _about(axis: int, angle: float) -> NDArray[np.float64]:
    """The rotation by an angle about axis 0 (x), 1 (y) or 2 (z)."""
    turn = np.eye(3)
    first, second = (i for i in range(3) if i != axis)
    turn[first, first] = turn[second, second] = np.cos(angle)
    turn[second, first] = np.sin(angle)
    turn[first, second] = -turn[second, first]
    return turn


def _world(rng: np.random.Generator, view: View) -> tuple[Surfaces, Floats]:
    """A room with its objects, and where the light is."""
    focal = view.camera.focal_px
    room = _Builder(rng, focal, _about(0, rng.uniform(-PITCH, PITCH)))
    floor = rng.uniform(*EYE_HEIGHT)
    back = rng.uniform(0.45, 0.75) * view.far
    _walls(room, view, floor, back)
    for _ in range(rng.integers(view.objects[0], view.objects[1] + 1)):
        size = rng.uniform(0.06, 0.28)  # half the object's extent over its distance
        near = view.near / SLACK
        distance = near * (back / near) ** rng.random() / (1 - size)
        width, height = view.width / focal, view.height / focal
        centre = distance * np.array([rng.uniform(-0.5, 0.5) * width, rng.uniform(-0.5, 0.5) * height, 1])
        KINDS[rng.integers(len(KINDS))](room, centre, size * distance, floor)
    sun = np.array([rng.uniform(-1, 1), rng.uniform(-1.5, -0.5), rng.uniform(-1, 0)])
    return room.surfaces(), (sun / np.linalg.norm(sun)).astype(np.float32)


def _walls(room: _Builder, view: View, floor: float, back: float) -> None:
    """Five planes around the camera, as far away as `far` allows in their corners."""
    rng, endless = room.rng, (np.inf, np.inf)
    yaw = _about(1, rng.uniform(-YAW, YAW))
    flat = np.array([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])  # a floor's axes
    wall = np.eye(3)
    side = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])
    for height in (floor, -rng.uniform(*EYE_HEIGHT)):
        room.add(np.array([0, height, 0]), flat, endless, room.look(view.near * 2.5))
    room.add(yaw @ np.array([0, 0, back]), wall @ yaw.T, endless, room.look(back))
    for at in (-rng.uniform(0.2, 0.45) * view.far, rng.uniform(0.2, 0.45) * view.far):
        room.add(yaw @ np.array([at, 0, 0]), side @ yaw.T, endless, room.look(view.far / 2))


def _box(room: _Builder, centre: NDArray[np.float64], extent: float, floor: float) -> None:
    """A box turned about the vertical, and if it floats about a second axis; half its diagonal is `extent`."""
    rng = room.rng
    half = rng.uniform(0.15, 1, 3)
    half *= extent / np.linalg.norm(half)
    turn = _about(1, rng.uniform(-np.pi, np.pi))
    if rng.random() < STANDING:
        centre = np.array([centre[0], floor - half[1], centre[2]])
    else:
        turn = turn @ _about(int(rng.integers(0, 2)) * 2, rng.uniform(-0.5, 0.5))
    look = room.look(centre[2])
    for axis in range(3):
        others = [i for i in range(3) if i != axis]
        for sign in (-1, 1):
            normal = turn[:, axis] * sign
            middle = centre + normal * half[axis]
            if normal @ middle < 0 or abs(normal[0]) > 0.5:  # faces the left camera, or may face the right one
                room.add(middle, np.stack([*turn[:, others].T, normal]), (half[others[0]], half[others[1]]), look)


def _ball(room: _Builder, centre: NDArray[np.float64], extent: float, floor: float) -> None:
    """A ball of radius `extent`."""
    if room.rng.random() < STANDING:
        centre = np.array([centre[0], floor - extent, centre[2]])
    room.add(centre, np.eye(3), (0.0, 0.0), room.look(centre[2]), extent)


def _board(room: _Builder, centre: NDArray[np.float64], extent: float, floor: float) -> None:
    """A slanted rectangle that floats, up to 60 degrees off the view."""
    rng = room.rng
    share = rng.uniform(0.2, 0.8)
    half = (extent * np.cos(share * np.pi / 2), extent * np.sin(share * np.pi / 2))
    slant = rng.uniform(-np.pi / 3, np.pi / 3)
    turn = _about(2, rng.uniform(-np.pi, np.pi)) @ _about(int(rng.integers(0, 2)), slant)
    room.add(centre, turn.T, half, room.look(centre[2]))


KINDS = (_box, _ball, _board)
