"""The training loop: distillation of the quantized student from what a corpus keeps of the original's distributions.

The original is not in memory: a corpus holds its k likeliest log-probabilities per position and the log of the mass
that is left, and the loss is the divergence over those k + 1 outcomes, mean over tokens (divergences.py, with the
hand-written gradient through the frozen lm_head). Recover-LoRA's loss (2606.04238) is the forward KL divergence over
the whole vocabulary.

Trained are adapters, group scales (both in AdaptedLinear) and RMSNorm weights, each kind at its own learning rate.
Every gradient is a part of one flat vector, so that several processes share a step with one sum.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from rlkit.recover import divergences, trainstate
from rlkit.recover.corpus import Targets
from rlkit.recover.model import fast_dtype

Rows = NDArray[np.int64]
KINDS: dict[str, Callable[[str], bool]] = {  # which parameters are of a kind, by name
    "adapter": lambda name: name.endswith((".lora_a", ".lora_b")),
    "scale": lambda name: name.endswith(".log_scales"),
    "norm": lambda name: name.endswith("norm.weight"),
}
YARDSTICK = divergences.forward_kl  # of held-out rows, whatever the loss, so that losses can be compared


@dataclass(frozen=True, slots=True)
class Distillation:
    """What to train, how long, and at which peak rates (cosine decay to a tenth after a linear warm-up).

    batch: rows per step, cut into `accumulate` parts that are in memory one after the other. scale_lr is a fraction of
    the scale (adapter.py). direction: a name of DIVERGENCES. check_every: steps between looks at the held-out rows,
    0 = never; patience: looks without an improvement after which training stops, 0 = no early stop. save_every: steps
    between saved states.
    """

    steps: int = 40
    batch: int = 16
    adapter_lr: float = 5e-4
    scale_lr: float = 8e-3
    norm_lr: float = 1e-3
    warmup: int = 4
    seed: int = 0
    train: tuple[str, ...] = ("adapter", "scale", "norm")
    direction: str = "forward"
    temperature: float = 1.0
    accumulate: int = 1
    checkpointing: bool = False
    save_every: int = 10
    check_every: int = 0
    patience: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch": 1, "warmup": 0, "accumulate": 1, "save_every": 1, "check_every": 0, "patience": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} = {getattr(self, name)} is too small; use at least {lowest}")
        for name in ("adapter_lr", "scale_lr", "norm_lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} trains nothing; use a finite number above 0")
        if unknown := set(self.train) - set(KINDS):
            raise ValueError(f"train = {sorted(unknown)} is no kind of parameter; use some of {tuple(KINDS)}")
        if self.direction not in divergences.DIVERGENCES:
            known = tuple(divergences.DIVERGENCES)
            raise ValueError(f"direction = {self.direction!r} is not offered; use one of {known}")
        if self.patience and not self.check_every:
            raise ValueError(f"patience = {self.patience} needs looks at held-out rows; set check_every above 0")

    def rate(self, step: int) -> float:
        """The fraction of the peak learning rate at `step` (0-based)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    def peak(self, kind: str) -> float:
        """The peak learning rate of a kind of parameter."""
        return {"adapter": self.adapter_lr, "scale": self.scale_lr, "norm": self.norm_lr}[kind]

    def rows(self, step: int, rows: Rows) -> Rows:
        """The rows of one step: every epoch visits all of `rows` in an order of its own."""
        wanted, count = np.arange(step * self.batch, (step + 1) * self.batch), len(rows)
        epochs = {
            int(epoch): np.random.default_rng((self.seed, int(epoch))).permutation(count) for epoch in wanted // count
        }
        return rows[[epochs[int(i) // count][int(i) % count] for i in wanted]]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: its number (1-based), the batch's mean loss in nats per token, and its wall seconds.

    held_out: mean forward KL over the held-out rows after the step, where it was looked at.
    """

    index: int
    kl: float
    seconds: float
    held_out: float | None = None


class Lessons(Protocol):
    """What the loop needs of a corpus (corpus.py)."""

    @property
    def ids(self) -> Rows:
        """Token ids (rows, length)."""

    @property
    def vocab(self) -> int:
        """How many tokens the original's distributions are over."""

    def targets(self, rows: Rows) -> Targets:
        """What the original says behind every position of these rows."""


def trainable(student: Any, train: tuple[str, ...] = tuple(KINDS)) -> dict[str, dict[str, torch.nn.Parameter]]:
    """The parameters to train, by kind and name; everything else is frozen."""
    kinds: dict[str, dict[str, torch.nn.Parameter]] = {kind: {} for kind in train}
    for name, parameter in student.named_parameters():
        kind = next((kind for kind in train if KINDS[kind](name)), None)
        parameter.requires_grad_(kind is not None)
        if kind:
            kinds[kind][name] = parameter
    return kinds


def distill(
    student: Any,
    corpus: Lessons,
    rows: Rows,
    plan: Distillation,
    *,
    held_out: Rows | None = None,
    state: Path | None = None,
    accelerator: Any = None,
) -> Iterator[Step]:
    """Train `student` in place on `rows` of `corpus`, yielding after every step.

    When all steps were taken, the student holds its best state on `held_out` (that before the first step included), or
    the last one where nothing was held out. With `state`, a run cut short goes on from what that file holds and ends
    as it would have; a finished one is only put back. `accelerator`: an accelerate.Accelerator; each of its processes
    calls this with the same arguments, takes its share of every batch and yields the same steps.

    Raises ValueError at once for rows that are not there, a student with nothing to train, or a `state` of another run
    or that cannot be read; and from a step on whose loss is not finite, the student being put back to a good state.
    """
    rows, held_out = (np.asarray(part if part is not None else [], np.int64) for part in (rows, held_out))
    _check_rows(rows, held_out, len(corpus.ids))
    run = _Run(student, corpus, plan, rows, held_out if plan.check_every else held_out[:0], _team(student, accelerator))
    file = None if state is None else trainstate.StateFile(state, run.key(), run.parameters, run.optimizer)
    if file is not None:
        run.resume(file)
    return _steps(run, file)


def _check_rows(rows: Rows, held_out: Rows, count: int) -> None:
    if not len(rows):
        raise ValueError("no rows to learn from; sample more sequences or hold fewer out")
    for part in (rows, held_out):
        if len(part) and not 0 <= part.min() <= part.max() < count:
            raise ValueError(
                f"rows {part.min()} to {part.max()} reach beyond the corpus of {count}; sample more of them"
            )


def _steps(run: _Run, file: trainstate.StateFile | None) -> Iterator[Step]:
    """The loop: step, look at the held-out rows, save, yield."""
    plan, standing = run.plan, run.standing
    try:
        if run.checks and standing.step == 0 and plan.steps:
            run.look()
        while standing.step < plan.steps and not standing.finished:
            began = time.perf_counter()
            kl = run.step()
            seconds, last = time.perf_counter() - began, standing.step == plan.steps
            found = run.look() if run.checks and (last or standing.step % plan.check_every == 0) else None
            standing.finished = last or bool(plan.patience and standing.stale >= plan.patience)
            if standing.finished and run.checks:
                run.put_back()
            if file is not None and run.team.index == 0 and (standing.finished or standing.step % plan.save_every == 0):
                file.save(standing)
            yield Step(standing.step, kl, seconds, found)
    finally:
        run.release()


@dataclass(frozen=True, slots=True)
class _Team:
    """The processes of a run: their device, this one's number, how many there are, and the sum over all of them."""

    device: torch.device
    index: int
    count: int
    sum: Callable[[torch.Tensor], torch.Tensor]

    def share(self, rows: Rows) -> Rows:
        return np.array_split(rows, self.count)[self.index]


def _team(student: Any, accelerator: Any) -> _Team:
    if accelerator is None:
        return _Team(next(student.parameters()).device, 0, 1, lambda tensor: tensor)
    reduce = functools.partial(accelerator.reduce, reduction="sum")
    return _Team(accelerator.device, accelerator.process_index, accelerator.num_processes, reduce)


class _Run:
    """A student in training: its parameters, their gradients as one vector, the optimizer, and how far it came."""

    def __init__(
        self, student: Any, corpus: Lessons, plan: Distillation, rows: Rows, held_out: Rows, team: _Team
    ) -> None:
        self.student, self.corpus, self.plan, self.team = student.to(team.device), corpus, plan, team
        self.rows, self.held_out, self.checks = rows, held_out, len(held_out) > 0
        self.dtype = torch.bfloat16 if student.lm_head.weight.dtype is torch.bfloat16 else _fast_dtype(team.device)
        self.head = self._head()
        kinds = trainable(student, plan.train)
        self.parameters = {name: parameter for group in kinds.values() for name, parameter in group.items()}
        if not self.parameters:
            raise ValueError(f"the student has nothing to train of {plan.train}; give it adapters or another `train`")
        if corpus.vocab != len(self.head):
            raise ValueError(
                f"the corpus is over {corpus.vocab} tokens, the student over {len(self.head)}; use one of its original"
            )
        groups = [
            {"params": list(kinds[kind].values()), "lr": plan.peak(kind), "peak": plan.peak(kind)}
            for kind in kinds
            if kinds[kind]
        ]
        self.dtypes = {name: parameter.dtype for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()  # a norm in bfloat16 would round small steps away
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        self.gradients = torch.zeros(sum(p.numel() for p in self.parameters.values()) + 1, device=team.device)
        self.loss = divergences.tempered(divergences.DIVERGENCES[plan.direction], plan.temperature)
        self.standing = trainstate.Standing()

    def key(self) -> str:
        """A fingerprint of what decides the result, up to rounding."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        indifferent = {"save_every", "accumulate", "checkpointing"}
        settings = [(name, getattr(self.plan, name)) for name in self.plan.__slots__ if name not in indifferent]
        return trainstate.fingerprint([shapes, settings], self.rows, self.held_out, self.corpus.ids[self.rows])

    def resume(self, file: trainstate.StateFile) -> None:
        """Go on from the file; ValueError if the processes find different ones."""
        self.standing = file.restore()
        own = torch.tensor([float(self.standing.step)], device=self.team.device)
        if float(self.team.sum(own)) != self.team.count * self.standing.step:
            raise ValueError(f"{file.path} is not the same for all processes; put it on a disk that they share")

    def step(self) -> float:
        """One optimizer step on the whole team's batch; its mean loss. Raises ValueError if that is not finite."""
        standing, plan = self.standing, self.plan
        self._clear()
        batch = plan.rows(standing.step, self.rows)
        tokens = len(batch) * self.corpus.ids.shape[1]
        with _checkpointed(self.student) if plan.checkpointing else contextlib.nullcontext():
            for part in np.array_split(batch, plan.accumulate):
                self._learn(self.team.share(part), tokens)
        vector = self.team.sum(self.gradients)  # the last entry is the loss
        norm, kl = float(vector[:-1].norm()), float(vector[-1])
        if not math.isfinite(norm + kl):
            self._give_up(kl, standing.step + 1)
        self.gradients.copy_(vector.mul_(min(1.0, 1.0 / (norm + 1e-6))))
        if not self.checks and standing.step % plan.save_every == 0:
            standing.keep(self.parameters)  # its loss was finite just now
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * plan.rate(standing.step)
        self.optimizer.step()
        standing.step += 1
        return kl

    def look(self) -> float:
        """The mean divergence of the held-out rows, and the parameters kept if it is the least so far."""
        found = torch.zeros(1, device=self.team.device)
        mine = self.team.share(self.held_out)
        for start in range(0, len(mine), self.plan.batch):
            found += self._divergence(mine[start : start + self.plan.batch])
        mean: float = self.team.sum(found).item() / (len(self.held_out) * self.corpus.ids.shape[1])
        if not math.isfinite(mean):
            self._give_up(mean, self.standing.step)
        self.standing.judge(mean, self.parameters)
        return mean

    def release(self) -> None:
        """Give the gradients' memory back, and the student its dtypes."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            parameter.data = parameter.data.to(self.dtypes[name])

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the student the parameters kept last."""
        for name, value in self.standing.kept.items():
            self.parameters[name].copy_(value)

    def _clear(self) -> None:
        """Zero gradients, each a view of its part of the vector."""
        self.gradients.zero_()
        start = 0
        for parameter in self.parameters.values():
            parameter.grad = self.gradients[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def _learn(self, rows: Rows, tokens: int) -> None:
        """Add the gradient of some rows' part in the mean over `tokens`."""
        if not len(rows):
            return
        hidden, known = self._hidden(rows)
        total, gradient = divergences.total_and_gradient(self.head, hidden.detach().flatten(0, 1), known, self.loss)
        torch.autograd.backward(hidden, gradient.div_(tokens).view_as(hidden))
        self.gradients[-1] += total / tokens

    @torch.no_grad()
    def _divergence(self, rows: Rows) -> torch.Tensor:
        hidden, known = self._hidden(rows)
        return divergences.total(self.head, hidden.flatten(0, 1), known, YARDSTICK)

    def _hidden(self, rows: Rows) -> tuple[torch.Tensor, divergences.Outcomes]:
        """What the student's lm_head reads at some rows (B, T, hidden), and what is known of the original there."""
        with self._autocast():
            hidden = self.student.model(input_ids=self._ids(rows), use_cache=False).last_hidden_state
        return hidden, divergences.Outcomes.of(self.corpus.targets(rows), self.team.device)

    def _ids(self, rows: Rows) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.corpus.ids[rows], np.int64)).to(self.team.device)

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype is torch.bfloat16
        return torch.autocast(self.team.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def _head(self) -> torch.Tensor:
        """The weight (V, hidden) of lm_head; ValueError if logits are not just its product with the last state."""
        weight: torch.Tensor = self.student.lm_head.weight.detach().to(self.dtype)
        ids = self._ids(self.rows[:1])[:, :8]
        with self._autocast():
            hidden = self.student.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.student(input_ids=ids, use_cache=False).logits.float()
        product = (hidden.to(self.dtype) @ weight.T).float()
        if not torch.allclose(logits, product, rtol=0, atol=0.02 * float(product.abs().max()), equal_nan=True):
            kind = type(self.student).__name__
            raise ValueError(
                f"{kind}: logits are not just lm_head's product; models with more behind it are not trained"
            )
        return weight

    def _give_up(self, value: float, step: int) -> None:
        self.put_back()
        plan, kept = self.plan, self.standing.kept_step
        rates = ", ".join(f"{kind}_lr = {plan.peak(kind):g}" for kind in plan.train)
        raise ValueError(
            f"step {step}: the divergence is {value:g} and its gradient of no use; lower the learning rate ({rates}); "
            f"the student is as it was after step {kept}"
        )


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return fast_dtype() if device.type == "cpu" else torch.float32


@contextlib.contextmanager
def _checkpointed(student: Any) -> Iterator[None]:
    """Decoder layers that compute their activations again in the backward pass.

    transformers' own switch acts in training mode only, which would turn dropout on.
    """
    layers = list(student.model.layers)
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
