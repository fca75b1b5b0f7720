"""The benchmark of evaluation: both ways say the same, fewer tokens are read, results are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from benchmarks import choice, lines, request
from rlkit.apps.benchmarks import evaluation
from rlkit.export.build import export_bundle
from rlkit.recover.likelihood import Continuation


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench-evaluation")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


@pytest.fixture(scope="module")
def float_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("parity")
    full = tiny.llama(root / "full")
    return full, export_bundle(full, root / "bundle")


def run(bundle: Path, out: Path, names: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    evaluation.main(bundle, out, names=names, items=5, rounds=2, threads=1, suite="speed", json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "evaluation.json").read_text())
    return dict(printed)


def test_tasks_of_ones_own(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.jsonl"
    written = [
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
    file.write_text("\n".join(map(json.dumps, written)))
    found = run(bundle, tmp_path / "out", str(file), capsys)
    (task,) = found["tasks"]  # type: ignore[misc]
    assert (task["task"], task["items"]) == ("own", 2)
    assert task["apart"] < 1e-4
    assert 2 < task["bound"] < 4  # three choices share their question, both questions their beginning
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
        evaluation.main(
            bundle, tmp_path / "out", names="arc_easy", items=2, rounds=1, threads=1, suite="speed", json=True
        )


def test_one_ratio_for_all() -> None:
    speeds = [evaluation.Speed("a", 1, 1, 1.0, ratio, ratio, ratio, 0.0, 1.0) for ratio in (2.0, 8.0)]
    assert evaluation.overall(speeds) == pytest.approx(4.0)


def own_tasks(folder: Path) -> str:
    choices = [
        choice(n, f"what is the capital of number {n}?", [" Paris", " the cat", " a dog"], n % 3) for n in range(9)
    ]
    (folder / "choices.jsonl").write_bytes(lines([one for item in choices for one in item], zipped=False))
    (folder / "solved.jsonl").write_bytes(lines([request(n, f"say {n}", " something") for n in range(4)], zipped=False))
    return f"{folder / 'choices.jsonl'},{folder / 'solved.jsonl'}"


def test_a_float_bundle_is_its_torch_model_item_by_item(
    float_pair: tuple[Path, Path],
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    names, (full, exported) = own_tasks(tmp_path), float_pair

    def compared(folder: Path) -> dict[str, Any]:
        evaluation.main(
            folder, tmp_path, names=names, items=6, suite="parity", against=str(full), threads=1, workers=1, json=True
        )
        found: dict[str, Any] = json.loads((tmp_path / "parity.json").read_text())
        assert json.loads(capsys.readouterr().out) == found
        return found

    found = compared(exported)
    assert found["reached"] and [(task["task"], task["items"]) for task in found["tasks"]] == [
        ("choices", 6),
        ("solved", 4),
    ]
    assert all(task["differing"] == 0 and task["apart"] < 1e-4 for task in found["tasks"])
    assert found["tasks"][0]["torch"] == found["tasks"][0]["bundle"] and found["tasks"][1]["torch"] > 0
    assert not compared(bundle)["reached"]  # four bits are not
    evaluation.main(
        exported, tmp_path, names=names, items=6, suite="parity", against=str(full), threads=1, workers=1, json=False
    )
    assert "reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"suite": "parity"}, "name it with --against"),
        ({"suite": "parity", "against": "{bundle}"}, "no torch model and bundle"),
        ({"suite": "sped"}, "use speed or parity"),
    ],
)
def test_what_cannot_be_compared(bundle: Path, tmp_path: Path, options: dict[str, str], words: str) -> None:
    told: dict[str, Any] = {name: text.format(bundle=bundle) for name, text in options.items()}
    with pytest.raises(ValueError, match=words):
        evaluation.main(
            bundle,
            tmp_path,
            **{
                "names": "",
                "items": 1,
                "threads": 1,
                "workers": 1,
                "json": True,
                "suite": "speed",
                "against": None,
                **told,
            },
        )
