"""One decoder layer after the other, with what recovery has to know of it: second moments of inputs and gradients.

With x the input of a linear and g the gradient of the negative log-likelihood with respect to its output, taken for
labels drawn from the model's own distribution,

    inputs   H = E[x x^T]  (K, K)
    outputs  G = E[g g^T]  (N, N)

so that H (x) G is the Kronecker-factored Fisher information of the weight (K-FAC, Martens & Grosse 2015, section 3): a
weight error E raises the KL divergence to the original model by about trace(G E H E^T) / 2.

Moments of all layers together are many times larger than the model. So the work goes layer by layer: first back from
the loss over some rows, which leaves each layer's G in the scratch folder; then forward over all rows, where a layer's
H is complete before the next layer begins. In memory are the model, one layer in float32, its moments, and the hidden
states of all rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from rlkit.recover.atomic import write_json
from rlkit.recover.model import autocast, linears
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.synthesize import draw

LARGEST_OUTPUT = 4096  # above this many outputs only G's diagonal is kept: (N, N) would not fit the scratch folder
BATCH = 8  # rows through a layer at a time
LOGITS = 2**26  # at a time: 256 MiB in float32
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """A layer and its moments, by module name inside it ("mlp.gate_proj").

    prefix: "model.layers.3", or "" for the last one, which holds lm_head alone.
    layer: a float32 copy, free to be changed; for lm_head the model's own module, whose matrix is large: leave it.
    inputs: (K, K), one tensor for linears that share their input; outputs: (N, N), or (N,) where N is large.
    """

    prefix: str
    layer: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def weight(self, name: str) -> torch.Tensor:
        """The matrix (N, K) of a linear, by its name inside the layer."""
        return self.layer.get_parameter(f"{name}.weight")

    def full(self, name: str) -> str:
        """The module's name in the whole model."""
        return f"{self.prefix}.{name}" if self.prefix else name


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows to look at, ids (rows, T): all for H, the first `output_rows` for G; and the labels' seed."""

    ids: NDArray[np.int64]
    output_rows: int = 64
    seed: int = 0


def sweep(
    model: Any,
    rows: Rows,
    outputs_of: Collection[str],
    scratch: Path,
    *,
    done: Collection[str] = (),
    tell: Tell = silent,
) -> Iterator[LayerMoments]:
    """Yield every decoder layer of `model` in order, then lm_head; prefixes in `done` are passed through, not yielded.

    `outputs_of` names the linears whose G is wanted (full names). What an interrupted sweep left in `scratch` is used
    again by one over the same rows. The model is not changed.
    """
    ids = torch.from_numpy(np.ascontiguousarray(rows.ids))
    wanted = [name for name in outputs_of if name != HEAD]
    if wanted and not _finished(scratch, rows):
        _output_moments(model, ids[: rows.output_rows], wanted, scratch, rows.seed, tell)
        write_json(scratch / "outputs.json", _stamp(rows))
    hidden = _embed(model, ids)
    keywords = _layer_keywords(model, ids[:1])
    for index, original in enumerate(model.model.layers):
        prefix = f"model.layers.{index}"
        layer = copy.deepcopy(original).float()
        inputs = _pass_through(layer, hidden, keywords[index], gather=prefix not in done)
        if prefix not in done:
            names = [name[len(prefix) + 1 :] for name in wanted if name.startswith(prefix + ".")]
            yield LayerMoments(prefix, layer, inputs, _load_outputs(scratch, prefix, names))
    if "" not in done:
        head = torch.nn.ModuleDict({HEAD: model.lm_head})
        yield LayerMoments("", head, {HEAD: _head_moment(model, hidden)}, {})


def _stamp(rows: Rows) -> dict[str, Any]:
    return {"rows": [int(rows.ids[: rows.output_rows].sum()), *rows.ids.shape, rows.output_rows, rows.seed]}


def _finished(scratch: Path, rows: Rows) -> bool:
    file = scratch / "outputs.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == _stamp(rows)


