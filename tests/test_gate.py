"""The gate: what an exported file is compared with, what is said where it cannot be, and that a shut gate keeps it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
from rlkit.apps.gate import Gate, Yardstick, measure_export, needed_nbytes, original_of, references
from rlkit.export.build import export_bundle
from rlkit.recover.progress import Progress
from rlkit.recover.source import Source, resolve

STICK = Yardstick(min_tokens=300)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # a checkpoint of tiny.checkpoint says "hf", the folder's name


@pytest.fixture
def original(tmp_path: Path) -> Source:
    return resolve(tiny.llama(tmp_path / "hf"))


@pytest.fixture
def made(original: Source, tmp_path: Path) -> Source:
    return resolve(tiny.checkpoint(original.path, tmp_path / "ckpt"))


def room(*nbytes: int) -> Yardstick:
    """A yardstick that is told of these amounts of free memory, one a question."""
    answers = list(nbytes)
    return Yardstick(min_tokens=300, room=lambda: answers.pop(0))


def stated(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "rlkit.json").read_text())["divergence"]
    return found


def test_a_checkpoint_is_held_to_the_original_it_names(made: Source, tmp_path: Path) -> None:
    out = export_bundle(made.path, tmp_path / "out", measure=measure_export(made, yardstick=STICK))
    found = stated(out)
    assert found["reference"] == {"kind": "original", "name": "hf"} and found["text"] == "builtin"
    assert found["tokens"] >= 300 and found["kl_mean"] > found["to_checkpoint"]["kl_mean"] > 0
    assert "the full-precision original hf on" in (out / "README.md").read_text()
    kept = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(name.partition("-")[0] for name in kept) == ["reference", "windows.json"]


def test_the_original_is_run_once(made: Source, tmp_path: Path) -> None:
    first = measure_export(made, yardstick=STICK)(export_bundle(made.path, tmp_path / "out"))
    (tmp_path / "hf" / "tokenizer.json").unlink()  # whoever loads it now fails
    again = measure_export(made, yardstick=room(10**12))(tmp_path / "out")
    assert again == first


def test_without_its_original_a_file_is_held_to_its_checkpoint(made: Source, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "hf")
    found = stated(export_bundle(made.path, tmp_path / "out", measure=measure_export(made, yardstick=STICK)))
    assert found["reference"]["kind"] == "checkpoint" and found["reference"]["name"] == "ckpt"
    assert found["reference"]["why"] == "its original hf is not at hand"
    assert "to_checkpoint" not in found and 0 < found["kl_mean"] < 0.1


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, "does not say what it was made of"),
        ({"source": {"reference": ""}}, "does not say what it was made of"),
        ({"source": "hf"}, "does not say what it was made of"),
        ({"source": {"reference": "some/model"}}, "its original some/model is not at hand"),
        ({"source": {"reference": "/home/ann/model"}}, "its original model is not at hand"),
        ({"source": {"reference": "ckpt"}}, "ckpt is another model by now"),
        ({"source": {"reference": "other"}}, "other is another model by now"),
    ],
)
def test_what_is_not_its_original_is_not_taken_for_it(made: Source, tmp_path: Path, facts: dict, why: str) -> None:
    tiny.llama(tmp_path / "other", num_hidden_layers=1)
    (made.path / "recovery.json").write_text(json.dumps(facts))
    found, said = original_of(made)
    assert found is None and why in said
    assert [reference.kind for reference in references(made)] == ["checkpoint"]


def test_a_float_model_is_its_own_reference(original: Source, made: Source, tmp_path: Path) -> None:
    assert [(reference.kind, reference.model) for reference in references(original)] == [("original", original)]
    found = measure_export(original, yardstick=STICK)(export_bundle(made.path, tmp_path / "out"))
    assert found["reference"] == {"kind": "original", "name": "hf"}
    assert "to_checkpoint" not in found and found["kl_mean"] > 0


def test_too_little_memory_for_the_original_is_said(made: Source, original: Source, tmp_path: Path) -> None:
    enough = needed_nbytes(made)
    found = measure_export(made, yardstick=room(0, enough))(export_bundle(made.path, tmp_path / "out"))
    assert found["reference"]["kind"] == "checkpoint"
    assert "the original hf needs" in found["reference"]["why"] and "0 B are free" in found["reference"]["why"]


def test_too_little_memory_for_the_checkpoint_alone_is_said(made: Source, tmp_path: Path) -> None:
    found = measure_export(made, yardstick=room(10**12, 0))(export_bundle(made.path, tmp_path / "out"))
    assert found["reference"]["kind"] == "original" and found["kl_mean"] > 0
    assert "the checkpoint" in found["to_checkpoint"]["skipped"]


def test_too_little_memory_for_anything_is_written_down(made: Source, tmp_path: Path) -> None:
    events: list[Progress] = []
    measure = measure_export(made, yardstick=room(0, 0), tell=events.append)
    out = export_bundle(made.path, tmp_path / "out", measure=measure)
    reason = stated(out)["skipped"]
    assert "the original hf needs" in reason and "the checkpoint" in reason
    assert Progress("gate", 1, 1, f"not measured: {reason}") in events
    assert str(tmp_path) not in reason
    assert f"Not measured on this file: {reason.replace('|', '')}." in (out / "README.md").read_text()


def test_an_original_that_cannot_be_loaded_gives_way(made: Source, original: Source, tmp_path: Path) -> None:
    (original.path / "tokenizer.json").write_text("{")
    (original.path / "tokenizer_config.json").unlink()
    found = measure_export(made, yardstick=STICK)(export_bundle(made.path, tmp_path / "out"))
    assert found["reference"]["kind"] == "checkpoint" and "cannot be loaded" in found["reference"]["why"]


def test_a_gate_that_holds_lets_through_and_one_that_does_not_leaves_nothing(made: Source, tmp_path: Path) -> None:
    measure = measure_export(made, gate=Gate(50.0), yardstick=STICK)
    assert stated(export_bundle(made.path, tmp_path / "out", measure=measure))["kl_mean"] < 50
    before = sorted(path for path in tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=r"nats per token from the original hf, more than the 1e-09 .*--max-kl"
    ) as shut:
        export_bundle(made.path, tmp_path / "new", measure=measure_export(made, gate=Gate(1e-9), yardstick=STICK))
    assert "\n" not in str(shut.value)
    assert sorted(path for path in tmp_path.iterdir()) == before


def test_a_gate_that_cannot_be_checked_is_shut(made: Source, tmp_path: Path) -> None:
    measure = measure_export(made, gate=Gate(0.5), yardstick=room(0, 0))
    with pytest.raises(ValueError, match=r"cannot be held to a KL of 0\.5: .* are free; leave --max-kl out"):
        export_bundle(made.path, tmp_path / "new", measure=measure)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_limits_that_are_none(limit: float) -> None:
    with pytest.raises(ValueError, match="is no limit"):
        Gate(limit)


def test_a_text_that_is_not_there_is_said_before_anything_is_made(made: Source) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text 'absent\.txt'"):
        measure_export(made, yardstick=Yardstick("absent.txt"))


def test_a_broken_file_for_this_cpu_is_an_error_and_one_for_elsewhere_a_reason(made: Source, tmp_path: Path) -> None:
    out = export_bundle(made.path, tmp_path / "out")
    for graph in out.glob("*.onnx"):
        graph.write_bytes(b"no graph")
    with pytest.raises(ValueError, match="cannot be opened"):
        measure_export(made, yardstick=STICK)(out)
    manifest = json.loads((out / "rlkit.json").read_text())
    (out / "rlkit.json").write_text(json.dumps(manifest | {"target": "npu"}))
    reason = measure_export(made, yardstick=STICK)(out)["skipped"]
    assert reason.startswith("a file for npu does not run on this machine's CPU (")
