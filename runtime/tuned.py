"""Session options that `rlkit tune` measured on this machine for a bundle, where opening the bundle finds them.

<cache folder>/tuned/<machine>/<bundle>.json

A machine is its processor, system, the processors this process may use and the version of onnxruntime; a bundle is its
shape and the sizes of its graphs and data, so a copy of it elsewhere, or another of the same form, has the same file.
RLKIT_TUNED=off leaves such files alone, RLKIT_TUNED=FILE takes the settings of that one for every bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rlkit.recover import cores
from rlkit.recover.atomic import write_json
from rlkit.recover.cache import cache_folder
from rlkit.recover.source import read_json
from rlkit.runtime.processor import cpu_name

SCHEMA_VERSION = 1
OVERRIDE = "RLKIT_TUNED"
OFF = "off"
SHAPE = ("hidden_size", "head_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "filename")
MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Tuned:
    """What to run with; `session_options` is laid over genai's decoder.session_options, `threads` goes beside it.

    `environment` only works where it is set before a process starts. `about` says what was measured, when and where.
    """

    threads: int
    session_options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.threads, bool) or not isinstance(self.threads, int):
            raise ValueError(f"threads = {self.threads!r} is no number; measure again with: rlkit tune")
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads = {self.threads} is outside 1..{MOST_THREADS}; measure again with: rlkit tune")
        for name in ("session_options", "environment", "about"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is no table; measure again with: rlkit tune")
        for key, value in self.session_options.items():
            if not isinstance(value, str | int | float | bool):
                raise ValueError(f"session option {key} = {value!r} is no plain value; measure again with: rlkit tune")
        if not all(isinstance(value, str) for value in self.environment.values()):
            raise ValueError("a variable of the environment is no text; measure again with: rlkit tune")

    @property
    def advice(self) -> str | None:
        """What to put before a command, where the environment matters."""
        words = [f"{name}={value}" for name, value in sorted(self.environment.items())]
        return " ".join(words) or None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Tuned:
        """The inverse of `to_json`; ValueError for what another version or program wrote."""
        version = table.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version {version!r} is not this rlkit's {SCHEMA_VERSION}; measure again")
        try:
            return cls(*(table[name] for name in ("threads", "session_options", "environment", "about")))
        except KeyError as error:
            raise ValueError(f"it lacks {error}; measure again with: rlkit tune") from error


def settings_for(bundle: Path) -> Tuned | None:
    """The settings for a bundle on this machine; None where none were measured or RLKIT_TUNED is off.

    Raises ValueError for a damaged file, with the remedy, and FileNotFoundError for one that RLKIT_TUNED names in vain.
    """
    told = os.environ.get(OVERRIDE, "")
    if told.lower() == OFF:
        return None
    if told:
        return load(Path(told))
    path = path_of(bundle)
    return load(path) if path is not None and path.is_file() else None


def environment_for(bundle: Path) -> dict[str, str]:
    """What a process that opens the bundle should find in its environment; empty where nothing was measured."""
    found = settings_for(bundle)
    return {} if found is None else dict(found.environment)


def load(path: Path) -> Tuned:
    """Read a file of settings; ValueError naming it where it cannot be used."""
    if not path.is_file():
        raise FileNotFoundError(f"no settings in {path}, which {OVERRIDE} names; unset it, or set it to {OFF}")
    try:
        return Tuned.from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used ({error}); drop it with: rlkit tune BUNDLE --forget") from error


def save(bundle: Path, tuned: Tuned) -> Path:
    """Keep the settings for a bundle on this machine; return the file. ValueError for a folder that is no bundle."""
    path = path_of(bundle)
    if path is None:
        raise ValueError(f"{bundle} is no bundle, as its genai_config.json cannot be read; make one with: rlkit export")
    write_json(path, tuned.to_json())
    return path


def forget(bundle: Path) -> Path | None:
    """Drop what was measured for a bundle on this machine; the file that is gone, None where there was none."""
    path = path_of(bundle)
    if path is None or not path.is_file():
        return None
    path.unlink()
    return path


def path_of(bundle: Path) -> Path | None:
    """The file of a bundle's settings on this machine, which may not exist; None for a folder that is no bundle."""
    key = bundle_key(bundle)
    return None if key is None else cache_folder() / "tuned" / machine_key() / f"{key}.json"


def machine_facts() -> dict[str, Any]:
    """What makes two machines the same for these settings."""
    return {
        "cpu": cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": list(cores.allowed()),  # which ones: threads may be held on them
        "threads": cores.default_threads(),
        "onnxruntime": _version("onnxruntime"),
    }


def machine_key() -> str:
    """Sixteen hex digits of `machine_facts`."""
    return _digest(machine_facts())


def bundle_key(bundle: Path) -> str | None:
    """Sixteen hex digits of a bundle's form; None where its genai_config.json cannot be read."""
    try:
        decoder = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        shape = {name: decoder.get(name) for name in SHAPE}
        return _digest({"shape": shape, "nbytes": _sizes(bundle, str(decoder["filename"]))})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sizes(bundle: Path, filename: str) -> list[int]:
    graph = bundle / filename
    files = (graph, graph.with_name(f"{graph.name}.data"))
    return [file.stat().st_size if file.is_file() else 0 for file in files]


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
