"""Results of several machines as one: every test a line, every machine a column.

    files of the device scripts (devicerun.Run) and of `rlkit bench -o` (benchfile.Result)  --merge-->  Merged

A machine is a host, the part of it that ran (its CPU with so many threads, a GPU by WebGPU, ...) and nothing else, so
results of one machine from several files share a column. Where two are of the same test there, the newer is shown and
a note says so. What this does not know: whether machines were in the same state, and whether two hosts of the same
sizes are one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlkit.profiles import benchfile, devicerun
from rlkit.profiles.bench import Case, Kind, Series
from rlkit.profiles.devicerun import Part, Promise, Row, Run
from rlkit.profiles.merged import Cell, Left, Line, Machine, Merged
from rlkit.profiles.standard import MODELS, RECIPES, model_name
from rlkit.recover.source import read_json

FAMILIES = {"cpu": "cpu", "webgpu": "webgpu", "dml": "directml", "ryzenai": "npu"}  # of bench's providers
_NOISE = re.compile(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|\d+-Core\b|\s(w/|with)\s.*$|@.*$")


@dataclass(frozen=True, slots=True)
class Source:
    """A file's name and what was in it."""

    file: str
    content: Run | benchfile.Result


def read(path: Path) -> Source:
    """A result file of a device script or of `rlkit bench`.

    Raises FileNotFoundError, or ValueError for what is damaged, of another schema version, in other units, or neither.
    """
    table = read_json(path)
    kind = table.get("kind", benchfile.KIND)
    if kind == devicerun.KIND:
        return Source(path.name, Run.from_json(table, str(path)))
    if kind == benchfile.KIND:
        return Source(path.name, benchfile.Result.from_json(table, str(path)))
    raise ValueError(f"{path} holds {kind!r}, no measurement; give files of a device script or of rlkit bench -o")


@dataclass(frozen=True, slots=True)
class _Found:
    """A result with all it is known by; `order` is the place of its file."""

    machine: Machine
    model: str
    recipe: str
    parameters: int
    test: Case
    cell: Cell
    order: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (_key(self.machine), self.model, self.recipe, self.test)


def _key(machine: Machine) -> tuple[Any, ...]:
    part = machine.part
    return machine.host, part.family, part.name, part.software, machine.threads


def merge(sources: Sequence[Source], notes: Iterable[str] = ()) -> Merged:
    """One report of all files, in the order given; `notes` of the caller come first. ValueError of no file."""
    if not sources:
        raise ValueError("there is nothing to merge; give result files of a device script or of rlkit bench -o")
    found = [each for order, source in enumerate(sources) for each in _of(source, order)]
    shown, twice = _newest(found)
    absent = [
        _absent(source.content) for source in sources if isinstance(source.content, Run) and not source.content.rows
    ]
    machines = _labelled([*(each.machine for each in shown), *absent])
    labels = {_key(machine): machine.label for machine in machines}
    return Merged(
        machines,
        tuple(_lines(shown, labels)),
        tuple(_skips(sources, labels, shown)),
        (*notes, *_duplicates(twice, labels), *_versions(shown, labels), *_unlike(shown, labels)),
        tuple(dict.fromkeys(source.file for source in sources)),
    )


def _of(source: Source, order: int) -> Iterator[_Found]:
    content = source.content
    if isinstance(content, Run):
        for row in content.rows:
            machine = Machine("", content.host, content.part, row.threads if content.part.family == "cpu" else None)
            cell = _cell(row.series, row, source.file)
            yield _Found(machine, row.model, row.recipe, row.parameters, row.series.test, cell, order)
        return
    names = Counter((*_model(entry), entry.measurement.provider) for entry in content.entries)
    for entry in content.entries:
        measured = entry.measurement
        family = FAMILIES.get(measured.provider, measured.provider)
        part = Part(family, measured.provider, content.host.cpu if family == "cpu" else measured.provider)
        machine = Machine("", content.host, part, measured.threads or None if family == "cpu" else None)
        model, recipe = _model(entry)
        name = f"{model} [{measured.name}]" if names[(model, recipe, measured.provider)] > 1 else model
        about = _About(measured.name, content.date, content.versions)
        for series in measured.series:
            yield _Found(machine, name, recipe, entry.parameters, series.test, _cell(series, about, source.file), order)


def _model(entry: benchfile.Entry) -> tuple[str, str]:
    return model_name(entry.architecture, entry.parameters), entry.recipe


@dataclass(frozen=True, slots=True)
class _About:
    """What a cell takes from a row, of a file of bench."""

    weights: str
    date: str
    versions: Mapping[str, str]
    forecast: Promise | None = None


def _cell(series: Series, about: Row | _About, file: str) -> Cell:
    seconds = series.ttft or series.token_seconds
    assert seconds is not None  # a series is of prefill or of decode
    return Cell(
        tokens_per_s=series.tokens_per_s,
        seconds=seconds,
        bytes_per_s=series.bytes_per_s,
        nbytes_per_token=series.nbytes_per_token,
        peak_nbytes=series.peak_nbytes,
        forecast=about.forecast,
        weights=about.weights,
        date=about.date,
        versions=about.versions,
        file=file,
    )


def _newest(found: Iterable[_Found]) -> tuple[list[_Found], list[tuple[_Found, _Found]]]:
    """The newest of every test, and the pairs (shown, not shown); of one date, the later file's."""
    kept: dict[tuple[Any, ...], _Found] = {}
    pairs = []
    for each in found:
        other = kept.get(each.key)
        newer = other is None or (each.cell.date, each.order) >= (other.cell.date, other.order)
        if other is not None:
            pairs.append((each, other) if newer else (other, each))
        if newer:
            kept[each.key] = each
    return list(kept.values()), pairs


