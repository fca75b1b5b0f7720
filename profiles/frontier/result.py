"""What a search found, as JSON: every point with its bytes, accuracy and KL, the frontiers, and what was chosen.

    saved = 1 - bytes / bytes of the reference         loss = 1 - accuracy / accuracy of the reference

of the same context. The reference keeps weights and cache in 16 bit and reads prompts at once. Chosen is the most
accurate point within a budget of bytes, or without one the smallest that loses at most so much; nothing is where the
reference itself is never right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkit.profiles.frontier import pareto
from rlkit.profiles.frontier.identity import Identity, identity_of
from rlkit.profiles.frontier.search import Evaluated, Found, Measured
from rlkit.profiles.frontier.space import KEPT, Point
from rlkit.recover import kvformat
from rlkit.recover.atomic import write_json
from rlkit.recover.source import Source, read_json

SCHEMA_VERSION = 1
KIND = "kv-frontier"
MAX_LOSS = 0.03  # of the reference's accuracy: KV Pareto's "1-3 %"
RUNTIME = ("float", "int8", "int4")  # the caches of a bundle (runtime/kv.py)
WIDTHS = {"float": 32, "int8": 8, "int4": 4}  # their bits, on the CPU


@dataclass(frozen=True, slots=True)
class Budget:
    """What a chosen point may take, or where nothing is said of bytes, lose."""

    max_bytes: int | None = None
    max_loss: float = MAX_LOSS

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"{self.max_bytes} bytes hold no model; give more")
        if not 0 <= self.max_loss <= 1:
            raise ValueError(f"a loss of {self.max_loss} is no share of an accuracy; give 0 to 1")


@dataclass(frozen=True, slots=True)
class Row:
    """A point in a table: what was measured, by task too, and how it stands against its context's reference."""

    found: Evaluated
    tasks: dict[str, float]
    saved: float
    loss: float | None
    on_frontier: bool

    @property
    def point(self) -> Point:
        """What was measured."""
        return self.found.point

    @property
    def complete(self) -> bool:
        """Whether it was measured on all items."""
        return not self.found.why


@dataclass(frozen=True, slots=True)
class KvSettings:
    """What export and serve make of a chosen point: a cache of the runtime, and how many tokens are read at once.

    `note` says what the runtime does otherwise than what was measured; empty if nothing.
    """

    point: Point
    kv: str
    chunk: int | None
    note: str = ""

    @property
    def caches(self) -> str | None:
        """What `export --kv` adds for it; None for nothing."""
        return None if self.kv == RUNTIME[0] else self.kv

    @property
    def text(self) -> str:
        """What is run, and how that differs from what was measured."""
        runs = f"kv {self.kv}" + (f", chunks of {self.chunk}" if self.chunk else "")
        return f"{runs} ({self.note})" if self.note else runs

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"point": self.point.to_json(), "kv": self.kv, "chunk": self.chunk, "note": self.note}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> KvSettings:
        """The inverse of `to_json`; KeyError or TypeError for what is none."""
        kv, chunk = str(table["kv"]), table["chunk"]
        if kv not in RUNTIME or not (chunk is None or (type(chunk) is int and chunk > 0)):
            raise TypeError(f"kv {kv!r} with chunks of {chunk!r}")
        return cls(Point.from_json(table["point"]), kv, chunk, str(table["note"]))


