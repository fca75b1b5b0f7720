"""The forecast beside each measurement: at this machine as calibrated, a device that is named, or one that is known."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rlkit.apps.benchmarks.devices.items import Item
from rlkit.export.targets import Target
from rlkit.profiles import device, here, places
from rlkit.profiles.bench import Case, Kind
from rlkit.profiles.devicerun import Promise
from rlkit.profiles.forecast import Workload, forecast_model
from rlkit.profiles.operators import NAMED
from rlkit.profiles.places import Place

LEAST = 4  # letters and digits of a name that is looked for within a processor's


@dataclass(frozen=True, slots=True)
class Forecaster:
    """Where forecasts are made for, and in words what with, or why there are none."""

    place: Place | None
    said: str

    def of(self, item: Item, test: Case) -> Promise | None:
        """Seconds to the first token, or per token; None where nothing can be forecast."""
        if self.place is None or item.recipe is None or (test.kind is Kind.PREFILL and test.depth):
            return None
        decodes = test.kind is Kind.DECODE
        work = Workload(max(test.depth, 1), test.tokens) if decodes else Workload(test.tokens, 1)
        try:
            made = forecast_model(item.at(self.place), work)
        except ValueError:  # beyond its context, or its memory as the device file has it
            return None
        seconds = made.roofline.tpot_seconds if decodes else made.roofline.ttft_seconds
        return Promise(seconds, self.place.name, made.label)


def forecaster(unit: str, cpu: str, asked: str | None = None, target: Target | None = None) -> Forecaster:
    """Forecasts for a unit (cpu, igpu, npu) of the device `asked`, by default of this machine, whose CPU's name it is.

    A GPU may be reached through one target or another: `target` says how models are stored and joined there. Raises
    ValueError for a device that is not known.
    """
    made = _forecaster(unit, cpu, asked)
    if made.place is None or target is None:
        return made
    return Forecaster(replace(made.place, widened=target.widened, options=NAMED[target.provider]), made.said)


def _forecaster(unit: str, cpu: str, asked: str | None) -> Forecaster:
    if asked is not None:
        return _at(*device.find(asked if ":" in asked else f"{asked}:{unit}"))
    try:
        known, table = device.load(), here.load_table()
    except ValueError as error:  # what was calibrated is of another version: no reason not to measure
        return Forecaster(None, f"no forecast: {error}")
    if unit == "cpu" and table is not None and device.HERE in known:
        made = places.of_unit(*device.find(f"{device.HERE}:cpu", known), table)
        return Forecaster(made, f"{_of(made).said} with {table.peaks.threads} threads")
    name = recognized(cpu, known)
    if name is None:
        remedy = "run `rlkit calibrate`, or name the device with --device" if unit == "cpu" else "name it with --device"
        return Forecaster(None, f"no forecast: {cpu} is no known device; {remedy}")
    if unit not in known[name].units:
        return Forecaster(None, f"no forecast: nothing is known of the {unit} of {name}")
    return _at(known[name], known[name].units[unit])


def recognized(cpu: str, known: dict[str, device.Device]) -> str | None:
    """The device whose name or alias stands in a processor's name, the longest of them; None if there is none."""
    whole = _letters(cpu)
    found = [
        (len(_letters(alias)), name)
        for name, each in known.items()
        for alias in (name, *each.aliases)
        if len(_letters(alias)) >= LEAST and _letters(alias) in whole
    ]
    return max(found)[1] if found else None


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _at(found: device.Device, unit: device.Unit) -> Forecaster:
    if found.name == device.HERE and unit.name == "cpu":
        return _of(places.of_unit(found, unit, here.load_table()))
    return _of(places.of_unit(found, unit))


def _of(place: Place) -> Forecaster:
    return Forecaster(place, f"forecasts of {place.name}, {place.rates.label}")
