"""A corpus: rows of token ids with the original's cached next-token distributions, as a folder of safetensors shards.

    corpus.json                 the manifest: where the rows come from, how they were made, how many, which shards
    shard-00000.safetensors     ids (n, T) int32, top_ids (n, T, k) int32, top_log_probs (n, T, k) float16,
                                rest (n, T) float16

Position t of a row holds the original's distribution of the token behind it, at temperature 1: its k most likely tokens
and the log of the mass of all others. What trains against it needs no teacher in memory. A row takes
T * (4 + 6 k + 2) bytes: 50 kB at 128 tokens and k = 64.

Nothing here needs torch. Rows are made by `synthesize.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rlkit.recover.atomic import need_space, refuse_existing, write_bytes, write_json
from rlkit.recover.cache import nbytes_below
from rlkit.recover.source import read_json

SCHEMA_VERSION = 1
MANIFEST = "corpus.json"
LEAST = -20.0  # no log of a rest is stored below this: e^-20 is nothing to training, and float16 holds it
LOWEST = -60000.0  # the same for single tokens, which float16 could only hold as -inf
AGAIN = "run the same `rlkit synthesize` again with --force"

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """The original's distribution of the next token at every position of some rows, at temperature 1."""

    ids: NDArray[np.int64]  # (B, T, k), the most likely first
    log_probs: NDArray[np.float32]  # (B, T, k)
    rest: NDArray[np.float32]  # (B, T), log of the mass that is left, never -inf


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """An opened corpus: all ids, and the cached distributions of any rows on demand."""

    folder: Path
    ids: Ids  # (rows, T)
    top_k: int  # tokens kept per position; 0 if no distributions were kept
    vocab: int
    facts: dict[str, Any]  # the manifest

    @staticmethod
    def open(folder: Path) -> Corpus:
        """Read the manifest and all ids.

        Raises FileNotFoundError if there is no corpus or a shard is missing, ValueError if one is damaged.
        """
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder} is no corpus: it has no {MANIFEST}; make one with `rlkit synthesize`")
        facts = read_json(folder / MANIFEST)
        if facts.get("schema_version") != SCHEMA_VERSION:
            version = facts.get("schema_version")
            raise ValueError(f"{folder / MANIFEST} has schema_version {version}, not {SCHEMA_VERSION}; {AGAIN}")
        try:
            length, top_k, vocab = (int(facts[name]) for name in ("length", "top_k", "vocab"))
            shards, _tokenizer = facts["shards"], facts["tokenizer"]
            listed = [(folder / str(shard["file"]), int(shard["rows"]), int(shard["nbytes"])) for shard in shards]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / MANIFEST} is damaged ({error!r}); {AGAIN}") from error
        parts = []
        for path, rows, nbytes in listed:
            if path.parent != folder or not path.is_file():
                raise FileNotFoundError(f"{folder} lacks {path.name}, which its manifest lists; {AGAIN}")
            try:
                if path.stat().st_size != nbytes:
                    raise ValueError(f"it has {path.stat().st_size} bytes instead of {nbytes}")
                parts.append(read_ids(path, Shape(rows, length, top_k, vocab)))
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}; {AGAIN}") from error
        if sum(map(len, parts)) != facts.get("sequences") or not parts:
            raise ValueError(f"{folder / MANIFEST} is damaged: its shards hold another number of rows; {AGAIN}")
        return Corpus(folder, np.concatenate(parts), top_k, vocab, facts)

    def targets(self, rows: Ids) -> Targets:
        """The cached distributions of `rows` (B,), in that order; only these rows are read from the disk.

        Storage in float16 loses up to 0.2% of a probability, so each distribution is normalized again: its tokens and
        its rest sum to 1. Raises ValueError if none are kept, if a row does not exist, or if a shard is damaged.
        """
        if not self.top_k:
            raise ValueError(f"{self.folder} keeps no log-probabilities; make it again with --kept 64 --force")
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.ids):
            raise ValueError(
                f"rows {rows.min()} to {rows.max()} are not all in 0..{len(self.ids) - 1} of {self.folder}"
            )
        count, length = len(rows), self.ids.shape[1]
        ids = np.empty((count, length, self.top_k), np.int64)
        logs = np.empty((count, length, self.top_k + 1), np.float32)  # the rest comes last
        starts = np.cumsum([0] + [shard["rows"] for shard in self.facts["shards"]])
        owners = np.searchsorted(starts, rows, side="right") - 1  # behind every empty shard
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            path = self.folder / self.facts["shards"][owner]["file"]
            for place, (top_ids, log_probs, rest) in zip(
                places, _read_rows(path, rows[places] - starts[owner]), strict=True
            ):
                ids[place], logs[place, :, :-1], logs[place, :, -1] = top_ids, log_probs, rest
            read = ids[places]
            if read.min() < 0 or read.max() >= self.vocab or not np.isfinite(logs[places]).all():
                raise ValueError(f"{path} is damaged: what it holds are no distributions; {AGAIN}")
        logs -= np.logaddexp.reduce(logs, axis=-1, keepdims=True)
        return Targets(ids, logs[..., :-1], np.maximum(logs[..., -1], LEAST))

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError unless the corpus was made with this tokenizer: its ids mean nothing to another."""
        if tokenizer_fingerprint(tokenizer) != self.facts["tokenizer"]:
            raise ValueError(
                f"{self.folder} was made with another tokenizer; make a corpus of this model with `rlkit synthesize`"
            )


def _read_rows(path: Path, rows: Ids) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Yield top_ids (T, k), top_log_probs (T, k) and rest (T,) of some rows of one shard."""
    try:
        with safe_open(path, framework="numpy") as file:
            parts = [file.get_slice(name) for name in ("top_ids", "top_log_probs", "rest")]
            for row in rows.tolist():
                top_ids, log_probs, rest = (part[row : row + 1][0] for part in parts)
                yield top_ids, log_probs, rest
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {AGAIN}") from error


