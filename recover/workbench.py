"""The steps that methods of recovery are made of, on one model that changes from the original into the student.

    quantize    every layer in turn: moments, codes, and closed-form corrections if asked (sweep.py, layers.py)
    train       adapters, group scales and norms, towards the original's kept distributions (distill.py)
    outcome     what the checkpoint will hold

Only one model is in memory: after the last layer its weights are overwritten with the quantized ones. What is done
lies in the work folder, where the same steps find it after an interruption. Of several processes the first does the
layers while the others wait, then read them; training is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover import adapter
from rlkit.recover.checkpoint import Recovered
from rlkit.recover.corpus import Corpus
from rlkit.recover.correct import LowRank
from rlkit.recover.distill import Distillation, distill
from rlkit.recover.kept import Kept, States
from rlkit.recover.layers import Treatment, in_blocks, treat
from rlkit.recover.memory import give_back, peak_nbytes
from rlkit.recover.model import fast_dtype, linears, set_weights
from rlkit.recover.progress import Progress, Tell
from rlkit.recover.quantize import quantize_nearest
from rlkit.recover.quantizers import Quantizer
from rlkit.recover.recipe import Scheme
from rlkit.recover.stages import Stages
from rlkit.recover.sweep import HEAD, Rows, sweep
from rlkit.recover.team import Team

RowNumbers = NDArray[np.int64]
Initial = Callable[[str, int, int, int], LowRank]  # (module name, N, K, rank) -> factors to start training from


@dataclass(frozen=True, slots=True)
class Text:
    """The corpus and its rows by use: to learn from, and to stop early by."""

    corpus: Corpus
    train: RowNumbers
    held_out: RowNumbers


@dataclass(frozen=True, slots=True)
class Amounts:
    """How many rows give input and output moments, and how often correction and codes alternate."""

    statistics_rows: int = 256
    output_rows: int = 64
    rounds: int = 4

    def __post_init__(self) -> None:
        if min(self.statistics_rows, self.output_rows) < 1 or self.rounds < 0:
            raise ValueError(
                f"statistics_rows = {self.statistics_rows} and output_rows = {self.output_rows} must be at least 1, "
                f"rounds = {self.rounds} at least 0"
            )


@dataclass(slots=True)
class Workbench:
    """The model at hand, what is to be done to it, and what has been done."""

    model: Any
    schemes: dict[str, Scheme]
    ranks: dict[str, int]
    quantizer: Quantizer
    text: Text
    amounts: Amounts
    distillation: Distillation
    work: Path
    stages: Stages
    team: Team
    tell: Tell
    low_ranks: dict[str, LowRank] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    corrected: frozenset[str] = frozenset()

    def quantize(self, *, correct: bool) -> None:
        """Codes for every matrix; with `correct`, closed-form corrections where there is a rank."""
        if self.team.main:
            self._layers(correct)
        self.team.wait()
        kept, dtype = self._kept(), self.model.dtype
        if self.quantizer.name != "search":  # which is that floor
            self._measure_floor()
        for name, tensor in kept.others():
            self.model.get_parameter(name).data.copy_(tensor)
        set_weights(self.model, ((name, kept.quantized(name).dequantize(dtype)) for name in self.schemes))
        self._finish("compensated" if self.quantizer.name.startswith("gptq") else self.quantizer.name)
        pairs = {name: pair for name in self.schemes if correct and (pair := kept.corrected(name))}
        if pairs:
            self.corrected = frozenset(pairs)
            self.low_ranks = {name: low_rank for name, (_state, low_rank) in pairs.items()}
            sums = ((name, state.dequantize() + low_rank.product()) for name, (state, low_rank) in pairs.items())
            set_weights(self.model, sums)
            self._finish("corrected")

    def train(self, kinds: tuple[str, ...], *, initial: Initial | None = None, scaling: float = 1.0) -> None:
        """Distillation of the parameters of these kinds; adapters without a closed form start from `initial`."""
        if not self.distillation.steps:
            return
        if "adapter" in kinds and initial is not None:
            modules = linears(self.model)
            for name in self.ranks.keys() - self.low_ranks.keys():
                n, k = modules[name].weight.shape
                self.low_ranks[name] = initial(name, n, k, self.ranks[name])
        scaled = [name for name in self.schemes if name != HEAD] if "scale" in kinds else []
        self._adapt(scaled, scaling)
        learn(self.model, self.text, replace(self.distillation, train=kinds), self.work, self.team, self.tell)
        self._restore(scaled)
        self._finish("distilled")

    def outcome(self) -> Recovered:
        """The checkpoint's content; adapters of linears that stay float are folded into them."""
        states = States(self._kept(), list(self.schemes), self.corrected, self.scales)
        low_ranks = {name: adapter.snap(self.low_ranks[name]) for name in self.low_ranks if name in self.schemes}
        return Recovered(states, low_ranks, _other_tensors(self.model, self.schemes))

    def layers(self) -> list[dict[str, Any]]:
        """The log of every layer."""
        return list(self._kept().logs.values())

    def _kept(self) -> Kept:
        return Kept(self.work / "layers", self.schemes)

    def _finish(self, stage: str) -> None:
        if self.team.main:
            self.stages.finish(stage, self.model)

    def _layers(self, correct: bool) -> None:
        kept, rounds = self._kept(), self.amounts.rounds if correct else None
        treatment = Treatment(self.schemes, self.ranks, self.quantizer, rounds)
        rows = self.text.train[: self.amounts.statistics_rows]
        total = self.model.config.num_hidden_layers + 1
        wanted = [name for name in self.ranks if name in self.schemes] if correct else []
        source = Rows(self.text.corpus.ids[rows], self.amounts.output_rows)
        for moments in sweep(self.model, source, wanted, self.work / "moments", done=kept.logs.keys(), tell=self.tell):
            state = treat(moments, treatment)
            state.log["peak_nbytes"] = peak_nbytes()
            kept.save(state)
            self.tell(Progress("layers", len(kept.logs), total, _note(state.log)))
        self.stages.finish("layers")

    def _measure_floor(self) -> None:
        """What plain rounding would have given, measured and thrown away; needs the original weights."""
        if self.team.main and not self.stages.finished("round-to-nearest"):
            modules, dtype = linears(self.model), self.model.dtype
            floor = (
                (name, in_blocks(modules[name].weight, partial(quantize_nearest, scheme=scheme)).dequantize(dtype))
                for name, scheme in self.schemes.items()
            )
            set_weights(self.model, floor)
            self._finish("round-to-nearest")

    def _adapt(self, scaled: Collection[str], scaling: float) -> None:
        """Make the model trainable: matrices with adapters or scales to train become AdaptedLinear."""
        states = States(self._kept(), list(self.schemes), self.corrected, {})
        for name in list(linears(self.model)):  # names only: each matrix goes as soon as its successor is there
            if name in self.low_ranks or name in scaled:
                module = self.model.get_submodule(name)
                base = states[name] if name in self.schemes else module.weight.detach()
                low_rank, train_scales = self.low_ranks.get(name), name in scaled
                made = adapter.AdaptedLinear(module, base, low_rank, fast_dtype(), train_scales, scaling)
                self.model.set_submodule(name, made)

    def _restore(self, scaled: Collection[str]) -> None:
        """The inverse of `_adapt`: plain linears that wear what was learned, as the checkpoint will hold it."""
        give_back()  # what training took
        kinds = [(name, type(module)) for name, module in self.model.named_modules()]
        for name in [name for name, kind in kinds if kind is adapter.AdaptedLinear]:
            module = self.model.get_submodule(name)
            low_rank, base = module.low_rank(), module.state()
            if name in scaled and not isinstance(base, torch.Tensor):
                self.scales[name] = base.scales
            weight = base if isinstance(base, torch.Tensor) else base.dequantize()
            if low_rank is not None:
                self.low_ranks[name] = adapter.snap(low_rank) if name in self.schemes else low_rank
                weight = weight + self.low_ranks[name].product()
            self.model.set_submodule(name, _plain(module, weight, self.model.dtype))
        self.low_ranks = {name: low_rank for name, low_rank in self.low_ranks.items() if name in self.schemes}


