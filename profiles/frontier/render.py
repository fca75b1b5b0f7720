"""A result as tables and sentences, for a terminal and for a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rlkit.profiles.frontier.result import FrontierResult, KvSettings, Row
from rlkit.profiles.needs import Memory
from rlkit.profiles.table import Table

COLUMNS = ("weights", "kv", "chunk", "total", "w + kv + act", "saved", "accuracy", "loss", "KL")
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
NOTE = (
    "Total = weights (w) + cache (kv) + peak of activations (act). Saved and loss are against the first weights with "
    "everything in 16 bit and the prompt read at once, at the same context. KL in nats per token, to the first weights."
)


def size(nbytes: float, like: float | None = None) -> str:
    """Bytes in decimal units, three digits or more; in the unit that `like` would have, which is then left out."""
    unit, scale = next((one for one in UNITS if (nbytes if like is None else like) >= one[1]), ("B", 1.0))
    value = nbytes / scale
    said = f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f}"
    return f"{said} {unit}" if like is None else said


def parts(memory: Memory) -> str:
    """Weights, cache and activations in the unit of their sum."""
    each = (memory.weights_nbytes, memory.cache_nbytes, memory.activations_nbytes)
    return " + ".join(size(nbytes, memory.nbytes) for nbytes in each)


def share(value: float) -> str:
    """In per cent; what rounds to nothing has no sign."""
    return f"{round(100 * value, 1) + 0.0:.1f}%"


def tables(result: FrontierResult, *, whole: bool = False) -> Iterator[Table]:
    """The frontier of each context, or with `whole` every point of it."""
    for context in result.contexts:
        rows = result.at(context) if whole else _framed(result, context)
        tasks = tuple(dict.fromkeys(name for row in rows for name in row.tasks))
        timed = any(row.found.tpot_seconds is not None for row in rows)
        columns = (*COLUMNS, *tasks, *(("TTFT", "ms per token") if timed else ()))
        what = "every point" if whole else "the frontier, below its reference"
        cells = tuple(_cells(row, tasks, timed) for row in rows)
        yield Table(f"{context:,} tokens: {what}", columns, cells, NOTE)


def narrow(result: FrontierResult) -> Iterator[Table]:
    """The frontier of each context for a terminal: what is known of tasks and seconds in a table of its own."""
    for table in tables(result):
        more = table.columns[len(COLUMNS) :]
        yield Table(table.title, COLUMNS, tuple(row[: len(COLUMNS)] for row in table.rows), table.note)
        if len(more) > 1:  # a single task is the accuracy
            rows = tuple((*row[:3], *row[len(COLUMNS) :]) for row in table.rows)
            yield Table(f"{table.title}: by task", (*COLUMNS[:3], *more), rows, table.note)


def _framed(result: FrontierResult, context: int) -> list[Row]:
    """The reference, then the frontier without it, the largest first."""
    reference = result.at(context)[0]
    return [reference, *(row for row in reversed(result.frontier(context)) if row is not reference)]


def _cells(row: Row, tasks: Sequence[str], timed: bool) -> tuple[str, ...]:
    point, found = row.point, row.found
    memory = found.memory
    scored = f"{100 * found.accuracy:.1f}" if found.scores else "-"
    accuracy = scored if row.complete else f"{scored}, {found.why}"
    judged = (share(row.saved), accuracy, "" if row.loss is None else share(row.loss))
    kl = "" if found.kl is None else f"{found.kl:.4f}"
    what = (point.weights, point.kv, str(point.chunk or "whole"), size(memory.nbytes), parts(memory))
    cells = (*what, *judged, kl, *(f"{100 * row.tasks[name]:.1f}" if name in row.tasks else "" for name in tasks))
    return (*cells, *_seconds(row)) if timed else cells


def _seconds(row: Row) -> tuple[str, str]:
    ttft, tpot = row.found.ttft_seconds, row.found.tpot_seconds
    return "" if ttft is None else f"{ttft:.2f} s", "" if tpot is None else f"{1e3 * tpot:.1f}"


def findings(result: FrontierResult) -> Iterator[str]:
    """What was chosen and what it took, a sentence each."""
    for context in result.contexts:
        chosen = result.settings_at(context)
        yield f"at {context:,} tokens: {_chosen(result, context, chosen)}"
    if result.grid_evaluations:
        share = result.evaluations / result.grid_evaluations
        spent = f"{result.evaluations:,.0f} items of the {result.grid_evaluations:,.0f} of the whole grid"
        yield f"measured: {spent} ({share:.0%})"


def _chosen(result: FrontierResult, context: int, chosen: KvSettings | None) -> str:
    budget = result.budget
    within = f"within {size(budget.max_bytes)}" if budget.max_bytes else f"losing at most {budget.max_loss:.1%}"
    if chosen is None and not budget.max_bytes and not result.at(context)[0].found.accuracy > 0:
        return "nothing is chosen, as the reference is never right; ask for other --tasks, or name --max-bytes"
    if chosen is None:
        smallest = min(row.found.nbytes for row in result.at(context) if row.complete)
        return f"nothing is {within}; the smallest point measured takes {size(smallest)}"
    row = next(row for row in result.at(context) if row.point == chosen.point)
    loss = "" if row.loss is None else f", {share(row.loss)} of the accuracy lost"
    said = f"{within}: {chosen.point.name}: {size(row.found.nbytes)}, {share(row.saved)} saved{loss}"
    return f"{said}; runtime: {chosen.text}"
