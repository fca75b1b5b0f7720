"""The command `devices`: what is known of the devices that forecasts are made for, and where each number is from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.profiles import devicefile
from rlkit.profiles.device import Device, Unit, Value, find, load

LISTED_TYPES = ("fp32", "fp16", "bf16", "int8")
_PRETTY = {
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")),
    "OP/s": ((1e12, "TOP/s"), (1e9, "GOP/s")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s")),
    "B": ((1e9, "GB"), (1e6, "MB")),
    "s": ((1e-3, "ms"), (1e-6, "us")),
    "W": ((1.0, "W"),),
}


def devices(
    name: Annotated[str | None, typer.Argument(help="A device, or one unit of it: hx370, hx370:igpu, here.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="A TOML file of your own devices, in the form of devices.toml.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """List the devices that forecasts know, or every number of one with its source.

    Another memory or size is chosen with @: hx370@ddr5-5600, max395@64GB. A file of your own starts with
    schema_version = 1 and has a table per device; `like = "hx370"` takes over what it does not say.

    Example: rlkit devices hx370:igpu
    """
    known = load(file)
    if name is None:
        _list(known, json=json)
        return
    device, unit = find(name, known)
    shown = {unit.name: unit} if ":" in name else dict(device.units)
    if json:
        console.emit_json({"schema_version": 1, "device": _json(device, shown)})
    else:
        _show(device, shown)


def _list(known: dict[str, Device], *, json: bool) -> None:
    if json:
        rows = [_json(device, dict(device.units)) for device in known.values()]
        console.emit_json({"schema_version": 1, "devices": rows})
        return
    columns = ("device", "", "unit", "GB/s", *LISTED_TYPES, "TDP W", "basis")
    console.table(columns, [row for device in known.values() for row in _rows(device)])
    console.say("fp in TFLOP/s, int in TOP/s.  *: what all units share, not what this one was seen to read")
    console.say("?: second-hand.  -: not known.  Every number with its source: rlkit devices NAME")


def _rows(device: Device) -> Iterator[tuple[str, ...]]:
    """One line per unit; the device's own columns on its first."""
    head = (device.name, device.title)
    for unit in device.units.values():
        values = [_own(unit, kind) for kind in LISTED_TYPES]
        reads = _reads(unit)
        bases = dict.fromkeys(value.basis for value in (reads, *values) if value is not None)
        basis = "calibrated" if unit.calibrated else ", ".join(bases) or "-"
        speed = _number(reads, 1e9) + ("*" if reads is not None and reads is unit.shared else "")
        figures = [_number(value, 1e12) for value in values]
        yield (*head, unit.name, speed, *figures, _number(device.tdp, 1.0), basis)
        head = ("", "")


def _own(unit: Unit, kind: str) -> Value | None:
    """A unit's rate in a data type itself, not in a wider one."""
    peak = unit.defaults.get(kind, kind)
    return unit.peaks.get(peak)


def _reads(unit: Unit) -> Value | None:
    return unit.reads if unit.bandwidth or unit.shared else None


def _number(value: Value | None, scale: float) -> str:
    return "-" if value is None else f"{value.value / scale:.4g}{'?' if value.unverified else ''}"


def _pretty(value: Value) -> str:
    """A value in the unit that a person uses for it."""
    scales = _PRETTY[value.unit]
    scale, unit = next(((scale, unit) for scale, unit in scales if value.value >= scale), scales[-1])
    return f"{value.value / scale:.4g} {unit}"


def _show(device: Device, units: dict[str, Unit]) -> None:
    console.emit(f"{device.name}: {device.title}")
    if device.aliases:
        console.emit(f"also called {', '.join(device.aliases)}")
    for unit in units.values():
        console.emit(f"{device.name}:{unit.name}  {unit.title}".rstrip())
    console.table(("what", "value", "basis", "date", "source"), list(_cells(device, units)))
    for unit in units.values():
        console.emit(f"{device.name}:{unit.name} forecasts use {'; '.join(_used(unit))}")


def _cells(device: Device, units: dict[str, Unit]) -> Iterator[tuple[str, ...]]:
    for what, value in _values(device, units):
        basis = f"{value.basis}?" if value.unverified else value.basis
        source = f"{value.source}; {value.note}" if value.note else value.source
        yield what, _pretty(value), basis, value.date, source


def _values(device: Device, units: dict[str, Unit]) -> Iterator[tuple[str, Value]]:
    """Every number of a device and of some of its units, by a name that a person understands."""
    if device.tdp:
        yield "TDP", device.tdp
    for memory in device.memories:
        if memory.bandwidth:
            yield f"{memory.kind}, shared", memory.bandwidth
        yield from ((f"{memory.kind}, size", size) for size in memory.sizes)
    for name, unit in units.items():
        own = {"reads": unit.bandwidth, "dispatch": unit.dispatch, "decoding": unit.power, "may hold": unit.memory}
        yield from ((f"{name} {what}", value) for what, value in own.items() if value)
        for peak, value in unit.peaks.items():
            yield f"{name} {peak}", value


def _used(unit: Unit) -> Iterator[str]:
    """What a forecast divides by."""
    reads = _reads(unit)
    yield "no bandwidth" if reads is None else f"{_pretty(reads)}{' of shared memory' if reads is unit.shared else ''}"
    yield from (f"{kind} {peak.partition('-')[2]}" for kind, peak in unit.defaults.items())
    if unit.memory_nbytes:
        yield f"at most {unit.memory_nbytes / 1e9:.4g} GB"
    if unit.dispatch is None:
        yield "no cost of dispatch, as none is known"
    yield "measured efficiencies" if unit.calibrated else "full efficiency (uncalibrated)"


def _json(device: Device, units: dict[str, Unit]) -> dict[str, Any]:
    """A device as its file has it, and per unit what forecasts make of that."""
    table = {"name": device.name, **devicefile.to_table(device)}
    kept = {key: item for key, item in table.items() if key not in device.units or key in units}
    return kept | {"used": {name: _json_used(unit) for name, unit in units.items()}}


def _json_used(unit: Unit) -> dict[str, Any]:
    reads = _reads(unit)
    kinds = dict.fromkeys(peak.partition("-")[0] for peak in unit.peaks)
    return {
        "bytes_per_s": None if reads is None else reads.value,
        "dispatch_seconds": unit.dispatch_seconds,
        "memory_nbytes": unit.memory_nbytes,
        "watts": unit.watts,
        "peaks": {kind: unit.peak(kind).value for kind in kinds},
        "calibrated": unit.calibrated,
    }
