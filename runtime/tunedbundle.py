"""Tuned settings inside a bundle: into its genai_config.json, and out again.

The manifest says which they are and what stood there before, so that they can be undone, and keeps the new hash.
Which processors threads are held on stays out: a bundle may go to another machine, or be opened with other threads,
and then could not be opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlkit.recover.atomic import sha256, write_json
from rlkit.recover.source import read_json
from rlkit.runtime.tuned import Tuned

CONFIG, MANIFEST = "genai_config.json", "rlkit.json"
THREADS = "intra_op_num_threads"
AFFINITIES = "session.intra_op_thread_affinities"


def write(bundle: Path, tuned: Tuned) -> Path:
    """Write settings into a bundle of rlkit; return its genai_config.json. ValueError for another's bundle."""
    undo(bundle)
    config, manifest = _read(bundle)
    options = _options(config)
    new = {THREADS: tuned.threads, **tuned.session_options}
    new.pop(AFFINITIES, None)
    before = {name: options.get(name) for name in new}
    options.update(new)
    manifest["tuned"] = {**tuned.to_json(), "before": before, "threads_before": manifest.get("threads")}
    manifest["threads"] = {"value": tuned.threads, "chosen_by": "tuned"}
    return _write(bundle, config, manifest)


def undo(bundle: Path) -> Path | None:
    """Put back what `write` changed; the file that was changed, None where nothing was."""
    if not (bundle / MANIFEST).is_file() or "tuned" not in read_json(bundle / MANIFEST):
        return None
    config, manifest = _read(bundle)
    options, kept = _options(config), manifest.pop("tuned")
    for name, value in kept["before"].items():
        if value is None:
            options.pop(name, None)
        else:
            options[name] = value
    manifest["threads"] = kept["threads_before"]
    return _write(bundle, config, manifest)


def _read(bundle: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not (bundle / MANIFEST).is_file():
        raise ValueError(f"{bundle} has no {MANIFEST}, so nothing is written into it; leave --write out")
    return read_json(bundle / CONFIG), read_json(bundle / MANIFEST)


def _options(config: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = config["model"]["decoder"].setdefault("session_options", {})
    return options


def _write(bundle: Path, config: dict[str, Any], manifest: dict[str, Any]) -> Path:
    path = bundle / CONFIG
    write_json(path, config)
    if CONFIG in manifest.get("sha256", {}):
        manifest["sha256"][CONFIG] = sha256(path)
    write_json(bundle / MANIFEST, manifest)
    return path
