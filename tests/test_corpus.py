"""A corpus folder gives back what was stored, reads only what is asked for, and says which part of it is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from rlkit.recover.corpus import LEAST, MANIFEST, Corpus, Shape, Work, tokenizer_fingerprint

LENGTH, TOP_K, VOCAB = 6, 3, 50
ROWS = (4, 0, 5)  # of each shard
FACTS = {"origin": "sampled", "length": LENGTH, "top_k": TOP_K, "vocab": VOCAB, "tokenizer": "0"}


def shard(rows: int, seed: int, top_k: int = TOP_K) -> dict[str, np.ndarray]:
    """The tensors of a shard of random rows with random distributions."""
    rng = np.random.default_rng(seed)
    tensors = Shape(rows, LENGTH, top_k, VOCAB).empty()
    tensors["ids"][:] = rng.integers(0, VOCAB, (rows, LENGTH))
    if top_k:
        p = rng.dirichlet(np.full(VOCAB, 0.1), (rows, LENGTH)) + 1e-30
        order = np.argsort(-p, axis=-1)[..., :top_k]
        tensors["top_ids"][:] = order
        tensors["top_log_probs"][:] = np.log(np.take_along_axis(p, order, -1))
        tensors["rest"][:] = np.log(np.maximum(1 - np.take_along_axis(p, order, -1).sum(-1), np.exp(LEAST)))
    return tensors


def make(out: Path, facts: dict[str, Any] = FACTS, *, force: bool = False) -> Corpus:
    work = Work(out, facts, sum(ROWS), force=force)
    for index, rows in enumerate(ROWS):
        work.write(index, shard(rows, index, facts["top_k"]), {"sampled": rows + 1})
    return work.publish(len(ROWS), {"sampled": 12})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make(tmp_path / "corpus")
    return tmp_path / "corpus"


def test_what_was_stored_comes_back(made: Path) -> None:
    corpus = Corpus.open(made)
    stored = [shard(rows, index) for index, rows in enumerate(ROWS)]
    np.testing.assert_array_equal(corpus.ids, np.concatenate([part["ids"] for part in stored]))
    assert corpus.ids.dtype == np.int64 and (corpus.top_k, corpus.vocab, corpus.folder) == (TOP_K, VOCAB, made)
    assert corpus.facts["sequences"] == 9 and corpus.facts["tokens"] == 54 and corpus.facts["counts"] == {"sampled": 12}
    assert corpus.facts["schema_version"] == 1
    assert sorted(path.name for path in made.iterdir()) == [MANIFEST, *(f"shard-{i:05d}.safetensors" for i in range(3))]
    assert [path.name for path in made.parent.iterdir()] == ["corpus"]
    nbytes = sum(part["nbytes"] for part in corpus.facts["shards"])
    assert 0 < nbytes - Shape(9, LENGTH, TOP_K, VOCAB).nbytes < 3 * 1000


def test_targets_come_in_the_order_asked_for(made: Path) -> None:
    corpus = Corpus.open(made)
    parts = [shard(rows, index) for index, rows in enumerate(ROWS)]
    top_ids, log_probs, rest = (
        np.concatenate([part[name] for part in parts]) for name in ("top_ids", "top_log_probs", "rest")
    )
    rows = np.array([8, 0, 4, 3, 8, 1])  # of both shards that hold any, one of them twice
    found = corpus.targets(rows)
    np.testing.assert_array_equal(found.ids, top_ids[rows])
    np.testing.assert_allclose(found.log_probs, log_probs[rows], atol=0.002)
    np.testing.assert_allclose(found.rest, rest[rows], atol=0.03)
    assert (found.ids.dtype, found.log_probs.dtype, found.rest.dtype) == (np.int64, np.float32, np.float32)
    mass = np.exp(found.log_probs.astype(np.float64)).sum(-1) + np.exp(found.rest.astype(np.float64))
    np.testing.assert_allclose(mass, 1, atol=1e-6)
    assert corpus.targets(np.empty(0, np.int64)).ids.shape == (0, LENGTH, TOP_K)


def test_only_the_shards_asked_for_are_read(made: Path) -> None:
    corpus = Corpus.open(made)
    (made / "shard-00000.safetensors").unlink()
    assert corpus.targets(np.array([4, 8])).ids.shape == (2, LENGTH, TOP_K)
    with pytest.raises(ValueError, match=r"shard-00000.* cannot be read .*; run the same `rlkit synthesize`"):
        corpus.targets(np.array([0]))


@pytest.mark.parametrize("rows", [[9], [-1], [0, 100]])
def test_rows_that_are_not_there_are_refused(made: Path, rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"are not all in 0\.\.8"):
        Corpus.open(made).targets(np.array(rows))


def test_a_corpus_without_log_probabilities_has_no_targets(tmp_path: Path) -> None:
    corpus = make(tmp_path / "bare", {**FACTS, "top_k": 0})
    assert corpus.ids.shape == (9, LENGTH)
    assert sorted(load_file(tmp_path / "bare" / "shard-00000.safetensors")) == ["ids"]
    with pytest.raises(ValueError, match="keeps no log-probabilities; make it again with --kept 64"):
        corpus.targets(np.array([0]))


def _manifest(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / MANIFEST).read_text())
    facts |= changes
    (folder / MANIFEST).write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))


def _truncate(folder: Path) -> None:
    path = folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _same_size(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """Damage that leaves the file's size as it was."""

    def damage(folder: Path) -> None:
        path = folder / "shard-00002.safetensors"
        size, tensors = path.stat().st_size, load_file(path)
        change(tensors)
        save_file(tensors, path, {"counts": '{"rows": 5, "sampled": 6}'})
        assert path.stat().st_size == size

    return damage


