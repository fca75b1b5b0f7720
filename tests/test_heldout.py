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
from rlkit.export.build import export_bundle
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
    assert later.label == "text.jsonl"


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
    with pytest.raises(FileNotFoundError, match="use the text builtin"):
        heldout.find(model, "lambada")
    assert heldout.find(model, "builtin").label == "builtin"
    found = heldout.find(model, str(passages))
    assert found.folder.is_relative_to(tmp_path / "cache")


def test_other_weights_config_text_or_length_are_measured_anew(
    tmp_path: Path, passages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    made = tiny.checkpoint(tiny.llama(tmp_path / "hf"), tmp_path / "ckpt", tiny.W4W2)
    found = [heldout.find(resolve(made), str(passages)).identity]
    found.append(heldout.find(resolve(made), "builtin").identity)
    found.append(heldout.find(resolve(made), str(passages), min_tokens=10).identity)
    adapter = made / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x07")
    found.append(heldout.find(resolve(made), str(passages)).identity)
    (made / "config.json").write_text((made / "config.json").read_text().replace("10000", "20000"))
    found.append(heldout.find(resolve(made), str(passages)).identity)
    assert len(set(found)) == 5


def test_borrowed_windows_are_the_same_and_leave_nothing(model: Source, passages: Path, tmp_path: Path) -> None:
    held_out = HeldOut(passages, tmp_path / "kept", "tiny", 10)
    heldout.keep_original(held_out, model)
    before = sorted(tmp_path.rglob("*"))
    with heldout.borrowed(held_out) as own:
        heldout.keep(own, (noisy(heldout.load(model)[0]), lambda text: pytest.fail(f"cut {text} again")))
        assert own.windows.read_text() == held_out.windows.read_text()
        assert own.divergence(heldout.load(model)[0]).kl_mean > 0.01
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_is_compared_with_original_and_checkpoint(model: Source, passages: Path, tmp_path: Path) -> None:
    held_out = HeldOut(passages, tmp_path / "kept", "tiny", 10)
    heldout.keep_original(held_out, model)
    made = tiny.checkpoint(model.path, tmp_path / "ckpt", tiny.W4W2)
    measure = heldout.measure_bundle(held_out, made)
    out = export_bundle(made, tmp_path / "bundle", accuracy_level=0, measure=measure)
    stated = json.loads((out / "rlkit.json").read_text())["divergence"]
    assert stated["text"] == "text.jsonl" and stated["kl_mean"] > 0.001
    assert stated["to_checkpoint"]["kl_mean"] < 1e-6 and stated["to_checkpoint"]["tokens"] == stated["tokens"]
