"""Smaller networks out of larger ones: what each cut leaves, that rest computes what it did, and what is no cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from rlkit.recover import channels, depthbatches, depthloss, depthtrain, slim
from rlkit.recover.anynet import AnyNet, AnyShape
from rlkit.recover.depthfile import Kind
from rlkit.recover.depthnets import FULL, REDUCED, DepthNet, DepthShape, value_count
from rlkit.recover.depthsample import LogScale
from rlkit.recover.depthtrain import Training
from rlkit.recover.scenes import View
from rlkit.recover.slim import Cut, How

MONO = DepthShape((8, 6, 12), (16, 14), ((12, 10), (7, 9), (8, 6)))
STEREO = AnyShape(spn=4, volume=((6, 5), (4,), (3, 4)), disparities=(3, 2, 2))


def lively(network: nn.Module, seed: int = 0) -> Any:
    """In evaluation mode, with statistics, scales and biases that differ from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith(("running_var", "norm_a.weight", "norm_b.weight", ".0.weight")) and value.ndim == 1:
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif name.endswith(("bias", "running_mean", "head.weight")) or "refine" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return network.eval()


@pytest.fixture(scope="module")
def networks() -> dict[Kind, Any]:
    torch.manual_seed(0)
    return {Kind.MONO: lively(DepthNet(MONO)), Kind.STEREO: lively(AnyNet(STEREO))}


def random_scores(network: nn.Module, seed: int = 1) -> slim.Scores:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(width, generator=generator) for name, width in channels.groups(network).items()}


def images(kind: Kind) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(2, 3, 32, 48, generator=generator) for _ in range(1 if kind is Kind.MONO else 2)]


@torch.no_grad()
def answers(network: nn.Module, kind: Kind) -> list[torch.Tensor]:
    said = network(*images(kind))
    return [said] if kind is Kind.MONO else list(said)


# --- the text -------------------------------------------------------------------------------------------------------


def test_cuts_are_read_in_order() -> None:
    assert slim.parse("level") == (Cut(How.LEVEL),)
    assert slim.parse("spn:0+prune:0.25:0.4+ widths:1 ") == (
        Cut(How.SPN, spn=0),
        Cut(How.PRUNE, 0.25, 0.4),
        Cut(How.WIDTHS, 1.0),
    )
    assert slim.parse("prune:0.25") == (Cut(How.PRUNE, 0.25, 1.0),)


@pytest.mark.parametrize(
    "junk",
    [
        "", "+", "level+", "levels", "level:1", "widths", "widths:", "widths:x", "widths:0", "widths:1.5", "widths:nan",
        "prune", "prune:0.5:0", "prune:0.5:0.5:0.5", "prune:-1", "prune:inf", "spn", "spn:x", "spn:-1", "spn:1.5",
    ],
)  # fmt: skip
def test_what_is_no_cut_is_one_clear_line(junk: str) -> None:
    with pytest.raises(ValueError, match=r"is no cut.*; write level, .* with \+ between several") as raised:
        slim.parse(junk)
    assert "\n" not in str(raised.value)


# --- what is left ---------------------------------------------------------------------------------------------------


def even(shape: DepthShape, share: float) -> DepthShape:
    def of(width: int) -> int:
        return max(1, round(share * width))

    a, b = shape.bottleneck
    return DepthShape(tuple(map(of, shape.down)), (of(a), of(b)), tuple((of(a), of(b)) for a, b in shape.up))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("level", DepthShape((8, 6), (12, 10), ((7, 9), (8, 6)))),
        ("level+level", DepthShape((8,), (6, 9), ((8, 6),))),
        ("widths:0.5", even(MONO, 0.5)),
        ("widths:0.01", even(MONO, 0.01)),
        ("widths:1", MONO),
        ("level+widths:0.5", even(DepthShape((8, 6), (12, 10), ((7, 9), (8, 6))), 0.5)),
    ],
)
def test_cuts_of_one_image_networks_leave_what_they_promise(
    networks: dict[Kind, Any], text: str, shape: DepthShape
) -> None:
    full = networks[Kind.MONO]
    before = copy.deepcopy(full.state_dict())
    made = slim.apply(full, slim.parse(text), random_scores)
    assert isinstance(made, DepthNet) and made.shape == shape and not made.training
    assert slim.parameter_count(made) == value_count(DepthNet(shape))
    assert answers(made, Kind.MONO)[0].isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in full.state_dict().items())
    again = slim.apply(full, slim.parse(text), random_scores)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize(
    ("text", "parameters"), [("spn:4", 36_933), ("spn:2", 35_277), ("spn:1", 34_827), ("spn:0", 34_629)]
)
def test_propagations_have_the_published_sizes(text: str, parameters: int) -> None:
    assert slim.parameter_count(slim.apply(AnyNet(), slim.parse(text), random_scores)) == parameters


