"""The training of depth networks: from the truth, from a larger network's answers, or from both.

AdamW with a linear warm-up and a cosine to 0. Where the processor multiplies bfloat16, convolutions of the monocular
network do; a stereo network's costs are differences of features, which keep their digits. A state file lets a training
that was cut short end as it would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlkit.recover import depthbatches, depthloss, slim
from rlkit.recover.anynet import AnyNet
from rlkit.recover.depthbatches import Batch, Cut, Samples
from rlkit.recover.depthfile import Kind
from rlkit.recover.depthnets import DepthNet
from rlkit.recover.depthsample import LogScale
from rlkit.recover.depthstate import StateFile
from rlkit.recover.model import fast_dtype
from rlkit.recover.progress import Progress, Tell, silent


class Lesson(StrEnum):
    """What a network learns from: the truth, a teacher's answers (no truth needed), or both."""

    TRUTH = "truth"
    TEACHER = "teacher"
    BOTH = "both"


JUDGED = 8  # batches that importance is taken from
CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True, slots=True)
class Training:
    """How long, on what, at which peak rate. size: height and width of a cut. save_every: steps between states."""

    steps: int = 600
    batch: int = 8
    size: tuple[int, int] = (96, 128)
    rate: float = 2e-3
    warmup: int = 20
    decay: float = 1e-4
    seed: int = 0
    lesson: Lesson = Lesson.TRUTH
    save_every: int = 50

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch": 1, "warmup": 0, "seed": 0, "save_every": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} = {getattr(self, name)} is too small; use at least {lowest}")
        if not 0 < self.rate < math.inf or not 0 <= self.decay < 1:
            raise ValueError(
                f"rate = {self.rate}, decay = {self.decay} train nothing; use a rate above 0, decay in 0..1"
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size = {self.size} is none of an image; give height and width")

    def share(self, step: int) -> float:
        """The fraction of the peak rate at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    @property
    def cut(self) -> Cut:
        """How samples become batches."""
        return Cut(self.batch, self.size, self.seed)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its number from 1, the batch's loss, and the seconds of all steps so far, earlier runs included."""

    index: int
    loss: float
    seconds: float


def kind_of(network: nn.Module) -> Kind:
    """What a network reads; TypeError for a module that is neither."""
    if isinstance(network, DepthNet | AnyNet):
        return Kind.MONO if isinstance(network, DepthNet) else Kind.STEREO
    raise TypeError(f"{type(network).__name__} is no depth network")


def train(
    network: nn.Module,
    samples: Samples,
    plan: Training,
    *,
    scale: LogScale | None = None,
    teacher: nn.Module | None = None,
    state: Path | None = None,
) -> Iterator[Step]:
    """Train `network` in place, yielding after every step; afterwards it is in evaluation mode.

    `scale`: of depth, for mono networks. `teacher`: what lessons other than the truth ask. With `state`, a run cut
    short goes on from what that file holds; a finished one is only put back.

    Raises ValueError at once for samples of the other kind, a lesson without teacher, sizes that do not fit, or a
    state of another run; and from a step on whose loss is not finite.
    """
    kind = kind_of(network)
    if samples.kind is not kind:
        raise ValueError(f"samples are {samples.kind}, the network is {kind}; use data of the network's kind")
    if (plan.lesson is Lesson.TRUTH) != (teacher is None):
        raise ValueError(f"lesson {plan.lesson} and {'no' if teacher is None else 'a'} teacher do not fit together")
    if teacher is not None and kind_of(teacher) is not kind:
        raise ValueError(f"a {kind_of(teacher)} network cannot teach a {kind} one; use one of its kind")
    run = _Run(network, samples, plan, scale or LogScale() if kind is Kind.MONO else None, teacher)
    file = None if state is None else StateFile(state, run.key())
    done, seconds = (0, 0.0) if file is None else file.restore(network, run.optimizer)
    return _steps(run, done, seconds, file)


def losses(
    network: nn.Module, samples: Samples, plan: Training, scale: LogScale | None, count: int
) -> Iterator[torch.Tensor]:
    """The losses of some batches towards the truth, with gradients, the network being in the mode it is in."""
    for step in range(count):
        shown = depthbatches.batch(samples, plan.cut, step, scale).to(next(network.parameters()).device)
        said = network(*shown.images)
        loss = depthloss.stereo if scale is None else depthloss.mono
        yield loss(said, shown.truth, shown.valid)


def slimmed(network: nn.Module, cuts: str, samples: Samples, plan: Training, scale: LogScale | None) -> nn.Module:
    """A network after cuts (slim.py), what its channels matter being judged on JUDGED batches of these samples."""

    def judge(network: nn.Module) -> slim.Scores:
        return slim.taylor(network, lambda copied: losses(copied, samples, plan, scale, JUDGED))

    return slim.apply(network, slim.parse(cuts), judge)


def fold(steps: Iterator[Step], plan: Training, stage: str, tell: Tell = silent) -> dict[str, Any]:
    """Take all steps, telling how far they are; the facts of the training as JSON values."""
    losses: list[float] = []
    seconds = 0.0
    for step in steps:
        losses.append(step.loss)
        seconds = step.seconds
        tell(Progress(stage, step.index, plan.steps, f"loss {sum(losses[-20:]) / len(losses[-20:]):.4f}"))
    return {**asdict(plan), "size": list(plan.size), "lesson": str(plan.lesson), "seconds": seconds}


def _steps(run: _Run, done: int, seconds: float, file: StateFile | None) -> Iterator[Step]:
    plan = run.plan
    try:
        for index in range(done, plan.steps):
            began = time.perf_counter()
            loss = run.step(index)
            seconds += time.perf_counter() - began
            if file is not None and ((index + 1) % plan.save_every == 0 or index + 1 == plan.steps):
                file.save(index + 1, seconds, run.network, run.optimizer)
            yield Step(index + 1, loss, seconds)
    finally:
        run.network.eval()


class _Run:
    """A network in training, with its optimizer and what it learns from."""

    def __init__(
        self, network: nn.Module, samples: Samples, plan: Training, scale: LogScale | None, teacher: nn.Module | None
    ) -> None:
        self.network, self.samples, self.plan, self.scale = network, samples, plan, scale
        self.device = next(network.parameters()).device
        self.teacher = None if teacher is None else teacher.eval().to(self.device)
        stride = network.shape.stride if isinstance(network, DepthNet) else 16
        if plan.size[0] % stride or plan.size[1] % stride:
            raise ValueError(f"size {plan.size} does not fit a network of stride {stride}; use multiples of it")
        if scale is not None:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on CPUs
        # Norms and biases are not decayed; a norm's scale says how much its channel matters.
        decayed = [each for each in network.parameters() if each.ndim > 1]
        others = [each for each in network.parameters() if each.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": plan.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.99))

    def key(self) -> list[Any]:
        """What decides the result, as JSON values."""
        shapes = [[name, list(value.shape)] for name, value in self.network.state_dict().items()]
        settings = {name: value for name, value in asdict(self.plan).items() if name != "save_every"}
        return [shapes, settings, self.samples.identity, repr(self.scale), _digest(self.teacher)]

    def step(self, index: int) -> float:
        """One optimizer step; its loss. ValueError if that is not finite."""
        shown = depthbatches.batch(self.samples, self.plan.cut, index, self.scale).to(self.device)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(shown)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        if not math.isfinite(float(loss.detach()) + float(norm)):
            raise ValueError(
                f"step {index + 1}: the loss is {float(loss.detach()):g}; lower --rate ({self.plan.rate:g})"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * self.plan.share(index)
        self.optimizer.step()
        return float(loss.detach())

    def _loss(self, shown: Batch) -> torch.Tensor:
        if self.scale is None:
            return self._stereo_loss(shown)
        image = shown.images[0].contiguous(memory_format=torch.channels_last)
        with _Taps(self.network) as ours, self._fast():
            said = self.network(image).float()
        total: torch.Tensor = said.new_zeros(())
        if self.plan.lesson is not Lesson.TEACHER:
            total = total + depthloss.mono(said, shown.truth, shown.valid)
        if self.teacher is not None:
            with torch.no_grad(), _Taps(self.teacher) as theirs, self._fast():
                answer = self.teacher(image).float()
            total = total + depthloss.mono(said, answer, torch.ones_like(shown.valid))
            total = total + depthloss.SPREAD_SHARE * depthloss.spread(ours.values, theirs.values)
        return total

    def _stereo_loss(self, shown: Batch) -> torch.Tensor:
        said = self.network(*shown.images)
        total: torch.Tensor = said[-1].new_zeros(())
        if self.plan.lesson is not Lesson.TEACHER:
            total = total + depthloss.stereo(said, shown.truth, shown.valid)
        if self.teacher is not None:
            with torch.no_grad():
                answer = self.teacher(*shown.images)[-1]
            total = total + depthloss.stereo(said, answer, torch.ones_like(shown.valid))
        return total

    def _fast(self) -> torch.autocast:
        cpu = self.device.type == "cpu"
        fast = fast_dtype() is torch.bfloat16 if cpu else torch.cuda.is_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)


class _Taps:
    """Collects what the levels on the way up of a DepthNet say in one pass, finest first, in float32."""

    def __init__(self, network: nn.Module) -> None:
        self._levels = list(network.up) if isinstance(network, DepthNet) else []
        self._said: list[torch.Tensor] = []

    def __enter__(self) -> _Taps:
        self._handles = [level.register_forward_hook(self._hear) for level in self._levels]
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hear(self, _level: nn.Module, _given: Any, said: torch.Tensor) -> None:
        self._said.append(said)

    @property
    def values(self) -> list[torch.Tensor]:
        """What was heard, finest first."""
        return [said.float() for said in reversed(self._said)]


def _digest(network: nn.Module | None) -> list[float] | None:
    """Numbers that tell one network's values from another's."""
    if network is None:
        return None
    values = [value.double() for value in network.state_dict().values()]
    return [float(sum(value.sum() for value in values)), float(sum(value.square().sum() for value in values))]
