"""Tuned settings: where they are kept, whose they are, and what happens to files that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlkit.runtime import tuned
from rlkit.runtime.tuned import Tuned, settings_for

FOUND = Tuned(2, {"session.intra_op.allow_spinning": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, {"gain": 1.1})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(tuned.OVERRIDE, raising=False)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder as far as this module looks into it."""
    made = tmp_path / "bundle"
    made.mkdir()
    decoder = {"filename": "model.onnx", "hidden_size": 128, "num_hidden_layers": 2}
    (made / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    (made / "model.onnx").write_bytes(b"graph")
    (made / "model.onnx.data").write_bytes(bytes(100))
    return made


def test_what_was_saved_is_found_again(bundle: Path, tmp_path: Path) -> None:
    assert settings_for(bundle) is None and tuned.environment_for(bundle) == {}
    path = tuned.save(bundle, FOUND)
    assert path.is_relative_to(tmp_path / "cache" / "tuned")
    assert settings_for(bundle) == FOUND
    assert tuned.environment_for(bundle) == FOUND.environment
    assert FOUND.advice == "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
    assert tuned.forget(bundle) == path
    assert settings_for(bundle) is None and tuned.forget(bundle) is None


def test_a_copy_has_the_same_settings_and_another_form_has_not(bundle: Path, tmp_path: Path) -> None:
    tuned.save(bundle, FOUND)
    copied = Path(shutil.copytree(bundle, tmp_path / "copy"))
    assert settings_for(copied) == FOUND
    (copied / "genai_config.json").write_text(
        (copied / "genai_config.json").read_text().replace('{"model"', '{"search": {}, "model"')
    )
    assert settings_for(copied) == FOUND  # how it samples is no matter of its form
    (copied / "model.onnx.data").write_bytes(bytes(101))
    assert settings_for(copied) is None


def test_another_machine_or_runtime_has_settings_of_its_own(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save(bundle, FOUND)
    monkeypatch.setattr(tuned.cores, "allowed", lambda: (0, 1, 2, 3, 4, 5, 6))
    assert settings_for(bundle) is None
    monkeypatch.setattr(tuned.cores, "allowed", lambda: (6, 7))
    other = tuned.machine_key()
    monkeypatch.setattr(tuned.cores, "allowed", lambda: (4, 5))
    assert tuned.machine_key() != other  # as many, but not the same


def test_another_version_of_the_runtime_has_settings_of_its_own(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuned.machine_key()
    monkeypatch.setattr(tuned.metadata, "version", lambda _name: "9.9")
    assert tuned.machine_key() != before


def test_they_can_be_switched_off_and_named(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save(bundle, FOUND)
    monkeypatch.setenv(tuned.OVERRIDE, "off")
    assert settings_for(bundle) is None
    other = tmp_path / "other.json"
    other.write_text(json.dumps(Tuned(1).to_json()))
    monkeypatch.setenv(tuned.OVERRIDE, str(other))
    assert settings_for(bundle) == Tuned(1)
    monkeypatch.setenv(tuned.OVERRIDE, str(tmp_path / "nowhere.json"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.json, which RLKIT_TUNED names"):
        settings_for(bundle)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema_version": 2, "threads": 2}',
        '{"schema_version": 1, "threads": 2}',
        '{"schema_version": 1, "threads": 0, "session_options": {}, "environment": {}, "about": {}}',
        '{"schema_version": 1, "threads": "2", "session_options": {}, "environment": {}, "about": {}}',
        '{"schema_version": 1, "threads": true, "session_options": {}, "environment": {}, "about": {}}',
        '{"schema_version": 1, "threads": 2, "session_options": [], "environment": {}, "about": {}}',
        '{"schema_version": 1, "threads": 2, "session_options": {"a": [1]}, "environment": {}, "about": {}}',
        '{"schema_version": 1, "threads": 2, "session_options": {}, "environment": {"A": 1}, "about": {}}',
    ],
)
def test_files_that_cannot_be_used_say_so(bundle: Path, text: str) -> None:
    tuned.save(bundle, FOUND).write_text(text)
    with pytest.raises(ValueError, match=r"cannot be used .*rlkit tune BUNDLE --forget") as raised:
        settings_for(bundle)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [None, "", "[]", "{}", '{"model": {"decoder": {}}}', '{"model": []}'])
def test_a_folder_that_is_no_bundle_has_none(tmp_path: Path, config: str | None) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if config is not None:
        (folder / "genai_config.json").write_text(config)
    assert settings_for(folder) is None and settings_for(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="is no bundle"):
        tuned.save(folder, FOUND)
