"""What a step of a model costs on a unit: where it is from, a forecast (here) or a measured profile (measured.py).

A frame of a vision or audio model, on a unit with stated shares of its peaks (models.toml, UnitShares):

    seconds   max(FLOPs / (peak * compute), bytes / (bandwidth * memory)) + start
    bytes     (weights + numbers moved) in the width of the unit's type: 4 on a CPU, 2 on an iGPU, 1 on an NPU
    demand    bytes / seconds / what all units together read: the share of the shared memory that the step asks for
    energy    watts of the unit * seconds; None where the device file knows no watts of the unit

A step of a language model is the forecast's (profiles.account): chunks and single tokens behind every 128 tokens of
context, with the shares for language models. Recipes are stored as the export stores them for the unit: where a unit
has no kernel for 2 bits the codes take 4, so a 2-bit recipe saves nothing there, and is no choice of that unit.

What this does not know: what frames of a batch would cost together, clocks that fall, and caches that keep weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from rlkit.profiles import places
from rlkit.profiles.account import Model, total
from rlkit.profiles.device import Device
from rlkit.profiles.hardware import Efficiency, Unit, Value
from rlkit.profiles.operators import cache_nbytes
from rlkit.profiles.places import Place
from rlkit.profiles.scheduling.modelsizes import ModelSize, Sizes, UnitShares, built_in
from rlkit.profiles.scheduling.workload import CONTEXT
from rlkit.recover import recipe as recipes

WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
WORTH = 0.98  # a recipe that stores more than this of another's bytes is no choice beside it
UNITS = ("cpu", "igpu", "npu", "gpu")


class Cost(NamedTuple):
    """A step alone on its unit: ns, share of the shared bandwidth, millijoule where known."""

    ns: int
    demand: float
    millijoule: float | None


@dataclass(frozen=True, slots=True)
class FrameCost:
    """A model's frame on a unit, the bytes its weights take there, and what the numbers rest on."""

    cost: Cost
    weights_nbytes: int
    source: str


@dataclass(frozen=True, slots=True)
class LanguageCost:
    """A language model with one recipe on a unit.

    decode[i]: a token behind i * 128 .. i * 128 + 127 tokens of context; prefill[c][i]: a chunk of c tokens there;
    least[i]: a chunk of one token. kv_nbytes: of the cache per token.
    """

    weights_nbytes: int
    kv_nbytes: int
    prefill: Mapping[int, tuple[Cost, ...]]
    least: tuple[int, ...]
    decode: tuple[Cost, ...]
    source: str


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """A unit as schedules see it: what starting another model and the first use of one cost there."""

    name: str
    title: str
    switch_ns: int
    load_bytes_per_s: float
    start_ns: int


class Costs(Protocol):
    """What settings are made of: a forecast of a device, or a machine's measured profile."""

    @property
    def name(self) -> str:
        """The device."""
        ...

    @property
    def units(self) -> tuple[UnitFacts, ...]:
        """Its units, in the order of preference of a static choice."""
        ...

    @property
    def bytes_per_s(self) -> float:
        """What all units together read."""
        ...

    @property
    def memory_nbytes(self) -> int | None:
        """Memory of the machine; None if not known."""
        ...

    def having(self, models: Mapping[str, ModelSize]) -> Costs:
        """These costs with the sizes of further models, where sizes are what they are made of."""
        ...

    def known(self, model: str) -> bool:
        """Whether there is such a model at all."""
        ...

    def names(self) -> tuple[str, ...]:
        """The models there are."""
        ...

    def context(self, model: str) -> int | None:
        """The longest context of a language model; None for other models."""
        ...

    def frame(self, model: str, unit: str) -> FrameCost:
        """A frame; ValueError with the reason where the unit cannot run it."""
        ...

    def language(self, model: str, unit: str, recipe: str, chunks: Sequence[int], tokens: int) -> LanguageCost:
        """Steps up to `tokens` of context; ValueError with the reason where the unit cannot run it."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What the numbers rest on, as sentences."""
        ...


