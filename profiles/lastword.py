"""Last-word prediction (LAMBADA, Paperno et al. 2016): does the model, taking its likeliest token each time, say it?

Passages come as requests {"request": {"context": "...", "continuation": " word"}}, one per line of a .jsonl or
.jsonl.gz file. A passage counts as right if every token of the last word is the model's first choice.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlkit.profiles.divergence import LogitsFn
from rlkit.profiles.text import Encode, batches
from rlkit.recover.progress import Progress, Tell, silent


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids of a passage, and how many of the last of them are its last word."""

    ids: tuple[int, ...]
    target: int


def read_passages(path: Path, encode: Encode, *, count: int, seed: int = 0) -> list[Passage]:
    """`count` passages of the file in an order drawn by `seed`; all of them if there are fewer.

    Raises ValueError for a file without requests.
    """
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    passages: list[tuple[str, str]] = []
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
        try:
            request = json.loads(line)["request"]
            passages.append((str(request["context"]), str(request["continuation"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no request with context and continuation: {error}") from error
    random.Random(seed).shuffle(passages)
    return [_passage(context, word, encode) for context, word in passages[:count]]


def _passage(context: str, word: str, encode: Encode) -> Passage:
    """The word is what the whole adds to the context; tokens may merge across the border, so prefixes are compared."""
    before, whole = encode(context), encode(context + word)
    same = 0
    while same < min(len(before), len(whole) - 1) and before[same] == whole[same]:
        same += 1
    return Passage(tuple(whole), len(whole) - same)


def accuracy(logits: LogitsFn, passages: Sequence[Passage], tell: Tell = silent) -> float:
    """The share of passages whose last word the model says; 0 to 1."""
    if not passages:
        raise ValueError("there are no passages to predict; give at least one")
    targets = {passage.ids: passage.target for passage in passages}
    right, done = 0, 0
    for batch in batches([passage.ids for passage in passages]):
        found = logits(batch.ids)
        for row, length in enumerate(batch.lengths):
            ids = batch.ids[row, :length]
            first = int(length) - targets[tuple(int(token) for token in ids)]
            right += bool(np.array_equal(found[row, first - 1 : length - 1].argmax(-1), ids[first:]))
        done += len(batch.lengths)
        tell(Progress("last words", done, len(passages)))
    return right / len(passages)
