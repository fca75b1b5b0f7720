"""A quantized student of a tiny model, and a corpus in memory, for tests of the training loop here and elsewhere.

A module that imports the fixtures may ask for a `folder` with a model, the `teacher` loaded from it, and its `corpus`.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from rlkit.recover.adapter import AdaptedLinear
from rlkit.recover.corpus import Targets
from rlkit.recover.correct import Moments, correct
from rlkit.recover.distill import KINDS, Distillation, Step
from rlkit.recover.model import linears, load_model
from rlkit.recover.quantize import quantize_nearest
from rlkit.recover.recipe import Scheme
from rlkit.recover.source import resolve

ROWS, LENGTH, TOP_K = 24, 16, 32
ALL = np.arange(ROWS)
TRAIN, HELD_OUT = ALL[6:], ALL[:6]
PLAN = Distillation(steps=13, batch=4, adapter_lr=2e-3, scale_lr=4e-3, norm_lr=1e-3, warmup=2)


@dataclass
class Lessons:
    """What the loop needs of a corpus, made of a model's logits; it writes down which rows were asked for."""

    ids: np.ndarray
    targets_of_all: Targets
    vocab: int = tiny.VOCAB
    asked: list[int] = field(default_factory=list)

    def targets(self, rows: np.ndarray) -> Targets:
        self.asked += rows.tolist()
        kept = self.targets_of_all
        return Targets(kept.ids[rows], kept.log_probs[rows], kept.rest[rows])


def lessons(teacher: Any, seed: int = 0) -> Lessons:
    """Random rows and the TOP_K likeliest tokens of `teacher` behind each position."""
    ids = np.random.default_rng(seed).integers(3, tiny.VOCAB, (ROWS, LENGTH))
    probabilities = torch.softmax(torch.from_numpy(tiny.logits(teacher, ids)).double(), dim=-1)
    top, found = probabilities.topk(TOP_K)
    rest = (1 - top.sum(-1)).clamp(min=2e-9).log()
    return Lessons(ids, Targets(found.numpy(), top.log().float().numpy(), rest.float().numpy()))


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.1)


@pytest.fixture(scope="module", name="teacher")
def teacher_fixture(folder: Path) -> Any:
    return load_model(resolve(folder))[0]


@pytest.fixture(name="corpus")
def corpus_fixture(teacher: Any) -> Lessons:
    return lessons(teacher)


def student(teacher: Any, dtype: torch.dtype = torch.float32, *, scales: bool = True) -> Any:
    """The teacher with gate and up at 2 bits, a correction of rank 8 beside them, and down at 4 bits."""
    made = copy.deepcopy(teacher)
    for name, module in linears(teacher).items():
        last = name.rpartition(".")[2]
        if last in ("gate_proj", "up_proj"):
            quantized = quantize_nearest(module.weight, Scheme(2, 64))
            low_rank = correct(module.weight - quantized.dequantize(), Moments(torch.eye(128)), 8)
            layer = AdaptedLinear(module, quantized, low_rank, dtype, train_scales=scales)
        elif last == "down_proj":
            layer = AdaptedLinear(module, quantize_nearest(module.weight, Scheme(4, 64)), None, dtype, scales)
        else:
            continue
        made.set_submodule(name, layer)
    return made


def trained(model: Any) -> dict[str, torch.Tensor]:
    """What of a student is trained, whatever its kind."""
    return {name: tensor for name, tensor in model.state_dict().items() if any(is_of(name) for is_of in KINDS.values())}


def equal(one: Any, other: Any) -> bool:
    """Whether two students have learned the very same."""
    return all(torch.equal(tensor, trained(other)[name]) for name, tensor in trained(one).items())


def losses(steps: list[Step]) -> list[tuple[int, float, float | None]]:
    """The loss curve of a run."""
    return [(step.index, step.kl, step.held_out) for step in steps]


def environment() -> dict[str, str]:
    """Of a process that imports what tests import, on one thread, without a network or a GPU."""
    tests = str(Path(__file__).parent)
    return {
        **os.environ,
        "PYTHONPATH": tests,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
