"""Devices in TOML: one table per device; what is wrong is said in one line that names the file and the key.

schema_version = 1
date = "2026-11"                      # of values that give none of their own
[sources]                             # optional: short names for what `source` would repeat
maker = "the maker's product page"

[my-laptop]
title = "My laptop"
like = "hx370"                        # optional: start from this device, and replace what is given here
aliases = ["laptop"]
tdp = { value = 28, unit = "W", basis = "quoted", source = "maker" }
[[my-laptop.memory]]                  # the first is assumed
kind = "LPDDR5X-7500"
bandwidth = { value = 120, unit = "GB/s", basis = "derived", source = "maker", note = "7500e6 x 16: ..." }
[my-laptop.cpu]                       # cpu, igpu, npu or gpu; the first is meant where none is named
title = "8 cores"
bandwidth = ...                       # also dispatch, power, memory
[my-laptop.cpu.peaks]
int8 = "int8-vnni"                    # a string: the variant that a forecast uses
int8-vnni = { value = 5.2, unit = "TOP/s", ... }
[my-laptop.cpu.efficiency.linear]     # calibrated devices: shares, and samples = [{ tokens, bits, ... }]
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rlkit.profiles.hardware import UNITS, Device, Efficiency, Memory, Sample, Unit, Value, values_of

Made = TypeVar("Made")

SCHEMA_VERSION = 1
MOST_NBYTES = 4 * 2**20  # a file of devices is thousands of times smaller
HEAD = ("schema_version", "date", "sources")
DEVICE_KEYS = ("title", "like", "aliases", "calibrated", "tdp", "memory", "installed_nbytes", *UNITS)
UNIT_KEYS = ("title", "peaks", "bandwidth", "dispatch", "power", "memory", "efficiency")
VALUE_KEYS = ("value", "unit", "basis", "source", "date", "note", "unverified")
SAMPLE_KEYS = ("tokens", "bits", "group", "flops", "nbytes", "seconds")

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SCALES = {
    f"{prefix}{unit}": (unit, scale) for unit in ("FLOP/s", "OP/s", "B/s", "B") for prefix, scale in _PREFIXES.items()
}
_SCALES |= {"TOPS": ("OP/s", 1e12), "TFLOPS": ("FLOP/s", 1e12), "GFLOPS": ("FLOP/s", 1e9)}
_SCALES |= {"GiB": ("B", 2.0**30), "GiB/s": ("B/s", 2.0**30), "W": ("W", 1.0), "mW": ("W", 1e-3)}
_SCALES |= {"s": ("s", 1.0), "ms": ("s", 1e-3), "us": ("s", 1e-6), "ns": ("s", 1e-9)}


def read(path: Path, bases: Mapping[str, Any] | None = None) -> tuple[dict[str, Device], dict[str, Any]]:
    """The devices of a file, and their tables as `like` of another file may use them (`bases`).

    Raises FileNotFoundError if there is none, ValueError naming file and key if it is not what it should be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} with devices; write one as `rlkit devices --help` says")
    if path.stat().st_size > MOST_NBYTES:
        raise ValueError(f"{path} is too large for a file of devices; give the TOML file of your devices")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, so no file of devices") from error
    return parse(text, where=str(path), bases=bases)


def parse(
    text: str, *, where: str = "devices", bases: Mapping[str, Any] | None = None
) -> tuple[dict[str, Device], dict[str, Any]]:
    """As `read`, from text."""
    try:
        table = tomllib.loads(text)
    except ValueError as error:  # also integers of more digits than Python reads
        raise ValueError(f"{where} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply for a file of devices") from error
    reader = _Reader(where)
    try:
        return _devices(reader, table, bases or {})
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply for a file of devices") from error


