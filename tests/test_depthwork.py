"""A work folder's networks: who teaches whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlkit.apps.depthwork import DEFAULTS, FULL, SAME, Work
from rlkit.recover import depthfile, depthtrain
from rlkit.recover.depthfile import Kind
from rlkit.recover.progress import silent


def test_the_full_network_teaches_as_it_is_after_it_learned_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(DEFAULTS[Kind.STEREO], size=(32, 64), batch=1, steps=1, slim_steps=1, pool=1)
    work = Work(tmp_path, settings)
    teachers: list[Any] = []
    real = depthtrain.train

    def seen(*given: Any, **options: Any) -> Any:
        teachers.append(options["teacher"])
        return real(*given, **options)

    monkeypatch.setattr(depthtrain, "train", seen)
    work.train_full(silent)
    work.slim("spn:1", silent)
    work.slim(SAME, silent)
    work.slim("spn:0", silent)
    first, alone, none, then = teachers
    assert first is None and none is None
    for teacher, name in ((alone, FULL), (then, SAME)):
        kept = depthfile.load(work.folder(name))[0].state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in teacher.state_dict().items())
