"""The KV caches that a bundle offers: which graph to open for one, and what it takes.

Beside its own graph a bundle may hold others over the same data, whose attention keeps keys and values as integers:

    model.onnx    model.kv-int8.onnx    model.kv-int4.onnx
    logits.onnx   logits.kv-int8.onnx   logits.kv-int4.onnx      for measuring

They are small files, written complete or not at all, so one that is there is offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.export.kvscales import SCHEMES, file_name

FLOAT = "float"
KINDS = (FLOAT, *SCHEMES)


@dataclass(frozen=True, slots=True)
class Cache:
    """What a cache holds for each token: `layers` times keys and values of `heads` KV heads of `head_size` numbers."""

    scheme: str
    bits: int
    layers: int
    heads: int
    head_size: int

    @property
    def nbytes_per_token(self) -> int:
        """Bytes of one token in all layers; the scales are of the graph."""
        return 2 * self.layers * self.heads * -(-self.head_size * self.bits // 8)


def offered(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """The caches of a bundle: FLOAT, and those of SCHEMES that it has a graph for."""
    filename = config["model"]["decoder"]["filename"]
    return (FLOAT, *(name for name in SCHEMES if (folder / file_name(filename, name)).is_file()))


def graph_of(folder: Path, config: dict[str, Any], kv: str | None) -> tuple[str, Cache]:
    """The file name of the graph with such a cache, and what the cache takes; `kv` None or FLOAT is the bundle's own.

    `config` is the bundle's genai_config.json. A float cache counts as float32, which it is in bundles for the CPU.
    Raises ValueError for a cache that the bundle does not have, naming those it has and the command that adds it.
    """
    decoder = config["model"]["decoder"]
    name = check(folder, decoder, kv)
    sizes = (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"])
    layers, heads, head_size = (int(size) for size in sizes)
    if name == FLOAT:
        return str(decoder["filename"]), Cache(FLOAT, 32, layers, heads, head_size)
    return file_name(decoder["filename"], name), Cache(name, SCHEMES[name].bits, layers, heads, head_size)


def check(folder: Path, decoder: dict[str, Any], kv: str | None) -> str:
    """The name of a cache that the bundle offers; ValueError for any other, as `graph_of` says it."""
    name, there = kv or FLOAT, offered(folder, {"model": {"decoder": decoder}})
    if name not in KINDS:
        raise ValueError(f"kv {name!r} is no kind of cache; use {', '.join(KINDS)}")
    if name not in there:
        has = f"{folder} has no {name} cache, only {', '.join(there)}"
        raise ValueError(f"{has}; add it with: rlkit kv-calibrate {folder} --add {name}")
    return name


def overlay(filename: str) -> dict[str, Any]:
    """What genai's configuration must say to run a graph of `graph_of`: one buffer, or an int4 cache cannot rewind."""
    return {"model": {"decoder": {"filename": filename}}, "search": {"past_present_share_buffer": True}}
