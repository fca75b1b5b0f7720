"""The log of stages, and the measure on a corpus' own distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from rlkit.recover.model import load_model, logits_fn
from rlkit.recover.source import resolve
from rlkit.recover.stages import Stages, corpus_measure
from rlkit.recover.synthesize import Sampling, synthesize


def test_a_stage_is_measured_once_and_survives(tmp_path: Path) -> None:
    asked: list[Any] = []

    def measure(logits: Any) -> dict[str, Any]:
        asked.append(logits)
        return {"kl_mean": 0.5}

    first = Stages(measure, tmp_path / "work" / "stages.json")
    first.finish("layers")
    first.finish("compensated", model=object())
    again = Stages(measure, tmp_path / "work" / "stages.json")
    again.finish("compensated", model=object())
    assert len(asked) == 1
    assert [(row["stage"], row["divergence"]) for row in again.rows] == [
        ("layers", None),
        ("compensated", {"kl_mean": 0.5}),
    ]
    assert again.finished("layers") and not again.finished("distilled")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.1)))


@pytest.mark.parametrize("kept", [8, tiny.VOCAB - 1])
def test_the_measure_is_at_most_the_divergence_over_all_tokens(
    loaded: tuple[Any, Any], kept: int, tmp_path: Path
) -> None:
    model, tokenizer = loaded
    other = load_model(resolve(tiny.llama(tmp_path / "other", initializer_range=0.1, seed=3)))[0]
    corpus = synthesize(model, tokenizer, Sampling(sequences=6, length=16, kept=kept), tmp_path / "corpus")
    rows = np.array([4, 1])
    measure = corpus_measure(corpus, rows)
    found, same = measure(logits_fn(other)), measure(logits_fn(model))
    p, q = (softmax(tiny.logits(m, corpus.ids[rows])) for m in (model, other))
    whole = float((p * (np.log(p) - np.log(q))).sum(-1).mean())
    assert found["tokens"] == 32
    assert found["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=0.04)
    assert same["kl_mean"] == pytest.approx(0, abs=2e-3)
    assert 0 < found["kl_mean"] < whole + 1e-3
    if kept == tiny.VOCAB - 1:
        assert found["kl_mean"] == pytest.approx(whole, rel=0.02)


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(exp / exp.sum(-1, keepdims=True))