def learn(model: Any, text: Text, plan: Distillation, work: Path, team: Team, tell: Tell) -> None:
    """Train a model's trainable parts as `plan` says, on all processes; it ends on the CPU, in its best state."""
    state, accelerator = work / "distill.safetensors", team.accelerator
    steps = distill(model, text.corpus, text.train, plan, held_out=text.held_out, state=state, accelerator=accelerator)
    for step in steps:
        tell(Progress("distill", step.index, plan.steps, f"KL {step.kl:.3f} on synthetic text"))
    model.cpu()  # an accelerator may have had it


def _note(log: dict[str, Any]) -> str:
    """A layer's figures in a few words."""
    rows = log["modules"].values()
    forecast = sum(row.get("kl_forecast", 0.0) for row in rows)
    errors = [row["output_error"] for row in rows if "output_error" in row]
    parts = [f"output error {100 * max(errors):.1f}%"] if errors else []
    parts += [f"KL forecast {forecast:.3f}"] if forecast else []
    parts += [f"peak {log['peak_nbytes'] / 1e9:.1f} GB"] if log["peak_nbytes"] else []
    return ", ".join(parts)


@torch.no_grad()
def _plain(module: adapter.AdaptedLinear, weight: torch.Tensor, dtype: torch.dtype) -> torch.nn.Linear:
    n, k = weight.shape
    plain = torch.nn.Linear(k, n, bias=module.bias is not None, device="meta").to_empty(device="cpu").to(dtype)
    plain.weight.copy_(weight)
    if module.bias is not None:
        plain.bias.copy_(module.bias)
    return plain.requires_grad_(False)


def _other_tensors(student: Any, quantized: Collection[str]) -> dict[str, torch.Tensor]:
    """Every tensor that is neither quantized nor an adapter; a float embedding in float16, the rest as it was."""
    tensors, tied = {}, bool(student.config.tie_word_embeddings)
    for name, tensor in student.state_dict().items():
        module = name.rpartition(".")[0]
        embedding = module == "model.embed_tokens"
        stored_as_head = tied and HEAD in quantized and embedding
        if stored_as_head or (tied and module == HEAD) or (name.endswith(".weight") and module in quantized):
            continue
        tensors[name] = tensor.half() if embedding else tensor.clone()
    return tensors
