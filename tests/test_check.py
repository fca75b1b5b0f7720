"""rlkit lint: what it prints, its JSON, its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from nodes import model_file
from rlkit.apps import check, errors


def run(path: Path, **options: str | bool) -> int:
    """The exit code, as the command line makes it of what the command raises."""
    try:
        check.lint(path, **options)  # type: ignore[arg-type]
    except typer.Exit as exit_:
        return exit_.exit_code
    except Exception as error:
        return errors.report(error)
    return 0


def test_a_fast_file_is_said_to_be_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model_file(tmp_path / "m.onnx", {})) == 0
    assert capsys.readouterr().out == "1 nodes of m.onnx checked for cpu: no findings\n"


def test_findings_are_told_with_reason_and_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model_file(tmp_path / "m.onnx", {"accuracy_level": 0})) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "slow: one (MatMulNBits)"
    assert "2 bits in blocks of 64 at accuracy_level 0 have no kernel on cpu" in out[1]
    assert out[2].startswith("    fix: cpu runs 2 bits fast with accuracy_level 4")
    assert out[-1].endswith("checked for cpu: 1 finding")


def test_equal_findings_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.onnx", "b.onnx"):
        model_file(tmp_path / name, {"bits": 8, "accuracy_level": 0})
    assert run(tmp_path) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "slow: a.onnx: one and 1 more (MatMulNBits)"
    assert out[-1] == "2 nodes of a.onnx, b.onnx checked for cpu: 2 findings"


@pytest.mark.parametrize(
    ("target", "provider", "code", "name"),
    [
        ("", "", 0, "cpu"),
        ("igpu", "", 0, "webgpu"),
        ("igpu", "dml", 1, "dml"),
        ("", "dml", 1, "dml"),
        ("npu", "", 1, "npu"),
    ],
)
def test_the_target_can_be_chosen(
    target: str, provider: str, code: int, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model_file(tmp_path / "m.onnx", {})
    assert run(path, target=target, provider=provider, json=True) == code
    told = json.loads(capsys.readouterr().out)
    assert (told["schema_version"], told["target"], told["path"]) == (1, name, str(path))
    assert bool(told["findings"]) == bool(code)


def test_a_bundle_is_checked_for_its_own_target(tmp_path: Path) -> None:
    model_file(tmp_path / "model.onnx", {})
    (tmp_path / "rlkit.json").write_text('{"target": "dml"}')
    assert run(tmp_path) == 1
    assert run(tmp_path, target="cpu") == 0


def test_notes_go_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_file(tmp_path / "model.onnx", {})
    options = {"session_options": {"provider_options": [{"cuda": {}}]}, "filename": "model.onnx"}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": options}}))
    assert run(tmp_path) == 0
    assert capsys.readouterr().err == "note: no rules are known for the provider cuda: checked for the CPU\n"


@pytest.mark.parametrize(
    ("name", "target", "provider", "says"),
    [
        ("absent.onnx", "", "", "no file"),
        ("m.onnx", "tpu", "", "target 'tpu' does not exist"),
        ("m.onnx", "cpu", "dml", "cpu has no provider 'dml'"),
        ("bad.onnx", "", "", "no readable ONNX model"),
    ],
)
def test_bad_input_is_one_line(
    name: str, target: str, provider: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_file(tmp_path / "m.onnx", {})
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    assert run(tmp_path / name, target=target, provider=provider) == errors.ExitCode.BAD_INPUT
    told = capsys.readouterr()
    assert told.out == ""
    assert says in told.err
    assert told.err.count("\n") == 1
