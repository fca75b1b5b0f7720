"""Smaller depth networks out of a larger one, by cuts that are written as text:

    level            the coarsest level goes, its convolutions become the bottleneck
    widths:0.5       that share of every group of channels stays, those that matter most
    prune:0.25       channels that matter least go until that share of the parameters is left
    prune:0.25:0.4   ... and that share of the FLOPs
    spn:4            the propagation keeps 4 channels; spn:0 ends with stage 3
    spn:0+prune:0.5  one after the other; shares are always of the network that all began with

What a channel matters is its first-order Taylor importance (Molchanov et al., 1906.10771): the squared change of the
loss, to first order, were the channel's outputs 0; the sum over what writes it of w dL/dw, squared, over some batches.
Convolutions before a norm add nothing, as their scale does not matter; the norm does. Pruning takes one channel after
the other, that with the least importance per saved share of what is not within its budget yet, so wide coarse levels
give parameters and fine ones FLOPs. Cutting is crude, so training has to follow (depthtrain.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rlkit.recover import channels
from rlkit.recover.anynet import STRIDE, AnyNet
from rlkit.recover.channels import SPN
from rlkit.recover.depthnets import DepthNet, value_count

Scores = dict[str, torch.Tensor]
"""By group: how much each channel matters."""

N = TypeVar("N", bound=nn.Module)
Judge = Callable[[nn.Module], Scores]
FRAME = 4 * STRIDE  # height and width of the frame whose FLOPs a budget counts
OUTSIDE = {"image": 3, "depth": 1, "costs": 1, "disparity": 1}  # channels of what is no group
LEAST = 0.125  # of a group's channels stay, whatever they matter


class How(StrEnum):
    """What a cut does."""

    LEVEL = "level"
    WIDTHS = "widths"
    PRUNE = "prune"
    SPN = "spn"


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut: shares of parameters (or of every width) and of FLOPs that stay, or the channels of an SPN."""

    how: How
    share: float = 1.0
    flops: float = 1.0
    spn: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.flops <= 1) or self.spn < 0:
            raise ValueError(f"{self.how} cannot leave {self.share} and {self.flops}; give shares above 0 and up to 1")


def parse(text: str) -> tuple[Cut, ...]:
    """The cuts of a text, in order; ValueError if it is written otherwise."""
    found = []
    for part in text.split("+"):
        word, *values = part.strip().split(":")
        counts = {How.LEVEL: (0,), How.WIDTHS: (1,), How.PRUNE: (1, 2), How.SPN: (1,)}
        try:
            how = How(word)
            if len(values) not in counts[how]:
                raise ValueError
            if how is How.SPN:
                found.append(Cut(how, spn=int(values[0])))
            else:
                share, flops = [*map(float, values), 1.0, 1.0][:2]
                found.append(Cut(how, share, flops))
        except ValueError as error:
            why = f" ({error})" if str(error).startswith(tuple(How)) else ""
            known = "level, widths:0.5, prune:0.25, prune:0.25:0.4, spn:4"
            raise ValueError(f"{part!r} is no cut{why}; write {known}, with + between several") from error
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a network takes: parameters, FLOPs of a frame (2 per multiply-add of convolutions), bytes of its values.

    Parameters of one-image networks include the running statistics, as Keras counts, those of AnyNets do not.
    """

    parameters: int
    flops: int
    nbytes: int


def parameter_count(network: nn.Module) -> int:
    """As `Sizes` says."""
    return value_count(network) if isinstance(network, DepthNet) else sum(p.numel() for p in network.parameters())


def sizes(network: nn.Module, height: int, width: int) -> Sizes:
    """The sizes of a network for frames of height x width, which must be multiples of its stride."""
    return Sizes(parameter_count(network), _flops(network, height, width), 4 * value_count(network))


def _flops(network: nn.Module, height: int, width: int) -> int:
    mono = isinstance(network, DepthNet)
    device = "meta" if mono else "cpu"  # a pair's network is small, and most of its operators are slow without values
    copied = copy.deepcopy(network).to(device).eval()
    images = [torch.zeros(1, 3, height, width, device=device)] * (1 if mono else 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copied(*images)
    return int(counter.get_total_flops())


def taylor(network: nn.Module, losses: Callable[[nn.Module], Iterator[torch.Tensor]]) -> Scores:
    """First-order importance of every channel, from `losses` of the network in training mode; it stays as it is."""
    network = copy.deepcopy(network).train()
    have = channels.groups(network)
    found = {name: torch.zeros(width) for name, width in have.items()}
    modules = dict(network.named_modules())
    for loss in losses(network):
        network.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        changes = {name: torch.zeros(width) for name, width in have.items()}
        for wire in channels.wires(network):
            change = sum(_change(parameter) for parameter in modules[wire.name].parameters())
            assert isinstance(change, torch.Tensor)
            written = wire.writes or wire.reads
            for name, part in zip(written, change.chunk(len(written)), strict=True):
                if name in changes:
                    changes[name] += part.cpu()
        for name, change in changes.items():
            found[name] += change.square()
    return found


def _change(parameter: torch.Tensor) -> torch.Tensor:
    """Of the loss, were each output's values 0: (outputs)."""
    if parameter.grad is None:
        return parameter.new_zeros(parameter.shape[0])
    return (
        (parameter.detach() * parameter.grad).flatten(1).sum(1)
        if parameter.ndim > 1
        else parameter.detach() * parameter.grad
    )


