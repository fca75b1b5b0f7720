"""What is known of a device: units (CPU, iGPU, NPU, GPU) with peaks and bandwidth, each number with where it is from.

    attainable rate = min(peak, arithmetic intensity * bandwidth)      the roofline that forecasts draw from a Unit

SI base units inside: FLOP/s (OP/s for integers), B/s, s, W, B. A number that nobody published or measured is absent,
never guessed. What this does not know: how much of a peak software reaches, unless a unit was calibrated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

BASES = ("measured", "derived", "quoted")
UNITS = ("cpu", "igpu", "npu", "gpu")
DATA_TYPES = ("fp32", "fp16", "bf16", "bfp16", "fp8", "int8", "int4")
# The kinds of profiles.step.Kind: what efficiencies are measured for.
CLASSES = ("linear", "adapter", "attention", "norm", "elementwise", "embedding", "experts", "conv")
# A type without a rate of its own is computed in the first of these that has one, since each holds all its values.
WIDER = {
    "int4": ("int8", "fp16", "bf16", "fp32"),
    "int8": ("fp16", "bf16", "fp32"),
    "fp8": ("fp16", "bf16", "fp32"),
    "bfp16": ("bf16", "fp32"),
    "fp16": ("fp32",),
    "bf16": ("fp32",),
    "fp32": (),
}
# Nothing that computes is slower or faster than this; what is, is a slip of the unit.
LIMITS = {
    "FLOP/s": (1e6, 1e18),
    "OP/s": (1e6, 1e18),
    "B/s": (1e6, 1e15),
    "s": (0.0, 1.0),
    "W": (1e-2, 1e5),
    "B": (1e6, 1e15),
}
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")


def type_of(peak: str) -> str:
    """The data type of a peak's name: fp16 of `fp16-wmma`."""
    return peak.partition("-")[0]


def rate_unit(peak: str) -> str:
    """What a peak of that name counts: operations for integers, floating-point operations for all else."""
    return "OP/s" if type_of(peak).startswith("int") else "FLOP/s"


@dataclass(frozen=True, slots=True)
class Value:
    """One number in a base unit, and how far to trust it.

    basis: "measured" on the device; "derived" by the arithmetic in `note`; "quoted" from whom `source` names.
    `unverified`: the source is second-hand, leaked or about a sibling of the part.
    """

    value: float
    unit: str
    source: str
    date: str
    basis: str
    note: str = ""
    unverified: bool = False

    def __post_init__(self) -> None:
        if self.unit not in LIMITS:
            raise ValueError(f"unit = {self.unit!r} is no base unit; use one of {', '.join(LIMITS)}")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise ValueError(f"value = {self.value!r} is no finite number; leave out what is not known")
        least, most = LIMITS[self.unit]
        if not least <= self.value <= most:
            why = "is negative" if self.value < 0 else f"is outside {least:g} to {most:g}"
            raise ValueError(f"value = {self.value:g} {self.unit} {why}; check the number and its unit")
        if self.basis not in BASES:
            raise ValueError(f"basis = {self.basis!r} is not known; use {', '.join(BASES)}")
        if not self.source.strip():
            raise ValueError("source is empty; say where the number is from")
        _is_line(self.source, "source")
        _is_line(self.note, "note")
        if not re.fullmatch(r"\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?", self.date):
            raise ValueError(f"date = {self.date!r} is none; write 2026, 2026-11 or 2026-11-22")


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured run of one operator: what it was, the work that the operator models count for it, and its seconds.

    bits and group: of its weights, or of the cache for attention; 0 if it has none.
    """

    tokens: int
    bits: int
    group: int
    flops: int
    nbytes: int
    seconds: float

    def __post_init__(self) -> None:
        counts = [getattr(self, name) for name in ("tokens", "bits", "group", "flops", "nbytes")]
        if any(type(count) is not int or not 0 <= count <= 10**18 for count in counts) or not self.tokens:
            raise ValueError(f"{self} has a count that is none; calibrate again")
        if not isinstance(self.seconds, int | float) or not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds = {self.seconds!r} is no duration; calibrate again")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How much of the unit's peak and bandwidth a class of operators reaches, and the runs that say so.

    Shares may exceed 1 where caches serve what is counted as memory traffic; None: not measured.
    """

    compute: float | None = None
    memory: float | None = None
    samples: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        for name in ("compute", "memory"):
            share = getattr(self, name)
            if share is not None and (
                isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 100
            ):
                raise ValueError(f"{name} = {share!r} is no share of a peak; it is above 0, and about 1 at most")


