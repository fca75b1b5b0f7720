"""The closed-form correction is the optimum that a brute-force weighted SVD finds."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlkit.recover import correct as sides
from rlkit.recover.compensate import Compensation, compensate, damped
from rlkit.recover.correct import INPUT_DAMPING, OUTPUT_DAMPING, Moments, correct
from rlkit.recover.recipe import Scheme

N, K = 40, 64
METRICS = ("plain", "diagonal", "full")


def problem(metric: str, seed: int = 0, n: int = N, k: int = K) -> tuple[torch.Tensor, Moments]:
    """A weight error (n, k) and moments; the output moment tiny, as those of gradients are."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(300, k, generator=rng) @ torch.randn(k, k, generator=rng)
    g = 1e-5 * torch.randn(300, n, generator=rng) @ torch.randn(n, n, generator=rng)
    output = {"plain": None, "diagonal": g.square().mean(0), "full": g.T @ g / len(g)}[metric]
    return torch.randn(n, k, generator=rng), Moments(x.T @ x / len(x), output)


def metrics(moments: Moments, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped H (k, k) and G (n, n) in float64, as the module's docstrings define them."""
    h = moments.input.double()
    h = h + INPUT_DAMPING * h.diagonal().mean() * torch.eye(len(h))
    if moments.output is None:
        return h, torch.eye(n, dtype=torch.float64)
    g = moments.output.double()
    g = torch.diag(g) if g.dim() == 1 else g
    return h, g + OUTPUT_DAMPING * g.diagonal().mean() * torch.eye(len(g))


def root(moment: torch.Tensor) -> torch.Tensor:
    """The symmetric square root by eigenvalues: another root than the module's Cholesky factor."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def loss(error: torch.Tensor, product: torch.Tensor, moments: Moments) -> float:
    h, g = metrics(moments, len(error))
    left = (error - product).double()
    return float(torch.trace(g @ left @ h @ left.T))


def brute_force(error: torch.Tensor, moments: Moments, rank: int) -> torch.Tensor:
    h, g = (root(moment) for moment in metrics(moments, len(error)))
    u, s, v = torch.linalg.svd(g @ error.double() @ h, full_matrices=False)
    return torch.linalg.inv(g) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(h)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize(("n", "k"), [(N, K), (K, N), (N, N)])
def test_equals_the_weighted_svd(metric: str, rank: int, n: int, k: int) -> None:
    error, moments = problem(metric, 0, n, k)
    made = correct(error, moments, rank)
    assert made.a.shape == (rank, k)
    assert made.b.shape == (n, rank)
    best = brute_force(error, moments, rank)
    torch.testing.assert_close(made.product().double(), best, rtol=0, atol=2e-3 * float(best.abs().max()))
    assert loss(error, made.product(), moments) <= loss(error, best, moments) * (1 + 1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_full_rank_reproduces_the_error(metric: str) -> None:
    error, moments = problem(metric)
    for rank in (N, K):
        made = correct(error, moments, rank)
        assert made.a.shape == (rank, K)
        torch.testing.assert_close(made.product(), error, rtol=0, atol=2e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rank", [1, 8, N])
def test_both_sides_give_the_same_correction(metric: str, rank: int) -> None:
    error, moments = problem(metric, seed=1)
    root, factor = torch.linalg.cholesky(damped(moments.input, INPUT_DAMPING)), None
    if moments.output is not None:
        factor = sides._factor(moments.output)
    weighed = sides._weigh(error @ root, factor)
    a, b = sides._by_inputs(weighed, root, factor, rank)
    other_a, other_b = sides._by_outputs(weighed, error, factor, rank)
    expected = b @ a
    torch.testing.assert_close(other_b @ other_a, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("metric", METRICS)
def test_more_rank_leaves_less(metric: str) -> None:
    error, moments = problem(metric, seed=3)
    left = [loss(error, correct(error, moments, rank).product(), moments) for rank in (1, 4, 16, 39)]
    assert all(after < before for before, after in itertools.pairwise(left))


def test_each_metric_serves_its_own_loss_best() -> None:
    """The three metrics disagree, so none of the optima may be mistaken for another."""
    error, full = problem("full")
    assert full.output is not None
    tilted = {
        "plain": Moments(full.input),
        "diagonal": Moments(full.input, full.output.diagonal() * torch.logspace(-2, 2, N)),
        "full": full,
    }
    for name, moments in tilted.items():
        losses = {other: loss(error, correct(error, tilted[other], 8).product(), moments) for other in METRICS}
        assert min(losses, key=lambda other: losses[other]) == name


def test_factors_are_balanced() -> None:
    error, moments = problem("full")
    made = correct(error, moments, 8)
    torch.testing.assert_close(made.a.norm(dim=1), made.b.norm(dim=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_no_error_needs_no_correction(metric: str) -> None:
    _error, moments = problem(metric)
    made = correct(torch.zeros(N, K), moments, 8)
    assert torch.isfinite(made.a).all()
    assert torch.isfinite(made.b).all()
    assert float(made.product().abs().max()) < 1e-6


def test_correction_and_compensation_help_each_other() -> None:
    """Alternating them loses less than compensating once and correcting once."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=rng) * 0.05
    _error, moments = problem("plain")
    scheme, damping = Scheme(2, 64), Compensation().damping
    quantized = compensate(weight, moments.input, scheme)
    losses = []
    for _ in range(4):
        low_rank = correct(weight - quantized.dequantize(), moments, 8)
        left = weight - quantized.dequantize() - low_rank.product()
        losses.append(float(((left @ damped(moments.input, damping)) * left).sum()))
        quantized = compensate(weight - low_rank.product(), moments.input, scheme)
    assert losses[-1] < 0.95 * losses[0]