def _absent(run: Run) -> Machine:
    return Machine("", run.host, run.part, None)


def _labelled(machines: Iterable[Machine]) -> tuple[Machine, ...]:
    """Every machine once, with the shortest label that tells it from the others."""
    every = list({_key(machine): machine for machine in machines}.values())
    labels = [_label(machine) for machine in every]
    for more in (_threads, _host, _memory):
        counts = Counter(labels)
        labels = [
            f"{label}, {more(machine)}" if counts[label] > 1 and more(machine) else label
            for label, machine in zip(labels, every, strict=True)
        ]
    seen: Counter[str] = Counter()
    made = []
    for label, machine in zip(labels, every, strict=True):
        seen[label] += 1
        made.append(replace(machine, label=label if seen[label] == 1 else f"{label} ({seen[label]})"))
    return tuple(made)


def _label(machine: Machine) -> str:
    part = machine.part
    if part.family == "cpu":
        return f"{short(part.name)} CPU"
    name = part.family if part.name in ("none", part.provider) else f"{short(part.name)} {part.family}"
    return f"{name} on {short(machine.host.cpu)}" if part.name in ("none", part.provider) else name


def _threads(machine: Machine) -> str:
    if machine.threads is None:
        return ""
    return f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"


def _host(machine: Machine) -> str:
    return f"{machine.host.cores} cores, {machine.host.system}"


def _memory(machine: Machine) -> str:
    return f"{machine.host.memory_nbytes / 2**30:.1f} GiB"


def short(name: str) -> str:
    """A processor's name without what all of them have: "AMD Ryzen AI 9 HX 370"."""
    return " ".join(_NOISE.sub("", name).replace(",", "").split()) or name


def _lines(shown: Iterable[_Found], labels: Mapping[tuple[Any, ...], str]) -> Iterator[Line]:
    cells: dict[tuple[str, str, Case], dict[str, Cell]] = {}
    sizes: dict[str, int] = {}
    for each in shown:
        cells.setdefault((each.model, each.recipe, each.test), {})[labels[_key(each.machine)]] = each.cell
        sizes[each.model] = each.parameters
    order = list(labels.values())
    for model, recipe, test in sorted(cells, key=lambda key: _place(key, sizes[key[0]])):
        mine = cells[model, recipe, test]
        placed = {label: mine[label] for label in order if label in mine}
        yield Line(model, recipe, test, sizes[model], placed)


def _place(key: tuple[str, str, Case], parameters: int) -> tuple[Any, ...]:
    """Small models first, recipes by their standing, prompts before decode, shallow before deep."""
    model, recipe, test = key
    first = RECIPES.index(recipe) if recipe in RECIPES else len(RECIPES)
    known = list(MODELS).index(model) if model in MODELS else len(MODELS)
    kind = test.kind is Kind.DECODE
    return parameters, known, model, first, recipe, kind, test.tokens, test.depth


def _skips(sources: Sequence[Source], labels: Mapping[tuple[Any, ...], str], shown: list[_Found]) -> Iterator[Left]:
    """What files left out, unless another file has it."""
    done = {(labels[_key(each.machine)], f"{each.model}, {each.recipe}, {each.test.name}") for each in shown}
    said: dict[Left, None] = {}
    for source in sources:
        if not isinstance(source.content, Run):
            continue
        run = source.content
        mine = next((row.threads for row in run.rows), None) if run.part.family == "cpu" else None
        label = labels[_key(Machine("", run.host, run.part, mine))]
        for skip in run.skips:
            if (label, skip.what) not in done:
                said[Left(label, skip.what, skip.reason)] = None
    yield from said


def _duplicates(pairs: Iterable[tuple[_Found, _Found]], labels: Mapping[tuple[Any, ...], str]) -> Iterator[str]:
    """One sentence for each machine and pair of files."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for new, old in pairs:
        cells = new.cell, old.cell
        first, second = (f"{cell.file} ({cell.date})" for cell in cells)
        differ = [
            f"{name} {cells[0].versions.get(name, 'unknown')} in place of {cells[1].versions.get(name, 'unknown')}"
            for name in sorted({*cells[0].versions, *cells[1].versions})
            if cells[0].versions.get(name) != cells[1].versions.get(name)
        ]
        name = f"{new.model} {new.recipe}, {new.test.name}"
        groups.setdefault((labels[_key(new.machine)], first, second, ", ".join(differ)), []).append(name)
    for (label, shown, hidden, changed), names in groups.items():
        what = names[0] if len(names) == 1 else f"{len(names)} tests"
        of = f"; {changed}" if changed else ""
        yield f"{label}: {what} measured twice; the newer of {shown} is shown, not that of {hidden}{of}"


def _versions(shown: Iterable[_Found], labels: Mapping[tuple[Any, ...], str]) -> Iterator[str]:
    """Packages of which machines had different versions."""
    found: dict[str, dict[str, list[str]]] = {}
    for each in shown:
        for name, version in each.cell.versions.items():
            who = found.setdefault(name, {}).setdefault(version, [])
            label = labels[_key(each.machine)]
            who += [label] if label not in who else []
    for name in sorted(found):
        if len(found[name]) > 1:
            said = "; ".join(f"{version} ({', '.join(who)})" for version, who in sorted(found[name].items()))
            yield f"different versions of {name}: {said}"


def _unlike(shown: Iterable[_Found], labels: Mapping[tuple[Any, ...], str]) -> Iterator[str]:
    """Software drivers are no devices."""
    software = dict.fromkeys(labels[_key(each.machine)] for each in shown if each.machine.part.software)
    for label in software:
        yield f"{label} is a software driver: it computes on the CPU, and its speed says nothing of a GPU"
