"""Maps of depth and disparity as pictures: the truth and what networks say in one range of colours, errors in another.

    value   dark blue (far) to yellow (near): disparity, or minus the logarithm of depth
    error   black to white: |d - t| in pixels up to FAR_PIXELS; of depth |d - t| / t up to FAR_SHARE

Colours grow lighter evenly, so they read the same in grey. Where the truth is not known a truth and an error are
transparent. PNG is written here: lines of bytes behind a filter of 0, deflated.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.profiles.depthresult import DepthResult, Picture
from rlkit.recover.atomic import write_bytes
from rlkit.recover.depthfile import Kind
from rlkit.recover.depthsample import Image, Map, Mask

MOST_WIDTH = 640  # pixels; larger pictures are thinned out
FAR_PIXELS, FAR_SHARE = 10.0, 0.5
ENDS = (0.01, 0.99)  # of the known truth: the range of colours
# Every eighth of the way; the first is that of matplotlib's viridis, the second of its inferno (both CC0).
VALUE = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
ERROR = ("000004", "210c4a", "57106e", "8a226a", "bc3754", "e45a31", "f98e09", "f9cb35", "fcffa4")


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture: what it is ("image", "truth", a row's name, or that and " error"), and its PNG."""

    name: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Range:
    """The values at the dark and the light end of the colours."""

    dark: float
    light: float


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An image of bytes (H, W), (H, W, 3) or (H, W, 4) as PNG; ValueError for another shape."""
    kinds = {1: 0, 3: 2, 4: 6}  # grey, RGB, RGBA
    shape = pixels.shape if pixels.ndim == 3 else (*pixels.shape, 1)
    if len(shape) != 3 or shape[2] not in kinds or not pixels.size or pixels.dtype != np.uint8:
        raise ValueError(f"{pixels.dtype} of shape {pixels.shape} is no picture; give bytes (H, W), (H, W, 3 or 4)")
    height, width, channels = shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, kinds[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*each) for each in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def coloured(shares: NDArray[Any], colours: tuple[str, ...], shown: Mask | None = None) -> NDArray[np.uint8]:
    """Shares (H, W) in 0..1 as RGBA (H, W, 4), transparent where not `shown`."""
    anchors = np.array([[int(colour[at : at + 2], 16) for at in (0, 2, 4)] for colour in colours], np.float64)
    place = np.clip(np.nan_to_num(shares), 0, 1) * (len(colours) - 1)
    made = np.full((*shares.shape, 4), 255, np.uint8)
    for channel in range(3):
        made[..., channel] = np.rint(np.interp(place, np.arange(len(colours)), anchors[:, channel]))
    if shown is not None:
        made[~shown] = 0
    return made


def value_range(kind: Kind, truth: Map, valid: Mask) -> Range:
    """The truth's range but for its outermost hundredths: for disparity small to large, for depth far to near."""
    low, high = (float(end) for end in np.quantile(truth[valid], ENDS))
    high = high if high > low else low + 1
    return Range(high, low) if kind is Kind.MONO else Range(low, high)


def values(kind: Kind, given: Map, ends: Range, shown: Mask | None = None) -> NDArray[np.uint8]:
    """A map in colours, (H, W, 4)."""
    least = min(ends.dark, ends.light) / 16
    way = (lambda x: -np.log(np.maximum(x, least))) if kind is Kind.MONO else np.asarray
    dark, light = way(ends.dark), way(ends.light)
    return coloured((way(given) - dark) / (light - dark), VALUE, shown)


def errors(kind: Kind, given: Map, truth: Map, valid: Mask) -> NDArray[np.uint8]:
    """Where and how much a map is wrong, (H, W, 4)."""
    known = np.where(valid, truth, 1).astype(np.float64)
    off = np.abs(given - known)
    shares = off / known / FAR_SHARE if kind is Kind.MONO else off / FAR_PIXELS
    return coloured(shares, ERROR, valid)


def thinned(picture: Picture) -> Picture:
    """The picture at most MOST_WIDTH wide: every n-th pixel, so that no value is made up."""
    step = -(-picture.truth.shape[1] // MOST_WIDTH)
    at = (slice(step // 2, None, step),) * 2
    image: Image = picture.image[at]
    predictions = {name: each[at] for name, each in picture.predictions.items()}
    return Picture(picture.name, image, picture.truth[at], picture.valid[at], predictions)


def drawn(kind: Kind, picture: Picture) -> Iterator[Shown]:
    """Yield the image, the truth, and each prediction followed by its error."""
    ends = value_range(kind, picture.truth, picture.valid)
    yield Shown("image", png(picture.image))
    yield Shown("truth", png(values(kind, picture.truth, ends, picture.valid)))
    for name, each in picture.predictions.items():
        yield Shown(name, png(values(kind, each, ends)))
        yield Shown(f"{name} error", png(errors(kind, each, picture.truth, picture.valid)))


def bar(colours: tuple[str, ...]) -> bytes:
    """The colours from the dark end to the light one, 256 x 1."""
    return png(coloured(np.linspace(0, 1, 256)[None], colours)[..., :3].copy())


def write(folder: Path, result: DepthResult) -> tuple[Path, ...]:
    """Write every picture in full size, KIND-PICTURE-WHAT.png, each complete or not at all; returns the paths.

    Pictures of an earlier result that this one does not have go.
    """
    made: list[Path] = []
    for suite in result.suites:
        for picture in suite.pictures:
            for shown in drawn(suite.kind, picture):
                stem = "-".join(map(_plain, (str(suite.kind), picture.name, shown.name)))
                path = folder / f"{stem}.png"
                for number in range(2, len(made) + 2):  # names that differ in signs alone
                    if path not in made:
                        break
                    path = folder / f"{stem}-{number}.png"
                write_bytes(path, shown.png)
                made.append(path)
    for old in {path for kind in Kind for path in folder.glob(f"{kind}-*.png")}.difference(made):
        old.unlink()
    return tuple(made)


def _plain(name: str) -> str:
    """A name as part of a file's name: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "x"
