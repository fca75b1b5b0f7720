"""Many forecasts as columns: over contexts, chunk sizes and recipes, alone or in every combination.

What does not depend on the past is counted once per recipe, so a point costs about a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rlkit.profiles.account import Model
from rlkit.profiles.forecast import Workload, forecast_model

SCHEMA_VERSION = 1
AXES = ("contexts", "chunks", "recipes")
SHORTEST, SMALLEST_CHUNK = 128, 16
MOST_POINTS = 100_000


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model stored by one recipe where it decodes, and where it reads prompts if that is elsewhere."""

    decode: Model
    prefill: Model | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One forecast: seconds and tokens/s by the roofline, and by the LIFE formula; `refused` says why there is none."""

    recipe: str
    context: int
    chunk: int | None
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    tokens_per_s: float | None = None
    life_ttft_seconds: float | None = None
    life_tpot_seconds: float | None = None
    nbytes_per_token: int | None = None
    memory_nbytes: int | None = None
    step_joules: float | None = None
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What was varied, for what, and the points: recipes outermost, then contexts, then chunks."""

    axes: tuple[str, ...]
    model: str
    prefill_place: str
    decode_place: str
    label: str
    new_tokens: int
    batch: int
    points: tuple[Point, ...]

    def columns(self) -> dict[str, list[Any]]:
        """The points as columns of equal length."""
        return {item.name: [getattr(point, item.name) for point in self.points] for item in fields(Point)}

    def curves(self, axis: str) -> dict[str, list[Point]]:
        """The points that have numbers, by what they differ in besides `axis`: "w4", or "w4, chunks of 256"."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            if not point.refused:
                found.setdefault(self._name(point, axis), []).append(point)
        return found

    def names(self) -> dict[int, str]:
        """What each point that has numbers is, by its place."""
        return {place: self._name(point) for place, point in enumerate(self.points) if not point.refused}

    def _name(self, point: Point, axis: str = "") -> str:
        words = [point.recipe]
        if "contexts" in self.axes and axis != "contexts":
            words.append(f"{point.context:,} tokens")
        if "chunks" in self.axes and axis != "chunks":
            words.append(f"chunks of {point.chunk}" if point.chunk else "whole prompts")
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; points as columns."""
        about = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "points"}
        return {"schema_version": SCHEMA_VERSION, **about, "axes": list(self.axes), "columns": self.columns()}

    @classmethod
    def from_json(cls, table: dict[str, Any], where: str = "sweep.json") -> Sweep:
        """The inverse of `to_json`; ValueError for another schema version, or for what is no sweep."""
        if table.get("schema_version") != SCHEMA_VERSION:
            why = f"schema_version {table.get('schema_version')!r}, this rlkit reads {SCHEMA_VERSION}"
            raise ValueError(f"{where} has {why}; make it again with `rlkit forecast --sweep`")
        try:
            names = [item.name for item in fields(Point)]
            rows = zip(*(table["columns"][name] for name in names), strict=True)
            points = tuple(Point(**dict(zip(names, row, strict=True))) for row in rows)
            kept = {item.name: table[item.name] for item in fields(cls) if item.name not in ("axes", "points")}
            return cls(axes=tuple(table["axes"]), points=points, **kept)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is no sweep ({error}); make it again with `rlkit forecast --sweep`") from error


def axes_of(text: str) -> tuple[str, ...]:
    """What `--sweep` names, with commas between; ValueError naming what there is."""
    asked = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in asked:
        if name not in AXES:
            raise ValueError(f"there is no sweep over {name!r}; use {', '.join(AXES)}, or several with commas between")
    return asked


def contexts_of(model: Model, new_tokens: int) -> tuple[int, ...]:
    """Powers of two from SHORTEST to what the model's context leaves beside the new tokens."""
    most = model.architecture.max_context - new_tokens
    return tuple(2**power for power in range(SHORTEST.bit_length() - 1, 31) if 2**power <= most) or (max(most, 1),)


def chunks_of(prompt_tokens: int) -> tuple[int | None, ...]:
    """Powers of two below the prompt's length, and the whole of it."""
    smaller = (2**power for power in range(SMALLEST_CHUNK.bit_length() - 1, 31))
    return (*(size for size in smaller if size < prompt_tokens), None)


def sweep(
    models: Mapping[str, Prepared],
    workload: Workload,
    *,
    contexts: Sequence[int] | None = None,
    chunks: Sequence[int | None] | None = None,
) -> Sweep:
    """Forecast every combination of models (by recipe), contexts and chunks; None takes those of the workload.

    A point that the model or its place has no room for says so instead of ending the sweep.
    """
    if not models:
        raise ValueError("there is nothing to sweep over; name at least one recipe")
    lengths, sizes = contexts or (workload.prompt_tokens,), chunks or (workload.chunk,)
    count = len(models) * len(lengths) * len(sizes)
    if count > MOST_POINTS:
        raise ValueError(f"{count:,} points are more than {MOST_POINTS:,}; sweep over less")
    points = [
        _point(name, model, replace(workload, prompt_tokens=context, chunk=chunk))
        for name, model in models.items()
        for context in lengths
        for chunk in sizes
    ]
    first = next(iter(models.values()))
    decode, prefill = first.decode.place, (first.prefill or first.decode).place
    axes = [name for name, given in (("contexts", contexts), ("chunks", chunks)) if given]
    labels = {place.rates.label for place in (decode, prefill)}
    return Sweep(
        axes=(*axes, "recipes") if len(models) > 1 or not axes else tuple(axes),
        model=first.decode.architecture.name,
        prefill_place=prefill.name,
        decode_place=decode.name,
        label=" and ".join(sorted(labels)),
        new_tokens=workload.new_tokens,
        batch=workload.batch,
        points=tuple(points),
    )


def _point(name: str, model: Prepared, workload: Workload) -> Point:
    at = Point(name, workload.prompt_tokens, workload.chunk)
    try:
        made = forecast_model(model.decode, workload, prefill=model.prefill)
    except ValueError as error:
        return replace(at, refused=str(error))
    return replace(
        at,
        ttft_seconds=made.roofline.ttft_seconds,
        tpot_seconds=made.roofline.tpot_seconds,
        tokens_per_s=made.tokens_per_s,
        life_ttft_seconds=made.life.ttft_seconds,
        life_tpot_seconds=made.life.tpot_seconds,
        nbytes_per_token=made.roofline.nbytes_per_token,
        memory_nbytes=made.memory.nbytes,
        step_joules=made.energy.step_joules,
    )