def test_a_level_less_is_the_published_reduction() -> None:
    made = slim.apply(DepthNet(FULL), slim.parse("level"), random_scores)
    assert isinstance(made, DepthNet) and made.shape == REDUCED and slim.parameter_count(made) == 489_089


def test_widths_of_a_pair_s_network_keep_the_propagation_whole(networks: dict[Kind, Any]) -> None:
    made = slim.apply(networks[Kind.STEREO], slim.parse("widths:0.5"), random_scores)
    assert isinstance(made, AnyNet)
    assert made.shape == AnyShape(spn=2, volume=((3, 2), (2,), (2, 2)), disparities=(3, 2, 2))


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(("share", "flops"), [(0.6, 1.0), (0.75, 0.6), (1.0, 1.0)])
def test_pruning_keeps_both_budgets_and_takes_no_more_than_it_must(
    networks: dict[Kind, Any], kind: Kind, share: float, flops: float
) -> None:
    full = networks[kind]
    whole = slim.sizes(full, 64, 64)
    text = f"spn:0+prune:{share}:{flops}" if kind is Kind.STEREO else f"prune:{share}:{flops}"
    made = slim.apply(full, slim.parse(text), random_scores)
    left = slim.sizes(made, 64, 64)
    budgets = (share * whole.parameters, flops * whole.flops)
    assert left.parameters <= round(budgets[0]) and left.flops <= budgets[1]
    begun = slim.apply(full, slim.parse("spn:0"), random_scores) if kind is Kind.STEREO else full
    have, had = channels.groups(made), channels.groups(begun)
    if share == flops == 1:
        assert have == had
        return
    costs = slim._Costs(begun)
    assert costs(have) == (left.parameters, left.flops)  # the forecast that decided is what came out
    more = [costs({**have, name: width + 1}) for name, width in have.items() if width < had[name]]
    assert any(p > round(budgets[0]) or f > budgets[1] for p, f in more)


def test_pruning_takes_the_least_important_first(networks: dict[Kind, Any]) -> None:
    full = networks[Kind.MONO]
    scores = {name: torch.arange(width) + 1e6 for name, width in channels.groups(full).items()}
    scores["bottleneck.a"] = torch.arange(16).flip(0) * 1e-6
    made = slim.prune(full, scores, round(0.9 * value_count(full)))
    kept = channels.groups(made)["bottleneck.a"]
    assert kept < 16 and {**channels.groups(full), "bottleneck.a": kept} == channels.groups(made)
    assert torch.equal(made.state_dict()["bottleneck.conv_a.bias"], full.state_dict()["bottleneck.conv_a.bias"][:kept])


def test_sizes_are_counted_by_hand() -> None:
    """A level of width 2 and a bottom of 3, on 4 x 6 pixels: 2 FLOPs per weight and output pixel."""
    network = DepthNet(DepthShape.of(2, 3))
    found = slim.sizes(network, 4, 6)
    convolutions = [(3, 2, 24), (2, 2, 24), (2, 3, 6), (3, 3, 6), (3 + 2, 2, 24), (2, 2, 24)]
    assert found.flops == sum(2 * 9 * a * b * pixels for a, b, pixels in convolutions) + 2 * 2 * 1 * 24
    weights = sum(9 * a * b + b for a, b, _ in convolutions) + 2 + 1
    assert found.parameters == weights + 4 * 4 * 2 and found.nbytes == 4 * found.parameters
    stereo = slim.sizes(AnyNet(), 64, 64)
    assert stereo.parameters == 43_269 and stereo.nbytes == 4 * value_count(AnyNet()) > 4 * 43_269


