"""The benchmark of evaluation: both ways say the same, fewer tokens are read, results are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from rlkit.apps.benchmarks import evaluation
from rlkit.export.build import export_bundle
from rlkit.recover.likelihood import Continuation


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench-evaluation")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


def run(bundle: Path, out: Path, names: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    evaluation.main(bundle, out, names=names, items=5, rounds=2, threads=1, json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "evaluation.json").read_text())
    return dict(printed)


def test_tasks_of_ones_own(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.jsonl"
    lines = [
        {
            "request_type": "loglikelihood",
            "doc": {},
            "idx": number,
            "doc_id": item,
            "label": 0,
            "native_id": str(item),
            "request": {"context": f"what is the capital of {word}?", "continuation": choice},
        }
        for item, word in enumerate(("France", "Spain"))
        for number, choice in enumerate((" Paris", " the cat", " a dog"))
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    found = run(bundle, tmp_path / "out", str(file), capsys)
    (task,) = found["tasks"]  # type: ignore[misc]
    assert (task["task"], task["items"]) == ("own", 2)
    assert task["apart"] < 1e-4
    assert min(task["plain_items_per_s"], task["items_per_s"], task["ratio"]) > 0


def test_generated_items_where_there_is_no_data(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "empty"))
    found = run(bundle, tmp_path / "out", "arc_easy", capsys)
    assert [task["task"] for task in found["tasks"]] == [evaluation.GENERATED]  # type: ignore[attr-defined]


def test_generated_items_have_usual_lengths() -> None:
    asked = evaluation.generated(20, 512, 8192)
    assert {len(pairs) for pairs in asked} == {4}
    assert all(20 <= len(context) <= 180 and 1 <= len(rest) <= 24 for pairs in asked for context, rest in pairs)
    assert asked == evaluation.generated(20, 512, 8192)


def test_a_wrong_scorer_is_no_speed(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluation, "alone", lambda _plain, pair: Continuation(-1.0, len(pair[1]), False))
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="log-probabilities differ by"):
        evaluation.main(bundle, tmp_path / "out", names="arc_easy", items=2, rounds=1, threads=1, json=True)


def test_one_ratio_for_all() -> None:
    speeds = [evaluation.Speed("a", 1, 1, 1.0, ratio, ratio, ratio, 0.0) for ratio in (2.0, 8.0)]
    assert evaluation.overall(speeds) == pytest.approx(4.0)
