"""How depth networks learn: losses against other people's and by hand, batches, resumption, lessons, files."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from rlkit.profiles import depthmetrics
from rlkit.recover import depthbatches, depthfile, depthloss, depthpredict, depthtrain
from rlkit.recover.anynet import AnyNet, AnyShape
from rlkit.recover.depthbatches import Cut, Samples
from rlkit.recover.depthfile import Description, Kind
from rlkit.recover.depthnets import DepthNet, DepthShape
from rlkit.recover.depthsample import DepthSample, LogScale, StereoSample, planes
from rlkit.recover.depthtrain import Lesson, Training
from rlkit.recover.progress import Progress
from rlkit.recover.scenes import View
from test_depthdata import diode, kitti

VIEW = View(16, 32, max_disparity=12.0)
PAIRS = View(32, 64, max_disparity=20.0)
SHAPES: dict[Kind, Any] = {
    Kind.MONO: DepthShape.of(4, 6),
    Kind.STEREO: AnyShape(spn=1, volume=((3,), (2,), (2,)), disparities=(3, 2, 2)),
}
PLANS = {
    Kind.MONO: Training(8, 2, (16, 32), 5e-3, warmup=2, save_every=3),
    Kind.STEREO: Training(8, 1, (32, 64), 5e-3, warmup=2, save_every=3),
}


def fresh(kind: Kind, seed: int = 0) -> nn.Module:
    description = Description(kind, SHAPES[kind].to_json(), (16, 32), LogScale() if kind is Kind.MONO else None)
    return depthfile.build(description, seed)


@pytest.fixture(scope="module")
def data() -> dict[Kind, Samples]:
    views = {Kind.MONO: VIEW, Kind.STEREO: PAIRS}
    return {kind: depthbatches.of_scenes(kind, views[kind], 0, 4) for kind in Kind}


def values(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def towards_truth(network: nn.Module, samples: Samples, plan: Training) -> float:
    scale = LogScale() if samples.kind is Kind.MONO else None
    with torch.no_grad():
        return float(sum(depthtrain.losses(network, samples, plan, scale, 4)))


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Kind))
def test_training_lowers_the_loss_and_depends_on_the_seed_alone(data: dict[Kind, Samples], kind: Kind) -> None:
    plan = replace(PLANS[kind], steps=20, rate=1e-2)
    made = []
    for seed in (0, 0, 1):
        network = fresh(kind, seed)
        before = towards_truth(network.train(), data[kind], plan)
        steps = list(depthtrain.train(network, data[kind], plan))
        assert [step.index for step in steps] == list(range(1, 21)) and not network.training
        assert all(a.seconds < b.seconds for a, b in itertools.pairwise(steps))
        assert towards_truth(network.train(), data[kind], plan) < 0.8 * before
        made.append(values(network))
    assert equal(made[0], made[1]) and not equal(made[0], made[2])


def test_the_order_is_part_of_what_a_seed_decides(data: dict[Kind, Samples]) -> None:
    made = []
    for seed in (0, 1):
        network = fresh(Kind.MONO)
        list(depthtrain.train(network, data[Kind.MONO], replace(PLANS[Kind.MONO], steps=2, seed=seed)))
        made.append(values(network))
    assert not equal(*made)


@pytest.mark.parametrize("kind", list(Kind))
def test_a_training_that_was_killed_ends_as_it_would_have(
    data: dict[Kind, Samples], kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, state = replace(PLANS[kind], lesson=Lesson.BOTH), tmp_path / "state.safetensors"
    teacher = fresh(kind, 5)

    def run(kept: Path | None) -> tuple[nn.Module, Any]:
        network = fresh(kind)
        return network, depthtrain.train(network, data[kind], plan, teacher=teacher, state=kept)

    whole, steps = run(None)
    list(steps)

    cut, steps = run(state)  # between two states: after 5 steps, 3 of which are kept
    assert [next(steps).index for _ in range(5)] == [1, 2, 3, 4, 5]
    steps.close()
    assert not cut.training

    def killed(_source: Any, _target: Any) -> None:
        raise KeyboardInterrupt

    _, steps = run(state)  # while the state after step 6 is written
    assert [next(steps).index, next(steps).index] == [4, 5]
    kept = state.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    assert state.read_bytes() == kept and list(tmp_path.iterdir()) == [state]
    (tmp_path / ".state.safetensors.x.part").write_bytes(kept[:100])  # what a power cut leaves

    network, steps = run(state)
    assert [step.index for step in steps] == [4, 5, 6, 7, 8]
    assert equal(values(network), values(whole))

    finished, steps = run(state)
    assert list(steps) == [] and equal(values(finished), values(whole))


def test_states_of_other_trainings_and_damaged_ones_are_refused_and_kept(
    data: dict[Kind, Samples], tmp_path: Path
) -> None:
    state, plan, samples = tmp_path / "state.safetensors", PLANS[Kind.MONO], data[Kind.MONO]
    list(depthtrain.train(fresh(Kind.MONO), samples, plan, state=state))
    kept = state.read_bytes()
    others: list[tuple[nn.Module, Samples, Training, dict[str, Any]]] = [
        (fresh(Kind.MONO), samples, replace(plan, rate=1e-3), {}),
        (fresh(Kind.MONO), depthbatches.of_scenes(Kind.MONO, VIEW, 1, 4), plan, {}),
        (fresh(Kind.MONO), samples, plan, {"scale": LogScale(1, 10)}),
        (DepthNet(DepthShape.of(4, 5)), samples, plan, {}),
        (fresh(Kind.MONO), samples, replace(plan, lesson=Lesson.TEACHER), {"teacher": fresh(Kind.MONO)}),
    ]
    for network, shown, training, more in others:
        with pytest.raises(ValueError, match=r"is the state of another training .*; remove it"):
            depthtrain.train(network, shown, training, state=state, **more)
    longer = depthtrain.train(fresh(Kind.MONO), samples, replace(plan, save_every=1), state=state)
    assert list(longer) == []  # how often states are kept decides nothing
    state.write_bytes(kept[:-9])
    with pytest.raises(ValueError, match=r"cannot be read .*; remove it to train from the start"):
        depthtrain.train(fresh(Kind.MONO), samples, plan, state=state)
    assert state.read_bytes() == kept[:-9]


def test_what_does_not_fit_together_is_said_at_once(data: dict[Kind, Samples]) -> None:
    mono, stereo, plan = fresh(Kind.MONO), fresh(Kind.STEREO), PLANS[Kind.MONO]
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("samples are stereo, the network is mono", lambda: depthtrain.train(mono, data[Kind.STEREO], plan)),
        (
            "lesson teacher and no teacher do not fit",
            lambda: depthtrain.train(mono, data[Kind.MONO], replace(plan, lesson=Lesson.TEACHER)),
        ),
        (
            "lesson truth and a teacher do not fit",
            lambda: depthtrain.train(mono, data[Kind.MONO], plan, teacher=fresh(Kind.MONO)),
        ),
        (
            "a stereo network cannot teach a mono one",
            lambda: depthtrain.train(mono, data[Kind.MONO], replace(plan, lesson=Lesson.BOTH), teacher=stereo),
        ),
        (
            r"size \(15, 32\) does not fit a network of stride 2",
            lambda: depthtrain.train(mono, data[Kind.MONO], replace(plan, size=(15, 32))),
        ),
        (
            r"size \(24, 32\) does not fit a network of stride 16",
            lambda: depthtrain.train(stereo, data[Kind.STEREO], replace(plan, size=(24, 32))),
        ),
        ("batch = 0 is too small; use at least 1", lambda: Training(batch=0)),
        ("rate = inf", lambda: Training(rate=math.inf)),
        ("rate = nan", lambda: Training(rate=math.nan)),
        (r"decay = 1\.0", lambda: Training(decay=1.0)),
        ("none of an image", lambda: Training(size=(0, 16))),
        ("seed = -1", lambda: Training(seed=-1)),
    ]
    for why, call in refused:
        with pytest.raises(ValueError, match=why):
            call()
    with pytest.raises(TypeError, match="Linear is no depth network"):
        depthtrain.kind_of(nn.Linear(1, 1))


def test_a_loss_that_is_not_finite_ends_the_training(data: dict[Kind, Samples], tmp_path: Path) -> None:
    network = fresh(Kind.STEREO)
    steps = depthtrain.train(network, data[Kind.STEREO], PLANS[Kind.STEREO], state=tmp_path / "state")
    for _ in range(3):
        next(steps)
    kept = (tmp_path / "state").read_bytes()
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"step 4: the loss is nan; lower --rate \(0\.005\)"):
        next(steps)
    assert (tmp_path / "state").read_bytes() == kept and not network.training


def test_a_teacher_is_followed_and_left_alone(data: dict[Kind, Samples]) -> None:
    """With its answers alone the truth decides nothing; the teacher stays as it is, in evaluation mode."""
    teacher = fresh(Kind.MONO, 3)
    list(depthtrain.train(teacher, data[Kind.MONO], replace(PLANS[Kind.MONO], steps=20)))
    before = values(teacher)
    far = {sample: data[Kind.MONO].get(sample) for sample in range(4)}

    def wrong(index: int) -> DepthSample:
        sample = far[index]
        assert isinstance(sample, DepthSample)
        return DepthSample("wrong", sample.image, np.full_like(sample.depth, 7), sample.valid)

    plan = replace(PLANS[Kind.MONO], lesson=Lesson.TEACHER, steps=20)
    made = []
    for get in (data[Kind.MONO].get, wrong):
        network = fresh(Kind.MONO)
        losses = [
            step.loss for step in depthtrain.train(network, Samples(Kind.MONO, 4, "x", get), plan, teacher=teacher)
        ]
        assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:2])
        made.append(values(network))
    assert equal(*made) and equal(values(teacher), before) and not teacher.training


def test_rates_rise_and_fall() -> None:
    plan = Training(100, warmup=9)
    shares = [plan.share(step) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1.0 and max(shares) == 1.0 and 0 < shares[-1] < 1e-3
    assert shares[:10] == sorted(shares[:10]) and shares[9:] == sorted(shares[9:], reverse=True)


def test_facts_are_plain_and_progress_is_told(data: dict[Kind, Samples]) -> None:
    told: list[Progress] = []
    plan = replace(PLANS[Kind.MONO], steps=3)
    facts = depthtrain.fold(depthtrain.train(fresh(Kind.MONO), data[Kind.MONO], plan), plan, "train x", told.append)
    assert json.loads(json.dumps(facts)) == facts and facts["steps"] == 3 and facts["seconds"] > 0
    assert [(each.stage, each.done, each.total) for each in told] == [("train x", k, 3) for k in (1, 2, 3)]
    assert told[-1].note.startswith("loss ")


# --- losses ---------------------------------------------------------------------------------------------------------


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


# --- batches --------------------------------------------------------------------------------------------------------


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


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    network = fresh(Kind.MONO)
    about = Description(Kind.MONO, SHAPES[Kind.MONO].to_json(), (16, 32), LogScale(1, 9), {"steps": 3})
    depthfile.save(tmp_path / "net", network, about)
    return tmp_path / "net"


def test_a_network_is_read_back_as_it_was(saved: Path) -> None:
    network, about = depthfile.load(saved)
    assert equal(values(network), values(fresh(Kind.MONO))) and not network.training
    assert about == depthfile.read(saved) and about.scale == LogScale(1, 9) and about.made == {"steps": 3}
    assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors", "network.json"]
    assert b"pickle" not in (saved / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        depthfile.save(saved, network, about)


def test_a_save_that_fails_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*_given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(depthfile, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        depthfile.save(saved, fresh(Kind.MONO, 9), depthfile.read(saved), force=True)
    with pytest.raises(OSError, match="No space"):
        depthfile.save(saved.with_name("other"), fresh(Kind.MONO), depthfile.read(saved))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["net"]


def test_seeds_draw_networks_and_leave_other_draws_alone() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    assert equal(values(fresh(Kind.STEREO, 4)), values(fresh(Kind.STEREO, 4)))
    assert not equal(values(fresh(Kind.STEREO, 4)), values(fresh(Kind.STEREO, 5)))
    assert torch.equal(torch.rand(1), wanted)


def damage(folder: Path, **fields: Any) -> None:
    about = json.loads((folder / "network.json").read_text())
    (folder / "network.json").write_text(json.dumps({**about, **fields}))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: (folder / "network.json").unlink(), r"no network\.json.*see rlkit depth train"),
        (lambda folder: (folder / "network.json").write_text("{"), r"network\.json"),
        (lambda folder: damage(folder, schema_version=9), "schema_version 9 is not 1"),
        (lambda folder: damage(folder, kind="sound"), "sound"),
        (lambda folder: damage(folder, scale=None), "only mono networks have one"),
        (lambda folder: damage(folder, scale={"near": 5, "far": 1}), "are no range"),
        (lambda folder: damage(folder, size=[0, 3]), "none of an image"),
        (lambda folder: damage(folder, shape={"down": [4]}), "is no depth network"),
        (lambda folder: damage(folder, shape=DepthShape.of(4, 7).to_json()), "does not hold this network"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04"), "does not hold this network"),
        (lambda folder: (folder / "model.safetensors").unlink(), "does not hold this network"),
    ],
)
def test_damaged_and_foreign_folders_are_refused_in_one_line(
    saved: Path, spoil: Callable[[Path], None], why: str
) -> None:
    spoil(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=why) as raised:
        depthfile.load(saved)
    assert "\n" not in str(raised.value) and str(saved) in str(raised.value)


def test_values_that_are_no_numbers_are_refused(saved: Path) -> None:
    network, about = depthfile.load(saved)
    with torch.no_grad():
        next(network.parameters())[0] = math.inf
    depthfile.save(saved, network, about, force=True)
    with pytest.raises(ValueError, match="holds NaN or infinite values; make it again"):
        depthfile.load(saved)


def test_a_work_folder_is_told_from_a_network(saved: Path) -> None:
    work = saved.parent / "work"
    depthfile.save(work / "networks" / "full", *depthfile.load(saved))
    with pytest.raises(FileNotFoundError, match=r"give one of its networks, such as .*networks.full"):
        depthfile.load(work)


# --- asking ---------------------------------------------------------------------------------------------------------


def test_predictions_are_in_metres_of_any_size_and_do_not_depend_on_the_batch() -> None:
    network, scale = fresh(Kind.MONO).eval(), LogScale(1, 9)
    images = np.random.default_rng(0).integers(0, 256, (9, 17, 31, 3), dtype=np.uint8)
    (depth,) = depthpredict.predictor(network, scale)(images)
    assert depth.shape == (9, 17, 31) and depth.min() >= 1 and depth.max() <= 9
    (alone,) = depthpredict.predictor(network, scale)(images[8:])
    np.testing.assert_allclose(depth[8:], alone, rtol=1e-5)
    padded = torch.from_numpy(planes(np.pad(images[:1], [(0, 0), (0, 1), (0, 1), (0, 0)], "edge")))
    with torch.no_grad():
        np.testing.assert_allclose(depth[:1], scale.decode(network(padded)[:, 0, :17, :31].numpy()), rtol=1e-5)


def test_pairs_have_a_map_per_stage_and_wrong_images_are_refused() -> None:
    network = fresh(Kind.STEREO).eval()
    assert isinstance(network, AnyNet)
    ask = depthpredict.predictor(network)
    pair = np.random.default_rng(0).integers(0, 256, (2, 1, 30, 45, 3), dtype=np.uint8)
    stages = ask(*pair)
    assert [stage.shape for stage in stages] == [(1, 30, 45)] * 4
    with pytest.raises(ValueError, match="1 images for a network of 2; give 2"):
        ask(pair[0])
    with pytest.raises(ValueError, match="12x8 are smaller than the network's stride of 16"):
        ask(*pair[:, :, :8, :12])
    assert equal(values(network), values(copy.deepcopy(network)))
