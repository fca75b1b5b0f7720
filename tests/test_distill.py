"""Training lowers the divergence, touches only what it may, keeps the best state, and is shared by processes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import team
import tiny
from lessons import (  # noqa: F401, fixtures
    ALL,
    HELD_OUT,
    LENGTH,
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
    trained,
)
from rlkit.recover.corpus import Targets
from rlkit.recover.distill import KINDS, Distillation, distill, trainable
from rlkit.recover.model import fast_dtype, load_model
from rlkit.recover.source import resolve

CLOSE = 0.05 if fast_dtype() is torch.bfloat16 else 1e-4
BROKEN = dataclasses.replace(PLAN, adapter_lr=1e20, scale_lr=1e20)


def divergence(teacher: Any, student: Any, rows: np.ndarray = ALL) -> float:
    ids = lessons(teacher).ids[rows]
    own, other = (torch.log_softmax(torch.from_numpy(tiny.logits(m, ids)), dim=-1) for m in (teacher, student))
    return float((own.exp() * (own - other)).sum(-1).mean())


def coarse(corpus: Lessons, student: Any, rows: np.ndarray) -> torch.Tensor:
    """The forward divergence over k + 1 outcomes, mean over the tokens of `rows`, by autograd."""
    kept = corpus.targets(rows)
    logits = student(input_ids=torch.from_numpy(corpus.ids[rows]), use_cache=False).logits
    chosen = torch.log_softmax(logits, dim=-1).gather(-1, torch.from_numpy(kept.ids))
    own = torch.cat([chosen, torch.log1p(-chosen.exp().sum(-1, keepdim=True))], dim=-1)
    known = torch.cat([torch.from_numpy(kept.log_probs), torch.from_numpy(kept.rest)[..., None]], dim=-1)
    return (known.exp() * (known - own)).sum(-1).mean()


def test_training_lowers_the_divergence_and_touches_only_what_it_may(teacher: Any, corpus: Lessons) -> None:
    learner = student(teacher)
    before, first = copy.deepcopy(learner.state_dict()), divergence(teacher, learner)
    steps = list(distill(learner, corpus, ALL, PLAN))
    assert [step.index for step in steps] == list(range(1, 14))
    assert all(step.seconds > 0 and math.isfinite(step.kl) and step.held_out is None for step in steps)
    assert divergence(teacher, learner) < 0.9 * first
    changed = {name for name, tensor in learner.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trained(learner))
    assert {name.rpartition(".")[2] for name in changed} == {"lora_a", "lora_b", "log_scales", "weight"}
    assert all(parameter.grad is None for parameter in learner.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_alone(teacher: Any, corpus: Lessons, kind: str) -> None:
    learner = student(teacher)
    before, first = copy.deepcopy(learner.state_dict()), divergence(teacher, learner)
    list(distill(learner, corpus, ALL, dataclasses.replace(PLAN, train=(kind,))))
    changed = {name for name, tensor in learner.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if KINDS[kind](name)}
    assert divergence(teacher, learner) < first


def test_the_first_step_follows_autograds_gradient(teacher: Any, corpus: Lessons) -> None:
    """Adam's first step has the size of the learning rate and the gradient's sign."""
    learner, exact = student(teacher), student(teacher)
    trainable(exact)
    loss = coarse(corpus, exact, PLAN.rows(0, ALL))
    loss.backward()
    begun = copy.deepcopy(trained(learner))
    (step,) = list(distill(learner, corpus, ALL, dataclasses.replace(PLAN, steps=1, warmup=0)))
    assert step.kl == pytest.approx(float(loss.detach()), rel=CLOSE)
    for name, parameter in exact.named_parameters():
        if name in begun:
            clear = parameter.grad.abs() > 0.2 * parameter.grad.abs().max()
            moved = trained(learner)[name] - begun[name]
            rate = 1e-3 if name.endswith("weight") else 4e-3 if name.endswith("scales") else 2e-3
            expected = -rate * parameter.grad.sign()[clear]
            torch.testing.assert_close(moved[clear], expected, rtol=0.02, atol=1e-6, msg=name)


def test_the_teacher_itself_has_nothing_to_learn(teacher: Any, corpus: Lessons) -> None:
    clone = copy.deepcopy(teacher)
    (step,) = list(distill(clone, corpus, ALL, dataclasses.replace(PLAN, steps=1, train=("norm",))))
    assert step.kl == pytest.approx(0, abs=3e-3 if fast_dtype() is torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("changes", [{"direction": "reverse"}, {"temperature": 2.0}])
def test_other_losses_lower_the_divergence_too(teacher: Any, corpus: Lessons, changes: dict[str, Any]) -> None:
    learner = student(teacher)
    plan = dataclasses.replace(PLAN, check_every=13, **changes)
    steps = list(distill(learner, corpus, TRAIN, plan, held_out=HELD_OUT))
    plain = next(iter(distill(student(teacher), corpus, TRAIN, PLAN)))
    assert steps[0].kl != pytest.approx(plain.kl, rel=0.02)
    assert steps[-1].kl < 0.9 * steps[0].kl
    assert steps[-1].held_out is not None
    yardstick = coarse(corpus, learner, HELD_OUT)  # whatever the loss
    assert steps[-1].held_out == pytest.approx(float(yardstick.detach()), rel=CLOSE)


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"accumulate": 9}, {"checkpointing": True}])
def test_saving_memory_changes_rounding_only(teacher: Any, corpus: Lessons, changes: dict[str, Any]) -> None:
    plan = dataclasses.replace(PLAN, steps=4, batch=5)
    one, other = student(teacher), student(teacher)
    expected = list(distill(one, corpus, ALL, plan))
    found = list(distill(other, corpus, ALL, dataclasses.replace(plan, **changes)))
    assert [step.kl for step in found] == pytest.approx([step.kl for step in expected], rel=5e-3)
    assert "forward" not in vars(other.model.layers[0])


def test_checkpointing_computes_layers_twice_without_training_mode(teacher: Any, corpus: Lessons) -> None:
    calls = []
    for checkpointing in (False, True):
        learner, seen = student(teacher), []
        learner.model.layers[0].mlp.register_forward_pre_hook(
            lambda module, _args, seen=seen: seen.append(module.training)
        )
        list(distill(learner, corpus, ALL, dataclasses.replace(PLAN, steps=3, checkpointing=checkpointing)))
        calls.append(seen)
    checks = 2  # of lm_head, before the first step
    assert calls == [[False] * (checks + 3), [False] * (checks + 6)]


def launch(folder: Path, out: Path, *rest: str) -> list[dict[str, Any]]:
    """Two processes of team.py, by `accelerate launch`; what each wrote.

    Its --cpu starts a single process unless there is MPI; several come with --multi_gpu, GPUs or not.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip"]
    command += ["127.0.0.1", "--main_process_port", str(port), team.__file__, str(folder), str(out), *rest]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{index}.json").read_text()) for index in range(2)]


