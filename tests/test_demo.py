"""The demo's plan and its manners; the run itself is in test_real_model.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlkit.apps import cli, demo
from rlkit.apps.errors import ExitCode


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def test_dry_run_lists_every_step_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.run(["demo", "-o", str(out), "--dry-run", "--json"]) == ExitCode.OK
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["state"] for step in steps] == ["to do"] * len(steps)
    titles = " ".join(step["step"] for step in steps)
    for word in ("pull smollm2-135m", "recover w4w2-gateup", "export w4 ", "chat", "bench", "report"):
        assert word in titles
    assert not out.exists()


def test_finished_steps_are_told_as_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoints" / "w4").mkdir(parents=True)
    done = [step.title for step in demo.plan(out) if step.made.exists()]
    assert done == ["recover w4"]


@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_a_folder_of_somebody_else_is_left_alone(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    assert cli.run(["demo", "-o", str(theirs), *flags]) == ExitCode.BAD_INPUT
    assert "choose another with -o" in capsys.readouterr().err
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]


def test_fresh_empties_only_an_own_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo._prepare(out, fresh=False)
    (out / "checkpoints").mkdir()
    demo._prepare(out, fresh=False)
    assert (out / "checkpoints").is_dir()
    demo._prepare(out, fresh=True)
    assert [path.name for path in out.iterdir()] == [demo.MARK]
