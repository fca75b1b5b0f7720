"""Adapters compute W x + B A x, scales learn as by autograd, factors lie on the 8-bit grid and are PEFT's on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

import tiny
from rlkit.recover import packing
from rlkit.recover.adapter import AdaptedLinear, load_adapters, random_low_rank, save_adapters, snap
from rlkit.recover.correct import LowRank
from rlkit.recover.model import linears, load_model
from rlkit.recover.quantize import Quantized, quantize_nearest, snap_scales
from rlkit.recover.recipe import Scheme
from rlkit.recover.source import resolve

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 12))


def low_rank(n: int, k: int, rank: int, seed: int = 0, size: float = 0.1) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    return LowRank(size * torch.randn(rank, k, generator=rng), size * torch.randn(n, rank, generator=rng))


@pytest.mark.parametrize("bias", [False, True])
def test_forward_adds_the_branch(bias: bool) -> None:
    torch.manual_seed(0)
    linear, branch, x = torch.nn.Linear(64, 40, bias=bias), low_rank(40, 64, 8), torch.randn(3, 5, 64)
    adapted = AdaptedLinear(linear, linear.weight.detach(), branch, torch.float32)
    expected = torch.nn.functional.linear(x, linear.weight + branch.product(), linear.bias)
    torch.testing.assert_close(adapted(x), expected, rtol=1e-5, atol=1e-5)


def test_only_the_factors_are_trained() -> None:
    linear, branch = torch.nn.Linear(64, 40, bias=False), low_rank(40, 64, 8)
    adapted = AdaptedLinear(linear, linear.weight.detach(), branch, torch.bfloat16)
    assert adapted.weight.dtype == torch.bfloat16
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    adapted.lora_a.data += 1
    assert torch.equal(adapted.low_rank().b, branch.b)
    assert torch.equal(adapted.low_rank().a, branch.a + 1)  # and the given factors were copied


SCHEMES = [Scheme(2, 32), Scheme(4, 64, symmetric=True), Scheme(8, 32), Scheme(8, 64, symmetric=True)]


def scaled(scheme: Scheme, *, rank: int = 0, bias: bool = False) -> tuple[AdaptedLinear, torch.nn.Linear, Quantized]:
    """A layer (40, 128) whose scales have moved from where they began, the float one it came from, and its start."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 40, bias=bias)
    linear.weight.data[:, :32] = linear.weight[:, :32].abs()  # 8 bits then need levels from 0 to 255
    begun = quantize_nearest(linear.weight, scheme)
    branch = low_rank(40, 128, rank) if rank else None
    adapted = AdaptedLinear(linear, begun, branch, torch.float32, train_scales=True)
    adapted.log_scales.data.copy_(0.1 * torch.randn(begun.scales.shape))
    return adapted, linear, begun


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
def test_trained_scales_act_and_learn_like_autograds(scheme: Scheme, bias: bool) -> None:
    adapted, linear, begun = scaled(scheme, rank=4, bias=bias)
    branch = adapted.low_rank()
    assert branch is not None
    factors = (adapted.log_scales.detach().double().exp() * begun.scales.double()).requires_grad_()
    levels = begun.codes.view(40, -1, scheme.group).double() - begun.zeros[..., None].double()
    x, seen = torch.randn(3, 5, 128), torch.randn(3, 5, 40)
    here, there = x.clone().requires_grad_(), x.double().requires_grad_()
    weight = (levels * factors[..., None]).flatten(1) + branch.product().double()
    expected = torch.nn.functional.linear(there, weight, None if linear.bias is None else linear.bias.double())
    (expected * seen).sum().backward()
    found = adapted(here)
    (found * seen).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert factors.grad is not None and adapted.log_scales.grad is not None and here.grad is not None
    torch.testing.assert_close(here.grad.double(), there.grad, rtol=1e-5, atol=1e-5)
    by_log = factors.grad * factors.detach()
    torch.testing.assert_close(adapted.log_scales.grad.double(), by_log, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_untouched_scales_give_back_what_was_quantized(scheme: Scheme) -> None:
    adapted, _, begun = scaled(scheme)
    adapted.log_scales.data.zero_()
    state = adapted.state()
    assert isinstance(state, Quantized)
    assert torch.equal(state.dequantize(), begun.dequantize())
    x = torch.randn(7, 128)
    torch.testing.assert_close(adapted(x), torch.nn.functional.linear(x, begun.dequantize()))


def test_trained_scales_are_stored_as_float16_values() -> None:
    adapted, _, begun = scaled(Scheme(2, 32))
    state = adapted.state()
    assert isinstance(state, Quantized)
    assert torch.equal(snap_scales(state.scales), state.scales)
    torch.testing.assert_close(state.scales, begun.scales * adapted.log_scales.detach().exp(), rtol=1e-3, atol=0)
    assert not torch.equal(state.scales, begun.scales)
    assert torch.equal(state.codes, begun.codes) and torch.equal(state.zeros, begun.zeros)


def test_scales_train_under_autocast() -> None:
    exact, fast = (scaled(Scheme(2, 32), rank=4)[0] for _ in range(2))
    x = torch.randn(64, 128)
    exact(x).square().mean().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fast(x)
    assert found.dtype == torch.bfloat16
    found.float().square().mean().backward()
    for name, parameter in fast.named_parameters():
        expected = dict(exact.named_parameters())[name].grad
        assert parameter.grad is not None and expected is not None
        assert parameter.grad.dtype == torch.float32
        assert float((parameter.grad - expected).norm() / expected.norm()) < 0.02, name


def test_only_x_levels_and_scales_wait_for_the_backward_pass() -> None:
    adapted, _, _ = scaled(Scheme(2, 32))
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        adapted(torch.randn(7, 128, requires_grad=True))
    assert (40, 128) not in kept
    assert {(7, 128), (40, 4, 32), (40, 4)} == {tuple(shape) for shape in kept}


def test_what_trains_is_what_was_asked_for() -> None:
    linear, branch = torch.nn.Linear(64, 40, bias=False), low_rank(40, 64, 8)
    quantized = quantize_nearest(linear.weight, Scheme(2, 64))
    frozen = AdaptedLinear(linear, quantized, branch, torch.float32)
    both = AdaptedLinear(linear, quantized, branch, torch.float32, train_scales=True)
    neither = AdaptedLinear(linear, quantized, None, torch.float32)
    trained = [{name for name, p in layer.named_parameters() if p.requires_grad} for layer in (frozen, both, neither)]
    assert trained == [{"lora_a", "lora_b"}, {"lora_a", "lora_b", "log_scales"}, set()]
    assert frozen.state() is quantized
    assert neither.low_rank() is None
    assert AdaptedLinear(linear, linear.weight.detach(), branch, torch.float32).state() is not quantized


def test_a_float_matrix_has_no_scales() -> None:
    linear = torch.nn.Linear(64, 40)
    with pytest.raises(ValueError, match="no scales to train; quantize it first"):
        AdaptedLinear(linear, linear.weight.detach(), None, torch.float32, train_scales=True)


def test_scaling_changes_what_a_step_does_and_nothing_else() -> None:
    linear, branch, x = torch.nn.Linear(64, 40), low_rank(40, 64, 8), torch.randn(5, 64)
    plain, doubled = (
        AdaptedLinear(linear, linear.weight.detach(), branch, torch.float32, scaling=scaling) for scaling in (1.0, 2.0)
    )
    torch.testing.assert_close(plain(x), doubled(x))
    for layer in (plain, doubled):
        layer(x).sum().backward()
        layer.lora_b.data -= 0.1
        found = layer.low_rank()
        assert found is not None
        expected = torch.nn.functional.linear(x, linear.weight + found.product(), linear.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.b, branch.b - 0.1 * layer.scaling)
    assert plain.lora_b.grad is not None and doubled.lora_b.grad is not None
    torch.testing.assert_close(doubled.lora_b.grad, 2 * plain.lora_b.grad)


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan")])
def test_scaling_must_be_positive(scaling: float) -> None:
    linear = torch.nn.Linear(64, 40)
    with pytest.raises(ValueError, match="alpha / rank"):
        AdaptedLinear(linear, linear.weight.detach(), low_rank(40, 64, 8), torch.float32, scaling=scaling)


def test_random_factors_are_peft_s_and_change_nothing_yet() -> None:
    start = random_low_rank(40, 400, 32, seed=3)
    assert not start.product().any()
    assert start.a.shape == (32, 400) and start.b.shape == (40, 32)
    assert 0.98 / 20 < float(start.a.abs().max()) <= 1 / 20  # uniform within 1/sqrt(K)
    assert float(start.a.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert torch.equal(random_low_rank(40, 400, 32, seed=3).a, start.a)
    assert not torch.equal(random_low_rank(40, 400, 32, seed=4).a, start.a)
    with pytest.raises(ValueError, match="rank = 0"):
        random_low_rank(40, 400, 0, seed=3)


@pytest.mark.parametrize(("rank", "on_grid"), [(32, True), (64, True), (12, False)])
def test_snapped_factors_lie_on_the_grid(rank: int, on_grid: bool) -> None:
    factors = low_rank(48, 96, rank)
    snapped = snap(factors)
    again = snap(snapped)
    assert torch.equal(again.a, snapped.a)
    assert torch.equal(again.b, snapped.b)
    parts = packing.snap8(snapped.a.numpy())
    np.testing.assert_array_equal(parts.dequantized, snapped.a.numpy())
    assert not torch.equal(snapped.a, factors.a)
    assert torch.equal(snapped.b, factors.b) is not on_grid
    assert float((snapped.product() - factors.product()).norm() / factors.product().norm()) < 0.02


def test_round_trip_and_nothing_where_nothing_is(tmp_path: Path) -> None:
    kept = {"model.layers.0.mlp.up_proj": low_rank(256, 128, 32), "model.layers.1.mlp.up_proj": low_rank(256, 128, 8)}
    save_adapters(tmp_path / "adapter", kept, "some model")
    found = load_adapters(tmp_path / "adapter")
    assert found.keys() == kept.keys()
    for name, factors in kept.items():
        assert torch.equal(found[name].a, factors.a)
        assert torch.equal(found[name].b, factors.b)
    assert load_adapters(tmp_path / "elsewhere") == {}


CHOICES = {  # module name -> rank
    "gate and up": {f"model.layers.{i}.mlp.{part}_proj": 32 for i in range(12) for part in ("gate", "up")},
    "some layers": {"model.layers.1.mlp.down_proj": 16, "model.layers.10.self_attn.q_proj": 16},
    "several ranks": {f"model.layers.{i}.mlp.up_proj": (8 if i == 1 else 4 if i == 11 else 16) for i in range(12)},
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Twelve layers, so that `layers.1` is a prefix of other names."""
    return load_model(resolve(tiny.llama(tmp_path_factory.mktemp("models") / "hf", num_hidden_layers=12)))[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5 the old way
@pytest.mark.parametrize("choice", CHOICES)
def test_peft_reads_the_same_model(deep: Any, choice: str, tmp_path: Path) -> None:
    merged, kept = copy.deepcopy(deep), {}
    for seed, (name, rank) in enumerate(CHOICES[choice].items()):
        weight = linears(merged)[name].weight
        kept[name] = snap(low_rank(*weight.shape, rank, seed))
        weight += kept[name].product()
    save_adapters(tmp_path / "adapter", kept, "some model")
    theirs = PeftModel.from_pretrained(copy.deepcopy(deep), tmp_path / "adapter").eval()
    expected, plain = tiny.logits(merged, IDS), tiny.logits(deep, IDS)
    assert np.abs(expected - plain).max() > 0.05 * np.abs(plain).max()
    np.testing.assert_allclose(tiny.logits(theirs, IDS), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    adapted = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert {name.removeprefix("base_model.model.") for name in adapted} == set(kept)