def test_two_processes_train_like_one(folder: Path, tmp_path: Path) -> None:
    original = load_model(resolve(folder))[0]
    learner, corpus = student(original), lessons(original)
    expected = losses(list(distill(learner, corpus, team.TRAIN, team.PLAN, held_out=team.HELD_OUT)))
    size = float(sum(tensor.double().abs().sum() for tensor in trained(learner).values()))
    found = launch(folder, tmp_path)
    assert [process["processes"] for process in found] == [2, 2]
    for process in found:
        np.testing.assert_allclose(np.array(process["curve"], float), np.array(expected, float), rtol=0, atol=1e-3)
        assert process["size"] == pytest.approx(size, rel=1e-4)
    assert found[0]["curve"] == found[1]["curve"]
    assert found[0]["rows"] + found[1]["rows"] == len(corpus.asked)
    assert min(found[0]["rows"], found[1]["rows"]) > 0.3 * len(corpus.asked)


def test_the_best_state_is_kept(teacher: Any, corpus: Lessons) -> None:
    """Rates far too high make it worse and worse: the start stays the best."""
    learner, begun = student(teacher), student(teacher)
    wild = dataclasses.replace(PLAN, adapter_lr=0.3, scale_lr=0.3, warmup=0, check_every=2)
    steps = list(distill(learner, corpus, TRAIN, wild, held_out=HELD_OUT))
    assert [step.index for step in steps if step.held_out is not None] == [2, 4, 6, 8, 10, 12, 13]
    assert equal(learner, begun)


