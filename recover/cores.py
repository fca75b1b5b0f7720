"""How many processors this process may use: affinity, a container's quota, and cores that are two threads of one."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
SIMILAR = 0.85  # of the fastest clock: favoured cores differ by a few percent, efficient ones by a quarter and more


def allowed() -> tuple[int, ...]:
    """The logical processors this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0))) or (0,)
    try:
        return tuple(sorted(psutil.Process().cpu_affinity())) or (0,)
    except (AttributeError, psutil.Error, OSError):  # macOS has no such call
        return tuple(range(os.cpu_count() or 1))


def one_per_core(processors: tuple[int, ...], cpus: Path = CPUS) -> tuple[int, ...]:
    """The first of these logical processors on each physical core; all of them where the system does not say."""
    seen: dict[tuple[str, str], int] = {}
    for number in processors:
        topology = cpus / f"cpu{number}" / "topology"
        try:
            place = (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
        except OSError:
            return _first_of(processors)
        seen.setdefault(place, number)
    return tuple(seen.values())


def _first_of(processors: tuple[int, ...]) -> tuple[int, ...]:
    """Windows and macOS count cores only; their threads are next to each other."""
    logical, cores = os.cpu_count() or 1, psutil.cpu_count(logical=False) or 0
    if len(processors) != logical or not cores or logical % cores:
        return processors
    return processors[:: logical // cores]


def by_speed(processors: tuple[int, ...], cpus: Path = CPUS) -> tuple[tuple[int, ...], int]:
    """The processors with the fastest clocks first, and how many have about the fastest; all where none is told."""
    clocks = {}
    for number in processors:
        try:
            clocks[number] = int((cpus / f"cpu{number}" / "cpufreq" / "cpuinfo_max_freq").read_text())
        except (OSError, ValueError):
            return processors, len(processors)
    fastest = max(clocks.values(), default=0)
    fast = [number for number in processors if clocks[number] >= SIMILAR * fastest]
    return (*fast, *(number for number in processors if number not in fast)), len(fast)


def quota(own: Path = OWN_GROUP, root: Path = CGROUPS) -> float | None:
    """How many processors' time a container may use; None where nothing limits it.

    Control groups version 2 (cpu.max, the tightest from the own group upwards) and 1 (cpu.cfs_quota_us).
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            found += [_version_2(root.joinpath(*parts)) for parts in _upwards(path)]
        elif "cpu" in controllers.split(","):
            for name in (controllers, "cpu"):
                found += [_version_1(root.joinpath(name, *parts)) for parts in _upwards(path)]
    limits = [limit for limit in found if limit is not None]
    return min(limits, default=None)


def _upwards(path: str) -> list[tuple[str, ...]]:
    parts = tuple(part for part in path.split("/") if part not in ("", "..", "."))
    return [parts[:end] for end in range(len(parts), -1, -1)]


def _version_2(group: Path) -> float | None:
    try:
        most, period = (group / "cpu.max").read_text().split()[:2]
        return int(most) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no limit
        return None


def _version_1(group: Path) -> float | None:
    try:
        most = int((group / "cpu.cfs_quota_us").read_text())
        return most / int((group / "cpu.cfs_period_us").read_text()) if most > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def default_threads() -> int:
    """Threads to compute with where nobody chose: one per core, within what this process may use.

    Two threads of one core share the multipliers and the way to memory that matrix kernels live on, and while they wait
    for each other they spin; a quota that is used up stops every thread until its next period. One core of two threads
    still gets both, as there is nothing else to share.
    """
    processors = allowed()
    cores = max(len(one_per_core(processors)), min(2, len(processors)))
    limit = quota()
    return cores if limit is None else max(1, min(cores, math.floor(limit + 0.05)))
