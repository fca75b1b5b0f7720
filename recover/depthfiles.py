"""Files of depth data sets, read into arrays: pictures, KITTI's 16-bit disparity, PFM, NumPy arrays without pickle.

Every reader raises ValueError in one line that names the file when it is damaged or of another kind.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rlkit.recover.depthsample import Image, Map

KITTI_SCALE = 256  # a stored 16-bit value is 256 times the disparity, 0 where it is not known (KITTI's devkit)
MOST_VALUES = 2**27  # of a PFM or an array: half a gigabyte of float32, ten times a large camera's picture


@contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Whatever a parser says of a damaged file, in one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"there is no {what} {name}; the data set needs it") from error
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be read as {what}: {reason}; fetch the file again") from error


def read_image(source: Path | IO[bytes], name: str = "") -> Image:
    """A picture as RGB bytes (H, W, 3); grey ones have three equal channels."""
    from PIL import Image as pictures  # of the extra [depth]

    with _reading("image", name or str(source)), pictures.open(source) as picture:
        return np.array(picture.convert("RGB"))


def read_kitti(path: Path) -> Map:
    """KITTI's disparity (H, W) in pixels, 0 where it is not known."""
    from PIL import Image as pictures

    with _reading("disparity of 16 bits", str(path)), pictures.open(path) as picture:
        if not picture.mode.startswith("I"):
            raise ValueError(f"its mode is {picture.mode}, not 16-bit grey")
        return np.array(picture, np.float32) / np.float32(KITTI_SCALE)


def read_pfm(path: Path) -> Map:
    """A grey portable float map (H, W), whose rows are stored from the bottom up.

    The header is "Pf", width and height, and a scale whose sign says the byte order: negative is little-endian.
    """
    with _reading("PFM disparity", str(path)):
        data = path.read_bytes()
        header = re.match(rb"Pf\s+(\d{1,6})\s+(\d{1,6})\s+(-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s", data[:80])
        if header is None:
            raise ValueError("it does not begin with Pf, a size and a scale")
        width, height, scale = int(header[1]), int(header[2]), float(header[3])
        if not 0 < width * height <= MOST_VALUES or len(data) - header.end() != 4 * width * height:
            raise ValueError(f"{len(data) - header.end()} bytes do not hold {width}x{height} values")
        values = np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=header.end()).reshape(height, width)
        return np.ascontiguousarray(values[::-1], np.float32)


def read_npy(path: Path) -> NDArray[Any]:
    """A NumPy array of numbers; pickled ones are refused."""
    with _reading("NumPy array", str(path)), path.open("rb") as file:
        values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return values


def read_npz(source: IO[bytes], name: str, member: str = "arr_0") -> NDArray[Any]:
    """One array of an .npz archive."""
    with _reading("NumPy archive", name), np.load(source, allow_pickle=False) as archive:
        values: NDArray[Any] = archive[member]
        return values
