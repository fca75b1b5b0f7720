"""Compensated codes lose less at the layer's output than nearest ones, and refinement never adds to the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.recover.compensate import Compensation, compensate, damped, output_error
from rlkit.recover.quantize import Quantized, quantize_nearest
from rlkit.recover.recipe import Scheme

SCHEMES = [Scheme(2, 64), Scheme(4, 32), Scheme(8, 128), Scheme(4, 32, symmetric=True), Scheme(2, 32, symmetric=True)]
N, K = 48, 128
DAMPING = 0.01  # the gains below are those of a well-known moment


def layer(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (N, K) and the second moment (K, K) of correlated inputs, a few of them much larger than the rest."""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.randn(K, generator=rng).exp()
    x = torch.randn(400, 24, generator=rng) @ torch.randn(24, K, generator=rng) + torch.randn(400, K, generator=rng)
    x = x * sizes
    return torch.randn(N, K, generator=rng) * 0.05, x.T @ x / len(x)


def lost(weight: torch.Tensor, quantized: Quantized, moment: torch.Tensor) -> torch.Tensor:
    return output_error(weight - quantized.dequantize(), damped(moment, DAMPING))


def test_output_error_is_the_mean_squared_output() -> None:
    rng = torch.Generator().manual_seed(0)
    x, error = torch.randn(500, K, generator=rng), torch.randn(N, K, generator=rng)
    expected = (x @ error.T).square().mean(0)
    torch.testing.assert_close(output_error(error, x.T @ x / len(x)), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("rounds", "share"), [(0, 0.55), (1, 0.25), (4, 0.2)])
@pytest.mark.parametrize("seed", range(3))
def test_beats_nearest_codes(scheme: Scheme, rounds: int, share: float, seed: int) -> None:
    weight, moment = layer(seed)
    nearest = lost(weight, quantize_nearest(weight, scheme), moment)
    weighted = lost(weight, quantize_nearest(weight, scheme, moment.diagonal()), moment)
    made = lost(weight, compensate(weight, moment, scheme, Compensation(DAMPING, rounds)), moment)
    assert made.sum() < share * torch.minimum(nearest, weighted).sum()
    assert (made <= nearest).float().mean() > 0.95  # row by row it is a greedy method: no promise, but nearly always


@given(st.integers(0, 2**31), st.sampled_from(SCHEMES))
@settings(max_examples=10)
def test_refinement_rounds_never_add_loss(seed: int, scheme: Scheme) -> None:
    weight, moment = layer(seed)
    losses = [lost(weight, compensate(weight, moment, scheme, Compensation(DAMPING, r)), moment) for r in range(4)]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()
    assert losses[-1].sum() < losses[0].sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_parts_hold_what_the_format_allows(scheme: Scheme) -> None:
    weight, moment = layer(5)
    made = compensate(weight, moment, scheme)
    assert made.codes.shape == (N, K)
    assert made.codes.dtype == made.zeros.dtype == torch.uint8
    assert int(made.codes.max()) < 2**scheme.bits
    assert int(made.zeros.max()) < 2**scheme.bits
    assert not scheme.symmetric or bool((made.zeros == 2 ** (scheme.bits - 1)).all())
    assert torch.equal(made.scales.half().float(), made.scales)
    assert (made.scales > 0).all()


