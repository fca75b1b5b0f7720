"""What any recovery says of itself in recovery.json, and the keys by which its kept work is found again.

A key is over everything that decides a result. Of a model's files that is `stamp`: cheap, but another one at another
place. `weights.identity` reads every weight and is the same for the same weights: what a folder says of its source.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any, Protocol

import torch

from rlkit.recover.memory import peak_nbytes
from rlkit.recover.source import Source
from rlkit.recover.stages import Stages
from rlkit.recover.team import Team
from rlkit.recover.workbench import Text


class Job(Protocol):
    """What a finished recovery can be asked: a Workbench or a repair's Bench."""

    @property
    def text(self) -> Text:
        """The corpus and its rows by use."""

    @property
    def stages(self) -> Stages:
        """The log of stages."""

    @property
    def team(self) -> Team:
        """The processes that did it."""

    def layers(self) -> list[dict[str, Any]]:
        """The log of every layer."""


def stamp(source: Source) -> list[list[str | int]]:
    """Path, bytes and time of the last change of the files that a model is read from, as JSON values."""
    files = [source.file] if source.file.is_file() else sorted(source.path.glob("*.safetensors"))
    files = [*files, *source.path.glob("config.json")]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def key(*parts: Any) -> str:
    """A short key of JSON values that decide a result, so that kept work is only reused for the same job."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def source_facts(source: Source, model: Any) -> dict[str, Any]:
    """Where a model came from and how large it is."""
    return {
        "reference": source.reference,
        "kind": str(source.kind),
        "file": source.gguf_file or source.path.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "reference_precision": "float32 dequantized from the GGUF's integers" if source.gguf_file else "as stored",
    }


def facts(job: Job, settings: dict[str, Any], *, on_text: bool) -> dict[str, Any]:
    """What is said of every recovery alike; `settings` as JSON values, `on_text` if text measured it."""
    corpus, rows = job.text.corpus, len(job.text.held_out)
    synthetic = f"{rows} held-out rows of the corpus, their {corpus.top_k} likeliest tokens and the rest"
    return {
        "settings": settings,
        "stages": job.stages.rows,
        "layers": job.layers(),
        "measured_on": "held-out text" if on_text else synthetic,
        "corpus": corpus.facts,
        "synthetic_tokens": int(corpus.ids.size),
        "peak_nbytes": peak_nbytes(),
        "processes": job.team.size,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
    }
