"""A model in memory: damage is named before anything is done to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from rlkit.recover.model import check_weights, linears, load_model
from rlkit.recover.source import resolve


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return load_model(resolve(tiny.llama(tmp_path / "hf", tied=False)))[0]


def test_a_sound_model_passes(model: Any) -> None:
    check_weights(model, linears(model))
    check_weights(model.half(), linears(model))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj", "model.embed_tokens", "model.norm", "lm_head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused_wherever_it_is(model: Any, name: str, value: float) -> None:
    model.get_submodule(name).weight.data[-1] = value
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=f"^{name} holds NaN or infinity"):
            check_weights(model.to(dtype), [])


def test_zeros_are_refused_only_where_they_would_be_quantized(model: Any) -> None:
    name = "model.layers.0.self_attn.o_proj"
    model.get_submodule(name).weight.data.zero_()
    check_weights(model, linears(model).keys() - {name})
    with pytest.raises(ValueError, match=f"^{name} holds nothing but zeros.*--degraded"):
        check_weights(model, linears(model))


def test_a_tied_lm_head_is_checked_under_its_own_name(tmp_path: Path) -> None:
    tied = load_model(resolve(tiny.llama(tmp_path / "tied")))[0]
    tied.lm_head.weight.data.zero_()
    check_weights(tied, ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match=r"^lm_head holds nothing but zeros"):
        check_weights(tied, ["lm_head"])