@dataclass(frozen=True, slots=True)
class Memory:
    """A kind of memory that the device is sold with: what all units together read of it, and the sizes it comes in."""

    kind: str
    bandwidth: Value | None = None
    sizes: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        if not self.kind.strip() or "@" in self.kind or ":" in self.kind:
            raise ValueError(f"kind = {self.kind!r} names no memory; write one as DDR5-5600")
        _is_line(self.kind, "kind")
        _has_unit(self.bandwidth, "bandwidth", "B/s")
        for size in self.sizes:
            _has_unit(size, "sizes", "B")


@dataclass(frozen=True, slots=True)
class Unit:
    """One part of a device that computes.

    peaks: by data type ("fp32") or variant of it ("fp32-dual", "fp16-wmma"); `defaults` says which variant a type
    means: {"fp16": "fp16-wmma"}. bandwidth: what this unit alone was seen to read. `shared` and `installed_nbytes`
    come from the device it belongs to, which sets them. `dispatch`: seconds to start an operator. `power`: while
    decoding. `memory`: the most this unit may hold, where that is less than the device's.
    """

    name: str
    title: str = ""
    peaks: Mapping[str, Value] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    bandwidth: Value | None = None
    dispatch: Value | None = None
    power: Value | None = None
    memory: Value | None = None
    efficiency: Mapping[str, Efficiency] = field(default_factory=dict)
    shared: Value | None = None
    installed_nbytes: int | None = None

    def __post_init__(self) -> None:
        if self.name not in UNITS:
            raise ValueError(f"unit {self.name!r} is not known; use {', '.join(UNITS)}")
        _is_line(self.title, "title")
        for name, unit in {"bandwidth": "B/s", "dispatch": "s", "power": "W", "memory": "B", "shared": "B/s"}.items():
            _has_unit(getattr(self, name), name, unit)
        for peak, value in self.peaks.items():
            if type_of(peak) not in DATA_TYPES or peak.endswith("-"):
                raise ValueError(f"peaks.{peak} is of no known data type; start it with {', '.join(DATA_TYPES)}")
            _has_unit(value, f"peaks.{peak}", rate_unit(peak))
        for name in self.efficiency:
            if name not in CLASSES:
                raise ValueError(f"efficiency.{name} is no class of operators; use {', '.join(CLASSES)}")
        self._check_defaults()

    def _check_defaults(self) -> None:
        for kind, peak in self.defaults.items():
            if peak not in self.peaks or type_of(peak) != kind or kind in self.peaks:
                known = [name for name in self.peaks if type_of(name) == kind and name != kind]
                raise ValueError(
                    f"peaks.{kind} = {peak!r} names no variant of it; use {', '.join(known) or 'a number'}"
                )
        for peak in self.peaks:
            if type_of(peak) not in self.defaults and type_of(peak) not in self.peaks:
                why = f"peaks.{peak} alone does not say what {type_of(peak)} is"
                raise ValueError(f'{why}; add {type_of(peak)} = "{peak}", or another variant')

    def peak_name(self, data_type: str) -> str:
        """Which entry of `peaks` answers for a data type: itself, its default variant, or those of a wider type.

        Raises ValueError naming what the unit has if it computes neither in this type nor in a wider one.
        """
        if data_type in self.peaks:
            return data_type
        for kind in (data_type, *WIDER.get(data_type, ())):
            if kind in self.peaks or kind in self.defaults:
                return self.defaults.get(kind, kind)
        have = ", ".join(self.peaks) or "no peak at all"
        raise ValueError(f"the {self.name} has no known rate for {data_type}, nor for a wider type; it has {have}")

    def peak(self, data_type: str) -> Value:
        """The rate (FLOP/s, OP/s) of a data type or variant, found as `peak_name` says; ValueError if there is none."""
        return self.peaks[self.peak_name(data_type)]

    @property
    def reads(self) -> Value:
        """What bounds its reading: its own bandwidth, unless the shared memory is slower or alone known.

        Raises ValueError if neither is known.
        """
        known = [value for value in (self.bandwidth, self.shared) if value is not None]
        if not known:
            raise ValueError(f"the {self.name} has no known bandwidth; add bandwidth or memory to the device's TOML")
        return min(known, key=lambda value: value.value)

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second that it reads at most; ValueError if nothing is known of that."""
        return self.reads.value

    @property
    def dispatch_seconds(self) -> float:
        """Seconds to start an operator; 0 where that is not known."""
        return self.dispatch.value if self.dispatch else 0.0

    @property
    def watts(self) -> float | None:
        """Watts while decoding; None if not known."""
        return self.power.value if self.power else None

    @property
    def memory_nbytes(self) -> int | None:
        """The most that a model, its cache and the rest may take here; None if not known."""
        limits = [self.installed_nbytes, int(self.memory.value) if self.memory else None]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def calibrated(self) -> bool:
        """Whether efficiencies of operators were measured on it."""
        return bool(self.efficiency)


@dataclass(frozen=True, slots=True)
class Device:
    """A machine or a card. The first of `units` is meant where none is named; the first of `memories` is assumed.

    `installed_nbytes`: the size of memory that was chosen or measured; None: any of the sizes on sale.
    """

    name: str
    title: str
    units: Mapping[str, Unit]
    memories: tuple[Memory, ...] = ()
    tdp: Value | None = None
    aliases: tuple[str, ...] = ()
    calibrated: bool = False
    installed_nbytes: int | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name of a device; use small letters, digits, dots and dashes")
        if not self.title.strip():
            raise ValueError("title is missing; say what the device is")
        for name, text in (("title", self.title), *(("aliases", alias) for alias in self.aliases)):
            _is_line(text, name)
        if not self.units:
            raise ValueError(f"no unit; give it one of {', '.join(UNITS)}")
        if any(name != unit.name for name, unit in self.units.items()):
            raise ValueError(f"units {', '.join(self.units)} do not go by their own names; key each by its name")
        if len({memory.kind.lower() for memory in self.memories}) < len(self.memories):
            raise ValueError("memory: a kind is given twice; keep one of them")
        _has_unit(self.tdp, "tdp", "W")
        # Units answer for what they share, so they are told; the only thing ever set in a frozen value.
        bound = {
            name: replace(unit, shared=self.bandwidth, installed_nbytes=self.memory_nbytes)
            for name, unit in self.units.items()
        }
        object.__setattr__(self, "units", bound)

    @property
    def memory(self) -> Memory | None:
        """The memory assumed: what was chosen, or the first on the list."""
        return self.memories[0] if self.memories else None

    @property
    def bandwidth(self) -> Value | None:
        """What all units together read at most (B/s)."""
        return self.memory.bandwidth if self.memory else None

    @property
    def memory_nbytes(self) -> int | None:
        """The memory it has, or the largest it is sold with if none was chosen; None if not known."""
        if self.installed_nbytes is not None:
            return self.installed_nbytes
        sizes = self.memory.sizes if self.memory else ()
        return max((int(size.value) for size in sizes), default=None)

    @property
    def tdp_watts(self) -> float | None:
        """Its default thermal design power; None if not known."""
        return self.tdp.value if self.tdp else None

    def with_memory(self, choice: str) -> Device:
        """This device with another memory: a kind it is sold with ("DDR5-5600"), or a size of any number ("32GB").

        Raises ValueError naming the kinds there are.
        """
        size = re.fullmatch(r"(\d{1,5})\s*gb", choice.strip().lower())
        if size and int(size[1]):
            return replace(self, installed_nbytes=int(size[1]) * 10**9)
        for memory in self.memories:
            if memory.kind.lower() == choice.strip().lower():
                others = tuple(other for other in self.memories if other is not memory)
                return replace(self, memories=(memory, *others))
        kinds = ", ".join(memory.kind for memory in self.memories) or "none listed"
        raise ValueError(f"{self.name} has no memory {choice!r}; there is {kinds}, or give a size such as 32GB")


def _has_unit(value: Value | None, name: str, unit: str) -> None:
    if value is not None and value.unit != unit:
        raise ValueError(f"{name} is in {value.unit}, not {unit}; check its unit")


def _is_line(text: str, name: str) -> None:
    if not text.isprintable():
        raise ValueError(f"{name} = {text!r} is no line of text; take out what cannot be printed")


def values_of(record: Any) -> dict[str, Any]:
    """A record's fields that say something, by name."""
    made = {item.name: getattr(record, item.name) for item in fields(record)}
    empty: tuple[object, ...] = ("", (), {})  # 0 says something
    return {
        name: value for name, value in made.items() if value is not None and value is not False and value not in empty
    }
