"""Adapters compute W x + B A x, lie on the exporter's 8-bit grid, and are PEFT's own on disk."""

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
from rlkit.recover.adapter import AdaptedLinear, load_adapters, save_adapters, snap
from rlkit.recover.correct import LowRank
from rlkit.recover.model import linears, load_model
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
