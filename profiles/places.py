"""Where a model runs: the rates of a unit, how the export stores and joins a model for it, and how much fits there.

    cpu    the CPU bundle: float32 activations, int8 products     igpu   the WebGPU bundle: float16
    npu    the folder for Ryzen AI: bfloat16, 2-bit codes in 4-bit fields     gpu   as the CPU bundle, in float16

What it does not know: copies that a runtime makes of weights, and memory that the system or other programs take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rlkit.export.targets import target_named
from rlkit.profiles.efficiency import Table
from rlkit.profiles.hardware import Device, Unit
from rlkit.profiles.machine import Machine
from rlkit.profiles.measured import Measured
from rlkit.profiles.operators import NAMED, Cache, Options, Storage
from rlkit.profiles.rates import Calibrated, Peaks, Rates
from rlkit.recover.recipe import Recipe, Rule

HALF = Storage(scale_bits=16, float_bits=16, activation_bits=16, kv=Cache(16))
# The runtime's int8 and int4 caches have one float32 scale per channel for all tokens.
CACHES = {
    "fp32": Cache(32),
    "fp16": Cache(16),
    "int8": Cache(8, 32, per="channel"),
    "int4": Cache(4, 32, per="channel"),
}
_GRAPHS = {"cpu": "cpu", "igpu": "webgpu", "npu": "dml", "gpu": "cpu"}  # names of step.NAMED


@dataclass(frozen=True, slots=True)
class Power:
    """Watts while prefilling and while decoding, None where unknown, and what kind of numbers they are."""

    prefill: float | None = None
    decode: float | None = None
    basis: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a phase runs. `widened`: bits of codes -> bits of the fields that hold them there.

    `shared` names the memory that places have in common: a cache made at one can be read at another of the same.
    """

    name: str
    rates: Rates
    storage: Storage = field(default_factory=Storage)
    options: Options = NAMED["cpu"]
    widened: Mapping[int, int] = field(default_factory=dict)
    memory_nbytes: int | None = None
    power: Power = Power()
    shared: str = ""

    def stored(self, recipe: Recipe | None) -> Recipe | None:
        """The recipe with its codes in the fields of this place."""
        if recipe is None or not any(rule.scheme.bits in self.widened for rule in recipe.rules):
            return recipe
        rules = tuple(
            Rule(rule.match, replace(rule.scheme, bits=self.widened.get(rule.scheme.bits, rule.scheme.bits)))
            for rule in recipe.rules
        )
        return replace(recipe, rules=rules)

    def having(self, *, cache: str | None = None, eager: bool = False) -> Place:
        """This place with another cache, or with nothing joined and every score stored, as frameworks run models.

        Raises ValueError naming the caches there are.
        """
        options = NAMED["eager"] if eager else self.options
        return replace(self, storage=replace(self.storage, kv=cache_named(cache, self.storage.kv)), options=options)


def cache_named(name: str | None, default: Cache) -> Cache:
    """A cache of CACHES; ValueError naming them."""
    if name is None:
        return default
    if name not in CACHES:
        raise ValueError(f"a cache of {name!r} is not known; use {', '.join(CACHES)}")
    return CACHES[name]


def of_unit(device: Device, unit: Unit, table: Table | None = None) -> Place:
    """A unit of a registered device, calibrated if it was; `table` is what `rlkit calibrate` left of this machine.

    Raises ValueError if too little is known of the unit.
    """
    try:
        rates: Rates = Calibrated.of_unit(unit) if unit.calibrated else Peaks.of_unit(unit)
        rates = rates if table is None else Measured(table, Peaks.of_unit(unit))
    except ValueError as error:
        raise ValueError(f"{device.name}: {error}") from error
    return Place(
        name=f"{device.name}:{unit.name}",
        rates=rates,
        storage=Storage() if unit.name == "cpu" else HALF,
        options=NAMED[_GRAPHS[unit.name]],
        widened={} if unit.name == "gpu" else target_named(unit.name).widened,
        memory_nbytes=unit.memory_nbytes,
        power=_power(device, unit),
        shared=device.name,
    )


def of_machine(machine: Machine) -> Place:
    """This computer's CPU with peaks as measured in a few seconds."""
    return Place("this machine:cpu", Peaks.of(machine), memory_nbytes=machine.memory_nbytes, shared="this machine")


def of_rates(rates: Rates, storage: Storage | None = None) -> Place:
    """A place of which only rates are known, with the CPU bundle unless `storage` says otherwise."""
    return Place("given rates", rates, storage or Storage())


def _power(device: Device, unit: Unit) -> Power:
    """What was measured; else the design power of the whole part, which an NPU is far below."""
    design = None if unit.name == "npu" else device.tdp_watts
    if unit.watts is None:
        return Power(design, design, "thermal design power of the part, not measured" if design else "")
    said = "while decoding as reported"
    return Power(design, unit.watts, f"{said}; while prefilling the design power" if design else said)