def apply(network: nn.Module, cuts: tuple[Cut, ...], judge: Judge) -> nn.Module:
    """The network after all cuts, in evaluation mode; always the same. ValueError for a cut that does not suit it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a bottleneck that does not fit starts anew
        return _apply(network, cuts, judge)


def _apply(network: nn.Module, cuts: tuple[Cut, ...], judge: Judge) -> nn.Module:
    whole = parameter_count(network), 0
    if any(cut.how is How.PRUNE and cut.flops < 1 for cut in cuts):  # counting takes a moment
        whole = whole[0], _flops(network, _side(network), _side(network))
    for cut in cuts:
        if cut.how is How.LEVEL:
            network = channels.without_level(_need(network, DepthNet, cut))
        elif cut.how is How.SPN:
            network = _spn(_need(network, AnyNet, cut), cut.spn, judge)
        elif cut.how is How.WIDTHS:
            network = _even(network, cut.share, judge(network))
        else:
            work = cut.flops * whole[1] if cut.flops < 1 else math.inf
            network = prune(network, judge(network), round(cut.share * whole[0]), work)
    return network.eval()


def _need(network: nn.Module, wanted: type[N], cut: Cut) -> N:
    if not isinstance(network, wanted):
        raise ValueError(f"{cut.how} is no cut for an {type(network).__name__}; use widths or prune")
    return network


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.topk(count).indices.sort().values


def _even(network: nn.Module, share: float, scores: Scores) -> nn.Module:
    """That share of every group; of an SPN whole channels."""
    widths = {name: max(1, round(share * width)) for name, width in channels.groups(network).items()}
    widths |= {name: 2 * widths[SPN] for name in widths if name.startswith("guide.")}
    return channels.cut(network, {name: _best(scores[name], width) for name, width in widths.items()})


def _spn(network: AnyNet, count: int, judge: Judge) -> nn.Module:
    if count == 0:
        return channels.without_spn(network)
    if not count <= network.shape.spn:
        raise ValueError(f"the network has {network.shape.spn} SPN channels, so {count} cannot stay; ask for fewer")
    scores = judge(network)
    guides = {f"guide.{k}": _best(scores[f"guide.{k}"], 2 * count) for k in range(3)}
    return channels.cut(network, {SPN: _best(scores[SPN], count), **guides})


def prune(network: nn.Module, scores: Scores, parameters: int, flops: float = math.inf) -> nn.Module:
    """Take channels away until at most so many parameters, and FLOPs of a frame of 64 x 64, are left.

    An SPN stays whole. ValueError if a LEAST part of every group is still too much.
    """
    costs = _Costs(network)
    widths = dict(channels.groups(network))
    queues = {  # least important first; SPN channels are tied to their guide
        name: scores[name].argsort().tolist() for name in widths if name != SPN and not name.startswith("guide.")
    }
    floors = {name: max(min(2, widths[name]), math.ceil(LEAST * widths[name])) for name in queues}
    gone: dict[str, int] = dict.fromkeys(queues, 0)
    budget = (float(parameters), flops)
    now = costs(widths)
    while any(have > want for have, want in zip(now, budget, strict=True)):
        best: tuple[float, str, tuple[float, float]] | None = None
        for name, queue in queues.items():
            if widths[name] <= floors[name]:
                continue
            then = costs({**widths, name: widths[name] - 1})
            over = [(a - b) / (a - want) for a, b, want in zip(now, then, budget, strict=True) if a > want]
            price = float(scores[name][queue[gone[name]]]) / sum(over)
            if best is None or price < best[0]:
                best = price, name, then
        if best is None:
            why = f"{now[0]:.0f} parameters and {now[1]:.0f} FLOPs of 64x64 are the fewest that pruning leaves"
            raise ValueError(f"{why}; ask for more than {parameters}, or cut something else first")
        _, name, now = best
        gone[name] += 1
        widths[name] -= 1
    keep = {name: torch.tensor(sorted(queue[gone[name] :])) for name, queue in queues.items()}
    return channels.cut(network, keep)


def _side(network: nn.Module) -> int:
    """Height and width of the frame whose FLOPs a budget counts."""
    return max(FRAME, network.shape.stride) if isinstance(network, DepthNet) else FRAME


class _Costs:
    """Parameters, and FLOPs of a frame, of a network were its groups of other widths."""

    def __init__(self, network: nn.Module) -> None:
        modules = dict(network.named_modules())
        have, side = channels.groups(network), _side(network)
        self.terms: list[tuple[tuple[str, ...], tuple[str, ...], int, int, float]] = []
        for wire in channels.wires(network):
            weight = modules[wire.name].get_parameter("weight")
            if weight.ndim == 1:  # a norm: two parameters, two statistics
                self.terms.append((wire.reads, (), 0, 4 if isinstance(network, DepthNet) else 2, 0.0))
                continue
            more = int(getattr(modules[wire.name], "bias", None) is not None)
            kernel = weight[0, 0].numel()
            self.terms.append((wire.reads, wire.writes, kernel, more, 2 * kernel * wire.area * side**2))
        modelled = self(have)
        self.rest = parameter_count(network) - modelled[0], _flops(network, side, side) - modelled[1]

    rest: tuple[float, float] = (0.0, 0.0)

    def __call__(self, widths: Mapping[str, int]) -> tuple[float, float]:
        """Both costs."""
        parameters, flops = self.rest
        for reads, writes, kernel, more, work in self.terms:
            given = sum(widths[name] if name in widths else OUTSIDE[name] for name in reads)
            made = sum(widths[name] if name in widths else OUTSIDE[name] for name in writes)
            parameters += kernel * given * made + more * (made or given)
            flops += work * given * made
        return parameters, flops
