"""Which channels of a depth network belong together, and the network without some of them.

Channels that must live or die together are a **group**: both convolutions of a level down are added, so their outputs
are one. `wires` says of every convolution and norm which groups it reads and writes; `cut` takes the rows and columns
that stay, so weights are really gone and the result is a plain network of the same class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from rlkit.recover.anynet import STRIDES, AnyNet
from rlkit.recover.depthnets import DepthNet, DepthShape

Keep = Mapping[str, torch.Tensor]
"""By group: sorted numbers of the channels that stay."""

SPN = "spn"


@dataclass(frozen=True, slots=True)
class Wire:
    """A convolution or norm by its name in the network: the groups it reads, one after the other, and writes.

    A norm writes what it reads. Groups that are not in `groups` stay whole. area: pixels per output, over an image's.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    area: float = 1.0


def wires(network: nn.Module) -> list[Wire]:
    """Every convolution and norm that can lose channels; others are copied."""
    if isinstance(network, DepthNet):
        return _mono_wires(len(network.shape.down))
    if isinstance(network, AnyNet):
        return _stereo_wires(network)
    raise TypeError(f"{type(network).__name__} is no depth network")


def _mono_wires(levels: int) -> list[Wire]:
    found: list[Wire] = []
    before = "image"
    for i in range(levels):
        own, at = f"down.{i}", 4.0**-i
        found += [Wire(f"{own}.conv_a", (before,), (own,), at), Wire(f"{own}.norm_a", (own,))]
        found += [Wire(f"{own}.conv_b", (own,), (own,), at), Wire(f"{own}.norm_b", (own,))]
        before = own
    bottom = 4.0**-levels
    for letter in "ab":
        found += [Wire(f"bottleneck.conv_{letter}", (before,), (f"bottleneck.{letter}",), bottom)]
        before = f"bottleneck.{letter}"
    for i in range(levels):
        kept, at = f"down.{levels - 1 - i}", 4.0 ** -(levels - 1 - i)
        for letter, reads in (("a", (before, kept)), ("b", (f"up.{i}.a",))):
            own = f"up.{i}.{letter}"
            found += [Wire(f"up.{i}.conv_{letter}", reads, (own,), at), Wire(f"up.{i}.norm_{letter}", (own,))]
        before = f"up.{i}.b"
    return [*found, Wire("head", (before,), ("depth",))]


def _stereo_wires(network: AnyNet) -> list[Wire]:
    found: list[Wire] = []
    for stage, (widths, count) in enumerate(zip(network.shape.volume, network.shape.disparities, strict=True)):
        tried = count if stage == 0 else 2 * count - 1
        at = tried / STRIDES[stage] ** 2
        names = ["costs", *(f"volume.{stage}.{k}" for k in range(len(widths))), "costs"]
        for k in range(len(widths) + 1):
            found += [Wire(f"volumes.{stage}.{k}.0", (names[k],))]
            found += [Wire(f"volumes.{stage}.{k}.2", (names[k],), (names[k + 1],), at)]
    if network.refine is not None:
        guides = ["image", "guide.0", "guide.1", "guide.2"]
        at = 1 / 16
        for k in range(3):
            found += [Wire(f"refine.guide.{2 * k}", (guides[k],), (guides[k + 1],), at)]
        found += [Wire("refine.guide.6", ("guide.2",), ("spn",) * 3, at)]
        found += [Wire("refine.spread", ("disparity",), ("spn",), at)]
        found += [Wire("refine.gather", ("spn",), ("disparity",), at)]
    return found


def groups(network: nn.Module) -> dict[str, int]:
    """Every group that can lose channels, and how many it has."""
    if isinstance(network, DepthNet):
        down, bottleneck, up = network.shape.down, network.shape.bottleneck, network.shape.up
        found = {f"down.{i}": width for i, width in enumerate(down)}
        found |= {f"bottleneck.{letter}": width for letter, width in zip("ab", bottleneck, strict=True)}
        return found | {f"up.{i}.{'ab'[k]}": width for i, pair in enumerate(up) for k, width in enumerate(pair)}
    if isinstance(network, AnyNet):
        volume, spn = network.shape.volume, network.shape.spn
        found = {f"volume.{s}.{k}": width for s, widths in enumerate(volume) for k, width in enumerate(widths)}
        return found | ({SPN: spn} | {f"guide.{k}": 2 * spn for k in range(3)} if spn else {})
    raise TypeError(f"{type(network).__name__} is no depth network")


