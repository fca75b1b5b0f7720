"""What a simulation runs: streams of frames and of language requests with their costs, and their arrivals.

A `Setting` is a scenario on a device: units, streams with the options of every step, memory. `expand` draws everything
random once (jitter, chance, times and lengths of requests), so every policy meets the same arrivals with the same seed.
All times are whole nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rlkit.runtime.jobs import Option

__all__ = ["CONTEXT", "Arrivals", "Late", "Lengths", "Llm", "Phase", "Request", "Setting", "Stream", "Workload"]

CONTEXT = 128  # tokens of context per entry of a language model's table of costs


class Late(StrEnum):
    """What happens to a frame that nothing has started by its deadline."""

    DROP = "drop"  # the engine drops it at the next dispatch (XRBench's rule), and a policy may drop it earlier
    RUN = "run"  # it runs late; a policy may not drop it


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of equal frames, one per `period`; frame n (0, 1, ...) is due `deadline` after its nominal time.

    `options` over all units. Frame n's nominal time is `offset + n * period`; it arrives up to half of `jitter` before
    or after that, its deadline does not move. With `after`, frame n can run when frame n of that stream has finished
    (periods must be equal), and is dropped with it. A frame exists with `probability`. The model's first step on a unit
    pays `load_ns[unit]`, the first one after another model's `switch_ns[unit]` (() = nothing).
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


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens: even over low..high, or log-normal around `median` with `sigma`, cut to low..high."""

    low: int
    high: int
    median: int | None = None
    sigma: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests come: "poisson" or "periodic" with a mean gap of `period` ns from `offset`, or at `times`."""

    process: str = "poisson"
    period: int = 0
    offset: int = 0
    times: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Phase:
    """Prefill chunks of one size, or decode steps, on one unit, by the tokens of context before them.

    `options[i]` is the step behind i * 128 .. i * 128 + 127 tokens of context, and the last entry also beyond. A last
    chunk of t of the c tokens takes least_ns[i] + (ns - least_ns[i]) * (t - 1) / (c - 1); without `least_ns` as long as
    a full one (padding).
    """

    options: tuple[Option, ...]
    least_ns: tuple[int, ...] = ()


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
    ttft: int  # target of the first token, ns after the arrival
    tpot: int  # target of every further token, ns after the one before
    priority: int = 0
    concurrent: int = 0
    droppable: bool = False
    after: str = ""  # with it, each frame of that stream brings a request with `probability`; `arrivals` is unused
    probability: float = 1.0
    weights_nbytes: int = 0
    kv_nbytes: int = 0
    load_ns: tuple[int, ...] = ()
    switch_ns: tuple[int, ...] = ()
    move_ns: tuple[tuple[int, ...], ...] = ()
    move_token_ns: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """A scenario on a device: names of the units, streams, the machine's memory (None = no limit) and bandwidth."""

    name: str
    units: tuple[str, ...]
    streams: tuple[Stream | Llm, ...]
    duration: int
    memory_nbytes: int | None = None
    cap: float = 1.0  # bandwidth that the steps share, in the demands' measure


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a run, as drawn."""

    number: int
    stream: int
    arrival: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A setting with everything random drawn; one entry per frame or request, in order of arrival (its number).

    `parents` holds the number of the job that must finish first, -1 for none; `prompts` and `outputs` are 0 for frames.
    The lists are read only: runs of all policies share them.
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
