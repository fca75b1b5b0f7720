"""Batches of depth networks: order, cuts, variation, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlkit.recover import depthbatches, depthtrain
from rlkit.recover.depthbatches import Cut, Samples
from rlkit.recover.depthfile import Kind
from rlkit.recover.depthsample import DepthSample, LogScale, StereoSample
from rlkit.recover.depthtrain import Training
from rlkit.recover.scenes import View
from test_depthdata import diode, kitti
from test_depthtrain import PLANS, fresh, learned_from

VIEW = View(16, 32, max_disparity=12.0)


@pytest.fixture(scope="module")
def data() -> dict[Kind, Samples]:
    return learned_from()


def test_batches_of_a_step_are_the_same_whenever_they_are_asked_for(data: dict[Kind, Samples]) -> None:
    cut, scale = Cut(3, (12, 20), 7), LogScale()
    first = [depthbatches.batch(data[Kind.MONO], cut, step, scale) for step in range(4)]
    again = {step: depthbatches.batch(data[Kind.MONO], cut, step, scale) for step in (3, 0, 2, 1)}
    for step, shown in enumerate(first):
        assert torch.equal(shown.images[0], again[step].images[0]) and torch.equal(shown.truth, again[step].truth)
        assert shown.images[0].shape == (3, 3, 12, 20) and shown.truth.shape == shown.valid.shape == (3, 1, 12, 20)
        assert float(shown.images[0].min()) >= 0 and float(shown.images[0].max()) <= 1
    assert not torch.equal(first[0].images[0], first[1].images[0])
    other = depthbatches.batch(data[Kind.MONO], replace(cut, seed=8), 0, scale)
    assert not torch.equal(other.images[0], first[0].images[0])


def test_every_epoch_shows_all_samples_once_in_an_order_of_its_own() -> None:
    cut = Cut(4, (16, 16), 3)
    shown = [index for step in range(5) for index in depthbatches.numbers(cut, step, 10)]
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10)) and shown[:10] != shown[10:]


def numbered(kind: Kind, height: int = 20, width: int = 48) -> Samples:
    """Images whose first two colours are the row and the column, as is the truth: 200 row + column + 1."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, columns * 0], -1).astype(np.uint8)
    truth = (200 * rows + columns + 1).astype(np.float32)
    valid = columns > 3
    sample: DepthSample | StereoSample = DepthSample("x", image, truth, valid)
    if kind is Kind.STEREO:
        sample = StereoSample("x", image, image[::-1].copy(), truth, valid)
    return Samples(kind, 1, "numbered", lambda _index: sample)


@pytest.mark.parametrize("kind", list(Kind))
def test_truth_stays_with_its_pixels(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthbatches, "GAIN", 0.0)
    monkeypatch.setattr(depthbatches, "GAMMA", 0.0)
    flipped = set()
    for step in range(12):
        shown = depthbatches.batch(numbered(kind), Cut(1, (16, 32)), step)
        rows, columns, _ = (255 * shown.images[0][0]).round()
        truth, valid = shown.truth[0, 0], shown.valid[0, 0]
        assert torch.equal(valid, columns > 3)
        assert torch.equal(truth, torch.where(valid, 200 * rows + columns + 1, 0))
        flipped.add(bool(columns[0, 0] > columns[0, 1]))
        if kind is Kind.STEREO:
            assert torch.equal((255 * shown.images[1][0, 0]).round(), 19 - rows)
    assert flipped == ({False, True} if kind is Kind.MONO else {False})  # a mirrored pair is one for the other eye


def test_large_single_images_are_shrunk_and_pairs_keep_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthbatches, "GAIN", 0.0)
    monkeypatch.setattr(depthbatches, "GAMMA", 0.0)
    mono = depthbatches.batch(numbered(Kind.MONO, 40, 100), Cut(1, (20, 50)), 0)
    columns = 255 * mono.images[0][0, 1]
    assert float((columns[:, 1:] - columns[:, :-1]).abs().median()) == pytest.approx(2, abs=1e-3)
    pair = depthbatches.batch(numbered(Kind.STEREO, 40, 100), Cut(1, (20, 50)), 0)
    for shown, step in ((mono, 2), (pair, 1)):  # columns from one pixel to the next
        both = shown.valid[0, 0, :, 1:] & shown.valid[0, 0, :, :-1]
        assert set(shown.truth[0, 0].diff(dim=1).abs()[both].tolist()) == {step}


def test_colours_vary_alike_in_a_pair() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    truth, valid = np.ones((16, 16), np.float32), np.ones((16, 16), bool)
    sample = StereoSample("x", image, image, truth, valid)
    seen = []
    for step in range(6):
        left, right = depthbatches.batch(Samples(Kind.STEREO, 1, 0, lambda _: sample), Cut(1, (16, 16)), step).images
        assert torch.equal(left, right)
        seen.append(float(left[0, 0, 0, 0]))
    assert len(set(seen)) == 6 and all(abs(value - 100 / 255) < 0.25 for value in seen)


def test_unknown_truth_that_is_not_a_number_reaches_no_network() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    truth = np.full((16, 16), np.nan, np.float32)
    truth[4:] = 2
    sample = DepthSample("x", image, truth, np.isfinite(truth))
    samples = Samples(Kind.MONO, 1, 0, lambda _: sample)
    assert bool(depthbatches.batch(samples, Cut(2, (16, 16)), 0, LogScale()).truth.isfinite().all())
    network = fresh(Kind.MONO)
    assert len(list(depthtrain.train(network, samples, Training(2, 2, (16, 16))))) == 2


def test_folders_of_the_other_kind_and_small_images_are_refused(tmp_path: Path) -> None:
    pairs, images = kitti(tmp_path / "kitti"), diode(tmp_path / "diode")
    with pytest.raises(ValueError, match="has pairs without depth in metres; use DIODE"):
        depthbatches.of_folder(Kind.MONO, pairs)
    with pytest.raises(ValueError, match="has single images, and a stereo network needs pairs"):
        depthbatches.of_folder(Kind.STEREO, images)
    samples = depthbatches.of_folder(Kind.STEREO, pairs, limit=1)
    assert samples.count == 1 and depthbatches.of_folder(Kind.STEREO, pairs).count == 2
    with pytest.raises(ValueError, match=r"000000_10\.png: 64x48 is smaller than the cut of 96x64; use a smaller"):
        depthbatches.batch(samples, Cut(1, (64, 96)), 0)
    network = fresh(Kind.STEREO)
    assert len(list(depthtrain.train(network, samples, replace(PLANS[Kind.STEREO], steps=1, size=(32, 48))))) == 1
