"""Held-out text: the original's logits are kept once, and every other form of the model is compared with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.apps import heldout
from rlkit.apps.heldout import HeldOut
from rlkit.recover import assets
from rlkit.recover.model import load_model, logits_fn
from rlkit.recover.source import Source, resolve

PASSAGES = ["the cat sat on the mat and looked at the dog", "a dog and a cat", "the mat was red and the dog was not"]


@pytest.fixture
def model(tmp_path: Path) -> Source:
    tiny.llama(tmp_path / "model", tied=True)
    return resolve(tmp_path / "model")


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    return path


def noisy(logits: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    return lambda ids: (found := logits(ids)) + rng.normal(0, 0.5, found.shape).astype(np.float32)


def test_the_original_does_not_diverge_from_itself_and_noise_does(
    model: Source, passages: Path, tmp_path: Path
) -> None:
    torch_model, tokenizer = load_model(model)
    held_out = HeldOut(passages, tmp_path / "kept", "tiny", min_tokens=10)
    measure = held_out.against(logits_fn(torch_model), tokenizer.encode)
    assert measure(logits_fn(torch_model))["kl_mean"] < 1e-5
    assert measure(noisy(logits_fn(torch_model)))["kl_mean"] > 0.01
    assert held_out.tokens >= 10


def test_a_later_process_needs_no_original(model: Source, passages: Path, tmp_path: Path) -> None:
    torch_model, _tokenizer = load_model(model)
    heldout.keep_original(HeldOut(passages, tmp_path / "kept", "tiny", 10), model)
    later = HeldOut(passages, tmp_path / "kept", "tiny", 10)
    assert later.ready
    assert later.divergence(logits_fn(torch_model)).kl_mean < 1e-5
    assert later.agreement(logits_fn(torch_model), logits_fn(torch_model)).top1_agreement == 1.0


def test_another_models_reference_is_not_taken(model: Source, passages: Path, tmp_path: Path) -> None:
    heldout.keep_original(HeldOut(passages, tmp_path / "kept", "tiny", 10), model)
    other = HeldOut(passages, tmp_path / "kept", "another", 10)
    assert not other.ready
    with pytest.raises(FileNotFoundError, match="lost the original's logits"):
        other.divergence(lambda ids: np.zeros((*ids.shape, tiny.VOCAB), np.float32))


def test_texts_that_are_not_there(
    model: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passages: Path
) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    assert "lambada" in assets.registry()
    with pytest.raises(FileNotFoundError, match="rlkit pull lambada"):
        heldout.find(model, "lambada")
    with pytest.raises(FileNotFoundError, match="rlkit assets"):
        heldout.find(model, str(tmp_path / "absent.txt"))
    found = heldout.find(model, str(passages))
    assert found.folder.is_relative_to(tmp_path / "cache")
