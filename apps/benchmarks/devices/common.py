"""The run of a device script: what is there is measured test by test into one file, the rest skipped with its reason.

    Family.find(system, asked) --> Ready, or Absent with the reason
    every item, every test     --> kept from the file, skipped with a reason, or measured; the file is written each time

So a run that was killed goes on where it was. A family is a value (cpu.py, webgpu.py, directml.py, npu.py); whatever
touches the machine is in `Tools`, which tests replace.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from rlkit.apps.benchmarks.devices import items
from rlkit.apps.benchmarks.devices.items import Item
from rlkit.apps.benchmarks.devices.present import System
from rlkit.apps.benchmarks.devices.promises import Forecaster, forecaster
from rlkit.export.targets import Target
from rlkit.profiles import bench, worker
from rlkit.profiles.bench import Case
from rlkit.profiles.benchfile import Host, this_host
from rlkit.profiles.bundle import BundleSize
from rlkit.profiles.devicerun import Part, Row, Run, Skip, read_run
from rlkit.recover.atomic import need_space, write_json
from rlkit.recover.progress import Tell, silent

RLKIT = "rlkit-edge"
NO_DEVICE = "no forecast: a software driver is no device"


class Absent(Exception):
    """Why a family's device, or the runtime for it, cannot be had here."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a script was asked for; `bundles` take the place of models and recipes unless those are named too."""

    output: Path
    models: tuple[str, ...]
    recipes: tuple[str, ...]
    tests: tuple[Case, ...]
    repeats: int
    bundles: tuple[Path, ...] = ()
    threads: int | None = None
    device: str | None = None
    python: Path | None = None
    software: bool = False
    resume: bool = True
    keep: bool = False
    dry_run: bool = False

    @property
    def work(self) -> Path:
        """Where bundles and environments are made."""
        return self.output.with_name(f"{self.output.stem}-work")

    def items(self) -> tuple[Item, ...]:
        """Given bundles, then stand-ins of what they do not cover."""
        first = items.given(self.bundles)
        covered = {(item.model, item.recipe_name) for item in first}
        made = items.stand_ins(self.models, self.recipes)
        return (*first, *(item for item in made if (item.model, item.recipe_name) not in covered))


@dataclass(frozen=True, slots=True)
class Ready:
    """A device and its runtime: what results say of them, and how a process that runs a bundle there is started.

    command: (bundle, threads) -> its command line; `variables` are added to its environment. `dtype`: of activations
    where the family's usual one does not run there.
    """

    part: Part
    versions: Mapping[str, str]
    command: Callable[[Path, int | None], list[str]]
    variables: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of device: its name, the unit that forecasts know it by, what bundles are made for, and how it is found.

    `unmade` says why random weights cannot be made for it; empty if they can.
    """

    name: str
    title: str
    unit: str
    target: Target
    find: Callable[[System, Asked], Ready]
    unmade: str = ""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _free() -> int:
    return int(psutil.virtual_memory().available)


@contextlib.contextmanager
def made_bundle(item: Item, target: Target, asked: Asked, tell: Tell) -> Iterator[Path]:
    """The item's bundle: the given one, or one of random weights that goes again unless it is to be kept."""
    if item.bundle is not None:
        yield item.bundle
        return
    assert item.recipe is not None  # stand-ins have one
    folder = asked.work / f"{item.model}-{item.recipe_name}-{target.name}-{target.dtype}"
    bundle, checkpoint = folder / "bundle", folder / "checkpoint"
    try:
        if not (bundle / items.CONFIG).is_file():
            from rlkit.export.build import export_bundle
            from rlkit.recover.standin import write_packed

            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            need_space(asked.work, 3 * item.at(items.nominal(target)).stored_nbytes)
            write_packed(item.shape, item.recipe, checkpoint)
            how: dict[str, Any] = {"target": target.device, "dtype": target.dtype, "tell": tell}
            how["provider"] = None if target.name == target.device else target.name
            export_bundle(checkpoint, bundle, **how)
            shutil.rmtree(checkpoint)
        yield bundle
    finally:
        if not asked.keep:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # something else is kept in it
                asked.work.rmdir()


