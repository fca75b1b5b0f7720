"""A bundle's folder before it is opened: its two JSON files, and whether it can be run at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1  # of rlkit.json


def read_bundle(bundle: Path, threads: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """genai_config.json and rlkit.json (empty where there is none) of a folder that can be opened with `threads`.

    Raises FileNotFoundError or ValueError, one line with the remedy.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads = {threads} cannot run anything; use at least 1, or leave it out")
    if not bundle.is_dir():
        raise FileNotFoundError(f"no bundle folder {bundle}; make one with: rlkit export CHECKPOINT -o {bundle}")
    if not (bundle / "genai_config.json").is_file():
        what = "a checkpoint" if (bundle / "config.json").is_file() else "no bundle: it holds no genai_config.json"
        raise ValueError(f"{bundle} is {what}; make a bundle with: rlkit export CHECKPOINT -o BUNDLE")
    config = _read_object(bundle / "genai_config.json")
    try:
        filename = str(config["model"]["decoder"]["filename"])
        _ = config["model"]["context_length"], config["model"]["vocab_size"], config["model"]["eos_token_id"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{bundle}/genai_config.json lacks {error}; export the bundle again") from error
    for name in (filename, "tokenizer.json"):
        if not (bundle / name).is_file():
            raise FileNotFoundError(f"{bundle} lacks {name}, so it is incomplete; export it again")
    return config, _manifest(bundle)


def threads_here(config: dict[str, Any], manifest: dict[str, Any]) -> int:
    """A number somebody chose or tuned holds, up to this process's cores; a default is made anew for this machine."""
    from rlkit.export.plan import default_threads

    cores = default_threads()
    written = (config["model"]["decoder"].get("session_options") or {}).get("intra_op_num_threads")
    chosen = (manifest.get("threads") or {}).get("chosen_by", "user") != "default"
    return min(written, cores) if chosen and isinstance(written, int) and written > 0 else cores


def providers(config: dict[str, Any]) -> set[str]:
    """The providers that a bundle names, in genai's spelling made small."""
    options = (config["model"]["decoder"].get("session_options") or {}).get("provider_options") or []
    return {str(name).lower() for entry in options for name in entry}


def graph_nbytes(file: Path) -> int:
    """Bytes of a graph and of the data beside it."""
    data = file.with_name(f"{file.name}.data")
    shared = file.parent / "model.onnx.data"  # other graphs of a bundle read the same
    parts = (file, data if data.is_file() else shared)
    return sum(part.stat().st_size for part in parts if part.is_file())


def _manifest(bundle: Path) -> dict[str, Any]:
    path = bundle / "rlkit.json"
    if not path.is_file():
        return {}
    manifest = _read_object(path)
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version!r}, newer than this rlkit's {SCHEMA_VERSION}; update rlkit"
        )
    return manifest


def _read_object(path: Path) -> dict[str, Any]:
    from rlkit.recover.source import read_json

    return read_json(path)
