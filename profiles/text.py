"""Held-out text as windows of token ids: read, choose documents by seed, cut, pad on the right.

Reads plain `.txt` (a form feed ends a document), and `.jsonl` or `.jsonl.gz` whose lines hold "text", or a request with
a context and its continuation: {"request": {"context": "...", "continuation": " word"}}.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[str], list[int]]
BUILTIN = Path(__file__).with_name("text.txt")
"""English of many kinds (tales, talk, news, letters, instructions, code, sums), written for this package, so that any
model can be measured without a download: about 6,000 tokens. Figures on it compare forms of one model; it is too short
and too plain to rank models."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of token ids padded on the right; `lengths` says how many of each row are real."""

    ids: NDArray[np.int64]  # (B, T)
    lengths: NDArray[np.int64]  # (B,)

    def __post_init__(self) -> None:
        rows, width = self.ids.shape
        if self.lengths.shape != (rows,) or not rows or self.lengths.min() < 2 or self.lengths.max() > width:
            raise ValueError(f"lengths {self.lengths.tolist()} do not fit rows of {width} ids; each needs 2 to {width}")

    @property
    def predicted(self) -> int:
        """How many positions have a next token to predict."""
        return int(self.lengths.sum()) - len(self.lengths)


def read_documents(path: Path) -> list[str]:
    """The documents of a text file; empty ones are left out."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}; give a .txt, .jsonl or .jsonl.gz file")
    suffixes = "".join(path.suffixes[-2:]).lower()
    if suffixes.endswith(".txt"):
        documents = re.split(r"\n?\f\n?", _decode(path, path.read_bytes()))
    elif suffixes.endswith((".jsonl", ".jsonl.gz")):
        data = _unzip(path) if suffixes.endswith(".gz") else path.read_bytes()
        documents = list(_documents(path, _decode(path, data)))
    else:
        raise ValueError(f"{path.name} is no text that can be read; give a .txt, .jsonl or .jsonl.gz file")
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise ValueError(f"{path} holds no text; give a file with at least one document")
    return kept


def _unzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); fetch it again") from error


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def _documents(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _document(json.loads(line))
        except (ValueError, TypeError) as error:
            wanted = '{"text": "..."} or {"request": {"context": "...", "continuation": "..."}}'
            raise ValueError(f"{path}, line {number} is not {wanted}: {error}") from error


def _document(entry: Any) -> str:
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return str(entry["text"])
    request = entry.get("request") if isinstance(entry, dict) else None
    if isinstance(request, dict) and isinstance(request.get("context"), str):
        return str(request["context"]) + str(request.get("continuation", ""))
    raise ValueError("neither text nor a request in it")


def windows(
    documents: Sequence[str], encode: Encode, *, min_tokens: int, max_length: int = 512, seed: int = 0
) -> list[list[int]]:
    """Documents in an order drawn by `seed`, as windows of 2 to `max_length` ids, until `min_tokens` are predicted.

    A window of n ids predicts n - 1 tokens. A document longer than `max_length` becomes several windows. Raises
    ValueError if there is less text than that.
    """
    if min_tokens < 1 or max_length < 2:
        raise ValueError(f"{min_tokens} tokens in windows of {max_length}: need at least 1 token, windows of 2 or more")
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    chosen: list[list[int]] = []
    predicted = 0
    for index in order:
        ids = encode(documents[index])
        for start in range(0, len(ids), max_length):
            window = ids[start : start + max_length]
            if predicted < min_tokens and len(window) >= 2:
                chosen.append(window)
                predicted += len(window) - 1
        if predicted >= min_tokens:
            return chosen
    raise ValueError(f"the text has {predicted} tokens to predict, fewer than {min_tokens}; ask for fewer or give more")


def batches(rows: Iterable[Sequence[int]], *, max_ids: int = 1024, pad: int = 0) -> list[Batch]:
    """Rows sorted by length (stable), in batches of at most `max_ids` ids with padding, and at least one row."""
    ordered = sorted(rows, key=len)
    found: list[Batch] = []
    while ordered:
        # Longest first, so that the largest batch, and with it peak memory, comes at once and not after an hour.
        width = len(ordered[-1])
        count = max(1, max_ids // width)
        part, ordered = ordered[-count:], ordered[:-count]
        ids = np.full((len(part), width), pad, dtype=np.int64)  # (B, T)
        for row, window in enumerate(part):
            ids[row, : len(window)] = window
        found.append(Batch(ids, np.array([len(window) for window in part], dtype=np.int64)))
    return found
