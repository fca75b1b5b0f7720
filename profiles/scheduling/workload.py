"""What a simulation runs: streams of frames and of language requests with their costs, and their arrivals.

A `Setting` is a scenario on a device: units, streams with the options of every step, memory. `arrivals.expand` draws
everything random once (jitter, chance, times and lengths of requests), so every policy meets the same arrivals with the
same seed. All times are whole nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from rlkit.runtime.jobs import Option, Upcoming

__all__ = ["CONTEXT", "Arrivals", "Late", "Lengths", "Llm", "Phase", "Setting", "Stream", "Workload", "foresee"]

CONTEXT = 128  # tokens of context per entry of a language model's table of costs


class Late(StrEnum):
    """What happens to a frame that nothing has started by its deadline."""

    DROP = "drop"  # the engine drops it at the next dispatch (XRBench's rule), and a policy may drop it earlier
    RUN = "run"  # it runs late; a policy may not drop it


def _whole(name: str, what: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"stream {name!r}: {what} {value}: use a whole number of at least {least}")


def _chance(name: str, probability: float) -> None:
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"stream {name!r}: probability {probability}: use a number above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of equal frames, one per `period`; frame n (0, 1, ...) is due `deadline` after its nominal time.

    `options` over all units. Frame n's nominal time is `offset + n * period`; it arrives up to half of `jitter` before
    or after that, its deadline does not move. With `after`, frame n can run when frame n of that stream has finished
    (periods must be equal), and is dropped with it. A frame exists with `probability`. The model's first step on a unit
    pays `load_ns[unit]`, the first one after another model's `switch_ns[unit]` (() = nothing); streams of one `model`
    ("" = the stream's name) share that and the weights.
    """

    name: str
    options: tuple[Option, ...]
    period: int
    deadline: int
    offset: int = 0
    jitter: int = 0
    priority: int = 0
    late: Late = Late.DROP
    after: str = ""
    probability: float = 1.0
    weights_nbytes: int = 0
    load_ns: tuple[int, ...] = ()
    switch_ns: tuple[int, ...] = ()
    count: int | None = None  # frames at most
    model: str = ""

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"stream {self.name!r}: no unit can run its model: give it a cost on one of the units")
        for what, value, least in (
            ("period", self.period, 1),
            ("deadline", self.deadline, 1),
            ("offset", self.offset, 0),
            ("jitter", self.jitter, 0),
            ("weights", self.weights_nbytes, 0),
            ("count", 1 if self.count is None else self.count, 1),
        ):
            _whole(self.name, what, value, least)
        _chance(self.name, self.probability)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens: even over low..high, or log-normal around `median` with `sigma`, cut to low..high."""

    low: int
    high: int
    median: int | None = None
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"{self.low} to {self.high} tokens: use 1 or more, the smaller number first")
        if self.median is not None and not self.low <= self.median <= self.high:
            raise ValueError(f"median of {self.median} tokens: use one within {self.low} to {self.high}")
        if not 0.0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma {self.sigma} of a number of tokens: use a number of at least 0")


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests come: "poisson" or "periodic" with a mean gap of `period` ns from `offset`, or at `times`."""

    process: str = "poisson"
    period: int = 0
    offset: int = 0
    times: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.process not in ("poisson", "periodic", "times"):
            raise ValueError(f"arrival process {self.process!r}: use poisson, periodic or times")
        if self.process != "times" and self.period < 1:
            raise ValueError(f"mean gap of {self.period} ns between requests: use at least 1")
        if self.offset < 0 or any(time < 0 for time in self.times):
            raise ValueError("a request before the start of the run: use times of at least 0")


@dataclass(frozen=True, slots=True)
class Phase:
    """Prefill chunks of one size, or decode steps, on one unit, by the tokens of context before them.

    `options[i]` is the step behind i * 128 .. i * 128 + 127 tokens of context, and the last entry also beyond. A last
    chunk of t of the c tokens takes least_ns[i] + (ns - least_ns[i]) * (t - 1) / (c - 1); without `least_ns` as long as
    a full one (padding). Its energy shrinks with its time.
    """

    options: tuple[Option, ...]
    least_ns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len({(option.unit, option.variant, option.units) for option in self.options}) != 1:
            raise ValueError("a phase of several units, variants or chunk sizes: make one phase of each")
        if self.options[0].units < 1:
            raise ValueError("a step of 0 tokens: say in Option.units how many tokens it advances")
        if self.least_ns and len(self.least_ns) != len(self.options):
            raise ValueError(f"{len(self.least_ns)} least times for {len(self.options)} contexts: give one for each")
        if any(not 1 <= least <= option.ns for least, option in zip(self.least_ns, self.options, strict=False)):
            raise ValueError("a chunk of one token that takes no time or longer than a full one: give its time")


