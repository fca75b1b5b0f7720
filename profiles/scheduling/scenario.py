"""Scenarios as TOML files: streams of frames and requests to language models, and when each of their results is due.

schema_version = 1
title = "A call with a summary"
about = "..."                        # optional: where rates and targets are from
duration_ms = 60000
overheads = "switch"                 # none; switch: another model on a unit; all: the first use of a model as well
whole_milliseconds = false           # true: intervals are 1000 // rate ms, as XRBench's program has them

[streams.voice]                      # frame n is nominally at offset + n * interval, as many as fit into the duration
model = "silero-vad"                 # of models.toml, of [models] below, or of a measured profile
rate = 31.25                         # frames per second
jitter_ms = 0.5                      # arrives up to half of it early or late; the deadline stays
deadline_ms = 32                     # after the nominal time; left out: the interval
offset_ms = 0
priority = 1                         # larger is more important
late = "drop"                        # drop: not started by its deadline, it is dropped; run: it runs late
after = "other"                      # frame n runs when frame n of that stream has finished (rates must be equal)
probability = 0.5                    # of each frame; with `after`: of each finished one
units = ["npu", "cpu"]               # where it may run; left out: wherever the model can

[requests.summary]
model = "llama-3.2-1b"
prompt_tokens = 600                  # or { low = 200, high = 900 }, or with median and sigma: log-normal, cut to them
output_tokens = { low = 20, high = 200, median = 80, sigma = 0.5 }
ttft_ms = 2000                       # first token, after the arrival
tpot_ms = 100                        # each further one, after the one before
recipes = ["w4", "w4w2-gateup"]      # weights: the first as asked, others are choices of a policy
qualities = [1.0, 0.9]               # what each is worth to a policy, and to the scores of quality
chunks = [512, 128]                  # tokens of a prompt per step: the first as asked
concurrent = 1                       # requests under way at most; 0: as many as memory holds
droppable = false
priority, units                      # as above
arrivals = { process = "poisson", interval_ms = 20000, offset_ms = 1000 }
    periodic  every interval_ms
    poisson   gaps are exponential around interval_ms
    bursty    bursts come as poisson; each has `burst` requests (a number or a range), within_ms apart
    turns     the next turn comes when the one before would be done by its targets, and a log-normal pause of
              interval_ms (its median) and sigma later
    after     every finished frame of `stream` brings one with `probability`

[models.mine]                        # sizes of models that models.toml does not have (modelsizes.py says how)

Turns do not wait for replies as they happen: with the same seed, every policy meets the same arrivals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from rlkit.profiles.scheduling import modelsizes, tables
from rlkit.profiles.scheduling.modelsizes import ModelSize
from rlkit.profiles.scheduling.tables import Table
from rlkit.profiles.scheduling.workload import Late, Lengths

SCHEMA_VERSION = 1
MS = 1_000_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
MOST_MS = 86_400_000.0  # a day
MOST_RATE = 10_000.0
MOST_FRAMES = 10_000_000
MOST_TOKENS = 1 << 20


class Process(StrEnum):
    """How requests arrive."""

    PERIODIC = "periodic"
    POISSON = "poisson"
    BURSTY = "bursty"
    TURNS = "turns"
    AFTER = "after"


class Overheads(StrEnum):
    """Which costs beside the steps count."""

    NONE = "none"
    SWITCH = "switch"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Frames:
    """A stream of frames; times in ns."""

    name: str
    model: str
    interval: int
    deadline: int
    count: int
    offset: int = 0
    jitter: int = 0
    priority: int = 0
    late: Late = Late.DROP
    after: str = ""
    probability: float = 1.0
    units: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comings:
    """When requests come; times in ns. `stream` and `probability` are of the process "after"."""

    process: Process
    interval: int = 0
    offset: int = 0
    within: int = 0
    burst: Lengths | None = None
    sigma: float = 0.0
    stream: str = ""
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests to a language model; times in ns."""

    name: str
    model: str
    arrivals: Comings
    prompt: Lengths
    output: Lengths
    ttft: int
    tpot: int
    recipes: tuple[str, ...] = ("w4",)
    qualities: tuple[float, ...] = (1.0,)
    chunks: tuple[int, ...] = (512,)
    priority: int = 0
    concurrent: int = 0
    droppable: bool = False
    units: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A file's content; `where` is the file's name for messages."""

    name: str
    title: str
    duration: int
    streams: tuple[Frames, ...]
    requests: tuple[Requests, ...]
    about: str = ""
    overheads: Overheads = Overheads.SWITCH
    models: dict[str, ModelSize] = field(default_factory=dict)
    where: str = "scenario"

    @property
    def used_models(self) -> tuple[str, ...]:
        """Names of models, each once, in the order of the file."""
        return tuple(dict.fromkeys([*(each.model for each in self.streams), *(each.model for each in self.requests)]))


def read(path: Path) -> Scenario:
    """The scenario of a file.

    Raises FileNotFoundError, or ValueError in one line naming file and key: unknown keys, rates that are zero or
    negative, cycles of dependencies, and what else is not as the form above says.
    """
    return _scenario(tables.read(path, "scenario"), path.stem)


def parse(text: str, where: str = "scenario") -> Scenario:
    """As `read`, from text."""
    return _scenario(tables.parse(text, where), Path(where).stem)


def _scenario(top: Table, name: str) -> Scenario:
    version = top.take("schema_version")
    if version != SCHEMA_VERSION or type(version) is not int:
        found = "is missing" if version is None else f"= {version!r}"
        top.fail("schema_version", f"{found}; this rlkit reads version {SCHEMA_VERSION}")
    title, about = top.text("title"), top.text("about", "")
    duration = _ns(top.number("duration_ms", 1, MOST_MS))
    overheads = Overheads(top.choice("overheads", list(Overheads), Overheads.SWITCH))
    whole = top.flag("whole_milliseconds", False)
    streams = {key: _frames(each, _named(each, key), duration, whole) for key, each in top.tables("streams").items()}
    requests = {key: _requests(each, _named(each, key)) for key, each in top.tables("requests").items()}
    models = {key: modelsizes.of_table(_named(each, key), each) for key, each in top.tables("models").items()}
    top.done()
    if not streams and not requests:
        top.fail("streams", "and requests are both missing; a scenario has at least one of them")
    for key in streams.keys() & requests.keys():
        top.fail(f"requests.{key}", "has the name of a stream; give it another")
    _check_dependencies(top, streams, requests)
    made = tuple(streams.values()), tuple(requests.values())
    return Scenario(name, title, duration, *made, about, overheads, models, top.where)


def _named(table: Table, name: str) -> str:
    if not NAME.fullmatch(name):
        table.fail("", ": is no name; use letters, digits, dots, dashes and underscores, 40 at most")
    return name


def _frames(table: Table, name: str, duration: int, whole: bool) -> Frames:
    model = table.text("model")
    rate = table.number("rate", 1e-3, MOST_RATE)
    if whole and (rate != int(rate) or rate > 1000):
        table.fail("rate", f"= {rate:g} gives no whole milliseconds; use whole rates to 1000, or no whole_milliseconds")
    interval = 1000 // int(rate) * MS if whole else round(1e9 / rate)
    offset = _ns(table.number("offset_ms", 0, MOST_MS, 0))
    count = max(duration - offset, 0) // interval
    if not 1 <= count <= MOST_FRAMES:
        table.fail("rate", f"= {rate:g} gives {count} frames within the duration; use 1 to {MOST_FRAMES:,}")
    made = Frames(
        name=name,
        model=model,
        interval=interval,
        deadline=_ns(table.number("deadline_ms", 1e-3, MOST_MS, interval / MS)),
        count=count,
        offset=offset,
        jitter=_ns(table.number("jitter_ms", 0, MOST_MS, 0)),
        priority=table.whole("priority", -1000, 1000, 0),
        late=Late(table.choice("late", list(Late), Late.DROP)),
        after=table.text("after", ""),
        probability=table.number("probability", 1e-6, 1, 1),
        units=table.texts("units"),
    )
    if made.jitter > made.interval:
        table.fail("jitter_ms", f"= {made.jitter / MS:g} is more than the interval of {made.interval / MS:g} ms")
    table.done()
    return made


def _requests(table: Table, name: str) -> Requests:
    model, recipes = table.text("model"), table.texts("recipes", ("w4",))
    made = Requests(
        name=name,
        model=model,
        arrivals=_comings(table.table("arrivals")),
        prompt=_lengths(table, "prompt_tokens"),
        output=_lengths(table, "output_tokens"),
        ttft=_ns(table.number("ttft_ms", 1e-3, MOST_MS)),
        tpot=_ns(table.number("tpot_ms", 1e-3, MOST_MS)),
        recipes=recipes,
        qualities=_qualities(table, len(recipes)),
        chunks=table.numbers("chunks", 1, MOST_TOKENS, (512,)),
        priority=table.whole("priority", -1000, 1000, 0),
        concurrent=table.whole("concurrent", 0, 1000, 0),
        droppable=table.flag("droppable", False),
        units=table.texts("units"),
    )
    table.done()
    return made


def _qualities(table: Table, count: int) -> tuple[float, ...]:
    value = table.take("qualities")
    if value is None:
        return (1.0,) * count
    right = isinstance(value, list) and len(value) == count
    if not right or any(isinstance(item, bool) or not isinstance(item, int | float) for item in value):
        table.fail("qualities", f"= {value!r} must be {count} numbers, one per recipe")
    if not all(0 <= item <= 1 for item in value):
        table.fail("qualities", f"= {value!r} must be shares of 0 to 1")
    return tuple(float(item) for item in value)


def _lengths(table: Table, key: str, most: int = MOST_TOKENS) -> Lengths:
    """A number, or a table of low, high, and for log-normal ones median and sigma."""
    value = table.take(key)
    if type(value) is int:
        value = {"low": value, "high": value}
    if not isinstance(value, dict):
        table.fail(key, "is missing" if value is None else f"= {value!r} is neither a number nor {{ low, high }}")
    inner = Table(value, table.where, f"{table.path}.{key}")
    low = inner.whole("low", 1, most)
    high = inner.whole("high", low, most)
    median = inner.whole("median", low, high) if "median" in inner else None
    sigma = inner.number("sigma", 0, 5, 0.5) if median is not None else 0.0
    inner.done()
    return Lengths(low, high, median, sigma)


def _comings(table: Table) -> Comings:
    process = Process(table.choice("process", list(Process)))
    if process is Process.AFTER:
        made = Comings(process, stream=table.text("stream"), probability=table.number("probability", 1e-6, 1, 1))
        table.done()
        return made
    interval, offset = _ns(table.number("interval_ms", 1, MOST_MS)), _ns(table.number("offset_ms", 0, MOST_MS, 0))
    made = Comings(process, interval, offset)
    if process is Process.BURSTY:
        within = _ns(table.number("within_ms", 0, MOST_MS, 0))
        made = Comings(process, interval, offset, within=within, burst=_lengths(table, "burst", 1000))
    elif process is Process.TURNS:
        made = Comings(process, interval, offset, sigma=table.number("sigma", 0, 5, 0.5))
    table.done()
    return made


def _check_dependencies(top: Table, streams: dict[str, Frames], requests: dict[str, Requests]) -> None:
    for name, each in requests.items():
        if each.arrivals.stream and each.arrivals.stream not in streams:
            top.fail(f"requests.{name}.arrivals.stream", f"= {each.arrivals.stream!r} is no stream of this scenario")
    for name, frames in streams.items():
        seen, at = [name], frames
        while at.after:
            parent = streams.get(at.after)
            if parent is None:
                top.fail(f"streams.{at.name}.after", f"= {at.after!r} is no stream of this scenario")
            if parent.name in seen:
                chain = " after ".join([*seen[seen.index(parent.name) :], parent.name])
                top.fail(f"streams.{at.name}.after", f"= {at.after!r} closes a cycle: {chain}")
            if (parent.interval, parent.offset) != (at.interval, at.offset):
                why = "frame n waits for frame n, so rate and offset must be the same"
                top.fail(f"streams.{at.name}.after", f"= {at.after!r}: {why}")
            seen.append(parent.name)
            at = parent


def _ns(milliseconds: float) -> int:
    return round(milliseconds * MS)
