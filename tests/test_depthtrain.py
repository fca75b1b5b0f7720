"""How depth networks learn: resumption, lessons, files, predictions."""

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
from torch import nn

from rlkit.recover import depthbatches, depthfile, depthpredict, depthtrain
from rlkit.recover.anynet import AnyNet, AnyShape
from rlkit.recover.depthbatches import Samples
from rlkit.recover.depthfile import Description, Kind
from rlkit.recover.depthnets import DepthNet, DepthShape
from rlkit.recover.depthsample import DepthSample, LogScale, planes
from rlkit.recover.depthtrain import Lesson, Training
from rlkit.recover.progress import Progress
from rlkit.recover.scenes import View

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


def learned_from() -> dict[Kind, Samples]:
    views = {Kind.MONO: VIEW, Kind.STEREO: PAIRS}
    return {kind: depthbatches.of_scenes(kind, views[kind], 0, 4) for kind in Kind}


@pytest.fixture(scope="module")
def data() -> dict[Kind, Samples]:
    return learned_from()


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