@dataclass(frozen=True, slots=True)
class FrontierResult:
    """Everything that is known after a search; rows by context, then as they were combined."""

    model: Identity
    rows: tuple[Row, ...]
    chosen: tuple[KvSettings, ...]
    budget: Budget
    evaluations: float
    grid_evaluations: float
    settings: dict[str, Any] = field(default_factory=dict)
    about: tuple[str, ...] = ()

    @property
    def contexts(self) -> tuple[int, ...]:
        """The contexts, in order."""
        return tuple(dict.fromkeys(row.point.context for row in self.rows))

    def at(self, context: int) -> list[Row]:
        """The rows of a context, its reference first."""
        return [row for row in self.rows if row.point.context == context]

    def frontier(self, context: int) -> list[Row]:
        """The points of a context that no other dominates, by bytes."""
        return sorted((row for row in self.at(context) if row.on_frontier), key=lambda row: row.found.nbytes)

    def settings_at(self, context: int) -> KvSettings | None:
        """What was chosen at a context."""
        return next((one for one in self.chosen if one.point.context == context), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "model": self.model.to_json(),
            "budget": {"max_bytes": self.budget.max_bytes, "max_loss": self.budget.max_loss},
            "evaluations": self.evaluations,
            "grid_evaluations": self.grid_evaluations,
            "settings": self.settings,
            "about": list(self.about),
            "chosen": [one.to_json() for one in self.chosen],
            "points": [_row_to_json(row) for row in self.rows],
        }

    @classmethod
    def from_json(cls, table: dict[str, Any], where: str = "the file") -> FrontierResult:
        """The inverse of `to_json`; ValueError for another schema version, or for what is no result."""
        version = table.get("schema_version")
        if table.get("kind") != KIND:
            raise ValueError(f"{where} is no result of `rlkit kv`; make one with: rlkit kv MODEL -o {where}")
        if version != SCHEMA_VERSION:
            why = f"{where} has schema_version {version!r}, this rlkit reads {SCHEMA_VERSION}"
            raise ValueError(f"{why}; make it again with `rlkit kv`")
        try:
            return cls(
                model=Identity.from_json(table["model"]),
                rows=tuple(_row_from_json(row) for row in table["points"]),
                chosen=tuple(KvSettings.from_json(one) for one in table["chosen"]),
                budget=Budget(**table["budget"]),
                evaluations=table["evaluations"],
                grid_evaluations=table["grid_evaluations"],
                settings=dict(table["settings"]),
                about=tuple(table["about"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where} is damaged ({error}); make it again with `rlkit kv`") from error


def _row_to_json(row: Row) -> dict[str, Any]:
    found = row.found
    measured = Measured(found.scores, found.memory, found.kl, found.ttft_seconds, found.tpot_seconds)
    accuracy = found.accuracy if found.scores else None
    said = {"accuracy": accuracy, "nbytes": found.nbytes, "tasks": row.tasks, "saved": row.saved, "loss": row.loss}
    return {
        **row.point.to_json(),
        **measured.to_json(),
        **said,
        "on_frontier": row.on_frontier,
        "why": found.why,
        "items": found.items,
    }


def _row_from_json(table: dict[str, Any]) -> Row:
    one = Measured.from_json(table)
    if one.memory is None:
        raise TypeError("a point without bytes")
    point, items = Point.from_json(table), tuple(int(item) for item in table.get("items", ()))
    found = Evaluated(
        point, one.memory, one.kl, one.scores, table["why"], one.ttft_seconds, one.tpot_seconds, items=items
    )
    return Row(found, dict(table["tasks"]), table["saved"], table["loss"], bool(table["on_frontier"]))


def nbytes_of(one: Evaluated) -> float:
    """What a frontier has least of."""
    return one.nbytes


def accuracy_of(one: Evaluated) -> float:
    """What a frontier has most of."""
    return one.accuracy


def complete(found: Sequence[Evaluated]) -> list[Evaluated]:
    """Those that were measured on all items."""
    return [one for one in found if not one.why]


def rows_of(found: Found, tasks: Mapping[int, Sequence[str]]) -> Iterator[Row]:
    """Every point beside its context's reference, the first of it; `tasks` names the task of each item of a context."""
    for context, names in tasks.items():
        some = [one for one in found.points if one.point.context == context]
        reference = some[0]
        best = {one.point for one in pareto.frontier(complete(some), nbytes_of, accuracy_of)}
        for one in some:
            loss = 1 - one.accuracy / reference.accuracy if reference.accuracy > 0 and one.scores else None
            saved = 1 - one.nbytes / reference.nbytes
            yield Row(one, _by_task(one, names), saved, loss, one.point in best)


def _by_task(one: Evaluated, names: Sequence[str]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for item, score in zip(one.items, one.scores, strict=True):
        found.setdefault(names[item], []).append(score)
    return {name: sum(some) / len(some) for name, some in found.items()}


def choose(rows: Sequence[Row], budget: Budget) -> Iterator[KvSettings]:
    """What to run at each context within a budget; nothing for a context where no point is within it."""
    for context in dict.fromkeys(row.point.context for row in rows):
        some = [row.found for row in rows if row.point.context == context]
        fit = complete(some)
        if budget.max_bytes is not None:
            best = pareto.within(fit, nbytes_of, accuracy_of, budget.max_bytes)
        elif not some[0].accuracy > 0:
            continue
        else:
            least = some[0].accuracy * (1 - budget.max_loss)
            best = pareto.cheapest(fit, nbytes_of, accuracy_of, least - 1e-12)
        if best is not None:
            yield settings_of(best.point, _weighed(best, some[0], budget))


def settings_of(point: Point, weighed: str = "") -> KvSettings:
    """What the runtime offers for a point: a cache of no fewer bits than the wider of keys and values, if there is one.

    The runtime's caches have one width for keys and values, fixed scales per channel, and no window. `weighed` says
    what that does to its bytes.
    """
    if point.kv in RUNTIME:
        return KvSettings(point, point.kv, point.chunk)
    kv, same = _offered(point.kv)
    notes = [] if same and kv == RUNTIME[0] else [f"measured with {point.kv}"]
    if same and kv != RUNTIME[0]:
        notes.append(f"the runtime's {kv} has fixed scales per channel")
    elif not same:
        notes.append(f"the runtime has no such cache, {kv} is the next wider one")
    notes += [weighed] if weighed else []
    notes += [] if same else ["to choose among what it has, search with --kv k8v8:smooth,k4v4:smooth"]
    return KvSettings(point, kv, point.chunk, "; ".join(notes))


def _offered(kv: str) -> tuple[str, bool]:
    """The runtime's cache in place of a simulated one, and whether it has the same widths."""
    scheme = kvformat.parse(kv)
    widths = {scheme.keys.bits, scheme.values.bits}
    name = next((name for name in ("int4", "int8") if max(widths) <= WIDTHS[name]), RUNTIME[0])
    return name, widths == {WIDTHS[name]} or (scheme.keys.whole and scheme.values.whole)


def _weighed(best: Evaluated, reference: Evaluated, budget: Budget) -> str:
    """How many more bytes the runtime's cache takes than the one that was measured; empty if none."""
    if best.point.kv in RUNTIME or reference.point.kv != KEPT:
        return ""
    takes = reference.memory.cache_nbytes * WIDTHS[_offered(best.point.kv)[0]] // kvformat.WHOLE
    more = takes - best.memory.cache_nbytes
    if more <= 0:
        return ""
    over = budget.max_bytes is not None and best.nbytes + more > budget.max_bytes
    return f"on the CPU its cache takes {takes:,} bytes, {more:,} more than counted" + ", over the budget" * over


def save(result: FrontierResult, path: Path) -> None:
    """Write a result, complete or not at all."""
    write_json(path, result.to_json())


def read(path: Path) -> FrontierResult:
    """A result from its file. Raises FileNotFoundError, or ValueError for what is none."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no result {path}; make one with: rlkit kv MODEL -o {path}")
    return FrontierResult.from_json(read_json(path), str(path))


def read_settings(path: Path, model: Source, context: int | None = None) -> KvSettings:
    """What was chosen for `model`, at the longest context measured unless told.

    Raises FileNotFoundError, or ValueError for a result of another model and where nothing was within the budget.
    """
    result = read(path)
    why = result.model.differs(identity_of(model))
    if why:
        raise ValueError(f"{path} is of another model, {result.model.name} ({why}); measure this one with `rlkit kv`")
    wanted = max(result.contexts, default=0) if context is None else context
    found = result.settings_at(wanted)
    if found is None:
        there = ", ".join(str(one.point.context) for one in result.chosen) or "none"
        raise ValueError(f"{path} chose nothing at a context of {wanted} (there is: {there}); choose with `rlkit kv`")
    return found
