"""Divergences between the original's kept probabilities and the student's, taken through a frozen lm_head.

Of the original, k log-probabilities per position and the log of the remaining mass are kept. Both distributions are
therefore compared over k + 1 outcomes: the k tokens, and any other. Merging outcomes never raises an f-divergence
(data-processing inequality), so the KL divergence over k + 1 outcomes is a lower bound of the one over the vocabulary.

With z = W h (W (V, hidden)), q = softmax(z) and c_i = dL / d log q_i over the k + 1 outcomes, C their sum:

    dL/dz_j = c_j - q_j C                    for j among the k tokens
    dL/dz_j = q_j (c_rest / q_rest - C)      for every other token
    dL/dh   = W^T dL/dz

The c_i come from autograd over (tokens, k + 1); the (tokens, V) matrix lives for one slice of tokens at a time, changed
in place, without an autograd graph. The matrix products are in the dtype of W, all between them is float32.

Temperature divides the k + 1 log-probabilities on both sides, which are then normalized again; the divergence is times
its square, so that gradients keep their size (Hinton et al. 2015, 1503.02531, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlkit.recover.corpus import Targets

# Bytes of float32 logits that exist at one time. On a CPU few enough that malloc hands the same pages out again: slices
# of 32 MiB took 0.78 s, of 128 MiB 1.26 s (2048 tokens, V = 49152, hidden 576, one core with AVX-512 bf16, 2026-11).
SLICE_NBYTES = {"cpu": 2**25, "cuda": 2**29}
LEAST_MASS = 1e-30  # of the rest, relative to the likeliest token: keeps its logarithm finite

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # log p, log q (tokens, k + 1) -> nats (tokens,)


def forward_kl(original: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(original || student): the student has to cover all that the original may say."""
    return (original.exp() * (original - student)).sum(-1)


def reverse_kl(original: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(student || original): the student may not say what the original would not."""
    return forward_kl(student, original)


DIVERGENCES: dict[str, Divergence] = {"forward": forward_kl, "reverse": reverse_kl}


def tempered(divergence: Divergence, temperature: float) -> Divergence:
    """`divergence` at a temperature above 0, times the temperature's square."""

    def at_temperature(original: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        softened = (torch.log_softmax(side / temperature, dim=-1) for side in (original, student))
        return temperature**2 * divergence(*softened)

    return at_temperature


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The original at some tokens: ids (tokens, k), log-probabilities (tokens, k + 1) with the rest last."""

    ids: torch.Tensor
    log_probs: torch.Tensor

    @staticmethod
    def of(targets: Targets, device: torch.device) -> Outcomes:
        """From a corpus' Targets (B, T, ...), normalized again, as they were stored rounded."""
        ids, log_probs, rest = (torch.as_tensor(part) for part in (targets.ids, targets.log_probs, targets.rest))
        joined = torch.cat([log_probs.float(), rest.float()[..., None]], dim=-1).flatten(0, 1)
        return Outcomes(ids.flatten(0, 1).to(device), torch.log_softmax(joined, dim=-1).to(device))

    def __getitem__(self, rows: slice) -> Outcomes:
        return Outcomes(self.ids[rows], self.log_probs[rows])


@torch.no_grad()
def total(head: torch.Tensor, hidden: torch.Tensor, known: Outcomes, divergence: Divergence) -> torch.Tensor:
    """The divergence summed over tokens; head (V, hidden), hidden (tokens, hidden)."""
    found = torch.zeros((), device=hidden.device)
    for rows in _slices(hidden, len(head)):
        part = known[rows]
        student, _, _ = _outcomes(head, hidden[rows], part.ids)
        found += divergence(part.log_probs, student).sum()
    return found


@torch.no_grad()
def total_and_gradient(
    head: torch.Tensor, hidden: torch.Tensor, known: Outcomes, divergence: Divergence
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence summed over tokens and its gradient with respect to `hidden` (tokens, hidden)."""
    found, gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
    for rows in _slices(hidden, len(head)):
        part = known[rows]
        student, masses, rest = _outcomes(head, hidden[rows], part.ids)
        with torch.enable_grad():
            student.requires_grad_()
            loss = divergence(part.log_probs, student).sum()
            (slopes,) = torch.autograd.grad(loss, student)  # (tokens, k + 1)
        found += loss.detach()
        by_logit = slopes - student.detach().exp() * slopes.sum(-1, keepdim=True)
        masses.mul_(by_logit[:, -1:] / rest).scatter_(1, part.ids, by_logit[:, :-1])  # now dL/dz
        gradient[rows] = masses.to(head.dtype) @ head
    return found, gradient


def _slices(hidden: torch.Tensor, vocab: int) -> list[slice]:
    tokens = max(1, SLICE_NBYTES.get(hidden.device.type, 2**25) // (4 * vocab))
    return [slice(start, start + tokens) for start in range(0, len(hidden), tokens)]


def _outcomes(
    head: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student's log-probabilities (tokens, k + 1); exp(z - max z) with the k tokens at zero (tokens, V); its sum.

    Summing the rest on its own keeps it exact where the k tokens hold nearly all of the mass.
    """
    logits = (hidden.to(head.dtype) @ head.T).float()
    chosen = logits.gather(1, ids)
    peak = logits.amax(-1, keepdim=True)
    masses = logits.sub_(peak).exp_().scatter_(1, ids, 0.0)
    rest = masses.sum(-1, keepdim=True).clamp_(min=LEAST_MASS)  # (tokens, 1)
    student = torch.log_softmax(torch.cat([chosen - peak, rest.log()], dim=-1), dim=-1)
    return student, masses, rest
