"""A run cut short ends where the whole one does, and no state of another run is used or lost."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import team
from lessons import (  # noqa: F401, fixtures
    ALL,
    HELD_OUT,
    PLAN,
    TRAIN,
    Lessons,
    corpus_fixture,
    environment,
    equal,
    folder_fixture,
    lessons,
    losses,
    student,
    teacher_fixture,
)
from rlkit.recover.distill import distill
from rlkit.recover.model import fast_dtype, load_model
from rlkit.recover.source import resolve


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_an_interrupted_run_ends_where_the_whole_one_does(
    teacher: Any, corpus: Lessons, dtype: torch.dtype, stop: int, tmp_path: Path
) -> None:
    if dtype is torch.bfloat16 and fast_dtype() is not dtype:
        pytest.skip("this processor multiplies float32 only")
    plan = dataclasses.replace(PLAN, steps=9, save_every=4, check_every=3)
    whole, broken, resumed = (student(teacher, dtype) for _ in range(3))
    expected = list(distill(whole, corpus, TRAIN, plan, held_out=HELD_OUT))
    state = tmp_path / "work" / "distill.safetensors"
    run = distill(broken, corpus, TRAIN, plan, held_out=HELD_OUT, state=state)
    begun = [next(run) for _ in range(stop)]
    del run
    rest = list(distill(resumed, corpus, TRAIN, plan, held_out=HELD_OUT, state=state))
    kept = stop // 4 * 4
    assert [step.index for step in rest] == list(range(kept + 1, 10))
    assert losses(begun[:kept] + rest) == losses(expected)
    assert equal(resumed, whole)
    assert [path.name for path in state.parent.iterdir()] == [state.name]
    again = student(teacher, dtype)
    assert list(distill(again, corpus, TRAIN, plan, held_out=HELD_OUT, state=state)) == []
    assert equal(again, whole)


def test_a_killed_process_leaves_a_state_to_go_on_from(folder: Path, tmp_path: Path) -> None:
    """Killed by itself, without a chance to clean up, between two saved states."""
    state = tmp_path / "state"
    kill = "import os, signal, team; team.Path.write_text = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
    program = f"{kill} team.main({str(folder)!r}, {str(tmp_path)!r}, {str(state)!r}, '5')"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()
    original = load_model(resolve(folder))[0]
    whole, resumed = student(original), student(original)
    parts = (lessons(original), team.TRAIN, team.PLAN)
    list(distill(whole, *parts, held_out=team.HELD_OUT))
    rest = list(distill(resumed, *parts, held_out=team.HELD_OUT, state=state))
    assert [step.index for step in rest] == [5, 6]
    assert equal(resumed, whole)


def test_the_state_of_another_run_is_refused_and_left_alone(teacher: Any, corpus: Lessons, tmp_path: Path) -> None:
    state = tmp_path / "state"
    plan = dataclasses.replace(PLAN, steps=2)
    list(distill(student(teacher), corpus, TRAIN, plan, state=state))
    before = state.read_bytes()
    others = [
        (student(teacher), TRAIN, dataclasses.replace(plan, adapter_lr=1e-3)),
        (student(teacher), ALL, plan),
        (student(teacher, scales=False), TRAIN, plan),
    ]
    for learner, rows, other in others:
        with pytest.raises(ValueError, match=r"state of another run .* remove it to train from the start"):
            distill(learner, corpus, rows, other, state=state)
    assert state.read_bytes() == before
    cheaper = dataclasses.replace(plan, accumulate=2, checkpointing=True, save_every=1)  # the same result
    assert list(distill(student(teacher), corpus, TRAIN, cheaper, state=state)) == []


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * 99])
def test_a_damaged_state_is_refused(teacher: Any, corpus: Lessons, damage: Any, tmp_path: Path) -> None:
    state = tmp_path / "state"
    list(distill(student(teacher), corpus, TRAIN, dataclasses.replace(PLAN, steps=1), state=state))
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot be read .* remove it to train from the start"):
        distill(student(teacher), corpus, TRAIN, dataclasses.replace(PLAN, steps=1), state=state)
