"""Whether a pair is rectified: what is in one row of the left image must be in the same row of the right one.

At points with structure across the rows a small patch is looked for in the right image, in its own row and in those
above and below, under every disparity. A point speaks against the pair where another row fits far better than its own.
Cameras turned against each other show rows that agree in one part of the image and not in another, so points all over
it are asked. Texture that repeats, or is weak, hides some of what is off, so a fifth of them is enough.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from rlkit.recover.depthsample import Image

WIDTH = 400  # images are shrunk to about that many columns
CELLS = 8  # points across and down, one in each cell
HALF = 4  # of a patch: 9 x 9 pixels
ROWS = 6  # above and below that are tried
REACH = 4  # the disparities tried end at a width / REACH
FAR_BETTER, LEVELS = 1.5, 2.0  # far better: FAR_BETTER times its mean difference plus LEVELS grey levels is less
OFF = 0.2  # share of points from which a pair is refused; good pairs had at most 0.06, pairs two rows off 0.26 or more


def need_rectified(name: str, left: Image, right: Image) -> None:
    """Raise ValueError if too many points of a pair (H, W, 3) are in other rows of the right image."""
    factor = max(1, round(left.shape[1] / WIDTH))
    rows = offsets(_grey(left, factor), _grey(right, factor))
    off = rows[rows != 0]
    if len(rows) >= CELLS and len(off) > OFF * len(rows):
        pixels = float(np.median(np.abs(off))) * factor
        why = f"{len(off)} of {len(rows)} points are about {pixels:.0f} rows away from their partner"
        raise ValueError(f"{name}: the pair is not rectified, {why}; rectify it with the cameras' calibration first")


def _grey(image: Image, factor: int) -> NDArray[np.float32]:
    grey = image.mean(-1, dtype=np.float32)
    height, width = (size // factor for size in grey.shape)
    blocks = grey[: height * factor, : width * factor].reshape(height, factor, width, factor)
    small: NDArray[np.float32] = blocks.mean((1, 3), dtype=np.float32)
    return small


def offsets(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.int64]:
    """Per point with structure: rows down to where it fits, 0 where its own row fits about as well. Grey (H, W)."""
    found = []
    for row, column in _points(left):
        first = max(0, column - HALF - left.shape[1] // REACH)
        patch = left[row - HALF : row + HALF + 1, column - HALF : column + HALF + 1]
        strip = right[row - HALF - ROWS : row + HALF + ROWS + 1, first : column + 2 * HALF + 1]
        windows = sliding_window_view(strip, patch.shape)  # (2 ROWS + 1, disparities, 9, 9)
        centred = windows - windows.mean((2, 3), keepdims=True)
        costs = np.abs(centred - (patch - patch.mean())).mean((2, 3)).min(1)
        best = int(costs.argmin())
        found.append(best - ROWS if FAR_BETTER * costs[best] + LEVELS < costs[ROWS] else 0)
    return np.array(found, np.int64)


def _points(grey: NDArray[np.float32]) -> list[tuple[int, int]]:
    """The place with most structure across the rows of each cell, where there is any."""
    margin = HALF + ROWS
    across = np.zeros_like(grey)
    across[1:-1] = np.abs(grey[2:] - grey[:-2])
    inner = across[margin : grey.shape[0] - margin, margin : grey.shape[1] - margin]
    points = []
    for i, band in enumerate(np.array_split(inner, CELLS, 0)):
        for j, cell in enumerate(np.array_split(band, CELLS, 1)):
            if cell.size and cell.max() > LEVELS * 4:
                row, column = np.unravel_index(int(cell.argmax()), cell.shape)
                above = sum(len(part) for part in np.array_split(inner, CELLS, 0)[:i])
                before = sum(part.shape[1] for part in np.array_split(band, CELLS, 1)[:j])
                points.append((margin + above + int(row), margin + before + int(column)))
    return points
