"""The float tensors of a full-precision model on disk, one at a time: read by name, or rewritten file by file.

A Hugging Face folder is never loaded whole: `rewrite` holds one of its safetensors files, `Weights` one tensor. A GGUF
is dequantized by transformers first, so it is held whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlkit.recover.atomic import need_space, sha256
from rlkit.recover.contents import read_safetensors_header
from rlkit.recover.model import load_model, quiet_transformers
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.source import Source, SourceKind, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".data", ".gguf", ".py"}
FACTS = {"recovery.json", "corruption.json", "recipe.toml", "rlkit.json"}  # what was said of the source, not of this
Change = Callable[[str, torch.Tensor], torch.Tensor]


def need_float(source: Source) -> None:
    """Raise ValueError unless `source` is a model whose matrices are stored as floats, or a GGUF."""
    if source.kind not in (SourceKind.HF, SourceKind.GGUF):
        why = f"{source.reference} is a {source.kind} folder, which is quantized already"
        raise ValueError(f"{why}; name a full-precision model")
    if source.kind is SourceKind.HF:
        quantization = read_json(source.path / "config.json").get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "some method")
            raise ValueError(f"{source.reference} is quantized already ({method}); name a full-precision model")
        files(source)


def files(source: Source) -> list[Path]:
    """The safetensors files that hold a Hugging Face folder's weights, checked to be whole.

    Raises ValueError for a folder without them, with a missing or damaged one, or with one outside the folder.
    """
    index = source.path / INDEX
    names = [SINGLE]
    if index.is_file():
        names = sorted(set(map(str, (read_json(index).get("weight_map") or {}).values())))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is outside the folder; fetch the model again")
        if not (source.path / name).is_file():
            raise ValueError(f"{source.reference} lacks {name}, where its weights should be; fetch or convert it again")
        read_safetensors_header(source.path / name)  # says what is wrong with a damaged file
    if not names:
        raise ValueError(f"{index} names no file; fetch the model again")
    return [source.path / name for name in names]


def identity(source: Source) -> str:
    """SHA-256 over the weight files: which model this is, wherever it lies and whatever it is called."""
    parts = [source.file] if source.kind is SourceKind.GGUF else files(source)
    return hashlib.sha256("".join(sha256(part) for part in parts).encode()).hexdigest()


class Weights:
    """The tensors of a full-precision model by parameter name, read when asked for; a tied lm_head has its own name."""

    def __init__(self, source: Source) -> None:
        need_float(source)
        self._held: dict[str, torch.Tensor] = {}
        self._places: dict[str, Path] = {}
        if source.kind is SourceKind.GGUF:
            self._held = dict(load_model(source)[0].state_dict())
        else:
            self._places = {row[0]: file for file in files(source) for row in read_safetensors_header(file)}
            if read_json(source.path / "config.json").get("tie_word_embeddings", False):
                self._places.setdefault("lm_head.weight", self._places.get("model.embed_tokens.weight", source.path))

    def __iter__(self) -> Iterator[str]:
        """Every parameter name."""
        return iter(self._held or self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._held or name in self._places

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor in its stored type."""
        if name in self._held:
            return self._held[name]
        with safe_open(self._places[name], framework="pt") as file:
            stored = name if name in file.keys() else "model.embed_tokens.weight"  # noqa: SIM118, no mapping
            tensor: torch.Tensor = file.get_tensor(stored)
        return tensor


def rewrite(source: Source, folder: Path, change: Change, tell: Tell = silent) -> None:
    """Write `source` into the empty `folder` with every tensor passed through `change(name, tensor)`.

    Types, file names, tied embeddings, config and tokenizer stay as they are; a GGUF becomes a float32 folder.
    """
    if source.kind is SourceKind.GGUF:
        _rewrite_gguf(source, folder, change, tell)
        return
    parts = files(source)
    need_space(folder, sum(part.stat().st_size for part in parts) + 64_000_000)
    for path in sorted(source.path.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_FILES and path.name not in FACTS:
            shutil.copyfile(path, folder / path.name)
    total = sum(len(read_safetensors_header(part)) for part in parts)
    done = 0
    for part in parts:
        changed = {}
        with safe_open(part, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118, no mapping
                changed[name] = change(name, file.get_tensor(name)).contiguous()
                done += 1
                tell(Progress("write", done, total, name))
        save_file(changed, folder / part.name, metadata=metadata or {"format": "pt"})


def _rewrite_gguf(source: Source, folder: Path, change: Change, tell: Tell) -> None:
    model, tokenizer = load_model(source)
    parameters = dict(model.named_parameters())  # a tied embedding is listed once
    need_space(folder, sum(parameter.nbytes for parameter in parameters.values()) + 64_000_000)
    for done, (name, parameter) in enumerate(parameters.items(), start=1):
        parameter.data = change(name, parameter.data)
        tell(Progress("write", done, len(parameters), name))
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
