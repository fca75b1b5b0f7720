"""What a model on disk is made of: bits and bytes by kind of tensor, from headers and manifests alone.

`bits` is the width of a stored code; `bits_per_weight` counts everything stored for it (scales, zero points), so it is
what a token has to read. Of a bundle that rlkit did not make only the files are known.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.recover.ggufheader import read_header
from rlkit.recover.source import Source, SourceKind, read_json, read_shape

SCHEMA_VERSION = 1
KINDS = ("embedding", "attention", "gate_up", "down", "lm_head", "norm", "adapter", "other")
PATTERNS = (  # the first that is found in a tensor's or module's name tells its kind
    ("adapter", r"lora_|adapter"),
    ("norm", r"norm"),
    ("embedding", r"embed_tokens|token_embd"),
    ("lm_head", r"lm_head|^output\."),
    ("gate_up", r"gate_proj|up_proj|ffn_gate|ffn_up|gate_up"),
    ("down", r"down_proj|ffn_down"),
    ("attention", r"attn"),
)
DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "U8": 8}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor: its kind, the weights it holds, their code width, the bytes it takes."""

    kind: str
    bits: int
    nbytes: int
    weights: int


def kind_of(name: str) -> str:
    """Which of KINDS a tensor or module of that name is."""
    return next((kind for kind, pattern in PATTERNS if re.search(pattern, name)), "other")


def describe(source: Source) -> dict[str, Any]:
    """Everything known about a model on disk, as JSON values."""
    facts: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "reference": source.reference, "kind": str(source.kind)}
    facts["path"] = str(source.file)
    facts["files_nbytes"] = sum(path.stat().st_size for path in _files(source))
    try:
        shape = read_shape(source)
        facts |= {"shape": shape.to_json(), "parameters": shape.parameters}
    except ValueError as error:
        if source.kind is not SourceKind.BUNDLE:
            raise
        facts |= {"shape": None, "parameters": None, "note": str(error)}
    facts["tensors"] = _by_kind(_pieces(source))
    facts |= {"recipe": _recipe_name(source.path), "divergence": _divergence(source.path)}
    return facts


def _files(source: Source) -> Iterable[Path]:
    return [source.file] if source.gguf_file else [path for path in source.path.rglob("*") if path.is_file()]


def _recipe_name(folder: Path) -> str | None:
    path = folder / "recipe.toml"
    return str(tomllib.loads(path.read_text(encoding="utf-8")).get("name")) if path.is_file() else None


def _divergence(folder: Path) -> dict[str, Any] | None:
    """What the folder's maker measured last: a bundle states it, a checkpoint logs it stage by stage."""
    found: dict[str, Any] | None = None
    if (folder / "rlkit.json").is_file():
        found = read_json(folder / "rlkit.json").get("divergence")
    elif (folder / "recovery.json").is_file():
        for stage in read_json(folder / "recovery.json").get("stages", []):
            found = stage["divergence"] or found
    return found


def _pieces(source: Source) -> Iterator[Piece]:
    if source.kind is SourceKind.GGUF:
        yield from _gguf_pieces(source.file)
    elif source.kind is SourceKind.BUNDLE:
        yield from _bundle_pieces(source.path)
    else:
        yield from _folder_pieces(source.path)


def _by_kind(pieces: Iterator[Piece]) -> list[dict[str, Any]]:
    """One row per kind that occurs, in the order of KINDS."""
    sorted_in: dict[str, list[Piece]] = {kind: [] for kind in KINDS}
    for piece in pieces:
        sorted_in[piece.kind].append(piece)
    rows = []
    for kind, group in sorted_in.items():
        weights, nbytes = sum(piece.weights for piece in group), sum(piece.nbytes for piece in group)
        row = {"kind": kind, "bits": sorted({piece.bits for piece in group}), "weights": weights}
        row |= {"nbytes": nbytes, "bits_per_weight": round(8 * nbytes / weights, 3) if weights else None}
        if group:
            rows.append(row)
    return rows


def _gguf_pieces(path: Path) -> Iterator[Piece]:
    for tensor in read_header(path).tensors:
        digits = re.findall(r"\d+", tensor.type)  # the type's name starts with its width: Q4_1, IQ2_XXS, BF16
        yield Piece(kind_of(tensor.name), int(digits[0]), tensor.nbytes, math.prod(tensor.shape))


def _bundle_pieces(folder: Path) -> Iterator[Piece]:
    """The tensors that rlkit.json lists; none without one."""
    if not (folder / "rlkit.json").is_file():
        return
    for entry in read_json(folder / "rlkit.json").get("tensors", []):
        kind = entry["kind"] if entry["kind"] in KINDS else "other"
        yield Piece(kind, int(entry["bits"]), int(entry["nbytes"]), int(entry["weights"]))


def _folder_pieces(folder: Path) -> Iterator[Piece]:
    """The tensors of a Hugging Face or checkpoint folder, with its adapter; packed codes count as their weights."""
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file, the only weight format read here; fetch or convert it")
    for path in files:
        for name, dtype, shape, nbytes in read_safetensors_header(path):
            yield _piece(name, dtype, shape, nbytes, quantization)
    for path in sorted((folder / "adapter").glob("*.safetensors")):
        for _name, dtype, shape, nbytes in read_safetensors_header(path):
            yield Piece("adapter", DTYPE_BITS.get(dtype, 8 * nbytes // math.prod(shape)), nbytes, math.prod(shape))


def _piece(name: str, dtype: str, shape: list[int], nbytes: int, quantization: dict[str, Any]) -> Piece:
    module, _dot, part = name.rpartition(".")
    if part not in ("qweight", "scales", "qzeros"):
        return Piece(kind_of(name), DTYPE_BITS.get(dtype, 0), nbytes, math.prod(shape))
    override = (quantization.get("overrides") or {}).get(module, {})
    bits = int(override.get("bits") or quantization.get("bits") or 4)
    return Piece(kind_of(module), bits, nbytes, 8 * nbytes // bits if part == "qweight" else 0)


def read_safetensors_header(path: Path) -> list[tuple[str, str, list[int], int]]:
    """(name, dtype, shape, nbytes) of every tensor; ValueError if the file is damaged or shorter than it says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        head = file.read(length) if length < size else b""
    try:
        entries = {name: entry for name, entry in json.loads(head).items() if name != "__metadata__"}
        rows = [
            (name, e["dtype"], e["shape"], e["data_offsets"][1] - e["data_offsets"][0]) for name, e in entries.items()
        ]
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file; fetch or make it again") from error
    if end != size:
        raise ValueError(f"{path} is truncated: {size} of {end} bytes; fetch or make it again")
    return rows
