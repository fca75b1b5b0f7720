"""Where downloads are kept: $RLKIT_CACHE, or a folder of our own in the platform's cache folder."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The folder of everything downloaded; it may not exist yet."""
    told = os.environ.get("RLKIT_CACHE")
    return Path(told).expanduser().absolute() if told else _platform_cache() / "rlkit"


def _platform_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def nbytes_below(folder: Path) -> int:
    """The bytes of all files in and below `folder`, also while another process writes there."""
    total = 0
    for root, _folders, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                total += Path(root, file).stat().st_size
    return total


def megabytes(done: int, total: int) -> str:
    """The note of a download's progress."""
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
