"""The steps of a float model's repair, on one model that changes from the teacher into the damaged student.

With E = W_teacher - W_degraded and the teacher's second moments H and G (sweep.py), a correction B A of rank r
minimizes trace(G (E - B A) H (E - B A)^T): correct.py. Training then starts from it, towards what the corpus keeps of
the teacher. What is done lies in the work folder, where the same steps find it after an interruption.

Some damage shrinks whole rows (bits cut off, small weights lost), which is an error of full rank. Where everything is
merged, rows of the damaged matrix may therefore be scaled first: by the d that minimizes (w - d w') H (w - d w')^T for
the row w' of the damaged and w of the sound matrix, if the correction then leaves less over. An adapter cannot do that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rlkit.recover import adapter
from rlkit.recover.correct import LowRank, Moments, correct, forecast
from rlkit.recover.corrupt import relative_error
from rlkit.recover.distill import Distillation
from rlkit.recover.memory import peak_nbytes
from rlkit.recover.methods import LORA_RATE, LORA_SCALING, random_start
from rlkit.recover.model import fast_dtype, linears
from rlkit.recover.progress import Progress, Tell
from rlkit.recover.recovery import Settings, fitting
from rlkit.recover.stages import Stages
from rlkit.recover.sweep import LayerMoments, Rows, sweep
from rlkit.recover.team import Team
from rlkit.recover.weights import Change, Weights
from rlkit.recover.workbench import Text, learn

CHECK_EVERY = 10  # steps: the best state on held-out rows is kept, so that training never spoils a good correction


@dataclass(frozen=True, slots=True)
class Bench:
    """The model in memory, teacher first and student later, and everything its repair needs."""

    model: Any
    weights: Weights
    ranks: dict[str, int]
    text: Text
    settings: Settings
    merge: bool
    work: Path
    stages: Stages
    team: Team
    tell: Tell
    scales: dict[str, torch.Tensor] = field(default_factory=dict)  # (N,) by module name, where rows are scaled

    def run(self) -> dict[str, LowRank]:
        """All stages; the adapters as they will be kept, worn by the model."""
        closed = self.settings.method != "recover-lora"
        if closed:
            if self.team.main:
                self._layers()
            self.team.wait()
        self._become_student()
        self._finish("degraded")
        low_ranks: dict[str, LowRank] = {}
        if closed:
            low_ranks, scales = kept(self.work / "layers")
            self.scales.update(scales)
            self._wear(low_ranks)
            self._finish("corrected")
        if self.settings.method != "corrected" and self.settings.distillation.steps:
            low_ranks = self._train(low_ranks)
            self._finish("distilled")
        return low_ranks

    def folded(self, low_ranks: Mapping[str, LowRank]) -> Change:
        """How `rewrite` makes the merged model of the damaged one."""
        norms = {name: p.data for name, p in self.model.named_parameters() if name.endswith("norm.weight")}

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            module = name.removesuffix(".weight")
            if module in low_ranks and name != module:
                return (self._base(module) + low_ranks[module].product()).to(tensor.dtype)
            return norms[name].to(tensor.dtype) if name in norms else tensor

        return change

    def layers(self) -> list[dict[str, Any]]:
        """The log of every layer's corrections."""
        return [json.loads(metadata["log"]) for _file, metadata in _layer_files(self.work / "layers")]

    def _finish(self, stage: str) -> None:
        if self.team.main:
            self.stages.finish(stage, self.model)

    @torch.no_grad()
    def _layers(self) -> None:
        folder, amounts = self.work / "layers", self.settings.amounts
        done = [metadata["prefix"] for _file, metadata in _layer_files(folder)]
        rows = Rows(self.text.corpus.ids[self.text.train[: amounts.statistics_rows]], amounts.output_rows)
        total = self.model.config.num_hidden_layers
        passed = [*done, ""]  # lm_head takes no adapter
        if len(done) < total:
            for moments in sweep(
                self.model, rows, list(self.ranks), self.work / "moments", done=passed, tell=self.tell
            ):
                log = self._correct_layer(moments, folder)
                done.append(moments.prefix)
                self.tell(Progress("layers", len(done), total, f"KL forecast {log['kl_forecast']:.3f}"))
        self.stages.finish("layers")

    def _correct_layer(self, moments: LayerMoments, folder: Path) -> dict[str, Any]:
        """The best corrections of one layer, kept in `folder`; what is to be said of them."""
        tensors: dict[str, torch.Tensor] = {}
        modules: dict[str, dict[str, Any]] = {}
        matrices = linears(moments.layer)
        for name in (name for name in moments.inputs if moments.full(name) in self.ranks):
            full = moments.full(name)
            sound, found = matrices[name].weight.detach(), self.weights[f"{full}.weight"]
            metric = Moments(moments.inputs[name], moments.outputs.get(name))
            before = forecast(sound - found.float(), metric)
            low_rank, scale, after = self._best(sound, found.float(), metric, self.ranks[full])
            tensors |= {f"{full}.a": low_rank.a.contiguous(), f"{full}.b": low_rank.b.contiguous()}
            tensors |= {} if scale is None else {f"{full}.scale": scale}
            row = {"rank": self.ranks[full], "relative_error": round(relative_error(sound, found), 6)}
            modules[name] = row | {"kl_forecast": [round(before, 6), round(after, 6)], "rescaled": scale is not None}
        left = sum(row["kl_forecast"][1] for row in modules.values())
        log = {"layer": moments.prefix, "modules": modules, "kl_forecast": left, "peak_nbytes": peak_nbytes()}
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{moments.prefix}.safetensors"
        save_file(tensors, file.with_suffix(".part"), {"prefix": moments.prefix, "log": json.dumps(log)})
        file.with_suffix(".part").replace(file)
        return log

    def _best(
        self, sound: torch.Tensor, found: torch.Tensor, metric: Moments, rank: int
    ) -> tuple[LowRank, torch.Tensor | None, float]:
        """The correction that leaves least over, the rows' scales if they are part of it, and what is left over."""
        low_rank = correct(sound - found, metric, rank)
        plain = low_rank, None, forecast(sound - found - low_rank.product(), metric)
        if not self.merge:
            return plain
        scale = row_scales(sound, found, metric.input)
        error = sound - scale[:, None] * found
        low_rank = correct(error, metric, rank)
        left = forecast(error - low_rank.product(), metric)
        return (low_rank, scale, left) if left < plain[2] else plain

    def _base(self, name: str) -> torch.Tensor:
        """A damaged matrix (N, K) in float32, its rows scaled where that was found to help."""
        weight = self.weights[f"{name}.weight"].float()
        return weight * self.scales[name][:, None] if name in self.scales else weight

    @torch.no_grad()
    def _become_student(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.weights[name])

    @torch.no_grad()
    def _wear(self, low_ranks: Mapping[str, LowRank]) -> None:
        """Damaged weights with corrections added, rounded as the merged model will store them."""
        modules = linears(self.model)
        for name, low_rank in low_ranks.items():
            whole = self._base(name) + low_rank.product()
            modules[name].weight.copy_(whole.to(self.weights[f"{name}.weight"].dtype) if self.merge else whole)

    def _train(self, low_ranks: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """Distillation from these factors, or from random ones where there are none; the model wears the outcome."""
        published = self.settings.method == "recover-lora"
        plan, scaling = self._plan(published), LORA_SCALING if published else 1.0
        plain, initial = linears(self.model), random_start(plan.seed)
        for name, rank in self.ranks.items():
            weight = self._base(name)
            n, k = weight.shape
            start = low_ranks.get(name) or initial(name, n, k, rank)
            made = adapter.AdaptedLinear(plain[name], weight, start, fast_dtype(), scaling=scaling)
            self.model.set_submodule(name, made)
        learn(self.model, self.text, plan, self.work, self.team, self.tell)
        trained = {}
        for name in self.ranks:
            low_rank = self.model.get_submodule(name).low_rank()
            assert low_rank is not None
            trained[name] = LowRank(low_rank.a.contiguous(), low_rank.b.contiguous())
            self.model.set_submodule(name, plain[name])
        self.model.requires_grad_(False)
        self._wear(trained)
        self._round_norms()
        return trained

    def _plan(self, published: bool) -> Distillation:
        """What is trained: norms only where everything is merged, as an adapter cannot hold them."""
        plan = fitting(self.settings.distillation, self.model)
        plan = replace(plan, check_every=plan.check_every or CHECK_EVERY)
        if published:
            return replace(plan, train=("adapter",), adapter_lr=LORA_RATE)
        return replace(plan, train=("adapter", "norm") if self.merge else ("adapter",))

    @torch.no_grad()
    def _round_norms(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(parameter.to(self.weights[name].dtype))


def row_scales(sound: torch.Tensor, found: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """(N,) factors that bring the outputs of `found` (N, K) nearest to those of `sound`; 1 for a row without output."""
    spread = found @ moment  # (N, K)
    power = (spread * found).sum(1)
    usable = power > 1e-12 * power.max()
    return torch.where(usable, (spread * sound).sum(1) / power.clamp(min=1e-30), 1.0)


def kept(folder: Path) -> tuple[dict[str, LowRank], dict[str, torch.Tensor]]:
    """All corrections and row scales that `folder` keeps, by module name."""
    tensors: dict[str, torch.Tensor] = {}
    for file, _metadata in _layer_files(folder):
        tensors |= load_file(file)
    names = [key.removesuffix(".a") for key in tensors if key.endswith(".a")]
    low_ranks = {name: LowRank(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names}
    return low_ranks, {name: tensors[f"{name}.scale"] for name in names if f"{name}.scale" in tensors}


def _layer_files(folder: Path) -> list[tuple[Path, dict[str, str]]]:
    """Finished layers in order, with their metadata; one that was cut off while being written is dropped."""
    found = []
    for file in folder.glob("model.layers.*.safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                found.append((file, opened.metadata()))
        except SafetensorError:
            file.unlink()
    return sorted(found, key=lambda pair: int(pair[1]["prefix"].rpartition(".")[2]))
