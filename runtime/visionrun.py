"""Depth networks in the plain runtime: images of any size go in, metres or pixels of disparity come out.

A file of export/vision.py says in its metadata what it is, so nothing else is needed: images are padded to the
network's stride by repeating their last row and column, results cut to the old size and taken back from the log scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.recover.depthfile import Description, Kind
from rlkit.recover.depthsample import DepthSample, Image, Map, StereoSample, pad, planes
from rlkit.runtime.framebench import available

META = "rlkit.depth"
SILENT = 4  # what goes wrong is raised


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file is: its network, the stride of its sizes, and the one size it takes, None for any."""

    description: Description
    stride: int
    size: tuple[int, int] | None
    inputs: tuple[str, ...]


class DepthRun:
    """An open network; make one with `open_depth`."""

    def __init__(self, session: Any, facts: Facts) -> None:
        self.session, self.facts = session, facts

    def __call__(self, *images: Image) -> Map:
        """RGB bytes (H, W, 3), one or a left and a right one, or batches of them -> metres or pixels (..., H, W).

        Raises ValueError for another number of images, for pairs of two sizes, and for sizes that the file or the
        network does not take.
        """
        values = self.session.run(None, self.feeds(*images))[0][:, 0]
        height, width = images[0].shape[-3:-1]
        shown = values[:, :height, :width].reshape(images[0].shape[:-1])
        scale = self.facts.description.scale
        result: Map = shown if scale is None else scale.decode(shown)
        return result

    def feeds(self, *images: Image) -> dict[str, NDArray[np.float32]]:
        """What the session is given for images: (B, 3, H, W) in 0..1, padded."""
        names = self.facts.inputs
        if len(images) != len(names):
            raise ValueError(f"{len(images)} images for a network of {' and '.join(names)}; give {len(names)}")
        if len({image.shape for image in images}) > 1:
            sizes = " and ".join(f"{image.shape[-2]}x{image.shape[-3]}" for image in images)
            raise ValueError(f"images of {sizes} are no rectified pair; give both in one size")
        padded = [pad(image, self.facts.stride) for image in images]
        size = self.facts.size
        if size is not None and padded[0].shape[-3:-1] != size:
            given = f"images of {images[0].shape[-2]}x{images[0].shape[-3]}"
            raise ValueError(f"{given} for a file of {size[1]}x{size[0]}; export it with open sizes, or for this size")
        shape = (-1, *padded[0].shape[-3:])
        return {name: planes(image.reshape(shape)) for name, image in zip(names, padded, strict=True)}

    def feeds_of(self, sample: DepthSample | StereoSample) -> dict[str, NDArray[np.float32]]:
        """`feeds` of a sample's images; ValueError for a sample of the other kind."""
        return self.feeds(*_images(sample))


def _images(sample: DepthSample | StereoSample) -> tuple[Image, ...]:
    return (sample.image,) if isinstance(sample, DepthSample) else (sample.left, sample.right)


def open_depth(path: Path, *, provider: str = "cpu", threads: int = 1) -> DepthRun:
    """Open a file of export/vision.py on one provider, never on another than that.

    Raises FileNotFoundError, and ValueError for what is no such file and for a provider that is not here.
    """
    import onnxruntime as ort

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; make one with rlkit depth export")
    wanted = available(provider)
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = SILENT
    try:
        session = ort.InferenceSession(str(path), options, providers=[wanted], enable_fallback=0)
    except Exception as error:  # of any kind the runtime has
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot be opened by onnxruntime {ort.__version__}: {line}") from error
    if session.get_providers()[0] != wanted:
        raise ValueError(f"onnxruntime gave {session.get_providers()[0]} instead of {wanted}; use another device")
    return DepthRun(session, _facts(path, session.get_modelmeta().custom_metadata_map, session.get_inputs()))


def _facts(path: Path, meta: Mapping[str, str], inputs: Any) -> Facts:
    if META not in meta:
        raise ValueError(f"{path} does not say what it estimates; export the network with rlkit depth export")
    try:
        fields = json.loads(meta[META])
        description, stride = Description.from_json(fields), fields["stride"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: what it says of itself is damaged ({error}); export it again") from error
    sides = tuple(inputs[0].shape[2:])
    size = sides if all(isinstance(side, int) for side in sides) else None
    names = tuple(value.name for value in inputs)
    if len(names) != (1 if description.kind is Kind.MONO else 2) or type(stride) is not int or stride < 1:
        raise ValueError(f"{path} is no {description.kind} network: it reads {', '.join(names)}; export it again")
    return Facts(description, stride, size, names)
