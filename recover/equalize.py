"""Scaling a layer's inputs by what they carry before quantization, as in AWQ, without changing what it computes.

Lin et al. 2023 (AWQ, section 3.2): inputs that carry much deserve finer steps. With a scale s (K,) per input, W' = W
diag(s) gets x' = x / s, and rounding W' costs input k only 1 / s_k of what it did. The division is folded into the
operation before: a norm's weight, or the rows of the linear whose outputs these inputs are. Here

    s = rms(x)^alpha, geometric mean 1;  alpha on a grid 0 .. 1, chosen by the least output error trace(E H E^T)

over the quantized matrices that share the input, with the grid search weighted by H's diagonal as quantizer. What is
folded where: norm -> q, k, v; norm -> gate, up; up -> down; v -> o where every head has its own values. A layer whose
parts are not these, or whose norm does not scale with its weight, keeps the folds that are safe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlkit.recover.compensate import checked_moment, output_error
from rlkit.recover.quantize import checked, quantize_nearest
from rlkit.recover.recipe import Scheme

ALPHAS = tuple(step / 10 for step in range(11))
WIDEST = 1e3  # a scale stays within this factor of the others: an input seen as dead may live on other text
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
PARTS = {  # what a layer and its two halves may be made of for their folds to be safe
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


@dataclass(frozen=True, slots=True)
class Fold:
    """Linears that share an input, and the norm or linear that makes it."""

    before: str
    after: tuple[str, ...]


@torch.no_grad()
def equalize(
    layer: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
    schemes: dict[str, Scheme],
) -> None:
    """Rescale the linears of `layer` that `schemes` names; weights, norms and moments change in place.

    Args:
        inputs: H (K, K) by name inside the layer, one tensor where the input is shared: D^-1 H D^-1 afterwards.
        outputs: G (N, N), or (N,) for its diagonal, by name: D G D for a linear whose outputs were divided by D.

    Raises ValueError for moments or weights that are not finite or do not fit.
    """
    for fold in _folds(layer):
        chosen = [name for name in fold.after if name in schemes]
        if not chosen:
            continue
        scale = _best_scale(layer, inputs, schemes, chosen)
        if scale is None or not _divide(layer.get_submodule(fold.before), scale):
            continue
        for name in fold.after:
            _weight(layer, name).mul_(scale)
        for moment in {id(inputs[name]): inputs[name] for name in fold.after if name in inputs}.values():
            moment.div_(scale[:, None]).div_(scale)
        if fold.before in outputs:
            gradient = outputs[fold.before]
            gradient.mul_(scale.square() if gradient.dim() == 1 else scale[:, None] * scale)


def _folds(layer: torch.nn.Module) -> Iterator[Fold]:
    """What can be folded where in this layer."""
    children = {
        part: {name for name, _ in layer.get_submodule(part).named_children()}
        for part in PARTS
        if part == "" or hasattr(layer, part)
    }
    safe = {part: names <= PARTS[part] for part, names in children.items()}
    attention = safe.get("self_attn", False) and children["self_attn"] >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    mlp = safe.get("mlp", False) and children["mlp"] >= {"gate_proj", "up_proj", "down_proj"}
    whole = safe[""] and children[""] == PARTS[""]  # a norm after attention feeds the MLP only if there is no other
    if attention and whole:
        yield Fold("input_layernorm", ATTENTION)
    if attention and _weight(layer, "self_attn.v_proj").shape[0] == _weight(layer, "self_attn.o_proj").shape[1]:
        yield Fold("self_attn.v_proj", ("self_attn.o_proj",))
    if mlp and whole:
        yield Fold("post_attention_layernorm", MLP)
    if mlp:
        yield Fold("mlp.up_proj", ("mlp.down_proj",))


def _weight(layer: torch.nn.Module, name: str) -> torch.Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _best_scale(
    layer: torch.nn.Module, inputs: dict[str, torch.Tensor], schemes: dict[str, Scheme], names: list[str]
) -> torch.Tensor | None:
    """The scale (K,) with the least output error over the matrices `names`; None if leaving them alone is best."""
    absent = [name for name in names if name not in inputs]
    if absent:
        raise ValueError(f"no input moment was gathered for {absent[0]}; gather one or leave it out of the recipe")
    weights = {name: checked(_weight(layer, name), schemes[name]) for name in names}
    moments = {name: checked_moment(inputs[name], weights[name].shape[1]) for name in names}
    power = torch.stack([moments[name].diagonal() for name in names]).mean(0).clamp(min=0)  # (K,)
    best, least = None, torch.inf
    for alpha in ALPHAS:
        scale = _scale(power, alpha)
        error = 0.0
        for name in names:
            moment = moments[name] / scale[:, None] / scale
            scaled = weights[name] * scale
            rounded = quantize_nearest(scaled, schemes[name], moment.diagonal()).dequantize()
            error += float(output_error(scaled - rounded, moment).sum())
        if error < least:
            best, least = (None if alpha == 0 else scale), error
    return best


def _scale(power: torch.Tensor, alpha: float) -> torch.Tensor:
    """rms^alpha with geometric mean 1; ones where no input carries anything."""
    if not power.any():
        return torch.ones_like(power)
    root = power.sqrt().clamp(min=float(power.max()) ** 0.5 / WIDEST)
    logs = alpha * root.log()
    return (logs - logs.mean()).exp()


def _divide(module: torch.nn.Module, scale: torch.Tensor) -> bool:
    """Divide what `module` gives by `scale`; False, and nothing changed, if its weight does not scale its output."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, torch.Tensor)
    if isinstance(module, torch.nn.Linear):
        weight.div_(scale[:, None])
    else:
        kept, probe = weight.clone(), torch.linspace(-1, 1, len(scale))[None]
        shift = 0 if bias is None else bias
        expected = (module(probe) - shift) / scale
        weight.div_(scale)
        if not torch.allclose(module(probe) - shift, expected, rtol=1e-4, atol=1e-6):
            weight.copy_(kept)  # such as (1 + weight) norms
            return False
    if isinstance(bias, torch.Tensor):
        bias.div_(scale)
    return True
