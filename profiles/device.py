"""Devices by name: those of the package (devices.toml), this machine's own once calibrated, and the user's file.

    hx370              its first unit            hx370@ddr5-5600:cpu    with another memory it is sold with
    hx370:igpu         that unit                 max395@64GB:igpu       with that much memory
    here               this machine as `rlkit calibrate` measured it; kept in the cache folder, devices/here.toml

Names and aliases are compared without regard to case, spaces, dashes, dots, underscores and plus signs.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlkit.profiles import devicefile
from rlkit.profiles.hardware import (
    CLASSES,
    DATA_TYPES,
    UNITS,
    WIDER,
    Device,
    Efficiency,
    Memory,
    Sample,
    Unit,
    Value,
    rate_unit,
    type_of,
)
from rlkit.recover import atomic
from rlkit.recover.cache import cache_folder

__all__ = [
    "BUILT_IN",
    "CLASSES",
    "DATA_TYPES",
    "HERE",
    "UNITS",
    "WIDER",
    "Device",
    "Efficiency",
    "Memory",
    "Sample",
    "Unit",
    "Value",
    "built_in",
    "find",
    "here_path",
    "load",
    "rate_unit",
    "save",
    "type_of",
]

BUILT_IN = Path(__file__).with_name("devices.toml")
HERE = "here"


def here_path() -> Path:
    """Where this machine's calibrated entry is kept; it may not exist yet."""
    return cache_folder() / "devices" / "here.toml"


@functools.cache
def _packaged() -> tuple[dict[str, Device], dict[str, Any]]:
    devices, tables = devicefile.read(BUILT_IN)
    _check_names(devices, {}, BUILT_IN.name)
    return devices, tables


def built_in() -> dict[str, Device]:
    """The devices of the package."""
    return dict(_packaged()[0])


def load(extra: Path | None = None) -> dict[str, Device]:
    """Every device there is, by name: built in, this machine's own, the user's file `extra`.

    Raises FileNotFoundError if `extra` is none; ValueError naming file and key for what is wrong in a file, also a name
    or alias that another device has.
    """
    devices, tables = built_in(), dict(_packaged()[1])
    if here_path().is_file():
        try:
            own, own_tables = devicefile.read(here_path())
            if list(own) != [HERE]:
                raise ValueError(f"{here_path()} holds {', '.join(own) or 'nothing'}, not {HERE}")
            _check_names(own, devices, str(here_path()), reserved=())
        except ValueError as error:
            raise ValueError(f"{error}; run `rlkit calibrate` again, or delete that file") from error
        devices |= own
        tables |= own_tables
    if extra is not None:
        theirs, _tables = devicefile.read(extra, tables)
        _check_names(theirs, devices, str(extra))
        devices |= theirs
    return devices


def find(name: str, devices: Mapping[str, Device] | None = None) -> tuple[Device, Unit]:
    """The device and unit of `DEVICE[@MEMORY][:UNIT]` among `devices` (by default all of `load`).

    Raises ValueError naming near matches.
    """
    known = load() if devices is None else devices
    whole, _colon, unit = name.partition(":")
    wanted, *choices = whole.split("@")
    device = _named(wanted, known)
    for choice in choices:
        device = device.with_memory(choice)
    if not _colon:
        return device, next(iter(device.units.values()))
    found = device.units.get(unit.strip().lower())
    if found is None:
        have = ", ".join(f"{device.name}:{each}" for each in device.units)
        raise ValueError(f"{device.name} has no unit {unit!r} that anything is known of; there is {have}")
    return device, found


def _named(name: str, devices: Mapping[str, Device]) -> Device:
    names = {_plain(each): device for device in devices.values() for each in (device.name, *device.aliases)}
    found = names.get(_plain(name))
    if found is not None:
        return found
    if _plain(name) == HERE:
        raise ValueError("this machine has not been measured yet; run `rlkit calibrate`, or name a device")
    near = difflib.get_close_matches(_plain(name), names, n=3, cutoff=0.5)
    close = list(dict.fromkeys(names[each].name for each in near))
    hint = f"did you mean {' or '.join(close)}? " if close else f"known are {', '.join(devices)}; "
    raise ValueError(f"no device {name!r}; {hint}`rlkit devices` says more")


def _plain(name: str) -> str:
    return re.sub(r"[\s._+-]+", "", name.lower())


def _check_names(
    new: Mapping[str, Device], old: Mapping[str, Device], where: str, reserved: tuple[str, ...] = (HERE,)
) -> None:
    """No name may mean two devices."""
    taken = {_plain(each): device.name for device in old.values() for each in _names(device)}
    taken = dict.fromkeys(reserved, "this machine as calibrated") | taken
    for device in new.values():
        for each in dict.fromkeys(_plain(name) for name in _names(device)):
            if each in taken:
                raise ValueError(f"{where}, {device.name}: the name {each} is that of {taken[each]}; choose another")
            taken[each] = device.name


def _names(device: Device) -> Iterable[str]:
    return (device.name, *device.aliases)


def save(device: Device, path: Path) -> None:
    """Write a device as TOML that `load` reads back to an equal value, complete or not at all."""
    atomic.write_text(path, devicefile.to_toml(device))
