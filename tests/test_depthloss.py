"""Losses of depth networks: against other people's and by hand, masks, slopes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from rlkit.profiles import depthmetrics
from rlkit.recover import depthloss
from rlkit.recover.depthfile import Kind


def maps(seed: int, height: int = 24, width: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(2, 1, height + 4, width + 4, generator=generator), 5, 1)
    return smooth.clamp(-0.9, 0.9).double()


def mask(height: int = 24, width: int = 30) -> torch.Tensor:
    known = torch.ones(2, 1, height, width, dtype=torch.bool)
    known[0, 0, 3:9, 5:12] = False
    known[1, 0, :, :2] = False
    return known


def test_ssim_is_that_of_scikit_image_over_whole_windows() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    predicted, truth, known = maps(0), maps(1), mask()
    found = []
    for index in range(2):
        x, y, valid = (each[index, 0].numpy() for each in (predicted, truth, known))
        constants = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "K1": 0.01, "K2": 0.03}
        _, every = metrics.structural_similarity(x * valid, y * valid, data_range=1.8, full=True, **constants)
        whole = sliding_window_view(valid, (11, 11)).all((2, 3))
        found.append(every[5:-5, 5:-5][whole])
    wanted = np.concatenate(found).mean()
    assert float(depthloss.ssim(predicted, truth, known)) == pytest.approx(wanted, abs=1e-9)
    metric = depthmetrics.ssim(predicted[:, 0].numpy(), truth[:, 0].numpy(), known[:, 0].numpy(), 1.8)
    assert metric == pytest.approx(wanted, abs=1e-9)
    assert float(depthloss.ssim(truth, truth, known)) == pytest.approx(1)
    nothing = known & (torch.arange(30) % 10 > 0)  # no window is known as a whole
    assert float(depthloss.ssim(predicted, truth, nothing)) == 1
    with pytest.raises(ValueError, match="30x10 are smaller than SSIM's window of 11"):
        depthloss.ssim(predicted[:, :, :10], truth[:, :, :10], known[:, :, :10])


def test_smoothness_of_maps_made_by_hand() -> None:
    truth = torch.zeros(1, 1, 3, 4)
    known = torch.ones_like(truth, dtype=torch.bool)
    step = torch.tensor([0.0, 0.0, 0.3, 0.3]).expand(1, 1, 3, 4)
    assert float(depthloss.smoothness(truth, step, known)) == 0
    assert float(depthloss.smoothness(step, truth, known)) == pytest.approx(0.3 / 3)  # one of three steps in each row
    edge = depthloss.smoothness(step, step, known)  # where the truth has that edge
    assert float(edge) == pytest.approx(0.1 * math.exp(-depthloss.EDGE * 0.3))
    tall = step.transpose(2, 3)
    assert float(depthloss.smoothness(tall, truth.transpose(2, 3), known.transpose(2, 3))) == pytest.approx(0.1)
    known[..., 2] = False  # the step's far end is not known
    assert float(depthloss.smoothness(step, truth, known)) == 0


@pytest.mark.parametrize("kind", list(Kind))
def test_what_is_not_known_counts_nowhere(kind: Kind) -> None:
    known = mask()
    predicted, truth = maps(2).requires_grad_(), maps(3)
    junk = torch.where(known, truth, 100.0)

    def loss(true: torch.Tensor) -> torch.Tensor:
        if kind is Kind.MONO:
            return depthloss.mono(predicted, true, known)
        return depthloss.stereo([predicted, 2 * predicted], true, known)

    one, other = loss(truth), loss(junk)
    assert one.item() == pytest.approx(other.item(), rel=1e-12)
    (slope,) = torch.autograd.grad(one, predicted)
    assert (slope[~known] == 0).all() and (slope[known] != 0).float().mean() > 0.9


def test_losses_by_hand_and_their_slopes() -> None:
    truth = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    known = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    stages = [torch.full_like(truth, size) for size in (3.0, 0.5, 0.2, 2.0)]
    by_hand = 0.25 * (3 - 0.5) + 0.5 * 0.5**2 / 2 + 1.0 * 0.2**2 / 2 + 1.0 * (2 - 0.5)  # smooth L1 turns at 1 px
    assert float(depthloss.stereo(stages, truth, known)) == pytest.approx(by_hand)
    assert float(depthloss.stereo(stages[:3], truth, known)) == pytest.approx(by_hand - 1.5)

    predicted, true, valid = maps(4), maps(5), mask()
    parts = (
        0.85 * (1 - depthloss.ssim(predicted, true, valid)),
        0.1 * (predicted - true).abs()[valid].mean(),
        0.9 * depthloss.smoothness(predicted, true, valid),
    )
    assert float(depthloss.mono(predicted, true, valid)) == pytest.approx(float(sum(parts)), rel=1e-12)
    small = [each[:1, :, :12, :13].clone() for each in (predicted, true, valid)]
    small[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda given: depthloss.mono(given, small[1], small[2]), small[0], atol=1e-6)


def test_spread_compares_where_features_are_and_not_their_channels() -> None:
    torch.manual_seed(0)
    wide = torch.rand(2, 6, 3, 4)
    assert float(depthloss.spread([wide], [wide[:, [5, 0, 3, 1, 2, 4]] * 7])) == pytest.approx(0, abs=1e-6)
    left, right = torch.zeros(1, 2, 1, 2), torch.zeros(1, 5, 1, 2)
    left[..., 0], right[..., 1] = 3, 2
    assert float(depthloss.spread([left, left], [right])) == pytest.approx(2)  # unit vectors at right angles, one level
