"""What all tests share.

Property tests on a shared machine: an example may be slow for reasons of its own, so there is no deadline. A shell
starts background jobs with Ctrl-C switched off, which their children inherit; the tests of interrupts need it on.

Tests run in a process per core, each with whole files (pytest-xdist), so what they start must not take every core.
"""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared", settings(), deadline=None)
settings.load_profile("shared")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MOST_PROCESSES = 4  # with torch in it, one takes more than 1 GB
LONGEST = ("test_real_model.py", "test_recovery.py")  # begin with these, else they run on alone

gc.disable()  # until the tests run: next to nothing of what imports and the search for tests make is garbage

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process per core, but no more than there are files to share out; for a single one none, which starts faster."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    named = [Path(name.split("::")[0]) for name in config.option.file_or_dir]
    if named and all(path.is_file() for path in named):
        cores = min(cores, len(set(named)))
    return min(cores, MOST_PROCESSES) if cores > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Leave what imports made out of garbage collection: rlkit collects after each stage, all of torch each time."""
    gc.collect()
    gc.freeze()
    gc.enable()
