"""Bundles judge continuations as whole rows are judged: all families, caches of all kinds, several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import families
import tiny
from rlkit.apps.kvcalibrate import Wanted, add_caches
from rlkit.export.build import export_bundle
from rlkit.export.kvscales import SCHEMES
from rlkit.recover.likelihood import Continuation, Pair
from rlkit.runtime import bundlescorer
from rlkit.runtime.bundlescorer import BundleScorer, even
from rlkit.runtime.folder import read_bundle
from rlkit.runtime.plain import Plain
from test_likelihood import assert_same, items, whole


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scorer")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


def plainly(bundle: Path, pairs: list[Pair], kv: str | None = None) -> list[Continuation]:
    """The plain way: whole rows, one by one, in float64."""
    plain = Plain(bundle, read_bundle(bundle)[0]["model"]["decoder"], 1, kv)
    found = []
    for context, continuation in pairs:
        row = np.array([[*context, *continuation[:-1]]])
        logits = plain.logits(row)[0, len(context) - 1 :].astype(np.float64)
        norms = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        logprob = float((logits[np.arange(len(continuation)), list(continuation)] - norms).sum())
        greedy = bool((logits.argmax(-1) == list(continuation)).all())
        found.append(Continuation(logprob, len(continuation), greedy))
    return found


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "gpt-oss"])
def test_float_bundles_of_all_families(name: str, tmp_path: Path) -> None:
    made = export_bundle(families.folder(name, tmp_path / "hf"), tmp_path / "bundle")
    pairs = items(3)
    with BundleScorer(made, threads=1) as scorer:
        found = scorer.score(pairs)
    assert_same(found, plainly(made, pairs))
    expected = whole(families.model(name), pairs)
    np.testing.assert_allclose([one.logprob for one in found], [one.logprob for one in expected], atol=1e-3)
    assert [one.greedy for one in found] == [one.greedy for one in expected]


def test_calls_one_after_the_other(bundle: Path) -> None:
    pairs = items(6)
    with BundleScorer(bundle, threads=1) as scorer:
        found = [one for start in range(0, len(pairs), 4) for one in scorer.score(pairs[start : start + 4])]
    assert_same(found, plainly(bundle, pairs))


@pytest.mark.parametrize("lean", [True, False])
def test_long_rows_are_read_piece_by_piece(bundle: Path, monkeypatch: pytest.MonkeyPatch, lean: bool) -> None:
    monkeypatch.setattr(bundlescorer, "PASS_IDS", 16)
    monkeypatch.setattr(bundlescorer, "LEAN_NBYTES", 2**30 if lean else 0)
    pairs = [*items(2), ([7] * 3, list(range(3, 103)))]
    with BundleScorer(bundle, threads=1) as scorer:
        assert_same(scorer.score(pairs), plainly(bundle, pairs))


def test_long_beginnings_without_a_judged_token_are_read_without_lm_head(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundlescorer, "UNJUDGED", 20)
    read: list[tuple[bool, int]] = []
    outputs = Plain.outputs

    def noted(self: Plain, names: list[str], ids: Any, *more: Any) -> Any:
        found = outputs(self, names, ids, *more)
        read.append((found[0].shape[1] == ids.shape[1], ids.shape[1]))
        return found

    pairs: list[Pair] = [([7 + n * n % 400 for n in range(50)], [9, 8, 7]), ([5] * 10, [9, 8, 7])]
    with BundleScorer(bundle, threads=1) as scorer:
        monkeypatch.setattr(Plain, "outputs", noted)
        found = scorer.score(pairs)
    assert sorted(read) == [(False, 49), (True, 3), (True, 12)]
    monkeypatch.undo()
    assert_same(found, plainly(bundle, pairs))


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_integer_caches(bundle: Path, tmp_path: Path, kv: str) -> None:
    made = export_bundle(bundle.parent / "ckpt", tmp_path / "cached", accuracy_level=0)
    add_caches(made, Wanted((SCHEMES[kv],), tokens=300, measure=False))
    pairs = items(3)
    with BundleScorer(made, threads=1, kv=kv) as scorer:
        found = scorer.score(pairs)
    assert_same(found, plainly(made, pairs, kv))
    assert found[0] != plainly(made, pairs)[0]


def test_integer_activations_round_as_in_whole_rows(bundle: Path, tmp_path: Path) -> None:
    made = export_bundle(bundle.parent / "ckpt", tmp_path / "int8", accuracy_level=4)
    pairs = items(6)
    with BundleScorer(made, threads=1) as scorer:
        assert_same(scorer.score(pairs), plainly(made, pairs))


@pytest.mark.parametrize("length", [1, 2, 64, 127, 128, 129, 130])
def test_figures_do_not_depend_on_what_is_read_together(bundle: Path, tmp_path: Path, length: int) -> None:
    made = export_bundle(bundle.parent / "ckpt", tmp_path / "int8", accuracy_level=4)
    context = [7 + n * n % 400 for n in range(length)]
    pairs: list[Pair] = [(context, [9, 8, n]) for n in range(3)] + [(context[:40], [n, 5]) for n in range(4)]
    with BundleScorer(made, threads=1) as scorer:
        together = scorer.score(pairs)
        other = [one for start in (3, 0) for one in scorer.score(pairs[start : start + 3])]
    with BundleScorer(made, threads=1) as scorer:
        alone = [scorer.score([pair])[0] for pair in pairs]
    assert_same(alone, together, 1e-5)
    assert_same(other, [*together[3:6], *together[:3]], 1e-5)


def test_rows_are_made_even() -> None:
    shapes = {(1, 1): 2, (1, 128): 128, (1, 129): 130, (3, 43): 44, (2, 65): 65, (1, 257): 258}
    for shape, width in shapes.items():
        found = even(np.ones(shape, np.int64), 1000)
        assert found.shape == (shape[0], width)
        assert even(np.ones(shape, np.int64), shape[1]).shape == shape


def test_several_processes_say_the_same(bundle: Path) -> None:
    pairs = items(5)
    with BundleScorer(bundle, workers=2) as several:
        assert_same(several.score(pairs), plainly(bundle, pairs))
        assert several.score([]) == []
        prompts = [[5, 6, 7], [9] * 20]
        replied = dict(several.replies(prompts, [3, 4]))
        with pytest.raises(ValueError, match="pair 0 has no token in its context"):
            several.score([([], [1])])
    with BundleScorer(bundle, threads=1) as alone:
        assert dict(alone.replies(prompts, [3, 4])) == replied
    with pytest.raises(ValueError, match="closed"):
        several.score(pairs)


def test_bad_choices(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers = 0"):
        BundleScorer(bundle, workers=0)
    with pytest.raises(ValueError, match="has no int8 cache"):
        BundleScorer(bundle, kv="int8")
    with pytest.raises(ValueError, match="has no int8 cache"):
        BundleScorer(bundle, kv="int8", workers=2)
    with pytest.raises(FileNotFoundError, match="no bundle folder"):
        BundleScorer(tmp_path / "absent")


def test_a_bundle_of_last_logits_cannot_judge(bundle: Path, tmp_path: Path) -> None:
    made = export_bundle(bundle.parent / "ckpt", tmp_path / "last", accuracy_level=0)
    (made / "logits.onnx").unlink()
    with pytest.raises(ValueError, match="computes only the last token's logits"):
        BundleScorer(made)
