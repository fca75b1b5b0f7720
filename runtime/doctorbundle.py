"""Whether a bundle can run here: on which device, with which kernels, in how much memory. Nothing is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlkit.runtime import tuned
from rlkit.runtime.clashes import numbers
from rlkit.runtime.devices import AUTO, choose, target_of
from rlkit.runtime.findings import Finding, Level
from rlkit.runtime.folder import graph_nbytes, read_bundle
from rlkit.runtime.processor import Processor
from rlkit.runtime.surroundings import Surroundings

AREA = "bundle"
RUNTIME_NBYTES = 150e6  # of a process with the runtime and no model, measured on Linux
FLOAT = 4  # bytes of a cached number on the CPU
PLENTY = 0.8  # of the free memory


def check_bundle(bundle: Path, around: Surroundings, processor: Processor, available_nbytes: int) -> Iterator[Finding]:
    """Findings about one bundle; a folder that is none is an error among them."""
    try:
        config, manifest = read_bundle(bundle)
    except (ValueError, OSError) as error:
        yield Finding(AREA, str(bundle), Level.ERROR, str(error))
        return
    yield from _device(target_of(manifest), around)
    yield from _kernels(bundle, manifest, processor)
    yield from _memory(bundle, config, available_nbytes)
    yield from _versions(manifest, around)
    yield from _tuned(bundle)


def _device(target: str, around: Surroundings) -> Iterator[Finding]:
    try:
        choice = choose(AUTO, target, around)
    except ValueError as error:
        yield Finding(AREA, "device", Level.ERROR, str(error))
        return
    text = f"made for {target}; --device auto takes {choice.device.name}: {choice.why}"
    yield Finding(AREA, "device", Level.OK, text)


def _kernels(bundle: Path, manifest: dict[str, Any], processor: Processor) -> Iterator[Finding]:
    tensors = (manifest.get("plan") or {}).get("tensors") or []
    packed = [tensor for tensor in tensors if tensor.get("bits") in (2, 4, 8)]
    if not packed:
        text = "its rlkit.json names no kernels"
        yield Finding(AREA, "kernels", Level.NOTE, text, f"rlkit lint {bundle}")
        return
    counted = Counter(str(tensor.get("kernel")) for tensor in packed)
    text = ", ".join(f"{number} x {name}" for name, number in counted.most_common())
    two_bits = any(tensor["bits"] == 2 for tensor in packed)
    feature = "avx2" if processor.is_x64 else "dotprod"
    if two_bits and manifest.get("target") == "cpu" and processor.features.get(feature, False) is False:
        text += f"; this processor has no {feature}, which the 2-bit kernel asks for"
        yield Finding(AREA, "kernels", Level.WARNING, text, "export the model again with a recipe of 4 bits")
    else:
        yield Finding(AREA, "kernels", Level.OK, text)


def _memory(bundle: Path, config: dict[str, Any], available_nbytes: int) -> Iterator[Finding]:
    """Weights are packed anew for the kernels when a bundle is opened, so at most twice the file for a moment."""
    weights = graph_nbytes(bundle / config["model"]["decoder"]["filename"])
    length, cache = cache_of(config)
    needed = weights + cache + RUNTIME_NBYTES
    parts = f"weights {_mb(weights)}, cache {_mb(cache)} for {length} tokens, the runtime {_mb(RUNTIME_NBYTES)}"
    text = f"about {_mb(needed)} ({parts}), while it opens up to {_mb(weights)} more; {_mb(available_nbytes)} are free"
    if needed > available_nbytes:
        fix = "close other programs, or export with fewer bits per weight"
        yield Finding(AREA, "memory", Level.ERROR, text, fix)
    elif needed + weights > PLENTY * available_nbytes:
        yield Finding(AREA, "memory", Level.WARNING, text, "close other programs, or it may have to swap")
    else:
        yield Finding(AREA, "memory", Level.OK, text)


def cache_of(config: dict[str, Any]) -> tuple[int, int]:
    """Tokens that the cache is made for unless told, and its bytes in float32; (0, 0) where the config lacks them."""
    decoder = config["model"]["decoder"]
    length = int((config.get("search") or {}).get("max_length") or config["model"]["context_length"])
    try:
        heads, layers = int(decoder["num_key_value_heads"]), int(decoder["num_hidden_layers"])
        return length, 2 * layers * heads * int(decoder["head_size"]) * FLOAT * length
    except (KeyError, TypeError, ValueError):
        return 0, 0


def _versions(manifest: dict[str, Any], around: Surroundings) -> Iterator[Finding]:
    made = manifest.get("versions") or {}
    for name in ("onnxruntime", "onnxruntime-genai"):
        there, here = made.get(name), around.packages.get(name)
        if there and here and numbers(here)[:2] < numbers(there)[:2]:
            text = f"made with {name} {there}, older {here} is installed: an operator may be missing"
            yield Finding(AREA, name, Level.WARNING, text, f'pip install "{name}>={there}"')


def _tuned(bundle: Path) -> Iterator[Finding]:
    try:
        found = tuned.settings_for(bundle)
    except (ValueError, OSError) as error:
        yield Finding(AREA, "tuned", Level.WARNING, str(error))
        return
    if found is None:
        yield Finding(AREA, "tuned", Level.NOTE, "not tuned on this machine", f"rlkit tune {bundle}")
        return
    options = ", ".join(f"{name}={value}" for name, value in found.session_options.items())
    text = f"tuned on {found.about.get('date', 'some day')}: {found.threads} threads{', ' if options else ''}{options}"
    yield Finding(AREA, "tuned", Level.OK, text, f"{found.advice} rlkit run ..." if found.advice else None)


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
