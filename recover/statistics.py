"""Second moments of each linear's input and of the loss gradient at its output: what recovery has to know of a model.

Both come from one pass over synthetic sequences. With x the input of a linear and g the gradient of the negative
log-likelihood with respect to its output, taken for labels drawn from the model's own distribution,

    inputs   H = E[x x^T]  (K, K)
    outputs  G = E[g g^T]  (N, N)

so that H (x) G is the Kronecker-factored Fisher information of the weight (K-FAC, Martens & Grosse 2015, section 3): a
weight error E raises the KL divergence to the original model by about trace(G E H E^T) / 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover.model import autocast, linears
from rlkit.recover.progress import Progress, Tell, silent

LARGEST_OUTPUT = 4096  # above this many outputs only G's diagonal is kept: (N, N) would not fit for every layer
BATCH = 8


@dataclass(frozen=True, slots=True)
class Statistics:
    """Second moments by module name: inputs (K, K); outputs (N, N), or (N,) where only the diagonal is kept."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    tokens: int


def collect(
    model: Any,
    ids: NDArray[np.int64],
    outputs_of: Iterable[str],
    *,
    output_rows: int | None = None,
    seed: int = 0,
    tell: Tell = silent,
) -> Statistics:
    """Gather the moments of every linear over `ids` (sequences, length), output moments for `outputs_of` only.

    Output moments need a backward pass and are damped more, so the first `output_rows` sequences may do for them.
    """
    modules, wanted = linears(model), set(outputs_of)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    leaders = _input_leaders(modules)
    leading = set(leaders.values()) - {"lm_head"}  # whose product is not needed, only its input
    handles = [modules[name].register_forward_pre_hook(_input_hook(inputs, name)) for name in leading]
    handles += [modules[name].register_full_backward_hook(_output_hook(outputs, name)) for name in wanted]
    rng = torch.Generator().manual_seed(seed)
    rows = torch.from_numpy(ids)
    counted = len(rows) if output_rows is None else min(output_rows, len(rows))
    head = _input_hook(inputs, "lm_head")
    handles.append(
        model.model.register_forward_hook(lambda _module, _inputs, out: head(None, (out.last_hidden_state,)))
    )
    try:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            if wanted and start < counted:
                _forward_backward(model, batch[: counted - start], rng)
                batch = batch[counted - start :]
            if len(batch):
                _forward(model, batch)
            tell(Progress("statistics", min(start + BATCH, len(rows)), len(rows), f"{rows.shape[1]} tokens each"))
    finally:
        for handle in handles:
            handle.remove()
    tokens, output_tokens = rows.numel(), counted * rows.shape[1]
    shared = {leader: inputs[leader] / tokens for leader in set(leaders.values())}
    return Statistics(
        {name: shared[leader] for name, leader in leaders.items()},
        {name: moment / output_tokens for name, moment in outputs.items()},
        tokens,
    )


def _input_leaders(modules: dict[str, torch.nn.Linear]) -> dict[str, str]:
    """Which linear's input stands for each one's: q, k, v share theirs, and so do gate and up."""
    heads = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    leaders = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        leader = f"{parent}.{heads[last]}" if last in heads else name
        leaders[name] = leader if leader in modules else name
    return leaders


def _input_hook(moments: dict[str, torch.Tensor], name: str) -> Any:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        moments.setdefault(name, torch.zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)

    return hook


def _output_hook(moments: dict[str, torch.Tensor], name: str) -> Any:
    def hook(_module: Any, _inputs: Any, gradients: tuple[torch.Tensor, ...]) -> None:
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        n = g.shape[1]
        if n > LARGEST_OUTPUT:
            moments.setdefault(name, torch.zeros(n)).add_(g.float().square().sum(0))
        else:  # in the gradients' own precision: this moment is damped by a tenth anyway
            moments.setdefault(name, torch.zeros(n, n)).add_(g.T @ g)

    return hook


@torch.no_grad()
def _forward(model: Any, batch: torch.Tensor) -> None:
    """One batch (B, T) through all layers; the hooks do the rest."""
    with autocast():
        model.model(input_ids=batch, use_cache=False)


def _forward_backward(model: Any, batch: torch.Tensor, rng: torch.Generator) -> None:
    """One batch through the model and back from -log p(label), labels drawn from the model itself."""
    with torch.enable_grad(), autocast():
        embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        with torch.no_grad():
            weight = model.lm_head.weight
            logits = torch.nn.functional.linear(hidden.detach(), weight)
            gradient = _sampled_gradient(logits.flatten(0, 1), rng) @ weight.to(logits.dtype)
        hidden.backward(gradient.view_as(hidden).to(hidden.dtype))


def _sampled_gradient(logits: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """d(-log p(label)) / d logits = p - onehot(label), (tokens, V), for labels sampled from p."""
    probabilities = torch.softmax(logits.float(), dim=-1)
    labels = draw(probabilities, rng)
    probabilities[torch.arange(len(labels)), labels] -= 1
    return probabilities.to(logits.dtype)


def draw(probabilities: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """One sample per row of (rows, V) by inverting the cumulative distribution; ten times faster than multinomial."""
    cumulative = probabilities.cumsum(-1)
    threshold = torch.rand(len(cumulative), 1, generator=rng) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold).clamp_(max=cumulative.shape[1] - 1)[:, 0]