def _outside(tensors: dict[str, np.ndarray]) -> None:
    tensors["ids"][0, 0] = VOCAB


def _flat(tensors: dict[str, np.ndarray]) -> None:
    tensors["ids"] = tensors["ids"].T.copy()


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / MANIFEST).unlink(), "it has no corpus.json; make one with `rlkit synthesize`"),
    (lambda folder: (folder / MANIFEST).write_text("{") and None, "corpus.json is not valid JSON"),
    (lambda folder: _manifest(folder, schema_version=2), "has schema_version 2, not 1"),
    (lambda folder: _manifest(folder, vocab=None), r"corpus.json is damaged \(KeyError\('vocab'\)\)"),
    (lambda folder: _manifest(folder, vocab="many"), "corpus.json is damaged"),
    (lambda folder: _manifest(folder, shards=[{"file": "x"}]), "corpus.json is damaged"),
    (lambda folder: _manifest(folder, shards=[]), "its shards hold another number of rows"),
    (lambda folder: _manifest(folder, sequences=8), "its shards hold another number of rows"),
    (lambda folder: _manifest(folder, top_k=4), r"shard-00000.safetensors is damaged: it holds .* instead of"),
    (lambda folder: (folder / "shard-00000.safetensors").unlink(), "lacks shard-00000.safetensors"),
    (_truncate, r"shard-00002.safetensors is damaged: it has \d+ bytes instead of \d+; run the same `rlkit synth"),
    (_same_size(_outside), r"shard-00002.safetensors is damaged: ids from \d+ to 50 are not all in the vocabulary"),
    (_same_size(_flat), r"shard-00002.safetensors is damaged: it holds .* instead of"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_corpus_is_one_line_naming_the_part(made: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(made)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        Corpus.open(made)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_a_manifest_reads_no_file_outside_its_folder(made: Path) -> None:
    shutil.move(made / "shard-00000.safetensors", made.parent / "elsewhere.safetensors")
    shards = json.loads((made / MANIFEST).read_text())["shards"]
    shards[0]["file"] = "../elsewhere.safetensors"
    _manifest(made, shards=shards)
    with pytest.raises(FileNotFoundError, match=r"lacks elsewhere.safetensors"):
        Corpus.open(made)


@pytest.mark.parametrize(("name", "value"), [("top_ids", -1), ("top_ids", VOCAB), ("rest", np.nan)])
def test_distributions_that_are_none_are_refused(made: Path, name: str, value: float) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][1, 2] = value

    _same_size(change)(made)
    corpus = Corpus.open(made)
    assert corpus.targets(np.array([0, 4])).ids.shape == (2, LENGTH, TOP_K)
    with pytest.raises(ValueError, match=r"shard-00002.* is damaged: what it holds are no distributions"):
        corpus.targets(np.array([0, 5]))


def test_a_corpus_knows_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    corpus = make(tmp_path / "corpus", {**FACTS, "tokenizer": tokenizer_fingerprint(tokenizer)})
    corpus.check_tokenizer(tiny.tokenizer())
    tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match=r"corpus was made with another tokenizer; make a corpus of this model"):
        corpus.check_tokenizer(tokenizer)


def test_finished_shards_wait_for_the_same_job_only(tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    first = Work(out, FACTS, 9, force=False)
    first.write(0, shard(4, 0), {"sampled": 5})
    other = Work(out, {**FACTS, "seed": 1}, 9, force=False)
    assert other.kept(0) is None
    kept = Work(out, dict(reversed(FACTS.items())), 9, force=False).kept(0)
    assert kept is not None and kept[1] == {"sampled": 5, "rows": 4}
    np.testing.assert_array_equal(kept[0], shard(4, 0)["ids"])
    assert not out.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "counts", "ids"])
def test_a_damaged_shard_counts_as_absent(tmp_path: Path, damage: str) -> None:
    work = Work(tmp_path / "corpus", FACTS, 9, force=False)
    work.write(0, shard(4, 0), {"sampled": 5})
    path = work.folder / "shard-00000.safetensors"
    tensors, counts = load_file(path), {"counts": '{"sampled": 5, "rows": 4}'}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "shape":
        save_file({**tensors, "ids": tensors["ids"][:, :-1].copy()}, path, counts)
    elif damage == "counts":
        save_file(tensors, path, {"counts": '{"sampled": 5}'})
    else:
        save_file({**tensors, "ids": tensors["ids"] - 100}, path, counts)
    assert work.kept(0) is None


def test_an_existing_folder_is_replaced_only_by_force(made: Path) -> None:
    (made / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already; pass --force"):
        Work(made, FACTS, 9, force=False)
    work = Work(made, FACTS, 9, force=True)
    work.write(0, shard(4, 7), {})
    work.write(5, shard(4, 8), {})  # of a longer job: not listed, so not kept
    assert (made / "note.txt").exists()
    replaced = work.publish(1, {})
    np.testing.assert_array_equal(replaced.ids, shard(4, 7)["ids"])
    assert sorted(path.name for path in made.iterdir()) == [MANIFEST, "shard-00000.safetensors"]
    assert [path.name for path in made.parent.iterdir()] == ["corpus"]


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    work = Work(tmp_path / "corpus", FACTS, 9, force=False)
    work.write(0, shard(4, 0), {})
    (tmp_path / "corpus").mkdir()
    with pytest.raises(FileExistsError):
        work.publish(1, {})
    assert work.kept(0) is not None


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("rlkit.recover.atomic.shutil.disk_usage", lambda _path: free)
    with pytest.raises(OSError, match="GB free; free some space"):
        Work(tmp_path / "corpus", FACTS, 1000, force=False)
    assert list(tmp_path.iterdir()) == []