@torch.no_grad()
def _embed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states before the first layer, (rows, T, hidden) float32."""
    embedded: torch.Tensor = model.get_input_embeddings()(ids).float()
    return embedded


@torch.no_grad()
def _layer_keywords(model: Any, row: torch.Tensor) -> list[dict[str, Any]]:
    """What the model itself passes to each layer beside the hidden states, for one row (1, T); it suits any batch."""
    found: list[dict[str, Any]] = []

    def keep(_module: Any, _inputs: Any, keywords: dict[str, Any]) -> None:
        found.append({key: value for key, value in keywords.items() if key != "past_key_values"})

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.model.layers]
    try:
        model.model(input_ids=row, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _call(layer: Any, hidden: torch.Tensor, keywords: dict[str, Any]) -> torch.Tensor:
    """A layer's output (B, T, hidden), matrix products in the fast type."""
    with autocast():
        out = layer(hidden, **keywords)
    tensor: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


@torch.no_grad()
def _pass_through(
    layer: torch.nn.Module, hidden: torch.Tensor, keywords: dict[str, Any], *, gather: bool
) -> dict[str, torch.Tensor]:
    """Move `hidden` (rows, T, hidden) through the layer in place; the input moments of its linears on the way."""
    modules = linears(layer)
    leaders = _input_leaders(modules)
    sums: dict[str, torch.Tensor] = {}
    hooks = [modules[name].register_forward_pre_hook(_input_hook(sums, name)) for name in set(leaders.values())]
    for hook in hooks if not gather else []:
        hook.remove()
    for start in range(0, len(hidden), BATCH):
        part = hidden[start : start + BATCH]
        part.copy_(_call(layer, part, keywords))
    for hook in hooks:
        hook.remove()
    tokens = hidden.shape[0] * hidden.shape[1]
    means = {name: total / tokens for name, total in sums.items()}
    return {name: means[leader] for name, leader in leaders.items()} if gather else {}


