"""What this machine can run and what stands in the way: providers, kernels, memory, packages, and one bundle.

    examine(Path("bundle")) -> Diagnosis(findings=(...), devices=(...))

It reads what the system tells and the runtime's own lists; no model is opened. What cannot be asked becomes a note.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from rlkit.recover import cores
from rlkit.recover.cache import cache_folder
from rlkit.runtime import processor
from rlkit.runtime.clashes import clashes
from rlkit.runtime.devices import Device, seen
from rlkit.runtime.doctorbundle import check_bundle
from rlkit.runtime.findings import Finding, Level, worst
from rlkit.runtime.processor import Processor
from rlkit.runtime.providers import Standing, State, standings
from rlkit.runtime.surroundings import Surroundings, look

SCHEMA_VERSION = 1
OLDEST_PYTHON = (3, 11)
LITTLE_MEMORY, LITTLE_DISK = 2e9, 5e9  # bytes
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # control groups version 2 and 1


@dataclass(frozen=True, slots=True)
class Machine:
    """What the system says of itself; sizes in bytes, None where it does not."""

    system: str
    python: str
    processor: Processor
    processors: int  # logical ones
    allowed: tuple[int, ...]
    per_core: int
    quota: float | None
    threads: int  # the default
    memory_nbytes: int
    available_nbytes: int
    swap_nbytes: int
    limit_nbytes: int | None  # of a container
    huge_pages: str | None  # always, madvise, never
    cache: str
    disk_nbytes: int | None  # free where the cache folder is
    writable: bool


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found; `level` is the worst of it."""

    machine: Machine
    around: Surroundings
    standings: tuple[Standing, ...]
    devices: tuple[Device, ...]
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """The worst finding's."""
        return worst(self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "level": str(self.level),
            "machine": asdict(self.machine),
            "packages": self.around.packages,
            "runtime": {
                "providers": list(self.around.providers),
                "devices": [asdict(one) for one in self.around.seen],
                "genai": sorted(self.around.genai),
                "plugins": [asdict(one) for one in self.around.plugins],
            },
            "hardware": [asdict(part) for part in self.around.hardware],
            "devices": [asdict(device) for device in self.devices],
            "providers": [
                {"name": one.provider.name, "title": one.provider.title, "state": str(one.state)}
                | {"why": one.why, "fix": one.fix}
                for one in self.standings
            ],
            "findings": [finding.to_json() for finding in self.findings],
        }


def examine(
    bundle: Path | None = None, *, around: Surroundings | None = None, machine: Machine | None = None
) -> Diagnosis:
    """Look at this machine (or at one that is described), and whether it can run a bundle. Never raises."""
    where = look() if around is None else around
    here = look_at_machine() if machine is None else machine
    stand = standings(where)
    found = [*_system(here), *_processor(here.processor), *_cores(here), *_memory(here), *_disk(here)]
    found += clashes(where)
    found += [_provider(one, where) for one in stand]
    if bundle is not None:
        found += check_bundle(bundle, where, here.processor, here.available_nbytes)
    return Diagnosis(here, where, stand, seen(where), tuple(found))


def look_at_machine() -> Machine:
    """Ask the system; never raises."""
    allowed = cores.allowed()
    memory, swap = psutil.virtual_memory(), _swap()
    cache = cache_folder()
    disk, writable = _disk_of(cache)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=processor.here(),
        processors=os.cpu_count() or 1,
        allowed=allowed,
        per_core=len(cores.one_per_core(allowed)),
        quota=cores.quota(),
        threads=cores.default_threads(),
        memory_nbytes=int(memory.total),
        available_nbytes=int(memory.available),
        swap_nbytes=swap,
        limit_nbytes=_group_limit(int(memory.total)),
        huge_pages=_chosen(HUGE_PAGES),
        cache=str(cache),
        disk_nbytes=disk,
        writable=writable,
    )


def _swap() -> int:
    try:
        return int(psutil.swap_memory().total)
    except (OSError, RuntimeError):  # containers hide it
        return 0


def _group_limit(total: int, root: Path = cores.CGROUPS) -> int | None:
    for name in GROUP_LIMITS:
        try:
            limit = int((root / name).read_text())
        except (OSError, ValueError):  # "max" is no limit
            continue
        if limit < total:
            return limit
    return None


def _chosen(path: Path) -> str | None:
    """The word in brackets of a file such as "always [madvise] never"."""
    try:
        return next((word.strip("[]") for word in path.read_text().split() if word.startswith("[")), None)
    except OSError:
        return None


