"""The command `rlkit tune` and its worker processes: one real search on a tiny bundle, and what is kept of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from rlkit.apps import tune as command
from rlkit.export.build import export_bundle
from rlkit.profiles import tunerun
from rlkit.profiles.tune import AGAIN, Outcome, Trial, Verdict
from rlkit.recover.atomic import sha256
from rlkit.runtime import tuned, tunedbundle
from rlkit.runtime.session import open_bundle
from rlkit.runtime.tuned import Tuned

SPIN = {"session.intra_op.allow_spinning": "0"}
WON = Verdict(0.8, 0.9, 0.7, 0.01, 7, 7)
FOUND = Outcome(
    Tuned(1, SPIN, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}),
    Tuned(2),
    WON,
    (Trial("spinning", "no spinning", WON, True), Trial("threads", "9 threads", None, False, "it ended")),
    ("small pages",),
    61.0,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(tuned.OVERRIDE, raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4W2), root / "bundle")


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Instead of measuring, FOUND; what was asked for is listed."""
    asked: list[dict[str, Any]] = []

    def tune_bundle(bundle: Path, **options: Any) -> Outcome:
        asked.append({"bundle": bundle, **options})
        return FOUND

    monkeypatch.setattr(tunerun, "tune_bundle", tune_bundle)
    return asked


def test_what_was_found_is_kept_and_used(
    bundle: Path, measured: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command.tune(bundle, seconds=30.0, inexact=True)
    text = capsys.readouterr().out
    assert measured[0]["seconds"] == 30.0 and measured[0]["inexact"] is True
    kept = tuned.settings_for(bundle)
    assert kept is not None and replace(kept, about={}) == FOUND.tuned
    assert kept.about["bundle"] == "bundle" and kept.about["against_default"]["cost"] == 0.8
    assert f"kept in {tuned.path_of(bundle)}" in text
    assert "best here: 1 thread" in text and "prompts +11.1 %, replies +42.9 % tokens/s" in text
    assert (
        "GLIBC_TUNABLES=glibc.malloc.hugetlb=0 rlkit run" in text and "not tried for want of time: small pages" in text
    )
    assert "it ended" in text
    session = open_bundle(bundle)
    assert session.threads == 1
    assert len(list(session.generate([5, 6, 7], 3, ignore_stop=True))) == 3


def test_a_dry_run_keeps_nothing(bundle: Path, measured: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    command.tune(bundle, dry_run=True, json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["file"] is None and answer["changed"] is True and answer["threads"] == 1
    assert answer["trials"][0]["verdict"]["cost"] == 0.8 and answer["left_out"] == ["small pages"]
    assert tuned.settings_for(bundle) is None


def test_forgetting_goes_back(bundle: Path, measured: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    command.tune(bundle)
    command.tune(bundle, forget=True)
    assert tuned.settings_for(bundle) is None and len(measured) == 1
    assert "forgotten: " in capsys.readouterr().out
    command.tune(bundle, forget=True, json=True)
    assert json.loads(capsys.readouterr().out)["forgotten"] == []


def test_written_into_the_bundle_it_goes_along_and_can_be_undone(
    bundle: Path, measured: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle / "genai_config.json").read_bytes(), json.loads((bundle / "rlkit.json").read_text())
    command.tune(bundle)
    command.tune(bundle, write=True)
    assert tuned.settings_for(bundle) is None  # what the bundle says counts
    manifest = json.loads((bundle / "rlkit.json").read_text())
    assert manifest["threads"] == {"value": 1, "chosen_by": "tuned"}
    assert manifest["sha256"]["genai_config.json"] == sha256(bundle / "genai_config.json")
    options = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert options["intra_op_num_threads"] == 1 and SPIN.items() <= options.items()
    assert open_bundle(bundle).threads == 1
    command.tune(bundle, write=True)  # once more changes nothing
    assert json.loads((bundle / "rlkit.json").read_text()) == manifest
    command.tune(bundle, forget=True)
    assert json.loads((bundle / "rlkit.json").read_text()) == before[1]
    assert json.loads((bundle / "genai_config.json").read_text()) == json.loads(before[0])
    assert tunedbundle.undo(bundle) is None


def test_processors_of_this_machine_stay_out_of_the_bundle(bundle: Path) -> None:
    tunedbundle.write(bundle, Tuned(2, {**SPIN, tunedbundle.AFFINITIES: "2"}))
    options = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert SPIN.items() <= options.items() and tunedbundle.AFFINITIES not in options
    assert open_bundle(bundle, threads=1).threads == 1


def test_only_our_bundles_are_written_into(bundle: Path, measured: list[Any]) -> None:
    (bundle / "rlkit.json").unlink()
    with pytest.raises(ValueError, match=r"has no rlkit.json, so nothing is written into it; leave --write out"):
        command.tune(bundle, write=True)


@pytest.mark.parametrize("seconds", [0.0, -5.0, float("nan"), float("inf"), 1e9])
def test_odd_times_are_refused(bundle: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="--seconds"):
        command.tune(bundle, seconds=seconds)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no bundle folder"):
        command.tune(tmp_path / "nowhere", json=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no bundle: it holds no genai_config"):
        command.tune(tmp_path / "folder", json=True)


def test_nothing_better_is_said_and_kept_as_such(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = replace(FOUND, tuned=Tuned(2), against=None, left_out=(), load=0.9)
    monkeypatch.setattr(tunerun, "tune_bundle", lambda bundle, **options: plain)
    command.tune(bundle)
    said = capsys.readouterr()
    assert "the default is best here: 2 threads; 1:01" in said.out
    assert "other programs used 90 % of the machine" in said.err
    assert "and is not kept; tune again while nothing else runs, or keep it with --force" in said.err
    assert tuned.settings_for(bundle) is None
    command.tune(bundle, force=True)
    kept = tuned.settings_for(bundle)
    assert kept is not None and (kept.threads, kept.session_options) == (2, {})


def test_workers_run_with_the_settings_they_are_given(bundle: Path) -> None:
    with tunerun.Workers(bundle) as bench:
        bench.round(Tuned(1, SPIN))
        (opened,) = (pair[0] for pair in bench._open.values())
        assert opened.threads == 1 and bench.opening > 0 and bench.round_seconds > 0 and bench.room >= 1
        bench._room = 1
        bench.round(Tuned(2))
        (other,) = (pair[0] for pair in bench._open.values())
        assert other.threads == 2 and other is not opened
        bench.round(Tuned(2))
        assert next(iter(bench._open.values()))[0] is other
        with pytest.raises(ChildProcessError, match="affin"):
            bench.round(Tuned(2, {"session.intra_op_thread_affinities": "1;2;3"}))
        bench.fresh()
        assert not bench._open


def test_a_real_search_ends_in_time_with_an_answer(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.tune(bundle, seconds=8.0, force=True, json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["threads"] >= 1 and (answer["trials"] or answer["left_out"])
    assert answer["changed"] is any(trial["won"] for trial in answer["trials"] if trial["axis"] == AGAIN)
    kept = tuned.settings_for(bundle)
    assert kept is not None and kept.threads == answer["threads"]
