"""What is known of depth networks and their smaller versions: accuracy against parameters, FLOPs, bytes, latency.

A result has a **suite** for each kind (one image, or a pair): the data it was measured on, a row per network and per
baseline on the same data, and pictures. A row is on the frontier if no other network is as good in both the figure that
leads (SSIM; the three-pixel error) and its size. A **bar** is a sentence with the figure asked for and the one found.

On disk `depth.json` and, where there are pictures, `pictures.safetensors` beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from rlkit.profiles.depthmetrics import DepthScore, StereoScore
from rlkit.recover.atomic import write_bytes, write_json
from rlkit.recover.depthfile import Kind
from rlkit.recover.depthsample import Image, Map, Mask
from rlkit.recover.source import read_json

SCHEMA_VERSION = 1
RESULT, PICTURES = "depth.json", "pictures.safetensors"
SCORES = {Kind.MONO: DepthScore, Kind.STEREO: StereoScore}
LEADING = {Kind.MONO: "ssim", Kind.STEREO: "three_pixel"}
HIGHER_IS_BETTER = {Kind.MONO: True, Kind.STEREO: False}

Score = DepthScore | StereoScore


@dataclass(frozen=True, slots=True)
class Data:
    """What was measured on: `about` in words, images or pairs, and whether no network learned from their like."""

    name: str
    about: str
    samples: int
    held_out: bool = True


@dataclass(frozen=True, slots=True)
class Scored:
    """A score on one data set; `stage` is that of an AnyNet, counted from 1, None for the answer of the last one."""

    data: str
    score: Score
    stage: int | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of one frame at the suite's size: median and quartiles of `frames` runs; forecast where there is one."""

    device: str
    threads: int
    seconds: float
    low: float
    high: float
    frames: int
    forecast_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A network or a baseline. Sizes are None for baselines; `how` says in words how it was made.

    parameters: as Keras counts, running statistics included. flops: of one frame, 2 per multiply-add, convolutions
    and products only. nbytes: of the file it runs from. precision: of that file, float32 or int8.
    """

    name: str
    how: str
    scores: tuple[Scored, ...]
    parameters: int | None = None
    flops: int | None = None
    nbytes: int | None = None
    precision: str = "float32"
    latency: tuple[Latency, ...] = ()
    folder: str | None = None
    train_steps: int | None = None
    train_seconds: float | None = None

    @property
    def baseline(self) -> bool:
        """Whether it is no network."""
        return self.parameters is None

    def score(self, data: str, stage: int | None = None) -> Score | None:
        """The score on a data set, None where it was not measured."""
        return next((each.score for each in self.scores if (each.data, each.stage) == (data, stage)), None)


@dataclass(frozen=True, slots=True)
class Bar:
    """A claim held against what was measured: `found` and `wanted` in the same unit."""

    claim: str
    wanted: float
    found: float
    met: bool


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One image with its truth and what networks and baselines say of it, in metres or pixels of disparity."""

    name: str
    image: Image  # (H, W, 3)
    truth: Map  # (H, W)
    valid: Mask  # (H, W)
    predictions: dict[str, Map]  # by a row's name: (H, W)


@dataclass(frozen=True, slots=True, eq=False)
class Suite:
    """All networks of a kind, the first row being the one that the others are compared with.

    height, width: of a frame whose FLOPs and latency are told.
    """

    kind: Kind
    height: int
    width: int
    data: tuple[Data, ...]
    rows: tuple[Row, ...]
    bars: tuple[Bar, ...] = ()
    pictures: tuple[Picture, ...] = ()

    def row(self, name: str) -> Row:
        """A row by its name; KeyError if there is none."""
        return {row.name: row for row in self.rows}[name]

    def leading(self, row: Row, data: str | None = None) -> float | None:
        """The figure that leads: SSIM, or the three-pixel error, on the first data set unless told; None without."""
        name = data or next((each.name for each in self.data), "")
        score = row.score(name)
        value = None if score is None else getattr(score, LEADING[self.kind])
        return None if value is None else float(value)

    def frontier(self, size: str = "parameters", data: str | None = None) -> list[Row]:
        """The networks of which no other one is both better and smaller, smallest first.

        size: parameters, flops or nbytes.
        """
        sign = -1.0 if HIGHER_IS_BETTER[self.kind] else 1.0
        known = [
            (getattr(row, size), sign * figure, row)
            for row in self.rows
            if getattr(row, size) is not None and (figure := self.leading(row, data)) is not None
        ]
        best: list[Row] = []
        least = np.inf
        for _, error, row in sorted(known, key=lambda each: each[:2]):
            if error < least:
                least = error
                best.append(row)
        return best


