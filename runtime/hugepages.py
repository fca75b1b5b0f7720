"""Weights in pages of 2 MiB instead of 4 KiB, where the system gives them to who asks.

A token reads every weight once, and with small pages much of that time goes into finding where they are. malloc asks
only if the environment of the process says so when it starts; hence variables for processes that are about to start,
and a command that starts itself once more. RLKIT_HUGE_PAGES=off leaves everything as it is.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

SWITCH = "RLKIT_HUGE_PAGES"
TUNABLES, HUGE, SMALL = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "glibc.malloc.hugetlb=0"
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OLDEST_GLIBC = (2, 35)  # the first whose malloc can ask for huge pages


def must_be_asked_for(path: Path = ENABLED) -> bool:
    """Whether this system gives huge pages to who asks for them, and malloc can."""
    name, version = platform.libc_ver()
    try:
        numbers = tuple(int(part) for part in version.split(".")[:2])
        return name == "glibc" and numbers >= OLDEST_GLIBC and "[madvise]" in path.read_text()
    except (OSError, ValueError):
        return False


def variables(environment: Mapping[str, str] | None = None, path: Path = ENABLED) -> dict[str, str]:
    """What to add to the environment of a process that will hold weights; nothing where that is settled already."""
    found = os.environ if environment is None else environment
    tunables = found.get(TUNABLES, "")
    if found.get(SWITCH) == "off" or "malloc.hugetlb" in tunables or not must_be_asked_for(path):
        return {}
    return {TUNABLES: f"{tunables}:{HUGE}" if tunables else HUGE}


def restart() -> None:
    """Start this very command once more with `variables`; return where there are none, or it cannot be done."""
    added = variables()
    if not added or not sys.executable or not sys.orig_argv:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})
    except OSError:
        return  # it works without, only slower
