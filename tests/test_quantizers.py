"""Every quantizer of the table in every combination of bits, group and symmetry keeps what the format promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.recover import recipe
from rlkit.recover.compensate import output_error
from rlkit.recover.quantize import Quantized
from rlkit.recover.quantizers import QUANTIZERS, Quantizer, find
from rlkit.recover.recipe import Scheme

SCHEMES = [Scheme(b, g, symmetric) for b in (2, 4, 8) for g in (32, 64, 128) for symmetric in (False, True)]
SHAPES = {
    "bell": lambda w: w,
    "one-sided": lambda w: w.abs() + 0.1,
    "heavy-tailed": lambda w: w**3,
    "constant": lambda w: 0 * w - 0.7,
    "tiny": lambda w: w * 1e-6,
}
N, K = 6, 256
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS.keys())


def layer(seed: int, shape: str = "bell", n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (n, K) and the moment (K, K) of correlated inputs of different sizes."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 24, generator=rng) @ torch.randn(24, K, generator=rng) + torch.randn(400, K, generator=rng)
    x = x * torch.randn(K, generator=rng).exp()
    return SHAPES[shape](torch.randn(n, K, generator=rng)), x.T @ x / len(x)


def relative(weight: torch.Tensor, quantized: Quantized, moment: torch.Tensor) -> float:
    lost = output_error(weight - quantized.dequantize(), moment).sum()
    return float(lost / output_error(weight, moment).sum())


@every_quantizer
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(sorted(SHAPES)))
@settings(max_examples=3)
def test_parts_hold_what_the_format_allows(quantizer: Quantizer, scheme: Scheme, seed: int, shape: str) -> None:
    weight, moment = layer(seed, shape)
    kept, kept_moment = weight.clone(), moment.clone()
    made = quantizer.quantize(weight, moment, scheme)
    assert made.scheme == scheme
    assert made.codes.dtype == made.zeros.dtype == torch.uint8
    assert made.codes.shape == (N, K)
    assert made.scales.shape == made.zeros.shape == (N, K // scheme.group)
    assert int(made.codes.max()) < 2**scheme.bits
    assert int(made.zeros.max()) < 2**scheme.bits
    assert not scheme.symmetric or bool((made.zeros == 2 ** (scheme.bits - 1)).all())
    assert torch.equal(made.scales.half().float(), made.scales)
    assert torch.isfinite(made.dequantize()).all()
    assert (made.scales > 0).all()
    assert torch.equal(weight, kept)
    assert torch.equal(moment, kept_moment)


@every_quantizer
@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_lose_less(quantizer: Quantizer, symmetric: bool) -> None:
    weight, moment = layer(1, n=32)
    losses = [relative(weight, quantizer.quantize(weight, moment, Scheme(b, 64, symmetric)), moment) for b in (2, 4, 8)]
    assert losses[0] < 0.5
    assert losses[1] < 0.15 * losses[0]
    assert losses[2] < 0.05 * losses[1]


@pytest.mark.parametrize("scheme", [Scheme(2, 64), Scheme(4, 128), Scheme(4, 32, True)], ids=str)
def test_looking_at_more_loses_less(scheme: Scheme) -> None:
    weight, moment = layer(2, n=64)
    lost = {name: relative(weight, q.quantize(weight, moment, scheme), moment) for name, q in QUANTIZERS.items()}
    assert lost["gptq"] < lost["gptq-act-order"] < lost["awq"] < lost["search"] < lost["nearest"]


@every_quantizer
@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(4, 64, True)], ids=str)
def test_zeros_stay_zeros(quantizer: Quantizer, scheme: Scheme) -> None:
    weight, moment = layer(3)
    weight[2], weight[4, :64] = 0, 0
    for damaged in (weight, torch.zeros_like(weight)):
        made = quantizer.quantize(damaged, moment, scheme).dequantize()
        assert torch.isfinite(made).all()
        assert not made[2].any()
        assert not made[4, :64].any()
    assert torch.isfinite(quantizer.quantize(weight, torch.zeros_like(moment), scheme).dequantize()).all()


@every_quantizer
def test_half_precision_and_views_are_taken(quantizer: Quantizer) -> None:
    weight, moment = layer(4)
    plain = quantizer.quantize(weight.half().float(), moment, Scheme(4, 32))
    assert torch.equal(quantizer.quantize(weight.half(), moment, Scheme(4, 32)).codes, plain.codes)
    parameter = torch.nn.Parameter(weight.half().float().T.contiguous()).T
    assert torch.equal(quantizer.quantize(parameter, moment, Scheme(4, 32)).codes, plain.codes)


@every_quantizer
def test_bad_input_is_told_in_one_line(quantizer: Quantizer) -> None:
    weight, moment = layer(5)
    spoiled, poisoned = weight.clone(), moment.clone()
    spoiled[0, 0], poisoned[3, 4] = float("inf"), float("nan")
    cases = {
        "^1 of 1536 weights are NaN or infinite; .*$": (spoiled, moment, Scheme(2, 64)),
        "^the input moment has NaN .*$": (weight, poisoned, Scheme(2, 64)),
        "^the input moment has shape .*$": (weight, moment[:64, :64], Scheme(2, 64)),
        "does not divide into groups of 128": (weight[:, :96], moment[:96, :96], Scheme(2, 128)),
    }
    for message, case in cases.items():
        with pytest.raises(ValueError, match=message):
            quantizer.quantize(*case)


def test_the_table_is_found_by_name() -> None:
    assert tuple(QUANTIZERS) == recipe.QUANTIZERS
    assert all(find(name).name == name and quantizer.about for name, quantizer in QUANTIZERS.items())
    assert [name for name, quantizer in QUANTIZERS.items() if quantizer.equalize] == ["awq"]
    with pytest.raises(ValueError, match="no quantizer 'best'; use one of nearest, search, "):
        find("best")
