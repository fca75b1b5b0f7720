"""The gradient written by hand is autograd's, and k + 1 outcomes bound the whole divergence from below."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlkit.recover import divergences
from rlkit.recover.corpus import Targets
from rlkit.recover.divergences import DIVERGENCES, Outcomes, tempered, total, total_and_gradient

VOCAB, HIDDEN, K = 96, 32, 8
CPU = torch.device("cpu")


def targets_of(logits: torch.Tensor, k: int = K) -> Targets:
    """What a corpus keeps of logits (B, T, V)."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    top, ids = probabilities.topk(k)
    rest = (1 - top.sum(-1)).clamp(min=2e-9)
    return Targets(ids.numpy(), top.log().float().numpy(), rest.log().float().numpy())


def case(tokens: int, sharpness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """lm_head (V, hidden), the student's hidden (tokens, hidden), the original's logits (1, tokens, V)."""
    rng = torch.Generator().manual_seed(tokens)
    head = torch.randn(VOCAB, HIDDEN, generator=rng) * 0.5
    hidden = torch.randn(tokens, HIDDEN, generator=rng)
    other = hidden + 0.5 * torch.randn(tokens, HIDDEN, generator=rng)
    return head, sharpness * hidden, (sharpness * other @ head.T)[None]


def by_autograd(
    head: torch.Tensor, hidden: torch.Tensor, targets: Targets, direction: str, temperature: float
) -> tuple[float, torch.Tensor]:
    """The same loss in float64, through a graph over the whole vocabulary."""
    leaf = hidden.double().requires_grad_()
    probabilities = torch.softmax(leaf @ head.double().T, dim=-1)
    chosen = probabilities.gather(1, torch.from_numpy(targets.ids)[0])
    others = torch.ones_like(probabilities).scatter_(1, torch.from_numpy(targets.ids)[0], 0.0)
    rest = (probabilities * others).sum(-1, keepdim=True)
    student = torch.cat([chosen, rest], dim=-1) ** (1 / temperature)
    kept = np.concatenate([targets.log_probs[0], targets.rest[0, :, None]], axis=-1)
    original = torch.from_numpy(kept).double().exp() ** (1 / temperature)
    p, q = (side / side.sum(-1, keepdim=True) for side in (original, student))
    if direction == "reverse":
        p, q = q, p
    loss = temperature**2 * (p * (p / q).log()).sum()
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad


@pytest.mark.parametrize("direction", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
def test_loss_and_gradient_are_autograds(direction: str, temperature: float, sharpness: float) -> None:
    head, hidden, logits = case(100, sharpness)
    targets = targets_of(logits)
    loss = tempered(DIVERGENCES[direction], temperature)
    found, gradient = total_and_gradient(head, hidden, Outcomes.of(targets, CPU), loss)
    expected, exact = by_autograd(head, hidden, targets, direction, temperature)
    assert float(found) == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert float((gradient.double() - exact).norm() / exact.norm()) < 2e-5
    assert float(total(head, hidden, Outcomes.of(targets, CPU), loss)) == float(found)


@pytest.mark.parametrize("tokens", [1, 7, 8, 23])
def test_slices_add_up(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, logits = case(tokens)
    known, loss = Outcomes.of(targets_of(logits), CPU), tempered(DIVERGENCES["forward"], 1.0)
    whole, gradient = total_and_gradient(head, hidden, known, loss)
    monkeypatch.setitem(divergences.SLICE_NBYTES, "cpu", 8 * VOCAB * 4)
    sliced, parts = total_and_gradient(head, hidden, known, loss)
    assert float(sliced) == pytest.approx(float(whole), rel=1e-6)
    torch.testing.assert_close(parts, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_more_outcomes_come_closer_to_the_whole_divergence_from_below(direction: str) -> None:
    head, hidden, logits = case(50)
    original, student = (torch.log_softmax(part, dim=-1) for part in (logits[0], hidden @ head.T))
    whole = float(DIVERGENCES[direction](original, student).sum())
    loss = tempered(DIVERGENCES[direction], 1.0)
    ranks = (1, 4, 16, 64, VOCAB - 1)
    found = [float(total(head, hidden, Outcomes.of(targets_of(logits, k), CPU), loss)) for k in ranks]
    assert found == sorted(found)
    assert 0 < found[0] < 0.9 * whole
    assert found[-1] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_a_student_like_its_original_has_nothing_to_learn(direction: str) -> None:
    head, hidden, _ = case(50)
    known = Outcomes.of(targets_of((hidden @ head.T)[None]), CPU)
    found, gradient = total_and_gradient(head, hidden, known, tempered(DIVERGENCES[direction], 1.0))
    assert float(found) == pytest.approx(0, abs=1e-4)
    assert float(gradient.abs().max()) < 1e-5


@pytest.mark.parametrize("direction", DIVERGENCES)
@pytest.mark.parametrize("k", [K, VOCAB])
def test_certainty_stays_finite(direction: str, k: int) -> None:
    """No mass beside the kept tokens on either side, though they differ; and no other token at all."""
    head, hidden, logits = case(50, sharpness=400.0)
    known = Outcomes.of(targets_of(logits / 100, k), CPU)
    found, gradient = total_and_gradient(head, hidden, known, tempered(DIVERGENCES[direction], 1.0))
    assert torch.isfinite(found) and float(found) > 0
    assert torch.isfinite(gradient).all()


def test_rounded_targets_are_normalized_again() -> None:
    head, hidden, logits = case(50)
    targets = targets_of(logits)
    shifted = Targets(targets.ids, targets.log_probs + np.float32(0.01), targets.rest + np.float32(0.01))
    loss = tempered(DIVERGENCES["forward"], 1.0)
    found, expected = (float(total(head, hidden, Outcomes.of(part, CPU), loss)) for part in (shifted, targets))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_bfloat16_head_is_close() -> None:
    head, hidden, logits = case(200)
    known, loss = Outcomes.of(targets_of(logits), CPU), tempered(DIVERGENCES["forward"], 1.0)
    exact, expected = total_and_gradient(head, hidden, known, loss)
    found, gradient = total_and_gradient(head.bfloat16(), hidden, known, loss)
    assert gradient.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=0.02)
    assert float((gradient - expected).norm() / expected.norm()) < 0.02