class Forecast:
    """Costs on a registered device, from its data sheet and stated shares: nothing is run."""

    def __init__(
        self, device: Device, models: Mapping[str, ModelSize] | None = None, sizes: Sizes | None = None
    ) -> None:
        """`models` come on top of the table. ValueError for a device whose memory bandwidth is not known."""
        self._table = table = sizes or built_in()
        self.device, self._models = device, {**table.models, **(models or {})}
        if device.bandwidth is None:
            raise ValueError(f"{device.name} has no known memory bandwidth, which all units share; use another device")
        self.name, self.bytes_per_s = device.name, device.bandwidth.value
        self.memory_nbytes = device.memory_nbytes
        self._shares = {name: table.units[name] for name in device.units}
        self._units = {name: _shared_out(unit, self._shares[name]) for name, unit in device.units.items()}
        self._kept: dict[tuple[str, str, str], Model] = {}
        self._steps: dict[tuple[str, str, str, int, int], Cost] = {}
        self.units = tuple(_facts(self._units[name], self._shares[name]) for name in UNITS if name in self._units)

    def having(self, models: Mapping[str, ModelSize]) -> Forecast:
        """With sizes on top of the table."""
        return Forecast(self.device, {**self._models, **models}, self._table) if models else self

    def known(self, model: str) -> bool:
        """Whether the table has it."""
        return model in self._models

    def names(self) -> tuple[str, ...]:
        """All of the table."""
        return tuple(self._models)

    def context(self, model: str) -> int | None:
        """The longest context of a language model."""
        architecture = self._models[model].architecture
        return None if architecture is None else architecture.max_context

    def frame(self, model: str, unit: str) -> FrameCost:
        """By FLOPs, bytes and the shares."""
        size, shares, there = self._size(model, unit), self._shares[unit], self._units[unit]
        if size.architecture is not None:
            raise ValueError(f"{model} is a language model; use it in [requests]")
        width = WIDTHS[shares.kind]
        nbytes = width * (size.weights + size.moved)
        compute = size.flops / (there.peak(shares.kind).value * shares.compute)
        seconds = max(compute, nbytes / (there.bytes_per_s * shares.memory)) + shares.start_ns / 1e9
        energy = None if there.watts is None else 1e3 * there.watts * seconds
        return FrameCost(self._cost(seconds, nbytes, energy), round(width * size.weights), size.basis)

    def language(self, model: str, unit: str, recipe: str, chunks: Sequence[int], tokens: int) -> LanguageCost:
        """By the forecast, behind every 128 tokens of context; steps start in its middle."""
        size = self._size(model, unit)
        if size.architecture is None:
            raise ValueError(f"{model} is no language model; use it in [streams]")
        made = self._prepared(size, unit, recipe)
        pasts = [past + CONTEXT // 2 for past in range(0, max(tokens, 1), CONTEXT)]
        watts = self._units[unit].watts

        def cost(new: int, past: int) -> Cost:
            key = model, unit, recipe, new, past
            if key not in self._steps:
                step = total(made.account(new, (past,)))
                energy = None if watts is None else 1e3 * watts * step.seconds
                self._steps[key] = self._cost(step.seconds, step.nbytes, energy)
            return self._steps[key]

        decode = tuple(cost(1, past) for past in pasts)
        return LanguageCost(
            weights_nbytes=made.stored_nbytes,
            kv_nbytes=cache_nbytes(size.architecture, made.place.storage.kv, CONTEXT, 1) // CONTEXT,
            prefill={chunk: tuple(cost(chunk, past) for past in pasts) for chunk in chunks},
            least=tuple(each.ns for each in decode),
            decode=decode,
            source=f"forecast, {self._shares[unit].source}; {size.basis}",
        )

    def notes(self) -> tuple[str, ...]:
        """Shares of units, and their sources."""
        lines = [
            f"{name}: {100 * one.compute:.0f} % of the {one.kind} peak and {100 * one.memory:.0f} % of the bandwidth "
            f"for frames, {100 * one.language_compute:.0f} and {100 * one.language_memory:.0f} % for language models "
            f"({one.source})"
            for name, one in self._shares.items()
        ]
        silent = [name for name, unit in self._units.items() if unit.watts is None]
        if silent:
            lines.append(f"no watts are known of {', '.join(silent)}: no energy there")
        if self.memory_nbytes is None:
            lines.append(
                f"how much memory {self.name} has is not known: all fits; say it with --device {self.name}@32GB"
            )
        return tuple(lines)

    def _size(self, model: str, unit: str) -> ModelSize:
        size = self._models[model]
        if unit not in size.units:
            raise ValueError(f"{model} does not run on the {unit}: {size.why}")
        return size

    def _prepared(self, size: ModelSize, unit: str, recipe: str) -> Model:
        key = size.name, unit, recipe
        if key not in self._kept:
            assert size.architecture is not None
            place = self._place(unit)
            chosen = recipes.load(recipe)
            made = Model(size.architecture, chosen, place)
            if place.stored(chosen) != chosen:
                first = Model(size.architecture, recipes.load("w4"), place)
                if made.stored_nbytes > WORTH * first.stored_nbytes and recipe != "w4":
                    raise ValueError(f"{recipe} is stored as 4 bits on the {unit}, which has no kernel for less")
            self._kept[key] = made
        return self._kept[key]

    def _place(self, unit: str) -> Place:
        return places.of_unit(self.device, self._units[unit])

    def _cost(self, seconds: float, nbytes: float, millijoule: float | None) -> Cost:
        return Cost(max(round(1e9 * seconds), 1), min(nbytes / seconds / self.bytes_per_s, 1.0), millijoule)


def _shared_out(unit: Unit, shares: UnitShares) -> Unit:
    """The unit with its shares for language models, unless it was calibrated, and the bandwidth that is known of it."""
    bandwidth = unit.bandwidth
    if bandwidth is None and shares.bytes_per_s is not None:
        date = unit.shared.date if unit.shared else "2026"
        bandwidth = Value(shares.bytes_per_s, "B/s", shares.source, date, "quoted", unverified=True)
    each = Efficiency(shares.language_compute, shares.language_memory)
    efficiency = unit.efficiency or {"linear": each, "attention": each, "elementwise": each}
    return replace(unit, efficiency=efficiency, bandwidth=bandwidth)


def _facts(unit: Unit, shares: UnitShares) -> UnitFacts:
    return UnitFacts(unit.name, unit.title, shares.switch_ns, shares.load_bytes_per_s, shares.start_ns)
