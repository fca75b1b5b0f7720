"""Kept work is found again for the same files and settings, and for no others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import tiny
from rlkit.recover import record
from rlkit.recover.model import load_model
from rlkit.recover.source import resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "hf")


def test_a_stamp_lasts_as_long_as_the_files(folder: Path) -> None:
    before = record.stamp(resolve(folder))
    assert json.loads(json.dumps(before)) == before
    (folder / "README.md").write_text("no part of the model")
    assert record.stamp(resolve(folder)) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_file_is_another_stamp(folder: Path, name: str) -> None:
    before, file = record.stamp(resolve(folder)), folder / name
    later = file.stat().st_mtime_ns + 1_000_000_000
    os.utime(file, ns=(later, later))
    assert record.stamp(resolve(folder)) != before


def test_every_file_counts(folder: Path) -> None:
    before = record.stamp(resolve(folder))
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    assert len(record.stamp(resolve(folder))) == len(before) + 1


def test_keys_differ_by_every_part_and_not_by_the_order_in_a_mapping() -> None:
    keys = [record.key("a", {"x": 1, "y": 2}), record.key("a", {"x": 1, "y": 3}), record.key("b", {"x": 1, "y": 2})]
    assert len({*keys, record.key("a"), record.key(["a", {"x": 1, "y": 2}])}) == 5
    assert record.key("a", {"y": 2, "x": 1}) == keys[0]
    assert len(keys[0]) == 16 and keys[0].isalnum()


def test_a_source_is_described(folder: Path) -> None:
    source = resolve(folder)
    model = load_model(source)[0]
    found = record.source_facts(source, model)
    assert found["reference"] == str(folder) and found["kind"] == "hf" and found["file"] == "hf"
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["reference_precision"] == "as stored"
