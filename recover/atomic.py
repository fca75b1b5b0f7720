"""Folders and files that are either complete or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise FileExistsError if `path` exists and may not be replaced."""
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already; pass --force to replace it, or choose another -o")


def need_space(folder: Path, nbytes: int) -> None:
    """Raise OSError (ENOSPC) unless the disk of `folder` has `nbytes` free."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < nbytes:
        why = f"{folder} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, f"{why}; free some space or choose another folder")


@contextlib.contextmanager
def fresh_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty sibling of `path`; rename it to `path` on success, remove it on any error.

    Raises FileExistsError if `path` exists and not `force`. With `force` the old folder stays until the new one is
    complete.
    """
    refuse_existing(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    work.chmod(0o777 & ~_umask())
    try:
        yield work
        _replace(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _replace(work: Path, path: Path) -> None:
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.replace(path, old / path.name)
        os.replace(work, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(work, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file beside `path` and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, complete or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, complete or not at all; NaN is refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
