"""How long an operator takes somewhere: the seam between what a model needs and what a unit can do.

    compute   FLOPs / (peak * share)     memory   bytes / (bandwidth * share)     dispatch   launches * dispatch
    seconds   max(compute, memory) + dispatch

`Peaks` takes every share as 1, so its times are bounds and labelled uncalibrated. `Calibrated` has the shares that a
device file gives for each class of operators; `profiles.measured` looks up what this machine took. What none of them
knows: operators that overlap, clocks that fall under load, and other work on the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from rlkit.profiles.hardware import Efficiency, Unit, Value
from rlkit.profiles.machine import Machine
from rlkit.profiles.step import Kind, Operator

UNCALIBRATED, CALIBRATED = "uncalibrated", "calibrated"
# What units multiply in: numbers that are floats, and packed weights. CPU kernels of packed weights (accuracy level 4)
# make int8 of the activations; the others make floats of the weights.
TYPES = {"cpu": ("fp32", "int8"), "igpu": ("fp16", "fp16"), "gpu": ("fp16", "fp16"), "npu": ("bf16", "bf16")}
PRODUCTS = (Kind.LINEAR, Kind.EXPERTS, Kind.ADAPTER, Kind.CONV)
PACKED_BITS = 8  # the widest codes
STRAIGHT = 1e-5


class Spent(NamedTuple):
    """Seconds that one run of an operator computes, moves bytes and is started; the first two overlap."""

    compute: float
    memory: float
    dispatch: float

    @property
    def seconds(self) -> float:
        """From start to end."""
        return max(self.compute, self.memory) + self.dispatch


@dataclass(frozen=True, slots=True)
class Band:
    """Between which factors of the forecast the truth is expected, for TTFT and TPOT, and why."""

    ttft: tuple[float, float]
    tpot: tuple[float, float]
    basis: str


class Rates(Protocol):
    """What a forecast asks of the place where a model runs."""

    @property
    def label(self) -> str:
        """UNCALIBRATED or CALIBRATED."""
        ...

    @property
    def bytes_per_s(self) -> float:
        """What the baseline bytes / bandwidth divides by."""
        ...

    @property
    def dispatch_seconds(self) -> float:
        """What starting an operator takes; 0 if that is not known."""
        ...

    @property
    def prompt_seconds(self) -> float:
        """What a reply takes beside the model up to its first token."""
        ...

    @property
    def token_seconds(self) -> float:
        """What a token takes beside the model."""
        ...

    @property
    def straight(self) -> float:
        """How far from the line between them times may be at depths between two others, as a share."""
        ...

    def fitted(self, streamed_nbytes: float, vocab: int, layers: int) -> Rates:
        """These rates for a model of which a decode step reads so much."""
        ...

    @property
    def roofs(self) -> dict[str, float]:
        """FLOP/s (OP/s) of the roofs that operators meet, by name."""
        ...

    @property
    def band(self) -> Band:
        """How far off it may be."""
        ...

    def spent(self, op: Operator) -> Spent:
        """Seconds of one run of an operator."""
        ...

    def assumptions(self) -> tuple[str, ...]:
        """What the numbers rest on, as sentences."""
        ...


class Bounds:
    """What rates have in common that are made of peaks: the same for every model, which is all they count."""

    __slots__ = ()

    @property
    def prompt_seconds(self) -> float:
        """Unknown, counted as 0."""
        return 0.0

    token_seconds = prompt_seconds

    @property
    def straight(self) -> float:
        """Bounds are straight but for windows and changes from one bound to the other."""
        return STRAIGHT

    def fitted(self, streamed_nbytes: float, vocab: int, layers: int) -> Self:
        """The same for every model."""
        return self


@dataclass(frozen=True, slots=True)
class Peaks(Bounds):
    """Peaks and bandwidth, reached in full; `packed_flops_per_s` of None: products of packed weights run like floats.

    `roof` and `packed_roof` name the two rates in charts; `notes` are further sentences about where they are from.
    """

    bytes_per_s: float
    flops_per_s: float
    dispatch_seconds: float = 0.0
    source: str = "given"
    packed_flops_per_s: float | None = None
    roof: str = "fp32"
    packed_roof: str = "int8"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rates = [self.bytes_per_s, self.flops_per_s, self.packed_flops_per_s or 1.0]
        if not (all(0 < rate < float("inf") for rate in rates) and 0 <= self.dispatch_seconds < float("inf")):
            said = f"{self.bytes_per_s:g} bytes/s and {self.flops_per_s:g} FLOP/s"
            raise ValueError(f"{said} cannot be divided by; bandwidth and FLOP/s must be positive")

    @classmethod
    def of(cls, machine: Machine) -> Peaks:
        """The measured peaks of a machine; the cost of starting an operator is unknown and counted as 0."""
        source = f"{machine.cpu}, {machine.source} {machine.date}"
        note = "low-bit kernels compute in int8, whose peak is not measured: where compute bounds, they may be faster"
        return cls(machine.read_bytes_per_s, machine.flops_per_s, 0.0, source, notes=(note,))

    @classmethod
    def of_unit(cls, unit: Unit) -> Peaks:
        """The peaks of a registered unit; ValueError naming what is not known of it."""
        names = [_peak_name(unit, kind) for kind in TYPES[unit.name]]
        rates = [unit.peaks[name] for name in names]
        said = {name: f"{name} {_rate_text(rate)} ({_origin(rate)})" for name, rate in zip(names, rates, strict=True)}
        reads = unit.reads
        notes = [f"peaks: {', '.join(said.values())}; {reads.value / 1e9:.1f} GB/s ({_origin(reads)})"]
        for asked, name in zip(TYPES[unit.name], names, strict=True):
            if not name.startswith(asked):
                notes.append(f"no rate for {asked} is known there; that of {name} stands in for it")
        if any(value.unverified for value in (*rates, reads)):
            notes.append("some of these numbers are second-hand")
        return cls(
            bytes_per_s=reads.value,
            flops_per_s=rates[0].value,
            dispatch_seconds=unit.dispatch_seconds,
            source="profiles/devices.toml or the user's file",
            packed_flops_per_s=rates[1].value,
            roof=names[0],
            packed_roof=names[1],
            notes=tuple(dict.fromkeys(notes)),
        )

    @property
    def label(self) -> str:
        """Uncalibrated: no kernel reaches its peak."""
        return UNCALIBRATED

    @property
    def roofs(self) -> dict[str, float]:
        """The rate of floats, and that of packed weights if it is another."""
        packed = {} if self.packed_flops_per_s is None else {self.packed_roof: self.packed_flops_per_s}
        return {self.roof: self.flops_per_s, **packed}

    @property
    def band(self) -> Band:
        """From what others measured beside such bounds."""
        lowest = 1.0 if self.packed_flops_per_s is not None else 0.25  # int8 may be four times as fast as float32
        why = (
            "decoding with llama.cpp was seen at 65 to 97 % of bytes / bandwidth, its prefill at 17 % of an iGPU's "
            "peak and more; small models, whose operators are not worth their start, are slower than this band"
        )
        return Band((lowest, 6.0), (1.0, 1.55), why)

    def rate(self, op: Operator) -> float:
        """The peak that bounds an operator's arithmetic, FLOP/s."""
        if self.packed_flops_per_s is not None and op.kind in PRODUCTS and 0 < op.bits <= PACKED_BITS:
            return self.packed_flops_per_s
        return self.flops_per_s

    def spent(self, op: Operator) -> Spent:
        """Seconds of one run at the peaks."""
        compute, memory = op.flops / self.rate(op), op.nbytes / self.bytes_per_s
        return Spent(compute, memory, op.launches * self.dispatch_seconds)

    def assumptions(self) -> tuple[str, ...]:
        """Efficiencies of 1, sources, and the cost of starting an operator."""
        rates = " or ".join(f"{rate / 1e9:.0f} GFLOP/s ({name})" for name, rate in self.roofs.items())
        lines = [
            f"{UNCALIBRATED}: every operator is taken to reach {self.bytes_per_s / 1e9:.1f} GB/s or {rates}; what "
            f"share kernels really reach is unknown ({self.source})",
            *self.notes,
        ]
        if self.dispatch_seconds:
            lines.append(f"starting an operator takes {1e6 * self.dispatch_seconds:.1f} us")
        else:
            unknown = "the cost of starting an operator is unknown and counted as 0"
            lines.append(f"{unknown}: small models will be slower than forecast")
        return tuple(lines)


