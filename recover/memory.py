"""How much memory this process has needed so far."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil


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
