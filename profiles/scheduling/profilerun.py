"""Profiles models on this machine: one process per model, provider and number of threads, so memory is the model's."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from rlkit.profiles.bundle import MANIFEST, read_size
from rlkit.profiles.machine import measure_read, usable_threads
from rlkit.profiles.scheduling import modelsizes
from rlkit.profiles.scheduling.profile import FRAME, LANGUAGE, Entry, Profile, Run, Step, percentile, summed
from rlkit.recover import assets, atomic
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.runtime import tuned

TIMEOUT_SECONDS = 600.0
READ_NBYTES = 256 * 2**20  # larger than the caches of laptops
Ask = Callable[[str, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to profile: an ONNX file, or a bundle folder."""

    name: str
    path: Path
    kind: str
    origin: str
    license: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where and how long: (provider, threads) pairs; for bundles also chunk sizes and a prompt's length."""

    places: tuple[tuple[str, int], ...]
    seconds: float = 1.0
    chunks: tuple[int, ...] = (256, 64)
    prompt_tokens: int = 512


def subject(reference: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Subject:
    """The model of `[NAME=]REFERENCE`: an asset that is downloaded, an .onnx file, a bundle folder.

    Raises ValueError or FileNotFoundError, one line with the remedy: nothing is downloaded here.
    """
    named = not Path(reference).expanduser().exists()  # a path may hold a = of its own
    name, equals, rest = reference.partition("=") if named else ("", "", reference)
    wanted = rest if equals else reference
    path = Path(wanted).expanduser()
    if path.is_dir():
        size = read_size(path)  # FileNotFoundError, ValueError for what is no bundle
        return Subject(name if equals else path.name, path, LANGUAGE, f"bundle of {size.shape.architecture}")
    if path.suffix == ".onnx":
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; give an ONNX file, a bundle folder or an asset of: rlkit assets")
        return _file(name if equals else path.stem, path, "file", "", shapes)
    asset = assets.registry().get(wanted)
    if asset is None or asset.kind is not assets.AssetKind.ONNX:
        known = ", ".join(each.name for each in onnx_assets())
        raise ValueError(f"{wanted!r} is no ONNX file, bundle folder or ONNX asset; the assets are {known}")
    kept = assets.cached(asset)
    if kept is None:
        size_text = f"{asset.nbytes / 1e6:.1f} MB"
        raise FileNotFoundError(f"{wanted} is not downloaded ({size_text}); run: rlkit pull {wanted}, or pass --pull")
    return _file(name if equals else wanted, kept, asset.origin, asset.license, shapes)


def onnx_assets() -> tuple[assets.Asset, ...]:
    """The assets that are ONNX models."""
    return tuple(each for each in assets.registry().values() if each.kind is assets.AssetKind.ONNX)


def _file(name: str, path: Path, origin: str, license: str, shapes: Mapping[str, tuple[int, ...]] | None) -> Subject:
    size = modelsizes.built_in().models.get(name)
    known = (dict(size.inputs), dict(size.values)) if size else ({}, {})
    return Subject(name, path, FRAME, origin, license, {**known[0], **(shapes or {})}, known[1])


def places(devices: Sequence[str], threads: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """(provider, threads): the processor with each number of threads, other providers once."""
    found: list[tuple[str, int]] = []
    for device in devices:
        found += [("cpu", number) for number in threads] if device == "cpu" else [(device, 1)]
    return tuple(dict.fromkeys(found))


def thread_counts() -> tuple[int, ...]:
    """1, 2, 4, ... and all that this process may use."""
    most = usable_threads()
    return tuple(sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)}))


def fresh() -> Profile:
    """A profile of this machine that holds no model yet; reading the memory takes about a second."""
    read = measure_read(usable_threads(), nbytes=READ_NBYTES, seconds=0.5)
    memory = int(psutil.virtual_memory().total)
    return Profile(datetime.date.today().isoformat(), tuned.machine_facts(), read.best, memory)


