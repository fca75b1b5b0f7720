"""What is known of models that scenarios run: a table of sizes (models.toml), each with its source.

[models.NAME]
about = "..."
source = "..."                # where the sizes are from
unverified = true             # second-hand, from memory, or an estimate
units = ["cpu", "igpu"]       # that can run it; left out: all
why = "..."                   # why not the others, where some are missing
gflop = 8.7                   # of one frame: two per multiply-add
params_m = 3.2                # millions of weights
activations_m = 40            # millions of numbers that a frame writes to memory or reads from it
inputs = { images = [1, 3, 640, 640] }       # of its ONNX file; needed where the graph leaves sizes open
asset = "..."                 # the ONNX file, a name of `rlkit assets`
values = { sr = 16000 }       # inputs that may not be random
# or, for a language model:
config = { model_type = "llama", hidden_size = 2048, ... }      # as its config.json has it

[units.NAME] says what a unit reaches of its peaks, beside models; see UnitShares.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkit.profiles.architecture import Architecture, of_config
from rlkit.profiles.hardware import UNITS
from rlkit.profiles.scheduling import tables
from rlkit.profiles.scheduling.tables import Table

FILE = Path(__file__).with_name("models.toml")
MOST = 1e9


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model: of a frame its FLOPs, weights and numbers moved; of a language model its architecture."""

    name: str
    about: str
    source: str
    unverified: bool = False
    units: tuple[str, ...] = UNITS
    why: str = ""
    flops: float = 0.0
    weights: float = 0.0  # how many
    moved: float = 0.0  # how many numbers, beside weights
    architecture: Architecture | None = None
    asset: str = ""
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def basis(self) -> str:
        """The source, and how far to trust it."""
        return f"{self.source}{' (unverified)' if self.unverified else ''}"


@dataclass(frozen=True, slots=True)
class UnitShares:
    """What a kind of unit reaches of its peaks, and what it costs to start there.

    `kind`: the data type of vision and audio models there; compute and memory: shares of peak and bandwidth that they
    reach; language_...: those of language models. start_ns: of a frame; switch_ns: to another model; load_bytes_per_s:
    of loading weights for the first time. bytes_per_s: the most the unit reads, where the device file knows none.
    """

    name: str
    kind: str
    compute: float
    memory: float
    language_compute: float
    language_memory: float
    start_ns: int
    switch_ns: int
    load_bytes_per_s: float
    source: str
    bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """The whole table."""

    models: Mapping[str, ModelSize]
    units: Mapping[str, UnitShares]


@functools.cache
def built_in() -> Sizes:
    """The table of the package."""
    return parse(FILE.read_text(encoding="utf-8"), FILE.name)


def parse(text: str, where: str) -> Sizes:
    """A table from text; ValueError naming file and key."""
    top = tables.parse(text, where)
    models = {name: of_table(name, each) for name, each in top.tables("models").items()}
    units = {name: _shares(name, each) for name, each in top.tables("units").items()}
    top.done()
    return Sizes(models, units)


def of_table(name: str, table: Table) -> ModelSize:
    """One model; ValueError naming file and key."""
    units = table.texts("units", UNITS)
    for unit in units:
        if unit not in UNITS:
            table.fail("units", f"= {unit!r} is no unit; use {', '.join(UNITS)}")
    why = table.text("why", "")
    if units != UNITS and set(units) != set(UNITS) and not why:
        table.fail("why", "is missing; say why the other units cannot run it")
    config = table.take("config")
    if config is not None and not isinstance(config, dict):
        table.fail("config", f"= {config!r} is no table")
    frame = config is None
    made = ModelSize(
        name=name,
        about=table.text("about", ""),
        source=table.text("source"),
        unverified=table.flag("unverified", False),
        units=units,
        why=why,
        flops=1e9 * table.number("gflop", 1e-6, MOST) if frame else 0.0,
        weights=1e6 * table.number("params_m", 0, MOST) if frame else 0.0,
        moved=1e6 * table.number("activations_m", 0, MOST) if frame else 0.0,
        architecture=None if config is None else of_config(config, f"{table.where}: {table.path}.config"),
        asset=table.text("asset", ""),
        inputs=_inputs(table),
        values=_values(table),
    )
    table.done()
    return made


def _inputs(table: Table) -> dict[str, tuple[int, ...]]:
    value: Any = table.take("inputs") or {}
    good = isinstance(value, dict) and all(
        isinstance(shape, list) and all(type(size) is int and 1 <= size < 1 << 31 for size in shape)
        for shape in value.values()
    )
    if not good:
        table.fail("inputs", f"= {value!r} must give each input's sizes, as in {{ images = [1, 3, 640, 640] }}")
    return {name: tuple(shape) for name, shape in value.items()}


def _values(table: Table) -> dict[str, float]:
    value: Any = table.take("values") or {}
    if not isinstance(value, dict) or any(type(each) not in (int, float) for each in value.values()):
        table.fail("values", f"= {value!r} must give each input's number, as in {{ sr = 16000 }}")
    return dict(value)


def _shares(name: str, table: Table) -> UnitShares:
    made = UnitShares(
        name=name,
        kind=table.choice("type", ("fp32", "fp16", "bf16", "int8")),
        compute=table.number("compute", 1e-3, 1),
        memory=table.number("memory", 1e-3, 1),
        language_compute=table.number("language_compute", 1e-3, 1),
        language_memory=table.number("language_memory", 1e-3, 1),
        start_ns=round(1e3 * table.number("start_us", 0, 1e6)),
        switch_ns=round(1e3 * table.number("switch_us", 0, 1e7)),
        load_bytes_per_s=1e9 * table.number("load_gb_per_s", 1e-3, 1e4),
        source=table.text("source"),
        bytes_per_s=1e9 * table.number("gb_per_s", 1e-3, 1e5) if "gb_per_s" in table else None,
    )
    table.done()
    return made
