"""Keys and values as a bundle's cache holds them, collected by running its own graph: what scales are chosen on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.export.kvscales import Attention, Sample
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.runtime.plain import Plain
from rlkit.runtime.session import Session

CHUNK = 64  # tokens of one sampled text


def collect(
    folder: Path,
    decoder: dict[str, Any],
    attentions: Sequence[Attention],
    rows: Sequence[Sequence[int]],
    *,
    threads: int,
    tell: Tell = silent,
) -> dict[str, Sample]:
    """What each attention, by its node's name, would keep of every token of `rows`, each a text of its own.

    Kept in float16: a range of it is off by 1 in 2000 at most, and a large model's sample is some hundred megabytes.
    """
    plain = Plain(folder, decoder, threads, whole=False)
    names = [name for attention in attentions for name in attention.presents]
    parts: list[list[NDArray[np.float16]]] = [[] for _ in names]
    for number, row in enumerate(rows):
        tell(Progress("kv sample", number, len(rows)))
        for part, present in zip(parts, plain.outputs(names, np.array([row], np.int64)), strict=True):
            part.append(present[0].transpose(1, 0, 2).astype(np.float16))  # (T, heads, head size)
    tell(Progress("kv sample", len(rows), len(rows)))
    whole = [np.concatenate(part) for part in parts]
    pairs = zip(whole[::2], whole[1::2], strict=True)
    return {attention.node: Sample(*pair) for attention, pair in zip(attentions, pairs, strict=True)}


def generated(session: Session, tokens: int, seed: int) -> list[list[int]]:
    """Texts of CHUNK ids each that the model writes after one id drawn by `seed`, where no text is at hand.

    Together they have `tokens` ids or a few more.
    """
    rng = np.random.default_rng(seed)
    length = min(CHUNK, session.context_length)
    rows = []
    for number in range(-(-tokens // length)):
        first = [int(rng.integers(session.vocab_size))]
        reply = session.generate(first, length - 1, temperature=1.0, top_k=0, seed=seed + number, ignore_stop=True)
        rows.append(first + [token.id for token in reply])
    return rows