def _devices(
    reader: _Reader, table: dict[str, Any], bases: Mapping[str, Any]
) -> tuple[dict[str, Device], dict[str, Any]]:
    version = table.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        found = "is missing" if version is None else f"= {_said(version)}"
        reader.fail("schema_version", f"{found}; this rlkit reads version {SCHEMA_VERSION}")
    sources = reader.texts(table.get("sources", {}), "sources")
    date = reader.text(table, "date", "", default="")
    tables = {name: item for name, item in table.items() if name not in HEAD}
    for name, item in tables.items():
        if not isinstance(item, dict):
            reader.fail(name, f"unknown key; a device is a table [{name}], and beside them are {', '.join(HEAD)}")
    filled = {name: _filled(item, sources, date) for name, item in tables.items()}
    whole = {name: _inherited(reader, name, filled, bases, ()) for name in filled}
    return {name: _device(reader, name, item) for name, item in whole.items()}, whole


def _filled(item: Any, sources: Mapping[str, str], date: str) -> Any:
    """A table whose values have their sources spelled out and a date."""
    if isinstance(item, list):
        return [_filled(part, sources, date) for part in item]
    if not isinstance(item, dict):
        return item
    if "value" not in item:
        return {key: _filled(part, sources, date) for key, part in item.items()}
    source = item.get("source")
    named = {"source": sources[source]} if isinstance(source, str) and source in sources else {}
    return {**({"date": date} if date else {}), **item, **named}


def _inherited(
    reader: _Reader, name: str, tables: Mapping[str, Any], bases: Mapping[str, Any], seen: tuple[str, ...]
) -> Any:
    """A device's table with what it does not say taken from the one it is like."""
    table = tables[name]
    like = table.get("like")
    if like is None:
        return table
    if name in seen:
        reader.fail(f"{seen[0]}.like", f"goes in a circle: {' -> '.join((*seen, name))}; break it")
    own = isinstance(like, str) and like in tables and (like != name or name not in bases)
    if not isinstance(like, str) or (not own and like not in bases):
        reader.fail(f"{name}.like", f"= {_said(like)} is no device here; known are {', '.join((*bases, *tables))}")
    base = _inherited(reader, like, tables, bases, (*seen, name)) if own else bases[like]
    kept = {key: part for key, part in base.items() if key not in ("aliases", "like", "calibrated")}
    return _merged(kept, {key: part for key, part in table.items() if key != "like"})


def _merged(base: Any, over: Any) -> Any:
    """`over` laid over `base`, table by table; values and lists are replaced whole."""
    tables = isinstance(base, dict) and isinstance(over, dict) and "value" not in base and "value" not in over
    if not tables:
        return over
    both = {key: _merged(part, over[key]) if key in over else part for key, part in base.items()}
    return both | {key: part for key, part in over.items() if key not in base}


def _device(reader: _Reader, name: str, table: dict[str, Any]) -> Device:
    reader.known(table, DEVICE_KEYS, name)
    memories = reader.tables(table, "memory", name)
    installed = table.get("installed_nbytes")
    if installed is not None and (type(installed) is not int or not 10**6 <= installed <= 10**15):
        reader.fail(f"{name}.installed_nbytes", f"= {_said(installed)} is no number of bytes that a memory has")
    if type(table.get("calibrated", False)) is not bool:
        reader.fail(f"{name}.calibrated", "is true or false")
    aliases = table.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias.strip() for alias in aliases):
        reader.fail(f"{name}.aliases", f'= {_said(aliases)} is no list of names; write ["..."]')
    return reader.make(
        Device,
        name,
        name=name,
        title=reader.text(table, "title", name, default=""),
        units={key: _unit(reader, key, f"{name}.{key}", item) for key, item in table.items() if key in UNITS},
        memories=tuple(_memory(reader, f"{name}.memory[{i}]", item) for i, item in enumerate(memories)),
        tdp=_value(reader, table, "tdp", name),
        aliases=tuple(aliases),
        calibrated=table.get("calibrated", False),
        installed_nbytes=installed,
    )