def _disk_of(folder: Path) -> tuple[int | None, bool]:
    """Free bytes where the folder is or would be, and whether it can be written."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return shutil.disk_usage(there).free, there.is_dir() and os.access(there, os.W_OK)
    except OSError:
        return None, False


def _system(here: Machine) -> Iterator[Finding]:
    text = f"{here.system}, Python {here.python}"
    if sys.maxsize <= 2**32:
        yield Finding("system", "python", Level.ERROR, f"{text} of 32 bits", "install Python of 64 bits")
    elif tuple(int(part) for part in here.python.split(".")[:2]) < OLDEST_PYTHON:
        yield Finding("system", "python", Level.ERROR, f"{text} is too old", "install Python 3.11 or newer")
    else:
        yield Finding("system", "python", Level.OK, text)


def _processor(found: Processor) -> Iterator[Finding]:
    has = [name for name, there in found.features.items() if there]
    untold = [name for name, there in found.features.items() if there is None]
    text = f"{found.name}: {', '.join(has) or 'none of the features that kernels ask for'}"
    if untold:
        text += f"; the system does not tell {', '.join(untold)}"
    yield Finding("processor", "features", Level.OK, text)
    yield kernels(found)


def kernels(found: Processor) -> Finding:
    """What the features mean for packed weights. Source: the runtime's selection of kernels, 1.31."""
    area, name = "processor", "kernels"
    slow = "are unpacked at every step, tens of times slower"
    if found.is_x64:
        avx2, vnni = found.features.get("avx2"), [n for n in ("avx512_vnni", "avx_vnni") if found.features.get(n)]
        if avx2 is False:
            text = f"without AVX2 there is no kernel for 2-bit weights: they {slow}"
            return Finding(area, name, Level.WARNING, text, "use a recipe of 4 bits, or another machine")
        if vnni:
            return Finding(area, name, Level.OK, f"2-, 4- and 8-bit weights run as int8 dot products ({vnni[0]})")
        width = "AVX-512" if found.features.get("avx512") else "AVX2"
        return Finding(
            area, name, Level.OK, f"2-, 4- and 8-bit weights run in {width}; prompts are slower without VNNI"
        )
    if found.is_arm64:
        if found.features.get("dotprod") is False:
            text = f"without dot products (Armv8.2) 2-bit weights {slow}"
            return Finding(area, name, Level.WARNING, text, "use a recipe of 4 bits, or another machine")
        faster = "; 4-bit prompts use i8mm, 2-bit ones cannot" if found.features.get("i8mm") else ""
        return Finding(area, name, Level.OK, f"2-, 4- and 8-bit weights run as dot products{faster}")
    text = f"the runtime has kernels for packed weights on x86-64 and 64-bit ARM, not for {found.architecture}"
    return Finding(area, name, Level.WARNING, text, "use another machine, or expect a small fraction of its speed")


def _cores(here: Machine) -> Iterator[Finding]:
    used = f"{len(here.allowed)} of {here.processors} processors, {here.per_core} cores"
    if here.quota is not None:
        used += f", a quota of {here.quota:.1f}"
    text = f"this process may use {used}: {here.threads} threads unless told or tuned"
    if here.quota is not None and here.quota < 1:
        yield Finding("processor", "cores", Level.WARNING, text, "give the container at least one processor")
    else:
        yield Finding("processor", "cores", Level.OK, text)


def _memory(here: Machine) -> Iterator[Finding]:
    text = f"{_gb(here.available_nbytes)} free of {_gb(here.memory_nbytes)}, swap {_gb(here.swap_nbytes)}"
    if here.limit_nbytes is not None:
        text += f"; the container may use {_gb(here.limit_nbytes)}"
    free = min(here.available_nbytes, here.limit_nbytes or here.available_nbytes)
    if free < LITTLE_MEMORY:
        yield Finding("memory", "memory", Level.WARNING, text, "close other programs, or use a small model")
    else:
        yield Finding("memory", "memory", Level.OK, text)
    if here.huge_pages is not None:
        about = {
            "always": "given unasked",
            "madvise": "given to who asks for them, as run, chat, serve and bench do (glibc.malloc.hugetlb)",
            "never": "switched off",
        }
        yield Finding("memory", "huge pages", Level.OK, about.get(here.huge_pages, here.huge_pages))


def _disk(here: Machine) -> Iterator[Finding]:
    free = "unknown space" if here.disk_nbytes is None else _gb(here.disk_nbytes)
    text = f"{free} free for {here.cache}"
    if not here.writable:
        yield Finding("disk", "cache", Level.WARNING, f"{here.cache} cannot be written", "set RLKIT_CACHE to a folder")
    elif here.disk_nbytes is not None and here.disk_nbytes < LITTLE_DISK:
        yield Finding("disk", "cache", Level.WARNING, text, "free some, or set RLKIT_CACHE to a folder on another disk")
    else:
        yield Finding("disk", "cache", Level.OK, text)


def _provider(one: Standing, around: Surroundings) -> Finding:
    """Only what is wrong is a warning: a provider that is not installed is no fault."""
    level = {State.READY: Level.OK, State.CLASH: Level.WARNING, State.BROKEN: Level.WARNING}.get(one.state, Level.NOTE)
    if one.provider.name == "cpu" and one.state is not State.READY:
        level = Level.ERROR
    return Finding("providers", one.provider.name, level, f"{one.state}: {one.why}", one.fix)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