@dataclass(frozen=True, slots=True)
class Llm:
    """Requests to a language model: chunks of the prompt, the last of which gives the first token, then decode steps.

    `prefill` and `decode` hold a `Phase` per unit and variant (the first of a unit is the one as asked). A request is
    admitted, in order of arrival, when its cache of (prompt + output) * `kv_nbytes` fits into memory and fewer than
    `concurrent` are under way (0 = as many as fit). A step on another unit than the one before moves the cache first:
    `move_ns[from][to]` and `move_token_ns[from][to]` per token of context (() = nothing).
    """

    name: str
    prefill: tuple[Phase, ...]
    decode: tuple[Phase, ...]
    arrivals: Arrivals
    prompt: Lengths
    output: Lengths
    ttft: int  # target of the first token, ns after the request can run
    tpot: int  # target of every further token, ns after the one before
    priority: int = 0
    concurrent: int = 0
    droppable: bool = False
    after: str = ""  # with it, each frame of that stream brings a request with `probability`; `arrivals` is unused
    probability: float = 1.0
    weights_nbytes: int = 0
    kv_nbytes: int = 0  # per token
    load_ns: tuple[int, ...] = ()
    switch_ns: tuple[int, ...] = ()
    move_ns: tuple[tuple[int, ...], ...] = ()
    move_token_ns: tuple[tuple[float, ...], ...] = ()
    model: str = ""

    def __post_init__(self) -> None:
        if not self.prefill or not self.decode:
            raise ValueError(
                f"stream {self.name!r}: no unit can run its model: give prefill and decode a cost on a unit"
            )
        for what, value, least in (
            ("TTFT target", self.ttft, 1),
            ("TPOT target", self.tpot, 1),
            ("concurrent", self.concurrent, 0),
            ("weights", self.weights_nbytes, 0),
            ("cache per token", self.kv_nbytes, 0),
        ):
            _whole(self.name, what, value, least)
        _chance(self.name, self.probability)

    @property
    def options(self) -> tuple[Option, ...]:
        """Every option of every phase and context."""
        return tuple(option for phase in (*self.prefill, *self.decode) for option in phase.options)


@dataclass(frozen=True, slots=True)
class Setting:
    """A scenario on a device: names of the units, streams, the machine's memory (None = no limit) and bandwidth."""

    name: str
    units: tuple[str, ...]
    streams: tuple[Stream | Llm, ...]
    duration: int
    memory_nbytes: int | None = None
    cap: float = 1.0  # bandwidth that the steps share, in the demands' measure

    def __post_init__(self) -> None:
        if not self.units or not self.streams or self.duration < 1 or not self.cap > 0.0:
            raise ValueError(f"setting {self.name!r}: give it a unit, a stream, a duration and a bandwidth above 0")
        for fault in _faults(self):
            raise ValueError(f"setting {self.name!r}: {fault}")

    def index(self, name: str) -> int:
        """The stream of this name."""
        return [stream.name for stream in self.streams].index(name)

    @property
    def weights_nbytes(self) -> int:
        """Weights of all models, each once."""
        return sum({stream.model or stream.name: stream.weights_nbytes for stream in self.streams}.values())

    @property
    def free_nbytes(self) -> int | None:
        """Memory that the weights leave for caches, None = no limit."""
        return None if self.memory_nbytes is None else self.memory_nbytes - self.weights_nbytes


def _faults(setting: Setting) -> Iterator[str]:
    """Yield what does not fit together, one line each."""
    units, streams = len(setting.units), {stream.name: stream for stream in setting.streams}
    if len(streams) < len(setting.streams):
        yield "two streams of one name: rename one"
    for stream in setting.streams:
        worst = max(option.unit for option in stream.options)
        if worst >= units:
            yield f"stream {stream.name!r} has a cost on unit {worst}, the units are 0 to {units - 1}"
        tables = [stream.load_ns, stream.switch_ns]
        if isinstance(stream, Llm):
            squares = [table for table in (stream.move_ns, stream.move_token_ns) if table]
            tables += [(0,) * len(row) for table in squares for row in (table, *table)]
        if any(table and (len(table) != units or min(table) < 0) for table in tables):
            yield f"stream {stream.name!r}: give load, switch and move costs of at least 0, one per unit"
        yield from _chained(stream, streams)
    if (free := setting.free_nbytes) is not None and free < 0:
        yield f"weights of {setting.weights_nbytes:,} bytes in memory of {setting.memory_nbytes:,}: use smaller models"


def _chained(stream: Stream | Llm, streams: dict[str, Stream | Llm]) -> Iterator[str]:
    """Yield what is wrong with the streams that a stream comes after."""
    seen, at = {stream.name}, stream
    while at.after:
        before = streams.get(at.after)
        if not isinstance(before, Stream):
            yield f"stream {at.name!r} comes after {at.after!r}: name a stream of frames"
            return
        if isinstance(at, Stream) and at.period != before.period:
            yield f"streams {at.name!r} and {before.name!r}, which it comes after, differ in rate: give them one rate"
            return
        if before.name in seen:
            yield f"stream {stream.name!r} comes after itself: break the cycle"
            return
        seen.add(before.name)
        at = before


@dataclass(frozen=True, slots=True)
class Workload:
    """A setting with everything random drawn; one entry per frame or request, in order of arrival (its number).

    `deadlines` are of the frame, or of the request's first token; `parents` holds the number of the job that must
    finish first, -1 for none; `prompts` and `outputs` are 0 for frames. Read only: runs of all policies share it.
    """

    setting: Setting
    seed: int
    arrivals: list[int]
    streams: list[int]
    indices: list[int]
    deadlines: list[int]
    parents: list[int]
    prompts: list[int]
    outputs: list[int]

    def __len__(self) -> int:
        return len(self.arrivals)


def foresee(setting: Setting, now: int, until: int) -> list[Upcoming]:
    """Frames with nominal times in (now, until] and within the run, in order of time, then of stream.

    Streams that come after others count with their own nominal times, and frames of chance as if they were certain.
    """
    found = []
    for place, stream in enumerate(setting.streams):
        if not isinstance(stream, Stream):
            continue
        first = max(0, (now - stream.offset) // stream.period + 1)
        last = (min(until, setting.duration - 1) - stream.offset) // stream.period
        if stream.count is not None:
            last = min(last, stream.count - 1)
        for index in range(first, last + 1):
            time = stream.offset + index * stream.period
            found.append(Upcoming(time, place, time + stream.deadline, stream.options))
    return sorted(found, key=lambda upcoming: upcoming[:2])