def test_the_best_of_several_is_given_back(teacher: Any, corpus: Lessons) -> None:
    """Held out is the row that the third step learns and the later ones forget."""
    learner, copies, found = student(teacher), {}, {}
    plan = dataclasses.replace(PLAN, batch=1, adapter_lr=0.02, scale_lr=0.02, warmup=0, check_every=1)
    for step in distill(learner, corpus, TRAIN, plan, held_out=plan.rows(2, TRAIN)):
        found[step.index], copies[step.index] = step.held_out, copy.deepcopy(learner)
    assert min(found, key=lambda index: found[index]) == 3
    assert equal(learner, copies[3])


def test_training_stops_early_when_held_out_rows_gain_nothing(teacher: Any, corpus: Lessons, tmp_path: Path) -> None:
    wild = dataclasses.replace(PLAN, adapter_lr=0.3, scale_lr=0.3, warmup=0, check_every=2, patience=2)
    learner, state = student(teacher), tmp_path / "state"
    assert len(list(distill(learner, corpus, TRAIN, wild, held_out=HELD_OUT, state=state))) == 4
    assert list(distill(student(teacher), corpus, TRAIN, wild, held_out=HELD_OUT, state=state)) == []


def test_no_look_is_taken_unless_asked_for(teacher: Any, corpus: Lessons) -> None:
    steps = list(distill(student(teacher), corpus, TRAIN, dataclasses.replace(PLAN, steps=2), held_out=HELD_OUT))
    assert [step.held_out for step in steps] == [None, None]
    assert not set(corpus.asked) & set(HELD_OUT.tolist())


def test_every_epoch_visits_every_row_in_an_order_of_its_own(teacher: Any) -> None:
    def seen(**changes: Any) -> list[int]:
        watched = lessons(teacher)
        plan = dataclasses.replace(PLAN, train=("norm",), **changes)
        list(distill(student(teacher), watched, TRAIN, plan))
        return watched.asked

    rows = seen(steps=6, batch=6)
    assert sorted(rows[:18]) == sorted(rows[18:]) == TRAIN.tolist()
    assert rows[:18] != rows[18:] != TRAIN.tolist()
    assert seen(steps=3, batch=6) == rows[:18]
    assert seen(steps=3, batch=6, seed=1) != rows[:18]
    wrapped = seen(steps=1, batch=40)
    assert len(wrapped) == 40
    assert wrapped[:36] == rows


def test_no_steps_change_nothing(teacher: Any, corpus: Lessons, tmp_path: Path) -> None:
    learner, plan = student(teacher), Distillation(steps=0, check_every=1)
    assert list(distill(learner, corpus, ALL, plan, held_out=HELD_OUT, state=tmp_path / "state")) == []
    assert equal(learner, student(teacher))


def test_norms_of_a_bfloat16_model_learn_in_float32_and_stay_what_they_were(teacher: Any, corpus: Lessons) -> None:
    learner = student(teacher, torch.bfloat16).to(torch.bfloat16)
    before, first = copy.deepcopy(learner.state_dict()), divergence(teacher, learner)
    plan = dataclasses.replace(PLAN, steps=30, norm_lr=6e-4, train=("norm",))  # each step alone would be rounded away
    list(distill(learner, corpus, ALL, plan))
    changed = {name for name, tensor in learner.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if KINDS["norm"](name)}
    assert {tensor.dtype for name, tensor in learner.state_dict().items() if name in changed} == {torch.bfloat16}
    assert divergence(teacher, learner) < first


