"""The bundle folder: what stock onnxruntime-genai needs to run the model, and what is known about it.

model.onnx, model.onnx.data        the graph and its tensors
genai_config.json                  how to run it: threads, cache, search defaults, end-of-turn tokens
tokenizer files, chat_template.jinja
recipe.toml                        what was asked of recovery
rlkit.json                         the manifest: shape, bytes, versions, hashes, divergence, provenance
README.md                          the model card, from the manifest
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlkit.export.card import card
from rlkit.export.inventory import Inventory
from rlkit.export.plan import Plan, default_threads
from rlkit.recover import recipe
from rlkit.recover.atomic import sha256, write_json, write_text
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.source import read_json

SCHEMA_VERSION = 1
MODEL = "model.onnx"
MANIFEST = "rlkit.json"
CARD = "README.md"
DEFAULT_MAX_LENGTH = 2048  # the cache is reserved for this many tokens unless a caller asks for another length
PACKAGES = ("rlkit-edge", "onnxruntime", "onnxruntime-genai", "onnx-ir", "torch", "transformers")
# Chat models end their turn with one of these, whatever eos_token their config names.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|return|>", "<|endofturn|>")

Measure = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked of the export."""

    plan: Plan
    threads: int | None

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"threads = {self.threads} is outside 1..1024; leave it out for this machine's cores")

    def threads_json(self) -> dict[str, Any]:
        """The number written, and whether somebody chose it or it is this machine's."""
        if self.threads is not None:
            return {"value": self.threads, "chosen_by": "user"}
        return {"value": default_threads(), "chosen_by": "default"}


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the pieces of a bundle come from; `work` is the folder being made, `built` the builder's inside it."""

    work: Path
    built: Path
    checkpoint: Path
    inventory: Inventory
    tensors: list[dict[str, Any]]


def finish(parts: Parts, settings: Settings, *, measure: Measure | None = None, tell: Tell = silent) -> None:
    """Complete `parts.work`, which holds the graph already; the builder's folder goes."""
    tell(Progress("bundle", 0, 1))
    for file in sorted(parts.built.iterdir()):
        if file.is_file() and file.name not in (MODEL, MODEL + ".data", "genai_config.json"):
            shutil.copy(file, parts.work / file.name)
    config = json.loads((parts.built / "genai_config.json").read_text(encoding="utf-8"))
    write_json(parts.work / "genai_config.json", runnable_config(config, parts.work, settings))
    if (parts.checkpoint / "recipe.toml").is_file():
        shutil.copy(parts.checkpoint / "recipe.toml", parts.work / "recipe.toml")
    shutil.rmtree(parts.built)
    hashes = {file.name: sha256(file) for file in sorted(parts.work.iterdir())}
    manifest = _manifest(parts, settings)
    _write_manifest(parts.work, manifest, hashes)
    tell(Progress("bundle", 1, 1))
    if measure is not None:
        tell(Progress("measure", 0, 1))
        manifest["divergence"] = measure(parts.work)
        _write_manifest(parts.work, manifest, hashes)
        tell(Progress("measure", 1, 1))


def runnable_config(config: dict[str, Any], folder: Path, settings: Settings) -> dict[str, Any]:
    """The builder's genai_config.json with explicit threads, one KV buffer, and every end-of-turn token."""
    model, search = config["model"], config["search"]
    options = model["decoder"]["session_options"]
    options["provider_options"] = []
    options["intra_op_num_threads"] = settings.threads_json()["value"]
    eos = model["eos_token_id"]
    ids = eos if isinstance(eos, list) else [eos]
    ids += [token for token in turn_end_ids(folder) if token not in ids]
    model["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    search["past_present_share_buffer"] = True  # no copy of the cache per token, and rewinding works
    search["max_length"] = min(model["context_length"], DEFAULT_MAX_LENGTH)
    return config


def turn_end_ids(folder: Path) -> list[int]:
    """Ids of the end-of-turn tokens that the folder's chat template uses."""
    template, tokenizer = folder / "chat_template.jinja", folder / "tokenizer.json"
    if not (template.is_file() and tokenizer.is_file()):
        return []
    text = template.read_text(encoding="utf-8")
    added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    return [ids[mark] for mark in TURN_ENDS if mark in text and mark in ids]


def _manifest(parts: Parts, settings: Settings) -> dict[str, Any]:
    recovery = parts.checkpoint / "recovery.json"
    provenance = read_json(recovery) if recovery.is_file() else None
    asked = parts.work / "recipe.toml"
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "source": (provenance or {}).get("source", parts.checkpoint.name),
        "recipe": recipe.load(asked).to_json() if asked.is_file() else None,
        "shape": parts.inventory.shape.to_json(),
        "target": settings.plan.target.name,
        "accuracy_level": settings.plan.accuracy_level,
        "threads": settings.threads_json(),
        "tensors": parts.tensors,
        "nbytes": sum(tensor["nbytes"] for tensor in parts.tensors),
        "versions": {name: _version(name) for name in PACKAGES},
        "divergence": None,
        "provenance": provenance,
    }


def _write_manifest(folder: Path, manifest: dict[str, Any], hashes: dict[str, str]) -> None:
    write_text(folder / CARD, card({**manifest, "sha256": hashes}))  # which files there are says how to run it
    hashes = {**hashes, CARD: sha256(folder / CARD)}
    write_json(folder / MANIFEST, {**manifest, "sha256": hashes})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
