"""This machine's entry among the devices: what was calibrated, as a device file and the table beside it.

<cache folder>/devices/here.toml    peaks, bandwidth, dispatch, shares and samples: what any device file may hold
<cache folder>/devices/here.json    the table of single operators that calibrated forecasts interpolate
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import psutil

from rlkit.profiles import device, efficiency
from rlkit.profiles.calibrate import FEW, Calibration
from rlkit.profiles.efficiency import FLOAT, Product, Table, attention_work, product_nbytes
from rlkit.profiles.hardware import Device, Efficiency, Memory, Sample, Unit, Value

SOURCE = "rlkit calibrate"


def table_path(devices: Path) -> Path:
    """Where the table of a device file is: beside it."""
    return devices.with_suffix(".json")


def save(made: Calibration, path: Path | None = None) -> Path:
    """Write the device file and its table, by default as this machine's entry; return the device file's path."""
    where = path or device.here_path()
    if where.suffix != ".toml":
        raise ValueError(f"{where} is no name of a device file; end it in .toml")
    efficiency.save(made.table, table_path(where))
    device.save(device_of(made), where)
    return where


def load_table(path: Path | None = None) -> Table | None:
    """The table beside a device file, by default this machine's; None if there is none.

    Raises ValueError if it is damaged or of another version.
    """
    where = table_path(path or device.here_path())
    return efficiency.load(where) if where.is_file() else None


def device_of(made: Calibration) -> Device:
    """The machine as a device named `here` with the unit `cpu`."""
    table, facts = made.table, made.table.facts

    def measured(value: float, unit: str, note: str = "") -> Value:
        return Value(float(value), unit, SOURCE, made.date, "measured", note)

    threads = f"{table.peaks.threads} threads"
    peaks = {"fp32": measured(table.peaks.flops_per_s, "FLOP/s", f"the fastest product of floats, {threads}")}
    low = [_rate(row) for row in table.products if row.bits in (4, 8)]
    if low:
        peaks["int8"] = measured(max(low), "OP/s", f"the fastest product of 4- or 8-bit weights, {threads}")
    read = ", ".join(f"{number}: {rate / 1e9:.1f}" for number, rate in sorted(made.reads.items()))
    unit = Unit(
        "cpu",
        title=str(facts.get("cpu", "CPU")),
        peaks=peaks,
        bandwidth=measured(table.peaks.bytes_per_s, "B/s", f"GB/s by threads {read}"),
        dispatch=measured(table.peaks.dispatch_seconds, "s"),
        efficiency=_classes(table),
    )
    memory = psutil.virtual_memory().total
    return Device(
        device.HERE,
        title=f"This machine: {facts.get('cpu', 'CPU')}, {threads}",
        units={"cpu": unit},
        memories=(Memory("installed", unit.bandwidth),),
        calibrated=True,
        installed_nbytes=int(memory),
    )


def _classes(table: Table) -> dict[str, Efficiency]:
    """Shares of the peaks, and every row as a sample of its class."""
    peaks = table.peaks
    products = tuple(_product_sample(row) for row in table.products)
    streams = [row for row in table.products if row.tokens == min(FEW) and not row.cached]
    moved = [product_nbytes(row.bits, row.block, row.n, row.k) / row.seconds for row in streams]
    rates = [_rate(row) for row in table.products if row.bits < 32]
    attentions = tuple(_attention_samples(table))
    rows = {
        kind: tuple(_row_samples(table, measured))
        for kind, measured in {"norm": ("norm",), "elementwise": ("add", "activation")}.items()
    }
    found = {
        "linear": Efficiency(_share(rates, peaks.flops_per_s), _share(moved, peaks.bytes_per_s), products),
        "attention": Efficiency(
            _share([sample.flops / sample.seconds for sample in attentions], peaks.flops_per_s),
            _share([sample.nbytes / sample.seconds for sample in attentions if sample.tokens == 1], peaks.bytes_per_s),
            attentions,
        ),
    }
    for kind, samples in rows.items():
        rates = [sample.nbytes / sample.seconds for sample in samples]
        found[kind] = Efficiency(None, _share(rates, peaks.bytes_per_s), samples)
    return {kind: each for kind, each in found.items() if each.samples}


def _share(rates: list[float], peak: float) -> float | None:
    return min(max(rates) / peak, 100.0) if rates else None


def _rate(row: Product) -> float:
    return 2.0 * row.tokens * row.n * row.k / row.seconds


def _product_sample(row: Product) -> Sample:
    nbytes = product_nbytes(row.bits, row.block, row.n, row.k) + FLOAT * row.tokens * (row.n + row.k)
    return Sample(row.tokens, row.bits, row.block, 2 * row.tokens * row.n * row.k, round(nbytes), row.seconds)


def _attention_samples(table: Table) -> Iterator[Sample]:
    for row in table.attentions:
        nbytes, flops = attention_work(*astuple(row)[:-1])
        yield Sample(row.tokens, 8 * FLOAT, 0, round(flops), round(nbytes), row.seconds)


def _row_samples(table: Table, kinds: tuple[str, ...]) -> Iterator[Sample]:
    for row in table.rowwise:
        if row.kind in kinds:
            elements = row.tokens * row.width
            yield Sample(row.tokens, 0, 0, elements, FLOAT * efficiency.ACCESSES[row.kind] * elements, row.seconds)
