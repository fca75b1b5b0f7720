"""Single steps in plain onnxruntime: a cache that is filled, read and written in place; profiles are read once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.export.build import export_bundle
from rlkit.runtime.stepper import Stepper, open_stepper


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stepper")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt")
    return export_bundle(checkpoint, root / "bundle", accuracy_level=0)


def keys(stepper: Stepper) -> np.ndarray:
    return np.array(stepper._buffers["past_key_values.0.key"].numpy())


def test_a_step_writes_its_own_places_of_the_cache_and_no_others(bundle: Path) -> None:
    stepper = open_stepper(bundle, threads=1)
    stepper._fill(12)
    before = keys(stepper)
    assert before.shape == (1, 2, 12, 32) and np.isfinite(before).all() and before.std() > 0
    assert stepper.step(3, 9) > 0
    after = keys(stepper)
    assert (after[:, :, :9] == before[:, :, :9]).all() and (after[:, :, 9:] != before[:, :, 9:]).any(axis=-1).all()
    stepper.step(3, 9)
    assert (keys(stepper)[:, :, 9:] == after[:, :, 9:]).all()  # the same ids after the same past
    assert stepper.close() == []


def test_depths_and_lengths_may_change_from_step_to_step(bundle: Path) -> None:
    stepper = open_stepper(bundle, threads=1)
    assert min(stepper.step(*sizes) for sizes in ((8, 0), (1, 8), (1, 255), (1, 0))) > 0
    assert keys(stepper).shape[2] == 1


def test_a_bundle_that_shares_no_buffer_is_run_without(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "b")
    config = json.loads((folder / "genai_config.json").read_text())
    config["search"]["past_present_share_buffer"] = False
    (folder / "genai_config.json").write_text(json.dumps(config))
    stepper = open_stepper(folder, threads=1)
    assert stepper.step(2, 6) > 0
    assert keys(stepper).shape[2] == 6


def test_time_is_taken_around_the_run_alone(bundle: Path) -> None:
    ticks = iter([1.0, 3.5])
    assert open_stepper(bundle, threads=1, clock=lambda: next(ticks)).step(2, 0) == 2.5


def test_a_profile_is_read_and_removed(bundle: Path, tmp_path: Path) -> None:
    stepper = open_stepper(bundle, threads=1, profile=tmp_path / "profile")
    stepper.step(2, 0)
    events = stepper.close()
    assert {event["args"]["op_name"] for event in events if event["cat"] == "Node"} >= {"GroupQueryAttention"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("new", "past"), [(0, 4), (1, -1), (1, 256), (257, 0)])
def test_steps_that_do_not_fit_are_refused(new: int, past: int, bundle: Path) -> None:
    with pytest.raises(ValueError, match=f"{new} tokens after {past} are no step in a context of 256"):
        open_stepper(bundle, threads=1).step(new, past)


def test_what_is_no_bundle_is_named(bundle: Path, tmp_path: Path) -> None:
    assert open_stepper(bundle).threads >= 1
    with pytest.raises(FileNotFoundError, match="no bundle folder"):
        open_stepper(tmp_path / "absent")
    with pytest.raises(ValueError, match="threads = 0"):
        open_stepper(bundle, threads=0)
