"""How much memory this process has needed so far, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil

LARGE_BLOCK = 2**20  # bytes; a tensor of this size is worth a system call
_MMAP_THRESHOLD = -3  # mallopt's name for it in glibc's malloc.h


def peak_nbytes() -> int | None:
    """The largest resident memory this process has had; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: what it reports survives exec, so a small child of a large parent would look large.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "darwin":
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return None


def give_back() -> None:
    """Collect garbage and return freed memory to the system: glibc keeps freed blocks between others for later use."""
    gc.collect()  # models hold cycles
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def map_large_blocks() -> None:
    """From now on blocks of LARGE_BLOCK come from the system and go back to it at once.

    glibc's own threshold rises to 32 MiB with use; below it, the holes of freed tensors took as much as a model of 0.6
    billion weights while it was trained. Costs page faults, so it is for models whose size matters more.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, LARGE_BLOCK)


def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