def _memory(reader: _Reader, key: str, table: dict[str, Any]) -> Memory:
    reader.known(table, ("kind", "bandwidth", "sizes"), key)
    sizes = reader.tables(table, "sizes", key)
    made = tuple(_made_value(reader, f"{key}.sizes[{i}]", item) for i, item in enumerate(sizes))
    kind = reader.text(table, "kind", key, default="")
    return reader.make(Memory, key, kind=kind, bandwidth=_value(reader, table, "bandwidth", key), sizes=made)


def _unit(reader: _Reader, name: str, key: str, table: Any) -> Unit:
    reader.known(table, UNIT_KEYS, key)
    given = reader.table(table, "peaks", key)
    peaks = {peak: item for peak, item in given.items() if not isinstance(item, str)}
    classes = reader.table(table, "efficiency", key)
    values = {item: _value(reader, table, item, key) for item in ("bandwidth", "dispatch", "power", "memory")}
    return reader.make(
        Unit,
        key,
        name=name,
        title=reader.text(table, "title", key, default=""),
        peaks={peak: _made_value(reader, f"{key}.peaks.{peak}", item) for peak, item in peaks.items()},
        defaults={peak: item for peak, item in given.items() if isinstance(item, str)},
        efficiency={item: _efficiency(reader, f"{key}.efficiency.{item}", part) for item, part in classes.items()},
        **values,
    )


def _efficiency(reader: _Reader, key: str, table: Any) -> Efficiency:
    reader.known(table, ("compute", "memory", "samples"), key)
    samples = []
    for i, item in enumerate(reader.tables(table, "samples", key)):
        reader.known(item, SAMPLE_KEYS, f"{key}.samples[{i}]", complete=True)
        samples.append(reader.make(Sample, f"{key}.samples[{i}]", **item))
    shares = {name: table.get(name) for name in ("compute", "memory")}
    return reader.make(Efficiency, key, samples=tuple(samples), **shares)


def _value(reader: _Reader, table: dict[str, Any], name: str, key: str) -> Value | None:
    return _made_value(reader, f"{key}.{name}", table[name]) if name in table else None


