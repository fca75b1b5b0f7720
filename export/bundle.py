"""The bundle folder: what stock onnxruntime-genai needs to run the model, and what is known about it.

model.onnx, model.onnx.data        the graph and its tensors
logits.onnx                        where model.onnx has the last token's logits only: the same with all of them
adapters/NAME.onnx_adapter         low-rank adapters to switch between at run time
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

from rlkit.export import npu
from rlkit.export.card import card
from rlkit.export.plan import Plan, default_threads
from rlkit.export.skeleton import Skeleton
from rlkit.export.store import Store
from rlkit.recover import recipe
from rlkit.recover.atomic import sha256, write_json, write_text
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.source import Source, read_json

SCHEMA_VERSION = 1
MODEL = "model.onnx"
ALL_LOGITS = "logits.onnx"
MANIFEST = "rlkit.json"
CARD = "README.md"
RECIPE = "recipe.toml"
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
    logits: str
    recipe: recipe.Recipe | None = None
    mode: str = "hybrid"  # of NPUs

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
    """Where the pieces of a bundle come from; `work` is the folder being made, which holds the graphs already."""

    work: Path
    skeleton: Skeleton
    source: Source
    store: Store
    tensors: list[dict[str, Any]]
    adapters: list[dict[str, Any]]
    findings: int  # of lint
    name: str  # of the folder when it is complete
    digests: dict[str, str]  # SHA-256 of files where it is known already


def finish(parts: Parts, settings: Settings, *, measure: Measure | None = None, tell: Tell = silent) -> None:
    """Complete `parts.work`."""
    tell(Progress("bundle", 0, 1))
    for file in sorted(parts.skeleton.folder.iterdir()):
        if file.is_file() and file.name != "genai_config.json":
            shutil.copy(file, parts.work / file.name)
    if not (parts.work / "tokenizer.json").is_file():
        raise ValueError(f"{parts.source.reference} has no tokenizer.json, so nothing could run it; add its tokenizer")
    write_json(parts.work / "genai_config.json", runnable_config(parts.skeleton.config, parts.work, settings))
    if settings.plan.target.device == "npu":
        npu.complete(
            parts.work,
            settings.plan,
            parts.store.inventory.shape,
            mode=settings.mode,
            name=parts.name,
            findings=parts.findings,
        )
    if settings.recipe is not None:
        write_text(parts.work / RECIPE, settings.recipe.to_toml())
    elif (parts.source.path / RECIPE).is_file():
        shutil.copy(parts.source.path / RECIPE, parts.work / RECIPE)
    files = sorted(file for file in parts.work.rglob("*") if file.is_file())
    names = {file.relative_to(parts.work).as_posix(): file for file in files}
    hashes = {name: parts.digests.get(name) or sha256(file) for name, file in names.items()}
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
    if settings.plan.target.device == "cpu":
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
    recovery = parts.source.path / "recovery.json"
    provenance = read_json(recovery) if recovery.is_file() else None
    asked, plan = parts.work / RECIPE, settings.plan.to_json()
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "source": (provenance or {}).get("source") or _stated(parts.source),
        "recipe": recipe.load(asked).to_json() if asked.is_file() else None,
        "shape": parts.store.inventory.shape.to_json(),
        "target": settings.plan.target.name,
        "accuracy_level": settings.plan.accuracy_level,
        "logits": settings.logits,
        "adapters": {adapter["name"]: adapter for adapter in parts.adapters},
        "threads": settings.threads_json(),
        "tensors": parts.tensors,
        "nbytes": sum(tensor["nbytes"] for tensor in parts.tensors),
        "plan": plan,
        "report": parts.store.report,
        "versions": {name: _version(name) for name in PACKAGES},
        "divergence": None,
        "provenance": provenance,
    }


def _stated(source: Source) -> dict[str, Any]:
    """Where an export without recovery came from."""
    return {"reference": source.reference, "kind": str(source.kind), "file": source.gguf_file or source.path.name}


def _write_manifest(folder: Path, manifest: dict[str, Any], hashes: dict[str, str]) -> None:
    write_text(folder / CARD, card({**manifest, "sha256": hashes}))  # which files there are says how to run it
    hashes = {**hashes, CARD: sha256(folder / CARD)}
    write_json(folder / MANIFEST, {**manifest, "sha256": hashes})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