def test_a_refined_matrix_is_a_local_optimum() -> None:
    """No single code or scale can be changed for the better once refinement has come to rest."""
    weight, moment = layer(7)
    scheme = Scheme(2, 64)
    made = compensate(weight[:2], moment, scheme, Compensation(DAMPING, 40))
    least = lost(weight[:2], made, moment)
    for column, step in itertools.product(range(K), (-1, 1)):
        codes = made.codes.int()
        codes[:, column] = (codes[:, column] + step).clamp(0, 3)
        changed = Quantized(codes.to(torch.uint8), made.scales, made.zeros, scheme)
        assert (lost(weight[:2], changed, moment) >= least * (1 - 1e-4)).all()
    for group, factor in itertools.product(range(K // 64), (0.99, 1.01)):
        scales = made.scales.clone()
        scales[:, group] *= factor
        changed = Quantized(made.codes, scales, made.zeros, scheme)
        assert (lost(weight[:2], changed, moment) > least).all()


def test_uncorrelated_inputs_leave_little_to_gain() -> None:
    weight, _moment = layer(2)
    scheme = Scheme(4, 32)
    nearest = lost(weight, quantize_nearest(weight, scheme), torch.eye(K)).sum()
    made = lost(weight, compensate(weight, torch.eye(K), scheme), torch.eye(K)).sum()
    assert 0.8 * nearest < made <= nearest * 1.0001


@pytest.mark.parametrize("moment", ["no inputs", "dead inputs", "one direction"])
def test_degenerate_moments_still_give_a_usable_weight(moment: str) -> None:
    weight, full = layer(3)
    direction = torch.randn(K, 1, generator=torch.Generator().manual_seed(0))
    moments = {
        "no inputs": torch.zeros(K, K),
        "dead inputs": full
        * torch.tensor([0.0, 1.0]).repeat(K // 2)[:, None]
        * torch.tensor([0.0, 1.0]).repeat(K // 2),
        "one direction": direction @ direction.T,
    }
    made = compensate(weight, moments[moment], Scheme(4, 32)).dequantize()
    assert torch.isfinite(made).all()
    assert (weight - made).norm() < 0.5 * weight.norm()


def test_input_is_left_alone() -> None:
    weight, moment = layer(4)
    kept, kept_moment = weight.clone(), moment.clone()
    compensate(weight, moment, Scheme(4, 32))
    assert torch.equal(weight, kept)
    assert torch.equal(moment, kept_moment)


def test_the_order_of_visits_pays_and_leaves_codes_in_place() -> None:
    """Inputs that carry most come last in place, where plain GPTQ has nothing left to make up for their errors."""
    weight, moment = layer(0)
    rising = moment.diagonal().argsort()
    moment = moment[rising][:, rising]
    ordered, plain = (
        lost(weight, compensate(weight, moment, Scheme(2, 32), Compensation(DAMPING, 0, visits)), moment).sum()
        for visits in (True, False)
    )
    assert ordered < 0.8 * plain


def test_the_order_of_inputs_inside_groups_does_not_matter() -> None:
    weight, moment = layer(6)
    shuffled = torch.cat(
        [torch.randperm(32, generator=torch.Generator().manual_seed(g)) + 32 * g for g in (2, 0, 3, 1)]
    )
    made = compensate(weight, moment, Scheme(4, 32), Compensation(rounds=0))
    again = compensate(weight[:, shuffled], moment[shuffled][:, shuffled], Scheme(4, 32), Compensation(rounds=0))
    same = (again.codes == made.codes[:, shuffled]).float().mean()
    assert same > 0.99  # but for sums taken in another order


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_zeros_stay_zeros(rounds: int, symmetric: bool) -> None:
    weight, moment = layer(8)
    weight[3:20, 32:64] = 0
    weight[7] = 0
    made = compensate(weight, moment, Scheme(2, 32, symmetric), Compensation(rounds=rounds)).dequantize()
    assert torch.isfinite(made).all()
    assert not made[weight == 0].any()
    assert made[8, 64:].any()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w, h: (w.fill_(float("nan")), h), "weights are NaN or infinite"),
        (lambda w, h: (w, h.index_fill(0, torch.tensor([1]), float("nan"))), "moment has NaN or infinite"),
        (lambda w, h: (w, h[:64, :64]), r"moment has shape \(64, 64\) where the weight has 128"),
        (lambda w, h: (w[:, :100], h[:100, :100]), r"\(48, 100\) does not divide into groups of 32"),
        (lambda w, h: (w, h - 1e3 * torch.eye(K)), "not positive definite"),
    ],
)
def test_bad_input_is_told_in_one_line(damage: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compensate(*damage(*layer(0)), Scheme(4, 32))
    assert "\n" not in str(caught.value)
