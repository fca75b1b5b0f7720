"""What the server says of itself and of its bundles: models, numbers, and what a bundle promises on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rlkit.apps.server.metrics import Metrics
from rlkit.apps.server.pool import Pool, numbers, size_of
from rlkit.recover.source import read_json

SCHEMA_VERSION = 1
LEFT_OUT = ("tensors", "sha256", "provenance")  # long, and of no use for a page
FORECAST_PROMPT, FORECAST_NEW = 512, 128
POINT = ("context", "ttft_seconds", "tpot_seconds", "tokens_per_s")


def models(pool: Pool) -> dict[str, Any]:
    """Bundles and their adapters as OpenAI lists models."""
    names = [name for bundle in pool.names for name in (bundle, *(f"{bundle}:{one}" for one in pool.adapters(bundle)))]
    return {"object": "list", "data": [model(pool, name) for name in names]}


def model(pool: Pool, name: str) -> dict[str, Any]:
    """One of them. Refusal (404) for one that is not there."""
    bundle, adapter = pool.resolve(name)
    created = int(pool.folder(bundle).stat().st_mtime)
    about = {"id": name, "object": "model", "created": created, "owned_by": "rlkit"}
    about["context_length"] = _context_length(pool.folder(bundle))
    return about if adapter is None else {**about, "root": bundle, "parent": bundle}


def stats(pool: Pool, metrics: Metrics) -> dict[str, Any]:
    """The numbers of all engines; bundles that are not open have none."""
    opened = {loaded.name: loaded for loaded in pool.loaded()}
    rows = []
    for name in pool.names:
        loaded = opened.get(name)
        engine = None if loaded is None else numbers(loaded.engine)
        nbytes = size_of(pool.folder(name)) if loaded is None else loaded.nbytes
        rows.append({"model": name, "loaded": loaded is not None, "nbytes": nbytes, "engine": engine})
    return {
        "schema_version": SCHEMA_VERSION,
        "uptime_seconds": time.time() - metrics.started,
        "memory": {"bound_nbytes": pool.memory_nbytes, "loaded_nbytes": sum(one.nbytes for one in opened.values())},
        "models": rows,
    }


def profile(pool: Pool, metrics: Metrics, name: str) -> dict[str, Any]:
    """What a bundle is, what this machine promises for it, and what this server has measured with it."""
    bundle, adapter = pool.resolve(name)
    folder = pool.folder(bundle)
    manifest = read_json(folder / "rlkit.json") if (folder / "rlkit.json").is_file() else {}
    stated = _without_paths({key: value for key, value in manifest.items() if key not in LEFT_OUT})
    made, missing = None, None
    try:
        made = forecast(folder)
    except (ValueError, OSError, KeyError) as error:
        missing = " ".join(str(error).split()).replace(str(folder), bundle)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": name,
        "adapter": adapter,
        "bundle": stated,
        "context_length": _context_length(folder),
        "nbytes": size_of(folder),
        **_size(manifest),
        "adapters": list(pool.adapters(bundle)),
        "forecast": made,
        "forecast_missing": missing,
        "measured": metrics.measured(bundle),
    }


def _without_paths(stated: dict[str, Any]) -> dict[str, Any]:
    """What a bundle was made of by name alone: where that lies on this machine is nobody's business."""
    source = stated.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("reference"), str):
        return stated
    reference = source["reference"]
    name = Path(reference).name if Path(reference).is_absolute() else reference
    return {**stated, "source": {**source, "reference": name}}


def _size(manifest: dict[str, Any]) -> dict[str, Any]:
    """Parameters and stored bits per weight, where the manifest has them."""
    from rlkit.profiles import bundle

    try:
        size = bundle.size_of(manifest)
    except ValueError:
        return {}
    return {"parameters": size.shape.parameters, "bits_per_weight": size.bits_per_weight}


def _context_length(folder: Path) -> int | None:
    found = read_json(folder / "genai_config.json")["model"].get("context_length")
    return found if isinstance(found, int) else None


def forecast(folder: Path) -> dict[str, Any]:
    """The forecast of this machine for a bundle, from its calibration: nothing is measured here.

    `points` are the same over contexts, as powers of two.

    ValueError where the machine was never calibrated, or for a model that no forecast is made of.
    """
    from rlkit.profiles import here, places, sweeps
    from rlkit.profiles.account import Model
    from rlkit.profiles.architecture import read_architecture
    from rlkit.profiles.device import HERE, find, load
    from rlkit.profiles.forecast import Workload, forecast_model
    from rlkit.recover import recipe

    known = load()
    if HERE not in known:
        raise ValueError("this machine is not calibrated; run `rlkit calibrate` once for forecasts of it")
    device, unit = find(HERE, known)
    place = places.of_unit(device, unit, here.load_table() if unit.name == "cpu" else None)
    own = folder / "recipe.toml"
    stored = recipe.load(own) if own.is_file() else None
    model = Model(read_architecture(str(folder)), stored, place)
    work = Workload(FORECAST_PROMPT, FORECAST_NEW)
    found = sweeps.sweep({"": sweeps.Prepared(model)}, work, contexts=sweeps.contexts_of(model, FORECAST_NEW))
    points = [{name: getattr(point, name) for name in POINT} for point in found.points if not point.refused]
    return {**forecast_model(model, work).to_json(), "points": points}