Start = Callable[[str, list[str], Mapping[str, str]], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Tools:
    """What touches the machine."""

    system: System = field(default_factory=System)
    host: Callable[[], Host] = this_host
    free_nbytes: Callable[[], int] = _free
    no_builder: Callable[[], str] = items.no_builder
    bundle: Callable[[Item, Target, Asked, Tell], AbstractContextManager[Path]] = made_bundle
    start: Start = worker.start
    now: Callable[[], str] = _now


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of a test: it was measured before (`kept`), cannot be (`reason`), or will be."""

    item: Item
    test: Case
    kept: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A file so far, the device, and a choice for every test; `ready` is None where there is no device."""

    family: Family
    asked: Asked
    run: Run
    ready: Ready | None
    promises: Forecaster
    choices: tuple[Choice, ...] = ()

    @property
    def target(self) -> Target:
        """With the type of activations that the device takes."""
        dtype = self.ready.dtype if self.ready else None
        return self.family.target if dtype is None else replace(self.family.target, dtype=dtype)


def prepare(family: Family, asked: Asked, tools: Tools) -> Prepared:
    """Find the device, read the file that is there, and decide about every test; nothing is written.

    Raises ValueError for a file of another machine or device, and for models, recipes and bundles that are not there.
    """
    wanted, host, now = asked.items(), tools.host(), tools.now()
    kept = _kept(asked, family, host)
    own = {RLKIT: version(RLKIT)}
    try:
        ready = family.find(tools.system, asked)
    except Absent as absent:
        promises = Forecaster(None, "")
        run = kept or Run(now, host, Part(family.name, family.target.name, "none"), own)
        return Prepared(family, asked, run.with_skip(Skip("", "", "", str(absent))), None, promises)
    if kept is not None and kept.rows and kept.part.name != ready.part.name:
        why = f"holds results of {kept.part.name}, and here is {ready.part.name}"
        raise ValueError(f"{asked.output} {why}; choose another -o")
    promises = Forecaster(None, NO_DEVICE)
    if not ready.part.software:
        promises = forecaster(family.unit, host.cpu, asked.device, family.target)
    run = Run(now, host, ready.part, {**own, **ready.versions}, promises.said)
    if kept is not None:
        run = replace(run, rows=kept.rows, skips=tuple(skip for skip in kept.skips if skip.model))
    made = Prepared(family, asked, run, ready, promises)
    free = tools.free_nbytes()
    unmade = family.unmade or tools.no_builder()
    choices = [_choice(made, item, test, free, unmade) for item in wanted for test in asked.tests]
    return replace(made, choices=tuple(choices))


def _kept(asked: Asked, family: Family, host: Host) -> Run | None:
    """What the file holds, if it is to be gone on with."""
    if not asked.resume or not asked.output.is_file():
        return None
    run = read_run(asked.output)
    for what, there, mine in (("device family", run.part.family, family.name), ("machine", run.host, host)):
        if there != mine:
            raise ValueError(f"{asked.output} holds results of another {what}; choose another -o, or --no-resume")
    return run


def _choice(made: Prepared, item: Item, test: Case, free_nbytes: int, unmade: str) -> Choice:
    if any(_same(row, made, item, test) for row in made.run.rows):
        return Choice(item, test, kept=True)
    reason = (
        items.no_kernel(item, made.target)
        or items.no_room(item, test)
        or (unmade if item.bundle is None else "")
        or items.no_memory(item, made.target, test.room, free_nbytes)
    )
    return Choice(item, test, reason=reason)


def _same(row: Row, made: Prepared, item: Item, test: Case) -> bool:
    """Whether a row answers a test: no fewer rounds, the same threads if any were asked for, the same versions."""
    named = (row.model, row.recipe, row.weights) == (item.model, item.recipe_name, item.weights)
    enough = row.series.test == test and len(row.series.rounds) >= made.asked.repeats
    return named and enough and made.asked.threads in (None, row.threads) and row.versions == made.run.versions


def run(made: Prepared, tools: Tools, tell: Tell = silent) -> Run:
    """Measure what can be; the file is complete after every test."""
    found = made.run
    write_json(made.asked.output, found.to_json())
    for item in dict.fromkeys(choice.item for choice in made.choices):
        mine = [choice for choice in made.choices if choice.item is item and not choice.kept]
        found = _with_skips(found, item, mine)
        tests = [choice.test for choice in mine if not choice.reason]
        for later in _measured(made, found, item, tests, tools, tell):
            found = later
            write_json(made.asked.output, found.to_json())
    write_json(made.asked.output, found.to_json())
    return found


def _with_skips(found: Run, item: Item, choices: list[Choice]) -> Run:
    """One reason for all tests where they share it, else one each."""
    reasons = {choice.reason for choice in choices}
    if len(reasons) == 1 and "" not in reasons and not _has_rows(found, item):
        return found.with_skip(Skip(item.model, item.recipe_name, "", reasons.pop()))
    for choice in choices:
        if choice.reason:
            found = found.with_skip(Skip(item.model, item.recipe_name, choice.test.name, choice.reason))
    return found


def _has_rows(found: Run, item: Item) -> bool:
    return any((row.model, row.recipe) == (item.model, item.recipe_name) for row in found.rows)


def _measured(made: Prepared, found: Run, item: Item, tests: list[Case], tools: Tools, tell: Tell) -> Iterator[Run]:
    """The file after each of the tests; what fails is skipped with its reason, and so are those after it."""
    if not tests or made.ready is None:
        return
    left = list(tests)
    try:
        with tools.bundle(item, made.target, made.asked, tell) as bundle:
            size = replace(item, bundle=bundle).size()
            command = made.ready.command(bundle, made.asked.threads)
            with tools.start(item.name, command, made.ready.variables) as process:
                while left:
                    series = _series(made, item, size, left[0], process, tell)
                    found = found.with_row(_row(made, item, size, series, process, tools.now()))
                    left.pop(0)
                    yield found
    except (ValueError, OSError) as error:  # also a process that ended
        why = " ".join(str(error).split())
        names = [test.name for test in left] if len(left) < len(tests) else [""]
        for name in names:
            found = found.with_skip(Skip(item.model, item.recipe_name, name, why))
        yield found


def _series(made: Prepared, item: Item, size: BundleSize, test: Case, process: Any, tell: Tell) -> bench.Series:
    storage = items.nominal(made.target).storage
    ends = process.generate, process.peak_nbytes, lambda depth: size.nbytes_at(depth, storage)
    subject = bench.Subject(item.name, *ends, process.threads, process.provider)
    plan = bench.Plan((test,), made.asked.repeats, vocab=item.shape.vocab)
    (found,) = bench.measure([subject], plan, tell)
    return found.series[0]


def _row(made: Prepared, item: Item, size: BundleSize, series: bench.Series, process: Any, now: str) -> Row:
    return Row(
        model=item.model,
        recipe=item.recipe_name,
        weights=item.weights,
        architecture=item.shape.architecture,
        parameters=item.shape.parameters,
        nbytes=size.nbytes,
        bits_per_weight=size.bits_per_weight,
        threads=process.threads or None,
        date=now,
        versions=made.run.versions,
        series=series,
        forecast=made.promises.of(item, series.test),
    )