@dataclass(frozen=True, slots=True, eq=False)
class DepthResult:
    """Suites, and how they were made: command, machine, versions, one line each."""

    suites: tuple[Suite, ...]
    about: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, pictures by name only."""
        return {
            "schema_version": SCHEMA_VERSION,
            "suites": [_suite_json(suite) for suite in self.suites],
            "about": list(self.about),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], pictures: dict[str, Any] | None = None) -> Self:
        """Inverse of to_json, with the arrays of pictures; ValueError for what is no result."""
        if fields.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version {fields.get('schema_version')} is not {SCHEMA_VERSION}; measure again")
        try:
            suites = tuple(_suite(suite, pictures or {}) for suite in fields["suites"])
            return cls(suites, tuple(fields["about"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no result of depth networks ({error!r}); measure again") from error


def _suite_json(suite: Suite) -> dict[str, Any]:
    plain = {"kind": str(suite.kind), "height": suite.height, "width": suite.width}
    lists = {name: [asdict(each) for each in getattr(suite, name)] for name in ("data", "rows", "bars")}
    return {**plain, **lists, "pictures": {each.name: list(each.predictions) for each in suite.pictures}}


def _suite(fields: dict[str, Any], arrays: dict[str, Any]) -> Suite:
    kind = Kind(fields["kind"])
    pictures = fields["pictures"].items()
    found = [_picture(name, names, f"{kind}/{name}", arrays) for name, names in pictures]
    return Suite(
        kind,
        fields["height"],
        fields["width"],
        tuple(Data(**each) for each in fields["data"]),
        tuple(_row(kind, each) for each in fields["rows"]),
        tuple(Bar(**each) for each in fields["bars"]),
        tuple(picture for picture in found if picture is not None),
    )


def _picture(name: str, names: list[str], start: str, arrays: dict[str, Any]) -> Picture | None:
    if f"{start}/image" not in arrays:
        return None
    image, truth, valid = (arrays[f"{start}/{part}"] for part in ("image", "truth", "valid"))
    return Picture(name, image, truth, valid, {who: arrays[f"{start}/of/{who}"] for who in names})


def _row(kind: Kind, fields: dict[str, Any]) -> Row:
    scores = tuple(Scored(each["data"], SCORES[kind](**each["score"]), each["stage"]) for each in fields["scores"])
    return Row(**{**fields, "scores": scores, "latency": tuple(Latency(**each) for each in fields["latency"])})


def _arrays(suites: Iterable[Suite]) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for suite in suites:
        for picture in suite.pictures:
            start = f"{suite.kind}/{picture.name}"
            arrays |= {f"{start}/{part}": getattr(picture, part) for part in ("image", "truth", "valid")}
            arrays |= {f"{start}/of/{who}": values for who, values in picture.predictions.items()}
    return {name: np.ascontiguousarray(values) for name, values in arrays.items()}


def write(folder: Path, result: DepthResult) -> None:
    """Write a result into a folder, each file complete or not at all."""
    if arrays := _arrays(result.suites):
        write_bytes(folder / PICTURES, save(arrays))
    write_json(folder / RESULT, result.to_json())


def read(folder: Path) -> DepthResult:
    """The result of a folder, with its pictures if they are there; ValueError or FileNotFoundError in one line."""
    if not (folder / RESULT).is_file():
        raise FileNotFoundError(f"{folder} has no {RESULT}; make one with rlkit depth slim")
    try:
        arrays = load_file(folder / PICTURES) if (folder / PICTURES).is_file() else None
        return DepthResult.from_json(read_json(folder / RESULT), arrays)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from error
