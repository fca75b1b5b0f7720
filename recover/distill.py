"""The training loop: logit distillation of the quantized student from the original model, on synthetic sequences.

The loss is the forward KL divergence of Recover-LoRA (2606.04238), mean over tokens of KL(softmax(t) || softmax(s)). As
lm_head is frozen, its part of the backward pass is written out: with teacher and student probabilities p_t, p_s and
lm_head weight W (V, hidden), d loss / d hidden = (p_s - p_t) W / tokens. The (tokens, V) matrices therefore live only
for one slice of tokens at a time, without an autograd graph.

Trained are the adapters and the RMSNorm weights; both cost nothing extra at run time beyond the adapters' own bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover.model import autocast

SLICE = 512  # tokens whose logits exist at one time: 512 x 49152 float32 = 100 MB


@dataclass(frozen=True, slots=True)
class Distillation:
    """Steps, sequences per step, peak learning rates (cosine decay to a tenth after a linear warm-up), and seed."""

    steps: int = 40
    batch: int = 16
    adapter_lr: float = 5e-4
    norm_lr: float = 1e-4
    warmup: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.warmup < 0:
            raise ValueError(
                f"steps = {self.steps}, batch = {self.batch}, warmup = {self.warmup}: use at least 0, 1 and 0"
            )

    def rate(self, step: int) -> float:
        """The fraction of the peak learning rate at `step` (0-based)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: its number (1-based), the batch's mean KL in nats per token, and wall seconds."""

    index: int
    kl: float
    seconds: float


def trainable(student: Any) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters to train, by kind; everything else is frozen."""
    kinds: dict[str, list[torch.nn.Parameter]] = {"adapter": [], "norm": []}
    for name, parameter in student.named_parameters():
        kind = "adapter" if ".lora_" in name else "norm" if name.endswith("norm.weight") else None
        parameter.requires_grad_(kind is not None)
        if kind:
            kinds[kind].append(parameter)
    return kinds


def distill(
    teacher: Any, student: Any, ids: NDArray[np.int64], plan: Distillation, *, state: Path | None = None
) -> Iterator[Step]:
    """Train `student` in place on rows of `ids` (sequences, length), yielding after every step.

    With `state`, progress is kept there after every tenth step and an interrupted run continues from it.
    """
    kinds = trainable(student)
    parameters = [parameter for group in kinds.values() for parameter in group]
    rates = {"adapter": plan.adapter_lr, "norm": plan.norm_lr}
    groups = [{"params": kinds[kind], "lr": rates[kind], "peak": rates[kind]} for kind in kinds if kinds[kind]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    first = _restore(state, parameters, optimizer)
    for step in range(first, plan.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * plan.rate(step)
        batch = torch.from_numpy(ids[_rows(len(ids), plan, step)])
        optimizer.zero_grad(set_to_none=True)
        kl = forward_backward(teacher, student, batch)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if state is not None and (step + 1) % 10 == 0:
            _save(state, parameters, optimizer, step + 1)
        yield Step(step + 1, kl, time.perf_counter() - began)


def _rows(count: int, plan: Distillation, step: int) -> NDArray[np.int64]:
    """The rows of one step: every epoch visits all rows in an order of its own."""
    wanted = np.arange(step * plan.batch, (step + 1) * plan.batch)
    epochs = {
        int(epoch): np.random.default_rng((plan.seed, int(epoch))).permutation(count) for epoch in wanted // count
    }
    return np.array([epochs[int(i) // count][int(i) % count] for i in wanted], dtype=np.int64)


def forward_backward(teacher: Any, student: Any, batch: torch.Tensor) -> float:
    """Accumulate d KL / d parameters for one batch (B, T) of ids; the mean KL in nats per token."""
    with autocast():
        with torch.no_grad():
            target = teacher.model(input_ids=batch, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden = student.model(input_ids=batch, use_cache=False).last_hidden_state
        kl, gradient = _head(teacher.lm_head.weight, student.lm_head.weight, target, hidden.detach().flatten(0, 1))
        hidden.backward(gradient.view_as(hidden))
    return kl


@torch.no_grad()
def _head(
    teacher_head: torch.Tensor, student_head: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Mean KL over tokens and its gradient with respect to `hidden` (tokens, hidden), slice by slice."""
    tokens, total = len(hidden), 0.0
    gradient = torch.empty_like(hidden)
    for start in range(0, tokens, SLICE):
        rows = slice(start, start + SLICE)
        log_teacher = torch.log_softmax((target[rows] @ teacher_head.T).float(), dim=-1)
        log_student = torch.log_softmax((hidden[rows] @ student_head.T).float(), dim=-1)
        teacher = log_teacher.exp()
        total += float((teacher * (log_teacher - log_student)).sum())
        difference = log_student.exp_().sub_(teacher)
        gradient[rows] = (difference @ student_head) / tokens
    return total / tokens, gradient


def _save(state: Path, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    part = state.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    values = [parameter.detach() for parameter in parameters]
    torch.save({"step": step, "parameters": values, "optimizer": optimizer.state_dict()}, part)
    part.replace(state)


def _restore(state: Path | None, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    if state is None or not state.is_file():
        return 0
    kept = torch.load(state, weights_only=True)
    for parameter, value in zip(parameters, kept["parameters"], strict=True):
        parameter.data.copy_(value)
    optimizer.load_state_dict(kept["optimizer"])
    return int(kept["step"])
