"""Equalization leaves what a model computes alone, takes the moments along, and makes coarse grids lose less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlkit.recover.compensate import output_error
from rlkit.recover.equalize import equalize
from rlkit.recover.model import linears
from rlkit.recover.quantize import quantize_nearest
from rlkit.recover.recipe import Scheme

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 100,
    "initializer_range": 0.1,
}
GQA = {"num_key_value_heads": 2}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama gqa": (LlamaForCausalLM, LlamaConfig, GQA),
    "llama with biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2 gqa": (Qwen2ForCausalLM, Qwen2Config, GQA),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
}
FIRST_NORM = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
SECOND_NORM = {"mlp.gate_proj", "mlp.up_proj"}
SCALED = {  # which linears have their inputs scaled: those behind a norm only where that norm can take the division
    "llama": FIRST_NORM | SECOND_NORM | {"self_attn.o_proj", "mlp.down_proj"},
    "llama gqa": FIRST_NORM | SECOND_NORM | {"mlp.down_proj"},
    "llama with biases": FIRST_NORM | SECOND_NORM | {"self_attn.o_proj", "mlp.down_proj"},
    "qwen2": FIRST_NORM | SECOND_NORM | {"self_attn.o_proj", "mlp.down_proj"},
    "qwen2 gqa": FIRST_NORM | SECOND_NORM | {"mlp.down_proj"},
    "qwen3": FIRST_NORM | SECOND_NORM | {"self_attn.o_proj", "mlp.down_proj"},
    "gemma": {"self_attn.o_proj", "mlp.down_proj"},  # its norms multiply by 1 + weight
    "olmo2": {"self_attn.o_proj", "mlp.down_proj"},  # its norms come after attention and MLP
}
every_model = pytest.mark.parametrize("kind", MODELS)


def made(kind: str) -> Any:
    """A model with norms and biases unlike their initial values, and channels of very different sizes."""
    build, config, changes = MODELS[kind]
    torch.manual_seed(0)
    model = build(config(**{**SHAPE, **changes})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn_like(parameter).exp())
        elif name.endswith("bias"):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        elif "up_proj" in name or "v_proj" in name:
            parameter.mul_(torch.randn(len(parameter), 1).exp())
    return model


def ids() -> torch.Tensor:
    return torch.randint(0, 100, (4, 24), generator=torch.Generator().manual_seed(1))


def moments(model: Any) -> dict[str, torch.Tensor]:
    """H of every linear in layer 0 by name inside it; one tensor for linears fed the same input."""
    found: dict[str, torch.Tensor] = {}
    by_input: dict[int, torch.Tensor] = {}
    layer, keep, hooks = model.model.layers[0], [], []
    for name, linear in linears(layer).items():

        def hook(_module: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            keep.append(args[0])  # alive, so that its id stays its own
            x = args[0].flatten(0, 1)
            found[name] = by_input.setdefault(id(args[0]), x.T @ x / len(x))

        hooks.append(linear.register_forward_pre_hook(hook))
    model(ids())
    for handle in hooks:
        handle.remove()
    return found


def schemes(model: Any, bits: int = 2) -> dict[str, Scheme]:
    return dict.fromkeys(linears(model.model.layers[0]), Scheme(bits, 32))


@every_model
def test_the_model_computes_the_same(kind: str) -> None:
    model = made(kind)
    expected, before = model(ids()).logits, copy.deepcopy(model.model.layers[0])
    inputs = moments(model)
    equalize(model.model.layers[0], inputs, {}, schemes(model))
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    old = linears(before)
    changed = {
        name
        for name, linear in linears(model.model.layers[0]).items()
        if (linear.weight / old[name].weight)[0].std() > 0.01  # along the inputs; outputs' scales are constant there
    }
    assert changed == SCALED[kind]
    for name, moment in moments(model).items():
        torch.testing.assert_close(inputs[name], moment, rtol=1e-3, atol=1e-4 * float(moment.diagonal().mean()))


@every_model
def test_coarse_grids_lose_less(kind: str) -> None:
    model = made(kind)
    layer, inputs = model.model.layers[0], moments(model)

    def lost(name: str) -> float:
        weight = layer.get_submodule(name).weight
        rounded = quantize_nearest(weight, Scheme(2, 32), inputs[name].diagonal()).dequantize()
        return float(output_error(weight - rounded, inputs[name]).sum())

    for shared in (FIRST_NORM, SECOND_NORM, {"self_attn.o_proj"}, {"mlp.down_proj"}):
        before = sum(lost(name) for name in shared)
        equalize(layer, inputs, {}, dict.fromkeys(shared, Scheme(2, 32)))
        after = sum(lost(name) for name in shared)
        assert after < before if shared <= SCALED[kind] else after == before


def gradients(model: Any, name: str) -> torch.Tensor:
    """G of a linear of layer 0 for a fixed direction at the logits."""
    found = []
    handle = (
        model.model.layers[0]
        .get_submodule(name)
        .register_full_backward_hook(lambda _module, _into, out: found.append(out[0].flatten(0, 1)))
    )
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(ids()).requires_grad_()
        direction = torch.randn(100, generator=torch.Generator().manual_seed(2))
        (model(inputs_embeds=embedded).logits @ direction).square().sum().backward()
    handle.remove()
    return found[0].T @ found[0] / len(found[0])


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.v_proj", "mlp.gate_proj"])
def test_output_moments_follow(name: str, diagonal: bool) -> None:
    model = made("qwen2")
    first = gradients(model, name)
    outputs = {name: first.diagonal().clone() if diagonal else first.clone()}
    equalize(model.model.layers[0], moments(model), outputs, schemes(model))
    second = gradients(model, name)
    expected = second.diagonal() if diagonal else second
    torch.testing.assert_close(outputs[name], expected, rtol=1e-2, atol=1e-3 * float(second.diagonal().mean()))
    assert torch.allclose(first, second, rtol=1e-2) == (name == "mlp.gate_proj")


def test_moments_change_in_place_and_once() -> None:
    model = made("llama")
    inputs = moments(model)
    shared = inputs["mlp.gate_proj"]
    assert inputs["mlp.up_proj"] is shared
    before = shared.clone()
    equalize(model.model.layers[0], inputs, {}, schemes(model))
    assert inputs["mlp.up_proj"] is inputs["mlp.gate_proj"] is shared
    ratio = (before / shared).diagonal()
    torch.testing.assert_close(before / shared, ratio.sqrt()[:, None] * ratio.sqrt(), rtol=1e-2, atol=0)
    assert ratio.std() > 0.1


def test_only_what_the_recipe_names_decides() -> None:
    model = made("llama")
    layer, inputs = model.model.layers[0], moments(model)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    expected = model(ids()).logits
    equalize(layer, inputs, {}, {"mlp.gate_proj": Scheme(2, 64)})
    changed = {name for name, parameter in layer.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"}
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    kept = copy.deepcopy(layer)
    equalize(layer, inputs, {}, {})
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), kept.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["dead inputs", "one live input", "no inputs", "zero weights"])
def test_degenerate_layers_still_compute_the_same(damage: str) -> None:
    model = made("llama")
    layer, inputs = model.model.layers[0], moments(model)
    if damage == "zero weights":
        for linear in linears(layer).values():
            linear.weight.zero_()
    else:
        live = {"dead inputs": 3, "one live input": 10**6, "no inputs": 10**9}[damage]
        for moment in {id(moment): moment for moment in inputs.values()}.values():
            mask = (torch.arange(len(moment)) % live == 0).float() * (damage != "no inputs")
            moment.mul_(mask[:, None]).mul_(mask)
    expected = model(ids()).logits
    equalize(layer, inputs, {}, schemes(model))
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_bad_input_is_told_in_one_line() -> None:
    model = made("llama")
    layer, inputs = model.model.layers[0], moments(model)
    poisoned = {**inputs, "mlp.gate_proj": inputs["mlp.gate_proj"] * float("nan")}
    with pytest.raises(ValueError, match=r"^the input moment has NaN"):
        equalize(layer, poisoned, {}, schemes(model))
    with pytest.raises(ValueError, match=r"^no input moment was gathered for mlp.down_proj; "):
        equalize(layer, {}, {}, {"mlp.down_proj": Scheme(2, 32)})
    with pytest.raises(ValueError, match="does not divide into groups of 128"):
        equalize(layer, inputs, {}, {"mlp.down_proj": Scheme(2, 128)})
