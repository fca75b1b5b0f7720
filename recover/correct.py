"""Closed-form low-rank correction: the rank-r matrix that takes back most of what quantization did to the output.

With weight error E = W - Q (N, K), input second moment H = R R^T and output-gradient second moment G = L L^T, the
correction B A minimizes || L^T (E - B A) R ||_F. Substituting X = L^T E R, its solution is the truncated SVD of X
(Eckart-Young): with V (K, r) the leading right singular vectors, B = L^-T X V and A = V^T R^-1; or, the same product
by the leading left ones U (N, r), B = L^-T U and A = U^T L^T E. Taken are those of the smaller side. Without G this is
the activation-aware correction of LQER/CALDERA; with G the error is weighed by what it does to the model's output
distribution (K-FAC, see sweep.py), which measured 0.06 nats better on SmolLM2-135M.

layers.py alternates quantization and correction: what the correction can express need not be quantized well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlkit.recover.compensate import damped

INPUT_DAMPING = 0.01
OUTPUT_DAMPING = 0.1


@dataclass(frozen=True, slots=True)
class LowRank:
    """The correction B A: a (r, K), b (N, r)."""

    a: torch.Tensor
    b: torch.Tensor

    def product(self) -> torch.Tensor:
        """B A, (N, K)."""
        return self.b @ self.a


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of one linear: input (K, K); output gradient (N, N), (N,) for its diagonal, or None."""

    input: torch.Tensor
    output: torch.Tensor | None = None


def correct(error: torch.Tensor, moments: Moments, rank: int) -> LowRank:
    """The best rank-`rank` approximation of `error` (N, K) in the metric of `moments`."""
    root = torch.linalg.cholesky(damped(moments.input, INPUT_DAMPING))  # (K, K) lower, H = R R^T
    factor = None if moments.output is None else _factor(moments.output)
    weighed = _weigh(error @ root, factor)  # (N, K)
    n, k = error.shape
    a, b = _by_outputs(weighed, error, factor, rank) if rank <= n < k else _by_inputs(weighed, root, factor, rank)
    balance = (b.norm(dim=0) / a.norm(dim=1)).clamp(1e-12, 1e12).sqrt()  # equal norms suit Adam and the 8-bit grid
    return LowRank(a * balance[:, None], b / balance)


def _by_inputs(
    weighed: torch.Tensor, root: torch.Tensor, factor: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B by the right singular vectors of X, the eigenvectors of a matrix (K, K)."""
    leading = torch.linalg.eigh(weighed.T @ weighed).eigenvectors[:, -rank:]  # (K, r)
    return torch.linalg.solve_triangular(root.T, leading, upper=True).T, _unweigh(weighed @ leading, factor)


def _by_outputs(
    weighed: torch.Tensor, error: torch.Tensor, factor: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B by the left singular vectors of X, the eigenvectors of a matrix (N, N)."""
    leading = torch.linalg.eigh(weighed @ weighed.T).eigenvectors[:, -rank:]  # (N, r)
    return leading.T @ _weigh(error, factor), _unweigh(leading, factor)


def forecast(error: torch.Tensor, moments: Moments) -> float:
    """trace(G E H E^T) / 2: the KL divergence that an error E (N, K) is expected to cause (sweep.py); G = 1 if None."""
    spread = error @ moments.input  # (N, K)
    if moments.output is not None:
        error = moments.output @ error if moments.output.dim() == 2 else moments.output[:, None] * error
    return max(0.0, float((spread * error).sum(dtype=torch.float64)) / 2)


def _factor(output: torch.Tensor) -> torch.Tensor:
    """Damped square root of G: lower triangular L (N, N) with G = L L^T, or (N,) where G is a diagonal."""
    if output.dim() == 1:
        return (output + OUTPUT_DAMPING * output.mean().clamp(min=1e-20)).sqrt()
    scaled = output / output.diagonal().mean().clamp(min=1e-30)  # gradients are tiny: keep float32 in its range
    factor: torch.Tensor = torch.linalg.cholesky(damped(scaled, OUTPUT_DAMPING))
    return factor


def _weigh(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """L^T x."""
    if factor is None:
        return x
    return factor[:, None] * x if factor.dim() == 1 else factor.T @ x


def _unweigh(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """L^-T x."""
    if factor is None:
        return x
    if factor.dim() == 1:
        return x / factor[:, None]
    unweighed: torch.Tensor = torch.linalg.solve_triangular(factor.T, x, upper=True)
    return unweighed