def profile(
    subjects: Sequence[Subject], plan: Plan, into: Profile, *, ask: Ask | None = None, tell: Tell = silent
) -> Iterator[Profile]:
    """Yield the profile with one more model each; what it has of the same file, provider and threads is kept.

    Raises ValueError naming the model that could not be run, with the runtime's reason.
    """
    asking = ask or ask_process
    total = len(subjects) * len(plan.places)
    for number, each in enumerate(subjects):
        entry = _about(each)
        before = into.entry(entry.name, entry.recipe)
        if before is not None and (before.sha256, before.inputs) == (entry.sha256, entry.inputs):
            entry = before
        for count, (provider, threads) in enumerate(plan.places):
            tell(Progress("profile", number * len(plan.places) + count, total, f"{each.name}, {provider} x {threads}"))
            if entry.run(provider, threads) is None:
                entry = _with_run(entry, each, plan, (provider, threads), asking)
        into = into.having(entry)
        yield into
    tell(Progress("profile", total, total))


def _about(each: Subject) -> Entry:
    """What is known before it runs."""
    if each.kind == FRAME:
        inputs = {name: list(sizes) for name, sizes in each.shapes.items()}
        digest, nbytes = atomic.sha256(each.path), each.path.stat().st_size
        return Entry(each.name, FRAME, each.origin, each.license, digest, nbytes, (), inputs=inputs)
    size = read_size(each.path)
    digest = atomic.sha256(each.path / MANIFEST)
    context = size.shape.max_context
    return Entry(each.name, LANGUAGE, each.origin, "", digest, size.nbytes, (), recipe=size.recipe, context=context)


def _with_run(entry: Entry, each: Subject, plan: Plan, place: tuple[str, int], ask: Ask) -> Entry:
    where = {"model": str(each.path.absolute()), "provider": place[0], "threads": place[1], "seconds": plan.seconds}
    if entry.kind == LANGUAGE:
        job = {**where, "chunks": list(plan.chunks), "prompt_tokens": plan.prompt_tokens}
        said = _asked(ask, each.name, "rlkit.runtime.stepbench", job)
        steps = summed(
            [(int(tokens), int(past), seconds) for tokens, past, seconds in (*said["prefill"], *said["decode"])]
        )
        entry = replace(entry, kv_nbytes=said["kv_nbytes"], context=said["context"])
    else:
        shapes = {name: list(sizes) for name, sizes in each.shapes.items()}
        job = {**where, "shapes": shapes, "values": dict(each.values), "count": entry.work is None}
        said = _asked(ask, each.name, "rlkit.runtime.framebench", job)
        taken = sorted(said["seconds"])
        steps = (Step(0, 0, len(taken), percentile(taken, 0.5), percentile(taken, 0.95)),)
        entry = replace(entry, work=entry.work or said["work"])
    run = Run(*place, said["load_seconds"], said["memory_nbytes"], steps)
    return replace(entry, runs=(*entry.runs, run))


def _asked(ask: Ask, name: str, module: str, job: Mapping[str, Any]) -> dict[str, Any]:
    said = ask(module, job)
    if "error" in said:
        raise ValueError(f"{name} on {job['provider']} with {job['threads']} threads: {said['error']}")
    return said


def ask_process(module: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIMEOUT_SECONDS,
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": f"its process ended with {done.returncode}: {lines[-1] if lines else 'no message'}"}
    return found


def to_rows(made: Profile) -> list[dict[str, Any]]:
    """One row per run, for tables: milliseconds per frame, or of the largest chunk and a token."""
    return [_row(entry, run) for entry in made.models for run in entry.runs]


def _row(entry: Entry, run: Run) -> dict[str, Any]:
    about = {"name": entry.name, "recipe": entry.recipe, "provider": run.provider, "threads": run.threads}
    about |= {"load_seconds": run.load_seconds, "memory_nbytes": run.memory_nbytes}
    sizes = (0,) if entry.kind == FRAME else (max(run.chunks, default=0), 1)
    shown = [run.rows(tokens)[0] for tokens in sizes if run.rows(tokens)]
    return about | {"steps": [asdict(step) for step in shown]}