# --- the rest computes what it did ----------------------------------------------------------------------------------


def silenced(network: nn.Module, keep: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network with the channels that go at 0: whatever writes them, norms included, has rows of 0."""
    network = copy.deepcopy(network)
    have = channels.groups(network)
    gone = {name: torch.tensor(sorted(set(range(have[name])) - set(kept.tolist()))) for name, kept in keep.items()}
    modules = dict(network.named_modules())
    for wire in channels.wires(network):
        start = 0
        for name in wire.writes or wire.reads:
            if name in gone and len(gone[name]):
                for parameter in modules[wire.name].parameters():
                    with torch.no_grad():
                        parameter[start + gone[name]] = 0
            start += have.get(name, 0)
    return network


@pytest.mark.parametrize("kind", list(Kind))
def test_a_cut_network_says_what_the_full_one_says_without_those_channels(
    networks: dict[Kind, Any], kind: Kind
) -> None:
    full = networks[kind]
    generator = torch.Generator().manual_seed(3)
    for name, width in channels.groups(full).items():
        if name == channels.SPN or name.startswith("guide."):
            continue
        keep = {name: torch.randperm(width, generator=generator)[: max(1, width // 2)]}
        wanted, found = answers(silenced(full, keep), kind), answers(channels.cut(full, keep), kind)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        if kind is Kind.MONO or name.startswith("volume"):
            assert not torch.allclose(answers(full, kind)[-1], wanted[-1], atol=1e-4)  # these channels said something


def test_a_smaller_propagation_says_what_the_rest_of_it_said(networks: dict[Kind, Any]) -> None:
    full = networks[Kind.STEREO]
    keep = {channels.SPN: torch.tensor([0, 2]), **{f"guide.{k}": torch.tensor([1, 2, 5, 6]) for k in range(3)}}
    wanted, found = (answers(made, Kind.STEREO) for made in (silenced(full, keep), channels.cut(full, keep)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(answers(full, Kind.STEREO)[-1], wanted[-1], atol=1e-2)
    torch.testing.assert_close(answers(channels.without_spn(full), Kind.STEREO), answers(full, Kind.STEREO)[:3])


def test_a_level_that_goes_leaves_its_convolutions_with_their_norms_folded(networks: dict[Kind, Any]) -> None:
    full = networks[Kind.MONO]
    made = channels.without_level(full)
    values = torch.rand(1, 6, 8, 8)
    with torch.no_grad():
        level = full.down[2]
        torch.testing.assert_close(made.bottleneck.conv_a(values), level.norm_a(level.conv_a(values)))
        even = lively(DepthNet(DepthShape.of(4, 6, 6, 8)))  # what the level above reads is as wide as this level
        level, bottom = even.down[2], channels.without_level(even).bottleneck
        torch.testing.assert_close(bottom.conv_b(values), level.norm_b(level.conv_b(values)))
    with pytest.raises(ValueError, match="has a single level, which cannot be removed"):
        channels.without_level(DepthNet(DepthShape.of(4, 6)))


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ({"down.9": [0]}, r"no group 'down\.9'; the network has down\.0, "),
        ({"down.0": []}, r"group down\.0 has 8 channels; keep at least one"),
        ({"down.0": [0, 0]}, "each at most once"),
        ({"down.0": [8]}, "has 8 channels"),
        ({"down.0": [-1]}, "has 8 channels"),
    ],
)
def test_channels_that_are_not_there_are_refused(networks: dict[Kind, Any], keep: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        channels.cut(networks[Kind.MONO], {name: torch.tensor(kept).long() for name, kept in keep.items()})


# --- importance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Kind))
def test_importance_is_how_the_loss_changes_with_a_channel(networks: dict[Kind, Any], kind: Kind) -> None:
    """Against finite differences: all values that write a channel grow by a little."""
    network = copy.deepcopy(networks[kind]).double()
    shown = [each.double() for each in images(kind)]
    target = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(5)).double()

    def losses(network: nn.Module) -> Iterator[torch.Tensor]:
        said = network(*shown)
        yield (sum((each - target).square().mean() for each in (said if isinstance(said, tuple) else [said])))

    before = copy.deepcopy(network.state_dict())
    scores = slim.taylor(network, losses)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert {name: len(score) for name, score in scores.items()} == channels.groups(network)
    modules = dict(network.named_modules())
    step, checked = 1e-7, 0
    for group in ("up.0.a", "bottleneck.b", "down.1") if kind is Kind.MONO else ("volume.0.1", "spn", "guide.1"):
        writers = [wire for wire in channels.wires(network) if group in (wire.writes or wire.reads)]
        ends = []
        for sign in (1, -1):
            changed = copy.deepcopy(network)
            own = dict(changed.named_modules())
            for wire in writers:
                names, width = wire.writes or wire.reads, len(scores[group])
                for parameter in own[wire.name].parameters():
                    for at in [at * width + 1 for at, name in enumerate(names) if name == group]:
                        with torch.no_grad():
                            parameter[at] *= 1 + sign * step
            with torch.no_grad():
                ends.append(float(next(losses(changed.train()))))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert math.sqrt(float(scores[group][1])) == pytest.approx(abs(slope), rel=1e-3, abs=1e-9)
        checked += abs(slope) > 1e-9
    assert checked >= 2 and modules


def test_what_says_nothing_does_not_matter(networks: dict[Kind, Any]) -> None:
    network = copy.deepcopy(networks[Kind.MONO])
    with torch.no_grad():
        network.up[2].conv_a.weight[:, 3] = 0  # nobody reads channel 3 of up.1.b
    shown = images(Kind.MONO)[0]
    scores = slim.taylor(network, lambda copied: iter([copied(shown).square().mean()]))
    assert scores["up.1.b"].argmin() == 3 and scores["up.1.b"][3] < 1e-12 < scores["up.1.b"].median()


def test_cuts_are_judged_on_the_samples_of_the_training() -> None:
    samples = depthbatches.of_scenes(Kind.MONO, View(16, 32, max_disparity=12.0), 0, 4)
    plan = Training(1, 2, (16, 32))
    network = lively(DepthNet(DepthShape.of(6, 8)))
    made = [depthtrain.slimmed(network, "widths:0.5", samples, plan, LogScale()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(each.state_dict().values() for each in made), strict=True))
    assert value_count(made[0]) == value_count(DepthNet(DepthShape.of(3, 4)))
    (loss,) = depthtrain.losses(network, samples, plan, LogScale(), 1)
    shown = depthbatches.batch(samples, plan.cut, 0, LogScale())
    assert loss.item() == pytest.approx(depthloss.mono(network(*shown.images), shown.truth, shown.valid).item())


# --- what does not suit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        (Kind.MONO, "spn:0", "spn is no cut for an DepthNet"),
        (Kind.STEREO, "level", "level is no cut for an AnyNet"),
        (Kind.STEREO, "spn:5", "has 4 SPN channels, so 5 cannot stay; ask for fewer"),
        (Kind.STEREO, "spn:0+spn:1", "has 0 SPN channels, so 1 cannot stay"),
        (Kind.MONO, "level+level+level", "has a single level"),
        (Kind.MONO, "prune:0.001", "are the fewest that pruning leaves; ask for more than"),
        (Kind.STEREO, "prune:0.9:0.001", "are the fewest that pruning leaves"),
    ],
)
def test_cuts_that_do_not_suit_a_network_are_refused(
    networks: dict[Kind, Any], kind: Kind, text: str, why: str
) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        slim.apply(networks[kind], slim.parse(text), random_scores)
    assert "\n" not in str(raised.value)


def test_pruning_leaves_an_eighth_of_every_group() -> None:
    full = DepthNet(DepthShape.of(16, 32, 40))
    with pytest.raises(ValueError, match="are the fewest") as raised:
        slim.prune(full, random_scores(full), 1)
    fewest = int(str(raised.value).split()[0])
    made = slim.prune(full, random_scores(full), fewest)
    assert slim.parameter_count(made) == fewest
    had = channels.groups(full)
    assert all(width == math.ceil(had[name] / 8) for name, width in channels.groups(made).items())
    for module in (nn.Linear(1, 1), nn.Sequential()):
        with pytest.raises(TypeError, match="is no depth network"):
            channels.groups(module)
