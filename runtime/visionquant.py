"""Depth networks in int8, by onnxruntime's own static quantizer: weights per channel, activations per tensor (QDQ).

    q = round(x / s) + z      s, z of an activation from the range that calibration finds for it over sample images

Ranges: `minmax` takes the extremes, `percentile` leaves out the largest TAIL of values, `entropy` cuts where the
histogram loses least. What is kept in float: the convolutions at the network's ends (they see the image, and say the
answer), all of them, or none. `quantize_static` tries what it is given and keeps the file that is closest to the float
one on the samples, unless one way is named.

Only what lies between convolutions of pairs' features and costs is quantized in a stereo network: disparities are
added and interpolated in float, whose fractions of a pixel int8 cannot say.

What it does not know: truth. The error is against the float network; what a metric makes of it is for metrics to say.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.recover.atomic import write_bytes
from rlkit.recover.depthfile import Kind
from rlkit.recover.depthsample import DepthSample, StereoSample
from rlkit.runtime.visionrun import DepthRun, open_depth

METHODS = ("minmax", "percentile", "entropy")
KEEPS = ("none", "ends")
TAIL = 1e-4  # of the values, at both sides together
MOST_SAMPLES = 16  # the quantizer holds the activations of all of them in memory at once
OPERATORS = {
    Kind.MONO: ("Conv", "LeakyRelu", "Add", "Concat", "MaxPool", "Resize"),
    Kind.STEREO: ("Conv", "Relu", "MaxPool"),
}
Feeds = Mapping[str, NDArray[Any]]
Given = Feeds | DepthSample | StereoSample


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to quantize: `error` is the RMS difference from the float network over the RMS of its answer's spread."""

    method: str
    keep: str
    kept: tuple[str, ...]
    error: float


@dataclass(frozen=True, slots=True)
class Quantized:
    """The file's way, every way that was tried, and bytes before and after."""

    chosen: Trial
    trials: tuple[Trial, ...]
    float_nbytes: int
    nbytes: int


def quantize_static(
    model: Path,
    out: Path,
    samples: Iterable[Given],
    *,
    methods: Sequence[str] = ("minmax", "percentile"),
    keeps: Sequence[str] = KEEPS,
) -> Quantized:
    """Write an int8 file of a float one, complete or not at all, calibrated on samples or on feeds of the session.

    Raises ValueError for methods that are none, for more than MOST_SAMPLES samples or none, and for a file that is no
    depth network or is quantized already.
    """
    from rlkit.export.visiongraph import ends

    _check(methods, keeps)
    opened = open_depth(model)
    feeds = [each if isinstance(each, Mapping) else opened.feeds_of(each) for each in samples]
    if not 1 <= len(feeds) <= MOST_SAMPLES:
        raise ValueError(f"{len(feeds)} samples to calibrate on; give 1 to {MOST_SAMPLES} images or pairs")
    wanted = [opened.session.run(None, dict(each))[0] for each in feeds]
    first, last = ends(model)
    kept = {"none": (), "ends": (*first, *last)}
    tried: list[tuple[Trial, bytes]] = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        ready = _prepared(model, Path(folder))
        for method in methods:
            for keep in keeps:
                made = _quantized(ready, Path(folder), feeds, _Way(method, kept[keep], opened.facts.description.kind))
                tried.append((Trial(method, keep, kept[keep], _error(made, feeds, wanted)), made.read_bytes()))
    chosen, best = min(tried, key=lambda each: each[0].error)
    write_bytes(out, best)
    return Quantized(chosen, tuple(trial for trial, _ in tried), model.stat().st_size, len(best))


@dataclass(frozen=True, slots=True)
class _Way:
    method: str
    kept: tuple[str, ...]
    kind: Kind


class _Reader:
    """The samples one after the other, as the quantizer takes them."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next one's inputs, None after the last."""
        found = next(self._left, None)
        return None if found is None else dict(found)


def _check(methods: Sequence[str], keeps: Sequence[str]) -> None:
    for what, given, known in (("method", methods, METHODS), ("keep", keeps, KEEPS)):
        if not given or any(name not in known for name in given):
            raise ValueError(f"{what} {', '.join(given) or 'of no name'} is not known; use {', '.join(known)}")


def _prepared(model: Path, folder: Path) -> Path:
    """The file with constants and batch norms folded, as the quantizer wants it; ValueError if it is int8 already."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if b"QuantizeLinear" in model.read_bytes():
        raise ValueError(f"{model} is quantized already; give the float file")
    ready = folder / "ready.onnx"
    quant_pre_process(str(model), str(ready), skip_symbolic_shape=True)
    return ready


def _quantized(ready: Path, folder: Path, feeds: Sequence[Feeds], way: _Way) -> Path:
    from onnxruntime import quantization as quant

    methods = {
        "minmax": quant.CalibrationMethod.MinMax,
        "percentile": quant.CalibrationMethod.Percentile,
        "entropy": quant.CalibrationMethod.Entropy,
    }
    made = folder / "int8.onnx"
    ranges = folder / f"{way.method}.json"  # the same whatever is kept
    quant.quantize_static(
        str(ready),
        str(made),
        _Reader(feeds),
        quant_format=quant.QuantFormat.QDQ,
        op_types_to_quantize=list(OPERATORS[way.kind]),
        per_channel=True,
        activation_type=quant.QuantType.QUInt8,
        weight_type=quant.QuantType.QInt8,
        nodes_to_exclude=list(way.kept),
        calibrate_method=methods[way.method],
        calibration_cache_path=str(ranges),
        extra_options={"CalibPercentile": 100 * (1 - TAIL)},
    )
    return made


def _error(made: Path, feeds: Sequence[Feeds], wanted: Sequence[NDArray[Any]]) -> float:
    """RMS difference over all samples, in units of the float answers' own spread."""
    run: DepthRun = open_depth(made)
    found = [run.session.run(None, dict(each))[0] for each in feeds]
    off = float(np.mean([np.mean(np.square(a - b, dtype=np.float64)) for a, b in zip(found, wanted, strict=True)]))
    spread = float(np.mean([np.var(each, dtype=np.float64) for each in wanted]))
    return float(np.sqrt(off / spread)) if spread else float(np.sqrt(off))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's reports and its advice, which was taken."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(before)
