"""The memory that KV Pareto reports for five models, beside what their architectures say, and where they differ.

What its total counts is not known to the byte: weights, cache and "peak memory". The reference's peak decides most of
it, so three are put side by side, of a prompt read at once in 16 bit:

    flash     attention keeps no scores, logits of the last token alone: the least that a run needs
    logits    the same with the logits of every token, which a plain forward pass makes
    eager     attention's scores of all heads at once

and the one that the reported share implies, taking weights and cache as counted here:

    implied = total of the point / (1 - reported) - weights - cache of the reference
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlkit.profiles.architecture import Architecture, of_config
from rlkit.profiles.frontier import analytic, render
from rlkit.profiles.frontier.analytic import HALF, Estimate
from rlkit.profiles.frontier.space import FLOAT, KEPT, Point
from rlkit.profiles.table import Table

NAME = "published"
FILE = Path(__file__).with_name("published.toml")
LONG = 131_072
CHUNKS = (1024, 4096)  # that KV Pareto compares there
SOURCE = "KV Pareto, arXiv 2512.01953"
COLUMNS = ("model", "point", "reported", "flash", "logits", "eager", "w + kv, GB", "peaks, GB", "implied, GB")
PART_COLUMNS = ("model", "weights", "cache", "activations", "saved", "reported")
NOTE = (
    "Reported: per cent of total memory saved at 10k tokens, as summaries of KV Pareto say; its abstract: 68 to 78. "
    "Saved here: against references whose prompt is read at once with flash attention, with the logits of all tokens, "
    "and with eager attention. w + kv and peaks are the references', implied the peak that the reported "
    "figure needs."
)
PARTS = "Of the flash reference: what each part contributes to the saving, in per cent of its total."


@dataclass(frozen=True, slots=True)
class Published:
    """A model and the share that was reported for one of its points."""

    name: str
    model: Architecture
    point: Point
    saved: float

    def estimate(self, context: int, chunk: int | None = None) -> tuple[Estimate, Estimate]:
        """The reference and the point at a context, with the point's own chunks unless told."""
        weights = {name: analytic.weights_nbytes(self.model, name) for name in (FLOAT, self.point.weights)}
        first = analytic.estimate(self.model, Point(FLOAT, KEPT, None, context), weights[FLOAT])
        point = Point(self.point.weights, self.point.kv, chunk or self.point.chunk, context)
        return first, analytic.estimate(self.model, point, weights[point.weights], first)


@dataclass(frozen=True, slots=True)
class Compared:
    """A reported share beside ours; peaks of references in bytes, by what they count."""

    published: Published
    reference: Estimate
    point: Estimate
    peaks: dict[str, int]
    saved: dict[str, float]
    implied_peak_nbytes: int
    parts: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.published.name,
            "parameters": self.published.model.parameters,
            "reported": self.published.saved,
            "reference": self.reference.to_json(),
            "point": self.point.to_json(),
            "reference_peaks_nbytes": self.peaks,
            "saved": self.saved,
            "implied_peak_nbytes": self.implied_peak_nbytes,
            "parts": self.parts,
        }


@cache
def models() -> dict[str, Published]:
    """The five by name."""
    told = tomllib.loads(FILE.read_text(encoding="utf-8"))
    found = {}
    for one in told["model"]:
        point = Point(told["weights"], one["kv"], told["chunk"], told["context"])
        found[one["name"]] = Published(one["name"], of_config(one["config"], one["name"]), point, one["saved"])
    return found


def compare(published: Published) -> Compared:
    """What was reported, beside what the architecture says."""
    reference, point = published.estimate(published.point.context)
    peaks, ours = _peaks(published.model, reference), _peaks(published.model, point)
    weights, held = reference.memory.weights_nbytes, reference.memory.cache_nbytes
    mine = point.memory.weights_nbytes + point.memory.cache_nbytes
    saved = {kind: 1 - (mine + ours[kind]) / (weights + held + peaks[kind]) for kind in peaks}
    whole = reference.nbytes()
    parts = {
        "weights": (weights - point.memory.weights_nbytes) / whole,
        "cache": (held - point.memory.cache_nbytes) / whole,
        "activations": (peaks["flash"] - ours["flash"]) / whole,
    }
    implied = round(point.nbytes() / (1 - published.saved)) - weights - held
    return Compared(published, reference, point, peaks, saved, implied, parts)


def _peaks(model: Architecture, one: Estimate) -> dict[str, int]:
    """The peak of a point with flash attention, with all logits of a chunk in 16 bit too, and with eager attention."""
    rows = min(one.point.chunk or one.point.context, one.point.context)
    flash, eager = one.activations["flash"], one.activations["eager"]
    return {"flash": flash, "logits": max(flash, HALF * rows * (3 * model.hidden + model.vocab)), "eager": eager}


