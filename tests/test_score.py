"""Given text becomes the same kind of corpus: its rows, in which order, and what the model says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from rlkit.recover import synthesize as module
from rlkit.recover.corpus import Corpus
from rlkit.recover.model import load_model
from rlkit.recover.progress import Progress
from rlkit.recover.source import resolve
from rlkit.recover.synthesize import score

DOCUMENTS = [f"{sentence} {number}" for number in range(12) for sentence in tiny.SENTENCES]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.1)))


def stream(documents: list[str]) -> list[int]:
    """All documents as one stream of ids, the end-of-text token behind each."""
    tokenizer = tiny.tokenizer()
    return [token for document in documents for token in [*tokenizer.encode(document), tokenizer.eos_token_id]]


def test_rows_are_the_text_in_order(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    corpus = score(*loaded, iter(DOCUMENTS), tmp_path / "out", length=24, sequences=1000, kept=5)
    tokens = stream(DOCUMENTS)
    assert corpus.ids.flatten().tolist() == tokens[: len(tokens) // 24 * 24]
    assert (corpus.facts["origin"], corpus.facts["sequences"]) == ("text", len(tokens) // 24)
    corpus.check_tokenizer(tiny.tokenizer())


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_distributions_are_the_models_own(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", step * 24 * tiny.VOCAB * 16)
    corpus = score(*loaded, DOCUMENTS, tmp_path / "out", length=24, sequences=13, kept=9, batch=6)
    assert [shard["rows"] for shard in corpus.facts["shards"]] == [6, 6, 1]
    rows = np.array([12, 0, 6, 5])
    found = corpus.targets(rows)
    log_p = torch.log_softmax(torch.from_numpy(tiny.logits(loaded[0], corpus.ids[rows])), dim=-1)
    best = log_p.topk(9, dim=-1).values
    np.testing.assert_allclose(found.log_probs, best, atol=0.006)
    np.testing.assert_allclose(log_p.gather(-1, torch.from_numpy(found.ids)), best, atol=1e-3)
    np.testing.assert_allclose(found.rest, torch.log1p(-best.exp().sum(-1)), atol=0.006)


def test_rows_beyond_those_asked_for_are_chosen_by_seed(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    def rows(name: str, **options: int) -> list[tuple[int, ...]]:
        made = score(*loaded, DOCUMENTS, tmp_path / name, length=24, kept=0, **options)
        return [tuple(row) for row in made.ids.tolist()]

    every = rows("all")
    few = rows("few", sequences=7)
    assert len(few) == len(set(few)) == 7 and set(few) < set(every)
    assert rows("again", sequences=7) == few
    assert set(rows("other", sequences=7, seed=1)) != set(few)
    assert few != every[:7]


def test_an_interrupted_scoring_continues(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.done > 8 * 24:
            raise KeyboardInterrupt

    options = {"length": 24, "sequences": 13, "kept": 4, "batch": 6}
    with pytest.raises(KeyboardInterrupt):
        score(*loaded, DOCUMENTS, tmp_path / "out", tell=stop, **options)
    told: list[Progress] = []
    resumed = score(*loaded, DOCUMENTS, tmp_path / "out", tell=told.append, **options)
    assert (told[0].done, told[-1].done, told[-1].total) == (6 * 24, 13 * 24, 13 * 24)
    whole = score(*loaded, DOCUMENTS, tmp_path / "whole", **options)
    assert resumed.facts == whole.facts
    for shard in whole.facts["shards"]:
        assert (tmp_path / "out" / shard["file"]).read_bytes() == (tmp_path / "whole" / shard["file"]).read_bytes()


def test_other_text_does_not_continue_it(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.done > 4 * 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(*loaded, DOCUMENTS, tmp_path / "out", length=24, batch=4, kept=2, tell=stop)
    other = score(*loaded, DOCUMENTS[::-1], tmp_path / "out", length=24, batch=4, kept=2)
    assert other.ids.flatten().tolist() == stream(DOCUMENTS[::-1])[: other.ids.size]


@pytest.mark.parametrize(
    ("documents", "options", "said"),
    [
        ([], {}, "the text has 0 tokens, fewer than one row of 24; give more text"),
        (["a cat"], {}, r"the text has \d+ tokens, fewer than one row of 24"),
        (DOCUMENTS, {"length": 300}, "length = 300 is more than the model's context of 256"),
        (DOCUMENTS, {"length": 4}, "length = 4"),
        (DOCUMENTS, {"kept": 513}, "513 tokens are more than the vocabulary of 512"),
        (DOCUMENTS, {"sequences": 0}, "sequences = 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    loaded: tuple[Any, Any], tmp_path: Path, documents: list[str], options: dict[str, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        score(*loaded, documents, tmp_path / "out", **{"length": 24, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(600)])
    with pytest.raises(ValueError, match="is not in the model's vocabulary; the tokenizer belongs to another model"):
        score(loaded[0], tokenizer, ["word599 " * 30], tmp_path / "out", length=8)


def test_text_and_samples_share_one_format(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    made = score(*loaded, DOCUMENTS, tmp_path / "out", length=24, kept=4)
    sampled = module.synthesize(*loaded, module.Sampling(sequences=4, length=24, kept=4), tmp_path / "sampled")
    common = set(made.facts) & set(sampled.facts)
    assert common >= {"schema_version", "origin", "seed", "length", "top_k", "vocab", "tokenizer", "shards", "counts"}
    assert isinstance(Corpus.open(made.folder), Corpus)