def cut(network: nn.Module, keep: Keep) -> nn.Module:
    """A network with only those channels; groups that are not named stay whole.

    Raises ValueError for channels that are not there, and if an SPN's guide does not keep twice its channels.
    """
    have = groups(network)
    for name, channels in keep.items():
        if name not in have:
            raise ValueError(f"there is no group {name!r}; the network has {', '.join(have)}")
        there = len(channels) and channels.min() >= 0 and channels.max() < have[name]
        if not there or len(set(channels.tolist())) != len(channels):
            raise ValueError(f"group {name} has {have[name]} channels; keep at least one, each at most once")
    made = _shaped(network, {name: len(keep[name]) if name in keep else width for name, width in have.items()})
    values = dict(network.state_dict())
    modules = dict(network.named_modules())
    for wire in wires(network):
        weight = modules[wire.name].get_parameter("weight")
        convolution = weight.ndim > 1
        outputs = _places(wire.writes if convolution else wire.reads, keep, have, weight.shape[0])
        for name in ("weight", "bias", "running_mean", "running_var"):
            if (full := f"{wire.name}.{name}") in values:
                values[full] = values[full][outputs]
        if convolution:
            values[f"{wire.name}.weight"] = values[f"{wire.name}.weight"][
                :, _places(wire.reads, keep, have, weight.shape[1])
            ]
    made.load_state_dict(values)
    return made.train(network.training)


def _places(names: tuple[str, ...], keep: Keep, have: Mapping[str, int], whole: int) -> torch.Tensor:
    """Rows or columns that stay, of groups that lie one after the other."""
    if not any(name in keep for name in names):
        return torch.arange(whole)
    places, start = [], 0
    for name in names:
        places.append(start + (keep[name].sort().values if name in keep else torch.arange(have[name])))
        start += have[name]
    return torch.cat(places)


def _shaped(network: nn.Module, widths: Mapping[str, int]) -> nn.Module:
    """A new network of the same class with these widths."""
    if isinstance(network, DepthNet):
        levels = range(len(network.shape.down))
        up = tuple((widths[f"up.{i}.a"], widths[f"up.{i}.b"]) for i in levels)
        bottleneck = (widths["bottleneck.a"], widths["bottleneck.b"])
        return DepthNet(DepthShape(tuple(widths[f"down.{i}"] for i in levels), bottleneck, up))
    assert isinstance(network, AnyNet)
    spn = widths.get(SPN, 0)
    if any(width != 2 * spn for name, width in widths.items() if name.startswith("guide.")):
        raise ValueError(f"an SPN of {spn} channels has a guide of {2 * spn}; keep as many of each of its three layers")
    rows = enumerate(network.shape.volume)
    volume = tuple(tuple(widths[f"volume.{s}.{k}"] for k in range(len(row))) for s, row in rows)
    return AnyNet(replace(network.shape, volume=volume, spn=spn))


def without_spn(network: AnyNet) -> AnyNet:
    """The network that ends with stage 3."""
    made = AnyNet(replace(network.shape, spn=0))
    made.load_state_dict({name: v for name, v in network.state_dict().items() if not name.startswith("refine.")})
    return made.train(network.training)


def without_level(network: DepthNet) -> DepthNet:
    """The network without its coarsest level, whose convolutions, norms folded in, become the bottleneck.

    The second one starts anew where its width is not what the level above reads. ValueError for a single level.
    """
    shape = network.shape
    if len(shape.down) < 2:
        raise ValueError("the network has a single level, which cannot be removed; scale its widths instead")
    made = DepthNet(DepthShape(shape.down[:-1], (shape.down[-1], shape.up[0][1]), shape.up[1:]))
    last = len(shape.down) - 1
    values = {
        name: v for name, v in network.state_dict().items() if not name.startswith((f"down.{last}", "up.", "bott"))
    }
    values |= {f"up.{i}.{name}": value for i in range(last) for name, value in network.up[i + 1].state_dict().items()}
    level, fresh = network.down[last], made.bottleneck.state_dict()
    for letter in "ab":
        weight, bias = _folded(level.get_submodule(f"conv_{letter}"), level.get_submodule(f"norm_{letter}"))
        fits = weight.shape == fresh[f"conv_{letter}.weight"].shape
        values[f"bottleneck.conv_{letter}.weight"] = weight if fits else fresh[f"conv_{letter}.weight"]
        values[f"bottleneck.conv_{letter}.bias"] = bias if fits else fresh[f"conv_{letter}.bias"]
    made.load_state_dict(values)
    return made.train(network.training)


@torch.no_grad()
def _folded(conv: nn.Module, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution that also does what the norm after it does."""
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and conv.bias is not None
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return conv.weight * scale.view(-1, 1, 1, 1), (conv.bias - norm.running_mean) * scale + norm.bias