def test_a_loss_that_is_no_number_stops_the_run_at_a_good_state(teacher: Any, corpus: Lessons, tmp_path: Path) -> None:
    learner, plan = student(teacher), dataclasses.replace(BROKEN, save_every=1, warmup=0)
    run = distill(learner, corpus, ALL, plan, state=tmp_path / "state")
    assert math.isfinite(next(run).kl)
    with pytest.raises(ValueError, match=r"step 2: .*lower the learning rate \(adapter_lr = 1e\+20.* after step 0$"):
        list(run)
    assert equal(learner, student(teacher))


def test_held_out_rows_may_show_it_too(teacher: Any, corpus: Lessons) -> None:
    learner = student(teacher)
    run = distill(learner, corpus, TRAIN, dataclasses.replace(BROKEN, warmup=0, check_every=1), held_out=HELD_OUT)
    with pytest.raises(ValueError, match=r"step 1: .*lower the learning rate.* after step 0$"):
        list(run)
    assert equal(learner, student(teacher))


def test_targets_that_are_no_numbers_change_nothing(teacher: Any, corpus: Lessons) -> None:
    kept, learner = corpus.targets_of_all, student(teacher)
    corpus.targets_of_all = Targets(kept.ids, kept.log_probs * np.float32("nan"), kept.rest)
    with pytest.raises(ValueError, match="step 1: the divergence is nan"):
        list(distill(learner, corpus, ALL, PLAN))
    assert equal(learner, student(teacher))


def test_rows_that_are_not_there_are_refused(teacher: Any, corpus: Lessons) -> None:
    with pytest.raises(ValueError, match="no rows to learn from"):
        distill(student(teacher), corpus, ALL[:0], PLAN)
    with pytest.raises(ValueError, match="rows 0 to 24 reach beyond the corpus of 24"):
        distill(student(teacher), corpus, np.arange(25), PLAN)
    with pytest.raises(ValueError, match="rows -1 to -1"):
        distill(student(teacher), corpus, ALL, PLAN, held_out=np.array([-1]))


def test_students_that_cannot_learn_from_it_are_refused(teacher: Any, corpus: Lessons, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        distill(copy.deepcopy(teacher), corpus, ALL, dataclasses.replace(PLAN, train=("adapter", "scale")))
    capped = student(teacher)
    capped.lm_head.register_forward_hook(lambda _module, _args, logits: logits.tanh())
    with pytest.raises(ValueError, match="not just lm_head's product"):
        distill(capped, corpus, ALL, PLAN)
    corpus.vocab = 600
    with pytest.raises(ValueError, match="over 600 tokens, the student over 512"):
        distill(student(teacher), corpus, ALL, PLAN)


@given(st.integers(1, 300), st.integers(0, 40))
def test_the_rate_rises_then_falls(steps: int, warmup: int) -> None:
    plan = Distillation(steps=steps, warmup=warmup)
    rates = [plan.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert not falling or falling[0] == 1
    assert len(falling) < 50 or falling[-1] < 0.11


BAD: list[tuple[dict[str, Any], str]] = [
    ({"steps": -1}, "steps = -1"),
    ({"batch": 0}, "batch = 0"),
    ({"warmup": -1}, "warmup = -1"),
    ({"accumulate": 0}, "accumulate = 0"),
    ({"save_every": 0}, "save_every = 0"),
    ({"check_every": -1}, "check_every = -1"),
    ({"patience": 3}, "patience = 3 needs"),
    ({"temperature": 0.0}, "temperature = 0"),
    ({"scale_lr": math.nan}, "scale_lr = nan"),
    ({"train": ("adapter", "bias")}, r"train = \['bias'\]"),
    ({"direction": "sideways"}, "direction = 'sideways' .* use one of"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**changes)


def test_lessons_have_the_shape_of_a_corpus(corpus: Lessons) -> None:
    kept = corpus.targets(HELD_OUT)
    assert kept.ids.shape[:2] == kept.rest.shape == (6, LENGTH)
    mass = np.exp(kept.log_probs).sum(-1) + np.exp(kept.rest)
    np.testing.assert_allclose(mass, 1, atol=1e-5)
