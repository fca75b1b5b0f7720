"""The hand-written gradient is the true one, training lowers the divergence, and an interrupted run ends the same."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from rlkit.recover import layers
from rlkit.recover.correct import Moments, correct
from rlkit.recover.distill import SLICE, Distillation, Step, _head, distill, forward_backward, trainable
from rlkit.recover.model import autocast, fast_dtype, linears, load_model
from rlkit.recover.quantize import quantize_nearest
from rlkit.recover.recipe import Scheme
from rlkit.recover.source import resolve

LOOSE = 0.05 if fast_dtype() is torch.bfloat16 else 1e-4
IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (24, 16))
PLAN = Distillation(steps=13, batch=4, adapter_lr=2e-3, norm_lr=1e-3, warmup=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", initializer_range=0.1)))[0]


def student(teacher: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The teacher with gate and up at 2 bits and a correction of rank 8 beside them."""
    made = copy.deepcopy(teacher)
    weights, low_ranks = {}, {}
    for name, module in linears(teacher).items():
        if name.endswith(("gate_proj", "up_proj")):
            weights[name] = quantize_nearest(module.weight, Scheme(2, 64)).dequantize()
            low_ranks[name] = correct(module.weight - weights[name], Moments(torch.eye(128)), 8)
    layers.adapt(made, weights, low_ranks, dtype)
    return made


def divergence(teacher: Any, student: Any) -> float:
    own, other = (torch.log_softmax(torch.from_numpy(tiny.logits(m, IDS)), dim=-1) for m in (teacher, student))
    return float((own.exp() * (own - other)).sum(-1).mean())


@pytest.mark.parametrize("tokens", [1, 100, SLICE, 2 * SLICE + 77])
def test_head_gradient_is_autograds(tokens: int) -> None:
    rng = torch.Generator().manual_seed(tokens)
    heads = [torch.randn(96, 32, generator=rng) * 0.5 for _ in range(2)]
    target, hidden = (torch.randn(tokens, 32, generator=rng) for _ in range(2))
    kl, gradient = _head(heads[0], heads[1], target, hidden)
    exact = hidden.double().requires_grad_()
    teacher = torch.log_softmax(target.double() @ heads[0].double().T, dim=-1)
    student = torch.log_softmax(exact @ heads[1].double().T, dim=-1)
    expected = torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    expected.backward()
    assert exact.grad is not None
    assert kl == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=1e-6 / tokens)


def test_every_parameters_gradient_is_autograds(teacher: Any) -> None:
    by_hand, by_autograd = student(teacher), student(teacher)
    kinds = trainable(by_hand)
    trainable(by_autograd)
    batch = torch.from_numpy(IDS[:4])
    kl = forward_backward(teacher, by_hand, batch)
    with autocast():
        own = torch.log_softmax(teacher(input_ids=batch, use_cache=False).logits.float(), dim=-1)
        other = torch.log_softmax(by_autograd(input_ids=batch, use_cache=False).logits.float(), dim=-1)
    loss = (own.exp() * (own - other)).sum(-1).mean()
    loss.backward()
    assert kl == pytest.approx(float(loss.detach()), rel=LOOSE)
    assert {kind: len(group) for kind, group in kinds.items()} == {"adapter": 8, "norm": 5}
    expected = dict(by_autograd.named_parameters())
    for name, parameter in by_hand.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        if parameter.grad is not None:
            error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
            assert float(error) < LOOSE, name


def test_training_lowers_the_divergence_and_touches_only_what_it_may(teacher: Any) -> None:
    learner = student(teacher)
    before, first = copy.deepcopy(learner.state_dict()), divergence(teacher, learner)
    kept = copy.deepcopy(teacher.state_dict())
    steps = list(distill(teacher, learner, IDS, PLAN))
    assert [step.index for step in steps] == list(range(1, 14))
    assert all(step.seconds > 0 and math.isfinite(step.kl) for step in steps)
    assert divergence(teacher, learner) < 0.9 * first
    changed = {name for name, tensor in learner.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name or name.endswith("norm.weight")}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in teacher.state_dict().items())


