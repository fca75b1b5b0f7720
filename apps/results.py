"""The report of a demo run, assembled from the folders it left: manifests, measurements, the chat, this machine."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlkit.profiles import bench, report
from rlkit.profiles.bundle import read_size
from rlkit.profiles.divergence import Divergence
from rlkit.profiles.forecast import Peaks, Workload, forecast
from rlkit.profiles.machine import Machine
from rlkit.recover import recipe as recipes
from rlkit.recover.source import read_json

PACKAGES = ("rlkit-edge", "torch", "transformers", "onnxruntime", "onnxruntime-genai", "numpy")


def checkpoint_of(out: Path, recipe: str) -> Path:
    """Where a demo in `out` keeps the checkpoint of a recipe."""
    return out / "checkpoints" / recipe


def bundle_of(out: Path, recipe: str) -> Path:
    """Where a demo in `out` keeps the bundle of a recipe."""
    return out / "bundles" / recipe


def assemble(out: Path, names: Sequence[str], *, text: str, command: str) -> report.Report:
    """Read everything in `out`; `names` are the recipes, the first being what the others are compared with.

    The stages told are those of the last recipe.
    """
    bundles = [bundle_of(out, name) for name in names]
    recoveries = [read_json(checkpoint_of(out, name) / "recovery.json") for name in names]
    measured = [bench.Measurement.from_json(row) for row in _read(out / "bench.json")]
    machine = Machine.from_json(read_json(out / "machine.json"))
    sizes = [read_size(bundle) for bundle in bundles]
    timed = measured[0].timing()
    work = Workload(timed.prompt_tokens, timed.new_tokens)
    forecasts = [
        forecast(size.shape, recipes.load(bundle / "recipe.toml"), Peaks.of(machine), work).roofline
        for size, bundle in zip(sizes, bundles, strict=True)
    ]
    last, accuracies = recoveries[-1], [_accuracy(bundle) for bundle in bundles]
    exported = report.Stage("exported", accuracies[-1].divergence, 0.0)
    return report.Report(
        model=last["source"]["reference"],
        parameters=last["source"]["parameters"],
        reference_format=_reference_format(last["source"]),
        held_out_text=text,
        machine=machine,
        command=command,
        date=datetime.date.today().isoformat(),
        provenance=tuple(_provenance(name, facts) for name, facts in zip(names, recoveries, strict=True)),
        stages=(*(_stage(row) for row in last["stages"]), exported),
        bundles=report.bundle_results(sizes, measured, forecasts, accuracies),
        chat=report.Chat(**read_json(out / "chat.json")),
        versions={name: found for name in PACKAGES if (found := _version(name))},
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _stage(row: dict[str, Any]) -> report.Stage:
    divergence = row["divergence"]
    return report.Stage(row["stage"], Divergence.from_json(divergence) if divergence else None, row["seconds"])


def _accuracy(bundle: Path) -> report.Accuracy:
    found = dict(read_json(bundle / "rlkit.json")["divergence"])
    agreement = found.pop("to_checkpoint")
    found.pop("text")
    return report.Accuracy(Divergence.from_json(found), Divergence.from_json(agreement))


def _reference_format(facts: dict[str, Any]) -> str:
    quantization = facts["file"].removesuffix(".gguf").rpartition(".")[2]
    return f"GGUF {quantization}" if facts["kind"] == "gguf" else "as stored"


def _provenance(name: str, facts: dict[str, Any]) -> str:
    seconds = sum(row["seconds"] for row in facts["stages"])
    settings = facts["settings"]
    distilled = any(row["stage"] == "distilled" for row in facts["stages"])
    trained = f", then {settings['distillation']['steps']} distillation steps" if distilled else ""
    seed = settings["sampling"]["seed"]
    text = f"{facts['synthetic_tokens']:,} tokens that the model wrote itself (seed {seed})"
    return f"{name}: statistics and codes from {text}{trained}; {seconds:.0f} s; no text data was used."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
