"""`rlkit kv --analytic`: the memory of every point from a model's configuration, nothing loaded and nothing run.

A model is one of KV Pareto's five by name, one of the standard set, or anything that `rlkit forecast` reads, a
config.json among it; `published` stands for the five together, beside what was reported of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.apps import console
from rlkit.profiles import charts, standard
from rlkit.profiles.architecture import Architecture, of_shape, read_architecture
from rlkit.profiles.frontier import analytic, analyticplot, published
from rlkit.profiles.frontier.analytic import Analytic
from rlkit.profiles.frontier.space import Space
from rlkit.profiles.table import Table
from rlkit.recover.atomic import write_json

CONTEXTS = "10k..128k"
KILO = 1024
MOST = 2**30
_COUNT = re.compile(r"(\d+)(k?)")
GROUPS = (64, 32, 16, 8)


@dataclass(frozen=True, slots=True)
class Files:
    """Where the result goes besides the terminal."""

    output: Path | None
    html: Path | None
    json: bool


def contexts_of(text: str) -> tuple[int, ...]:
    """1024,4k as numbers, k for 1024; 10k..128k goes on by doubling and ends with the last.

    Raises ValueError for what is no list of them.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        found.append(_tokens(text, first))
        if dots:
            end = _tokens(text, last)
            if end < found[-1]:
                raise ValueError(f"--contexts {text!r}: {part.strip()} runs backwards; write the smaller one first")
            while 2 * found[-1] < end:
                found.append(2 * found[-1])
            found += [end] if end > found[-1] else []
    return tuple(found)


def _tokens(text: str, word: str) -> int:
    match = _COUNT.fullmatch(word.strip().lower())
    count = int(match[1]) * (KILO if match[2] else 1) if match else MOST
    if count >= MOST:
        raise ValueError(f"--contexts {text!r} is no list of numbers; write them such as 1024,4096, or 10k..128k")
    return count


def refuse(given: Mapping[str, object]) -> None:
    """Raise ValueError for options, by name, that only measuring has a use for."""
    for name, value in given.items():
        if value:
            raise ValueError(f"--analytic measures nothing, so it has no use for {name}; leave one of them out")


def show(model: str, told: dict[str, Any], max_bytes: int | None, files: Files) -> None:
    """Reckon and print, and write what was asked for. `told` are arguments of Space.

    Raises ValueError or FileNotFoundError for models, weights and caches that are none or do not fit each other.
    """
    contexts = told.get("contexts") or contexts_of(CONTEXTS)
    if model == published.NAME:
        others = sorted(told.keys() - {"contexts"})
        if others or max_bytes is not None:
            what = others[0] if others else "max-bytes"
            raise ValueError(f"{model} stands for given points, so it has no use for --{what}; name one model")
        tables, lines = list(published.tables(contexts)), list(published.findings())
        value: dict[str, Any] = {"published": published.to_json(contexts)}
        drawn: dict[str, charts.Draw] = {analyticplot.describe_published(): analyticplot.draw_published}
    else:
        found = analytic.analyse(model, of := architecture(model), _space(of, told | {"contexts": contexts}))
        tables, lines = [analytic.table(found)], [*analytic.findings(found, max_bytes), *_reported(found)]
        value = {"model": found.to_json()}
        drawn = {analyticplot.describe(found): lambda: analyticplot.draw(found)}
    value = {"schema_version": analytic.SCHEMA_VERSION, "kind": analytic.KIND, **value}
    _finish(f"KV memory of {model}", value, tables, lines, files)
    if files.html is not None:
        charts.save(files.html, f"KV memory of {model}", drawn, tables)
        console.say(f"page: {files.html}")


def architecture(model: str) -> Architecture:
    """By name, or from files."""
    if model in published.models():
        return published.models()[model].model
    path = Path(model).expanduser()
    if model in standard.MODELS and not path.exists():
        return of_shape(standard.MODELS[model])
    return read_architecture(model)


def _space(model: Architecture, told: dict[str, Any]) -> Space:
    """The space with its gaps filled for this model."""
    sizes = {size for layer, _count in model.kinds for size in (layer.key_size, layer.value_size)}
    group = next((group for group in GROUPS if all(size % group == 0 for size in sizes)), min(sizes))
    filled: dict[str, Any] = {"weights": analytic.WEIGHTS, "kv": analytic.KV, "groups": (group,)}
    return Space(**{**filled, **told})


def _reported(found: Analytic) -> list[str]:
    """What KV Pareto reports of this model, if it does."""
    known = published.models().get(found.name)
    if known is None:
        return []
    one = published.compare(known)
    ours = ", ".join(f"{one.saved[kind]:.1%} ({kind})" for kind in one.saved)
    point = f"{known.point.weights} {known.point.kv} at {known.point.context:,} tokens"
    more = f"`rlkit kv {published.NAME} --analytic` says more"
    return [f"reported for {point}: {known.saved:.0%} saved ({published.SOURCE}); here {ours}; {more}"]


def _finish(title: str, value: dict[str, Any], tables: list[Table], lines: list[str], files: Files) -> None:
    if files.output is not None:
        write_json(files.output, value)
    if files.json:
        console.emit_json(value)
        return
    for table in tables:
        console.table(table.columns, table.rows, title=table.title)
        console.emit(table.note)
    for line in lines:
        console.emit(f"- {line}")
    if files.output is not None:
        console.say(f"result: {files.output}")