def test_the_teacher_itself_has_nothing_to_learn(teacher: Any) -> None:
    clone = copy.deepcopy(teacher)
    trainable(clone)
    assert forward_backward(teacher, clone, torch.from_numpy(IDS[:4])) == pytest.approx(0, abs=1e-6)
    assert all(float(p.grad.abs().max()) < 1e-6 for p in clone.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_ends_where_the_whole_one_does(teacher: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype is torch.bfloat16 and fast_dtype() is not dtype:
        pytest.skip("this processor multiplies float32 only")
    whole, broken, resumed = (student(teacher, dtype) for _ in range(3))
    expected = list(distill(teacher, whole, IDS, PLAN))
    run = distill(teacher, broken, IDS, PLAN, state=tmp_path / "work" / "distill.pt")
    begun = [next(run) for _ in range(12)]
    run.close()
    rest = list(distill(teacher, resumed, IDS, PLAN, state=tmp_path / "work" / "distill.pt"))
    assert [step.index for step in rest] == [11, 12, 13]
    assert losses(begun[:10] + rest) == losses(expected)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["distill.pt"]


def losses(steps: list[Step]) -> list[float]:
    return [step.kl for step in steps]


def seen_rows(teacher: Any, plan: Distillation) -> list[int]:
    """Which rows of IDS each step trained on, one after the other."""
    batches: list[torch.Tensor] = []
    watched = copy.deepcopy(teacher)
    watched.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True
    )
    list(distill(watched, student(teacher), IDS, plan))
    rows = {tuple(row): index for index, row in enumerate(IDS.tolist())}
    return [rows[tuple(row)] for row in torch.cat(batches).tolist()]


def test_every_epoch_visits_every_row_in_an_order_of_its_own(teacher: Any) -> None:
    rows = seen_rows(teacher, Distillation(steps=6, batch=8))
    assert sorted(rows[:24]) == sorted(rows[24:]) == list(range(24))
    assert rows[:24] != rows[24:] != list(range(24))
    assert seen_rows(teacher, Distillation(steps=3, batch=8)) == rows[:24]
    assert seen_rows(teacher, Distillation(steps=3, batch=8, seed=1)) != rows[:24]


def test_batches_may_be_larger_than_the_data(teacher: Any) -> None:
    rows = seen_rows(teacher, Distillation(steps=1, batch=60))
    assert len(rows) == 60
    assert sorted(rows[:24]) == list(range(24))


def test_no_steps_change_nothing(teacher: Any) -> None:
    learner = student(teacher)
    before = copy.deepcopy(learner.state_dict())
    assert list(distill(teacher, learner, IDS, Distillation(steps=0))) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())


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


@pytest.mark.parametrize("changes", [{"steps": -1}, {"batch": 0}, {"warmup": -1}])
def test_bad_settings_are_refused(changes: dict[str, int]) -> None:
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Distillation(**changes)


def test_adapt_and_uninstall_are_inverse(teacher: Any) -> None:
    names = [name for name in linears(teacher) if name.endswith("down_proj")]
    weights = {name: quantize_nearest(linears(teacher)[name].weight, Scheme(4, 32)).dequantize() for name in names}
    errors = {name: linears(teacher)[name].weight - weights[name] for name in names}
    low_ranks = {name: correct(errors[name], Moments(torch.eye(256)), 8) for name in names}
    plain, adapted = copy.deepcopy(teacher), copy.deepcopy(teacher)
    layers.install(plain, weights, low_ranks)
    layers.adapt(adapted, weights, low_ranks, torch.float32)
    np.testing.assert_allclose(tiny.logits(adapted, IDS), tiny.logits(plain, IDS), rtol=0, atol=1e-4)
    layers.uninstall(adapted, weights, low_ranks)
    np.testing.assert_array_equal(tiny.logits(adapted, IDS), tiny.logits(plain, IDS))
    assert list(linears(adapted)) == list(linears(teacher))