@dataclass(frozen=True, slots=True)
class Shape:
    """What a shard must be: rows of `length` ids below `vocab`, with `top_k` log-probabilities at each."""

    rows: int
    length: int
    top_k: int
    vocab: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; a shard's header adds less than a kilobyte."""
        kept = 4 * self.top_k + 2 * self.top_k + 2 if self.top_k else 0
        return self.rows * self.length * (4 + kept)

    def empty(self) -> dict[str, NDArray[Any]]:
        """Tensors to fill and store."""
        types = {"I32": np.int32, "F16": np.float16}
        return {name: np.empty(shape, types[dtype]) for name, (dtype, shape) in self.tensors().items()}

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Data type and shape of every tensor, by name, as safetensors names them."""
        rows, k = [self.rows, self.length], self.top_k
        kept = {"top_ids": ("I32", [*rows, k]), "top_log_probs": ("F16", [*rows, k]), "rest": ("F16", rows)}
        return {"ids": ("I32", rows)} | (kept if k else {})


def read_ids(path: Path, shape: Shape) -> Ids:
    """The ids of a shard (rows, T). Raises ValueError if the shard is not of this shape or cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dictionary
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            if found != shape.tensors():
                raise ValueError(f"it holds {found} instead of {shape.tensors()}")
            ids: Ids = file.get_tensor("ids").astype(np.int64)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"it cannot be read ({error})") from error
    if ids.size and not 0 <= ids.min() <= ids.max() < shape.vocab:
        raise ValueError(f"ids from {ids.min()} to {ids.max()} are not all in the vocabulary of {shape.vocab}")
    return ids


class Work:
    """A corpus in the making: finished shards in `.<name>.work/<key>` beside its place, until all are there.

    The key stands for `facts`, everything that decides the data, so another job neither reuses these shards nor loses
    them. Shards are numbered in the order in which they are made, and keep what is counted in their metadata.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any], rows: int, *, force: bool) -> None:
        """Start or continue making `out` with about `rows` rows.

        Raises FileExistsError if `out` exists and not `force`, OSError if the disk is too full.
        """
        refuse_existing(out, force=force)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = out.with_name(f".{out.name}.work") / key
        self._out, self._facts, self._force = out, {"schema_version": SCHEMA_VERSION, **facts}, force
        need_space(out, self.shape(rows).nbytes - nbytes_below(self.folder))
        self.folder.mkdir(parents=True, exist_ok=True)

    def shape(self, rows: int) -> Shape:
        """What a shard of that many rows must be."""
        return Shape(rows, *(self._facts[name] for name in ("length", "top_k", "vocab")))

    def kept(self, index: int) -> tuple[Ids, dict[str, int]] | None:
        """The ids and counts of a finished shard; None if it is absent, damaged or another job's."""
        path = self._shard(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                counts = json.loads((file.metadata() or {})["counts"])
            return read_ids(path, self.shape(counts["rows"])), counts
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def write(self, index: int, tensors: Mapping[str, NDArray[Any]], counts: Mapping[str, int]) -> None:
        """Keep a shard, complete or not at all, with what is counted of it."""
        stored = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        # One entry alone, as several would be written in any order, and the same data is to be the same bytes.
        counted = json.dumps({**counts, "rows": len(tensors["ids"])}, sort_keys=True)
        write_bytes(self._shard(index), save(stored, {"counts": counted}))

    def publish(self, shards: int, counts: Mapping[str, int]) -> Corpus:
        """Put the folder of the first `shards` shards in its place, and open it."""
        listed: list[dict[str, Any]] = []
        for index in range(shards):
            path, kept = self._shard(index), self.kept(index)
            assert kept is not None
            listed.append({"file": path.name, "rows": len(kept[0]), "nbytes": path.stat().st_size})
        for path in set(self.folder.iterdir()) - {self.folder / shard["file"] for shard in listed}:
            path.unlink()
        rows = sum(shard["rows"] for shard in listed)
        sizes = {"sequences": rows, "tokens": rows * int(self._facts["length"]), "counts": dict(counts)}
        write_json(self.folder / MANIFEST, {**self._facts, **sizes, "shards": listed})
        refuse_existing(self._out, force=self._force)
        if self._out.exists():
            replaced = self.folder.with_name("replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self._out, replaced)
        os.replace(self.folder, self._out)
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        return Corpus.open(self._out)

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the sorted (token, id) pairs of a tokenizer's vocabulary, added tokens included."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