def _made_value(reader: _Reader, key: str, table: Any) -> Value:
    reader.known(table, VALUE_KEYS, key)
    for name in ("value", "unit", "basis", "source", "date"):
        if name not in table:
            reader.fail(f"{key}.{name}", 'is missing; as in { value = 1, unit = "GB/s", basis, source, date }')
    words = {name: reader.text(table, name, key) for name in ("unit", "basis", "source", "date")}
    unit = words.pop("unit")
    if unit not in _SCALES:
        reader.fail(f"{key}.unit", f"= {_said(unit)} is not known; use TFLOP/s, TOP/s, GB/s, us, W or GB")
    value = table["value"]
    if type(value) not in (int, float) or abs(value) > 1e30:  # NaN is Value's to refuse
        reader.fail(f"{key}.value", f"= {_said(value)} is no number of this world; leave out what is not known")
    if type(table.get("unverified", False)) is not bool:
        reader.fail(f"{key}.unverified", "is true or false")
    base, scale = _SCALES[unit]
    return reader.make(
        Value,
        key,
        value=float(value) * scale,
        unit=base,
        note=reader.text(table, "note", key, default=""),
        unverified=table.get("unverified", False),
        **words,
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Says what is wrong where."""

    where: str

    def fail(self, key: str, why: str) -> NoReturn:
        raise ValueError(f"{self.where}, {key} {why}")

    def make(self, record: Callable[..., Made], key: str, /, **fields: Any) -> Made:
        """A record of these fields; its complaint is given file and key."""
        try:
            return record(**fields)
        except ValueError as error:
            raise ValueError(f"{self.where}, {key}: {error}") from error

    def known(self, table: Any, keys: tuple[str, ...], key: str, *, complete: bool = False) -> None:
        if not isinstance(table, dict):
            self.fail(key, f"= {_said(table)} is no table")
        for name in table:
            if name not in keys:
                self.fail(f"{key}.{name}", f"is an unknown key; known here: {', '.join(keys)}")
        missing = [name for name in keys if name not in table]
        if complete and missing:
            self.fail(key, f"lacks {', '.join(missing)}")

    def text(self, table: dict[str, Any], name: str, key: str, default: str | None = None) -> str:
        found = table.get(name, default)
        if not isinstance(found, str) or not found.isprintable():
            self.fail(f"{key}.{name}".lstrip("."), f"= {_said(found)} is no line of text")
        return found

    def texts(self, table: Any, key: str) -> dict[str, str]:
        if not isinstance(table, dict):
            self.fail(key, f"= {_said(table)} is no table of texts")
        return {name: self.text(table, name, key) for name in table}

    def table(self, table: dict[str, Any], name: str, key: str) -> dict[str, Any]:
        found = table.get(name, {})
        if not isinstance(found, dict):
            self.fail(f"{key}.{name}", f"= {_said(found)} is no table")
        return found

    def tables(self, table: dict[str, Any], name: str, key: str) -> list[dict[str, Any]]:
        found = table.get(name, [])
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            self.fail(f"{key}.{name}", f"= {_said(found)} is no list of tables")
        return found


def _said(found: object) -> str:
    """What was found, short enough for a line."""
    try:
        text = repr(found)
    except ValueError:  # an integer of more digits than Python writes
        return "a very long number"
    return text if len(text) <= 60 else f"{text[:56]} ..."


def to_table(device: Device) -> dict[str, Any]:
    """A device as plain values, laid out as the file is; numbers in base units."""
    named = {"title": device.title, "aliases": list(device.aliases), "calibrated": device.calibrated}
    said = {name: value for name, value in named.items() if value}
    if device.installed_nbytes is not None:
        said["installed_nbytes"] = device.installed_nbytes
    if device.tdp:
        said["tdp"] = values_of(device.tdp)
    units = {name: _unit_table(unit) for name, unit in device.units.items()}
    return (
        said
        | ({"memory": [_plain(values_of(memory)) for memory in device.memories]} if device.memories else {})
        | units
    )


def _unit_table(unit: Unit) -> dict[str, Any]:
    hidden = ("name", "peaks", "defaults", "efficiency", "shared", "installed_nbytes")
    said = {name: _plain(value) for name, value in values_of(unit).items() if name not in hidden}
    peaks: dict[str, Any] = {**unit.defaults, **{name: values_of(value) for name, value in unit.peaks.items()}}
    classes = {name: _plain(values_of(found)) for name, found in unit.efficiency.items()}
    return said | ({"peaks": peaks} if peaks else {}) | ({"efficiency": classes} if classes else {})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Value):
        return values_of(value)
    return asdict(value) if isinstance(value, Sample) else value


def to_toml(device: Device) -> str:
    """The file of one device, which `parse` reads back to an equal value."""
    lines = [f"schema_version = {SCHEMA_VERSION}"]
    _write(lines, (device.name,), to_table(device))
    return "\n".join(lines) + "\n"


def _write(lines: list[str], path: tuple[str, ...], table: dict[str, Any]) -> None:
    lines += ["", f"[{'.'.join(_key(part) for part in path)}]"]
    inner = {name: item for name, item in table.items() if isinstance(item, dict) and "value" not in item}
    lines += [f"{_key(name)} = {_inline(item)}" for name, item in table.items() if name not in inner]
    for name, item in inner.items():
        _write(lines, (*path, name), item)


def _inline(item: Any) -> str:
    if isinstance(item, dict):
        return "{ " + ", ".join(f"{_key(name)} = {_inline(part)}" for name, part in item.items()) + " }"
    if isinstance(item, list):
        parts = [_inline(part) for part in item]
        apart = any(isinstance(part, dict) for part in item)
        return "[\n" + "".join(f"    {part},\n" for part in parts) + "]" if apart else f"[{', '.join(parts)}]"
    if isinstance(item, bool):
        return str(item).lower()
    if isinstance(item, str):  # JSON's escapes are TOML's, but for DEL, which JSON leaves bare
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(float(item) if isinstance(item, float) else int(item))  # numpy's numbers show their type


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