def _peak_name(unit: Unit, kind: str) -> str:
    """The peak for a data type; where neither it nor a wider one is known, that for int8."""
    try:
        return unit.peak_name(kind)
    except ValueError:
        try:
            return unit.peak_name("int8")
        except ValueError:
            pass
        raise


def _rate_text(rate: Value) -> str:
    return f"{rate.value / 1e12:.2f} T{rate.unit}" if rate.value >= 1e12 else f"{rate.value / 1e9:.0f} G{rate.unit}"


def _origin(value: Value) -> str:
    return f"{value.basis}: {value.source}, {value.date}"


# A class that was not measured goes at the shares of one that does the like.
LIKE = {
    Kind.EXPERTS: (Kind.LINEAR,),
    Kind.CONV: (Kind.LINEAR,),
    Kind.ADAPTER: (Kind.LINEAR,),
    Kind.EMBEDDING: (Kind.ELEMENTWISE, Kind.NORM),
    Kind.NORM: (Kind.ELEMENTWISE,),
    Kind.ELEMENTWISE: (Kind.NORM,),
}


@dataclass(frozen=True, slots=True)
class Calibrated(Bounds):
    """A unit whose efficiencies were measured: peaks, and by class of operators the share of them that was reached."""

    peaks: Peaks
    shares: Mapping[str, Efficiency]
    date: str

    @classmethod
    def of_unit(cls, unit: Unit) -> Calibrated:
        """Of a unit with efficiencies; ValueError if it has none."""
        if not unit.efficiency:
            raise ValueError(f"the {unit.name} was not calibrated; run `rlkit calibrate` on it, or use its peaks")
        return cls(Peaks.of_unit(unit), unit.efficiency, unit.reads.date)

    @property
    def label(self) -> str:
        """Calibrated."""
        return CALIBRATED

    @property
    def dispatch_seconds(self) -> float:
        """As the device file says."""
        return self.peaks.dispatch_seconds

    @property
    def bytes_per_s(self) -> float:
        """The measured read bandwidth."""
        return self.peaks.bytes_per_s

    @property
    def roofs(self) -> dict[str, float]:
        """The measured peaks."""
        return self.peaks.roofs

    @property
    def band(self) -> Band:
        """A guess until compared with whole models."""
        why = "shares are those of single operators in short runs; whole models were not compared with them here"
        return Band((0.7, 1.4), (0.7, 1.4), why)

    def spent(self, op: Operator) -> Spent:
        """Seconds of one run at the shares of its class."""
        share = self._share(op.kind)
        compute, memory, dispatch = self.peaks.spent(op)
        if share is None:
            return Spent(compute, memory, dispatch)
        return Spent(compute / (share.compute or 1.0), memory / (share.memory or 1.0), dispatch)

    def _share(self, kind: Kind) -> Efficiency | None:
        names = (kind, *LIKE.get(kind, ()))
        return next((self.shares[name] for name in names if name in self.shares), None)

    def assumptions(self) -> tuple[str, ...]:
        """Which classes were measured, and which only stand in for others."""
        measured = ", ".join(self.shares)
        lines = [
            f"{CALIBRATED} on {self.date}: shares of peak and bandwidth as measured for {measured}",
            *self.peaks.notes,
        ]
        unmeasured = [
            str(kind) for kind in Kind if kind not in self.shares and kind != Kind.CONV
        ]  # no language model has any
        if unmeasured:
            lines.append(f"not measured: {', '.join(unmeasured)}; they go at the shares of the class most like them")
        lines.append(f"starting an operator takes {1e6 * self.peaks.dispatch_seconds:.1f} us")
        return tuple(lines)
