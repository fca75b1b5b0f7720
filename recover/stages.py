"""The log of a recovery's finished stages: how long each took and how far the model then is from the original."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover.atomic import write_json
from rlkit.recover.corpus import Corpus
from rlkit.recover.memory import give_back, peak_nbytes
from rlkit.recover.model import logits_fn

Measure = Callable[[Any], dict[str, Any]]  # LogitsFn -> JSON object with at least "kl_mean"


class Stages:
    """Rows of stage, wall seconds since the one before, divergence and peak memory so far; `file` keeps them."""

    def __init__(self, measure: Measure, file: Path) -> None:
        self._measure, self._file = measure, file
        found = file.is_file()
        self.rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if found else []
        self._since = time.perf_counter()

    def finished(self, name: str) -> bool:
        """Whether the stage is on the log."""
        return any(row["stage"] == name for row in self.rows)

    def finish(self, name: str, model: Any = None) -> None:
        """Close a stage, unless it is on the log; with a model, measure it (which counts as no stage's time)."""
        if not self.finished(name):
            seconds = time.perf_counter() - self._since
            self.note(name, seconds, self._measure(logits_fn(model)) if model is not None else None)
        give_back()
        self._since = time.perf_counter()

    def note(self, name: str, seconds: float, divergence: dict[str, Any] | None = None) -> None:
        """Add a row."""
        row = {"stage": name, "seconds": round(seconds, 2), "divergence": divergence, "peak_nbytes": peak_nbytes()}
        self.rows.append(row)
        write_json(self._file, self.rows)


def corpus_measure(corpus: Corpus, rows: NDArray[np.int64]) -> Measure:
    """The divergence on rows of the corpus, from its kept distributions: KL over their top tokens and "any other".

    By the data-processing inequality that is at most the KL over the whole vocabulary.
    """

    def measure(logits: Any) -> dict[str, Any]:
        total, same, count = 0.0, 0, 0
        for row in rows:
            target = corpus.targets(np.array([row]))
            log_q = torch.log_softmax(torch.from_numpy(logits(corpus.ids[[row]])), dim=-1)  # (1, T, V)
            ids, log_p = torch.from_numpy(target.ids), torch.from_numpy(target.log_probs)
            chosen = log_q.gather(-1, ids)
            rest = torch.log1p(-chosen.exp().sum(-1).clamp(max=1 - 1e-6))
            log_rest = torch.from_numpy(target.rest)
            kl = (log_p.exp() * (log_p - chosen)).sum(-1) + log_rest.exp() * (log_rest - rest)
            total, count = total + float(kl.sum()), count + kl.numel()
            same += int((log_q.argmax(-1) == ids[..., 0]).sum())
        return {"kl_mean": total / count, "top1_agreement": same / count, "tokens": count}

    return measure