@torch.no_grad()
def _head_moment(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """H of lm_head (hidden, hidden)."""
    total = torch.zeros(hidden.shape[-1], hidden.shape[-1])
    for start in range(0, len(hidden), BATCH):
        x = model.model.norm(hidden[start : start + BATCH]).float().flatten(0, 1)
        total.addmm_(x.T, x)
    return total / (hidden.shape[0] * hidden.shape[1])


def _input_leaders(modules: Collection[str]) -> dict[str, str]:
    """Which linear's input stands for each one's: q, k, v share theirs, and so do gate and up."""
    heads = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    leaders = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        leader = f"{parent}.{heads[last]}" if last in heads else name
        leaders[name] = leader if leader in modules else name
    return leaders


def _input_hook(sums: dict[str, torch.Tensor], name: str) -> Any:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        sums.setdefault(name, torch.zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)

    return hook


def _output_moments(model: Any, ids: torch.Tensor, wanted: list[str], scratch: Path, seed: int, tell: Tell) -> None:
    """Forward over `ids`, keeping each layer's input in `scratch`, then back from the loss, layer by layer."""
    scratch.mkdir(parents=True, exist_ok=True)
    layers, keywords = model.model.layers, _layer_keywords(model, ids[:1])
    total = 2 * len(layers)
    hidden = _embed(model, ids)
    for index, original in enumerate(layers):
        save_file({"hidden": hidden.bfloat16()}, scratch / f"hidden-{index:03d}.safetensors")
        _pass_through(copy.deepcopy(original).float(), hidden, keywords[index], gather=False)
        tell(Progress("output moments", index + 1, total))
    gradient = _loss_gradient(model, hidden, torch.Generator().manual_seed(seed))
    lowest = min(int(name.split(".")[2]) for name in wanted)
    for index in range(len(layers) - 1, lowest - 1, -1):
        prefix, kept = f"model.layers.{index}", scratch / f"hidden-{index:03d}.safetensors"
        names = [name[len(prefix) + 1 :] for name in wanted if name.startswith(prefix + ".")]
        layer = copy.deepcopy(layers[index]).float()
        outputs = _pass_back(layer, load_file(kept)["hidden"], gradient, keywords[index], names)
        _save_outputs(scratch, prefix, {name: moment / ids.numel() for name, moment in outputs.items()})
        tell(Progress("output moments", 2 * len(layers) - index, total))
    tell(Progress("output moments", total, total))
    for kept in scratch.glob("hidden-*.safetensors"):
        kept.unlink()


@torch.no_grad()
def _loss_gradient(model: Any, hidden: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """d(-log p(label)) / d hidden (rows, T, hidden) of the last layer's output, labels drawn from p."""
    gradient, weight = torch.empty_like(hidden), model.lm_head.weight
    step = max(1, LOGITS // len(weight))  # tokens whose logits exist at one time
    before, after = hidden.flatten(0, 1), gradient.flatten(0, 1)  # (tokens, hidden)
    for start in range(0, len(before), step):
        with torch.enable_grad():
            leaf = before[start : start + step].detach().requires_grad_()
            normed = model.model.norm(leaf)
        with autocast():
            logits = torch.nn.functional.linear(normed.detach(), weight)
            at_head = _sampled_gradient(logits, rng) @ weight.to(logits.dtype)
        torch.autograd.backward(normed, at_head.to(normed.dtype))
        assert leaf.grad is not None
        after[start : start + step] = leaf.grad
    return gradient


def _sampled_gradient(logits: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """d(-log p(label)) / d logits = p - onehot(label), (tokens, V), for labels sampled from p."""
    probabilities = torch.softmax(logits.float(), dim=-1)
    labels = draw(probabilities, rng)
    probabilities[torch.arange(len(labels)), labels] -= 1
    return probabilities.to(logits.dtype)


def _pass_back(
    layer: torch.nn.Module, hidden: torch.Tensor, gradient: torch.Tensor, keywords: dict[str, Any], names: list[str]
) -> dict[str, torch.Tensor]:
    """Move `gradient` (rows, T, hidden) back through the layer in place; sums of g g^T of the named linears."""
    sums: dict[str, torch.Tensor] = {}
    layer.requires_grad_(False)
    hooks = [layer.get_submodule(name).register_full_backward_hook(_output_hook(sums, name)) for name in names]
    for start in range(0, len(hidden), BATCH):
        rows = slice(start, start + BATCH)
        with torch.enable_grad():
            x = hidden[rows].float().requires_grad_()
            torch.autograd.backward(_call(layer, x, keywords), gradient[rows])
        assert x.grad is not None
        gradient[rows] = x.grad
    for hook in hooks:
        hook.remove()
    return sums


def _output_hook(sums: dict[str, torch.Tensor], name: str) -> Any:
    def hook(_module: Any, _inputs: Any, gradients: tuple[torch.Tensor, ...]) -> None:
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        n = g.shape[1]
        if n > LARGEST_OUTPUT:
            sums.setdefault(name, torch.zeros(n)).add_(g.float().square().sum(0))
        else:  # in the gradients' own precision: this moment is damped by a tenth anyway
            sums.setdefault(name, torch.zeros(n, n)).add_(g.T @ g)

    return hook


def _save_outputs(scratch: Path, prefix: str, outputs: dict[str, torch.Tensor]) -> None:
    """In float16 at unit mean diagonal, beside that mean: gradients are far below what float16 can hold."""
    tensors: dict[str, torch.Tensor] = {}
    for name, moment in outputs.items():
        mean = (moment.diagonal() if moment.dim() == 2 else moment).mean().clamp(min=1e-30)
        tensors |= {name: (moment / mean).clamp(-60000, 60000).half(), f"{name}.mean": mean.reshape(1)}
    if tensors:
        save_file(tensors, scratch / f"{prefix}.outputs.safetensors")


def _load_outputs(scratch: Path, prefix: str, names: list[str]) -> dict[str, torch.Tensor]:
    if not names:
        return {}
    stored = load_file(scratch / f"{prefix}.outputs.safetensors")
    return {name: stored[name].float() * stored[f"{name}.mean"] for name in names}