def tables(contexts: tuple[int, ...]) -> Iterator[Table]:
    """Reported beside ours, what the saving consists of, and the reported points at other contexts."""
    compared = [compare(one) for one in models().values()]
    columns: tuple[str, ...] = (
        "model",
        "point",
        "reported",
        "flash",
        "logits",
        "eager",
        "w + kv + peak",
        "peaks",
        "implied",
    )
    yield Table("Total memory saved at 10k tokens, %", columns, tuple(map(_cells, compared)), NOTE)
    columns = ("model", "weights", "cache", "activations", "saved", "reported")
    yield Table("What the saving consists of, points of %", columns, tuple(map(_parts, compared)), PARTS)
    columns = ("model", "point", *(f"{context:,}" for context in contexts))
    rows = tuple(_over(one, contexts) for one in models().values())
    beyond = "; ".join(
        f"{one.name} beyond its {one.model.max_context:,} tokens"
        for one in models().values()
        if max(contexts) > one.model.max_context
    )
    note = f"{analytic.NOTE} Reckoned, whatever the model was trained for: {beyond}." if beyond else analytic.NOTE
    yield Table("The same points at other contexts: total, saved", columns, rows, note)


def _cells(one: Compared) -> tuple[str, ...]:
    saved = (f"{100 * one.saved[kind]:.1f}" for kind in ("flash", "logits", "eager"))
    reference = one.reference.memory
    whole = f"{reference.weights_nbytes / 1e9:.2f} + {reference.cache_nbytes / 1e9:.2f}"
    peaks = " / ".join(f"{one.peaks[kind] / 1e9:.1f}" for kind in ("flash", "logits", "eager"))
    name, point = one.published.name, one.published.point
    reported = f"{100 * one.published.saved:.0f}"
    return (name, f"{point.weights} {point.kv}", reported, *saved, whole, peaks, f"{one.implied_peak_nbytes / 1e9:.1f}")


def _parts(one: Compared) -> tuple[str, ...]:
    each = (f"{100 * one.parts[name]:.1f}" for name in ("weights", "cache", "activations"))
    return one.published.name, *each, f"{100 * one.saved['flash']:.1f}", f"{100 * one.published.saved:.0f}"


def _over(one: Published, contexts: tuple[int, ...]) -> tuple[str, ...]:
    found = (one.estimate(context)[1] for context in contexts)
    cells = (f"{render.size(each.nbytes())}, {each.saved['flash']:.0%}" for each in found)
    return one.name, f"{one.point.weights} {one.point.kv}", *cells


def findings() -> Iterator[str]:
    """Where the reported figures and ours part, in numbers."""
    compared = [compare(one) for one in models().values()]
    apart = [100 * (one.published.saved - one.saved["flash"]) for one in compared]
    yield (
        f"with flash attention and the last token's logits the five save {_range(compared, 'flash')} %, "
        f"{min(apart):.1f} to {max(apart):.1f} points less than reported ({SOURCE})"
    )
    yield (
        f"a reference that makes all logits gives {_range(compared, 'logits')} %, one with eager attention "
        f"{_range(compared, 'eager')} %: no one of them gives the reported figures of all five"
    )
    flash, eager = ([one.implied_peak_nbytes / one.peaks[kind] for one in compared] for kind in ("flash", "eager"))
    yield (
        f"the reported figures imply peaks of {min(flash):.1f} to {max(flash):.1f} times the flash reference's, "
        f"which are {min(eager):.0%} to {max(eager):.0%} of what eager attention needs: more than one layer's "
        "activations, less than one layer's scores"
    )
    weights, held = ([100 * one.parts[part] / one.saved["flash"] for one in compared] for part in ("weights", "cache"))
    yield (
        f"of what is saved at 10k tokens, weights are {min(weights):.0f} to {max(weights):.0f} % and the cache is "
        f"{min(held):.0f} to {max(held):.0f} %"
    )
    yield from _long()


def _range(compared: list[Compared], kind: str) -> str:
    found = [100 * one.saved[kind] for one in compared]
    return f"{min(found):.1f} to {max(found):.1f}"


def _long() -> Iterator[str]:
    """What is reported of 128k tokens: more than 60 % saved, 1k chunks 23 % under 4k, flash attention 6 % more."""
    pairs = [[one.estimate(LONG, chunk) for chunk in CHUNKS] for one in models().values()]
    small, large = ([pair[number][1] for pair in pairs] for number in (0, 1))
    least = [one.saved["flash"] for one in small]
    scores = HALF * 32 * LONG**2 / 1e12
    yield (
        f"at {LONG:,} tokens these points save {min(least):.0%} to {max(least):.0%} with chunks of {CHUNKS[0]:,} "
        f"(reported: more than 60 %); a reference with eager attention would need {scores:.1f} TB for one copy of the "
        "scores of 32 heads, so none can have been measured there"
    )
    for kind, what in (("eager", "eager attention"), ("sdpa", "keys repeated for every head")):
        less = [1 - one.nbytes(kind) / other.nbytes(kind) for one, other in zip(small, large, strict=True)]
        flash = [1 - one.nbytes() / one.nbytes(kind) for one in small]
        yield (
            f"there, with {what}, chunks of {CHUNKS[0]:,} take {min(less):.0%} to {max(less):.0%} less than of "
            f"{CHUNKS[1]:,} (reported: 23 %), and flash attention {min(flash):.0%} to {max(flash):.0%} less than that "
            "(reported: 6 %)"
        )


def to_json(contexts: tuple[int, ...]) -> dict[str, Any]:
    """Plain JSON values: the comparison, and the points at other contexts."""
    over = {
        one.name: [one.estimate(context)[number].to_json() for context in contexts for number in (0, 1)]
        for one in models().values()
    }
    compared = [compare(one).to_json() for one in models().values()]
    return {"source": SOURCE, "compared": compared, "points": over, "findings": list(findings())}
