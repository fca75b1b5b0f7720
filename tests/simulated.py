"""Small settings and stand-in policies for tests of the simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.record import Run
from rlkit.profiles.scheduling.workload import Arrivals, Late, Lengths, Llm, Phase, Setting, Stream
from rlkit.runtime.jobs import Decision, Job, Option, Policy, Start, State


def one(name: str, ns: int, due: int, unit: int = 0, **more: object) -> Stream:
    """A stream of one frame at 0."""
    return Stream(name, (Option(unit, ns),), period=1000, deadline=due, count=1, late=Late.RUN, **more)  # type: ignore[arg-type]


def phase(unit: int, tokens: int, *ns: int, demand: float = 0.0, variant: str = "", least: Sequence[int] = ()) -> Phase:
    """A phase whose steps take `ns` by 128 tokens of context."""
    options = tuple(Option(unit, time, demand, 1.0, variant, 1.0, tokens) for time in ns)
    return Phase(options, tuple(least))


def llm(prefill: Sequence[Phase], decode: Sequence[Phase], times: Sequence[int] = (0,), **more: object) -> Llm:
    """Requests of 256 + 3 tokens at `times`, unless `more` says otherwise."""
    base: dict[str, object] = {"prompt": Lengths(256, 256), "output": Lengths(3, 3), "ttft": 1000, "tpot": 100}
    arrivals = Arrivals("times", times=tuple(times))
    return Llm("llm", tuple(prefill), tuple(decode), arrivals, **(base | more))  # type: ignore[arg-type]


def setting(*streams: Stream | Llm, units: int = 1, duration: int = 100_000, **more: object) -> Setting:
    """Streams on units u0, u1, ..."""
    names = tuple(f"u{index}" for index in range(units))
    return Setting("small", names, streams, duration, **more)  # type: ignore[arg-type]


class Least:
    """Starts the ready job with the least key that has an idle unit, on its quickest idle unit."""

    def __init__(self, name: str, key: Callable[[Job, int], float]) -> None:
        self.name = name
        self.key = key

    def decide(self, state: State) -> Decision:
        found: Start | None = None
        least = float("inf")
        for job in state.ready:
            options = [option for option in job.options if state.units[option.unit].running is None]
            if options and (value := self.key(job, state.now)) < least:
                found, least = Start(job, min(options, key=lambda option: option.ns)), value
        return found


def work(job: Job) -> int:
    return min(time for time in job.remaining if time is not None)


STAND_INS: dict[str, Callable[[], Policy]] = {
    "fcfs": lambda: Least("fcfs", lambda job, now: job.arrival),
    "edf": lambda: Least("edf", lambda job, now: job.deadline),
    "sjf": lambda: Least("sjf", lambda job, now: work(job)),
    "llf": lambda: Least("llf", lambda job, now: job.deadline - now - work(job)),
}


def simulate(case: Setting, policy: str | Policy = "fcfs", seed: int = 0) -> Run:
    """Expand and run."""
    return run(expand(case, seed), STAND_INS[policy]() if isinstance(policy, str) else policy)


def spans(done: Run) -> dict[str, tuple[int, int]]:
    """Start and finish of every frame, by name and index."""
    load = done.workload
    names = [f"{load.setting.streams[s].name}{i}" for s, i in zip(load.streams, load.indices, strict=True)]
    return {names[number]: (start, finish) for start, finish, _, number, _ in done.steps}


def gaming(seconds: int = 60) -> Setting:
    """About 150 frames a second on three units, and a language model of some hundred tokens every few seconds."""
    ms = 1_000_000

    def costs(*rows: tuple[int, float, float]) -> tuple[Option, ...]:
        return tuple(Option(unit, int(time * ms), demand, 1.0) for unit, time, demand in rows)

    def steps(tokens: int, growth: float, *rows: tuple[int, float, float]) -> tuple[Phase, ...]:
        return tuple(
            phase(unit, tokens, *(int(time * ms * (1 + growth * i)) for i in range(16)), demand=demand)
            for unit, time, demand in rows
        )

    hand = Stream("hand", costs((0, 6, 0.15), (1, 3, 0.3), (2, 2, 0.1)), 22 * ms, 22 * ms, jitter=10_000)
    eye = Stream("eye", costs((0, 4, 0.1), (1, 2, 0.2), (2, 1.2, 0.1)), 16 * ms, 16 * ms, jitter=10_000)
    seen = Stream("seen", costs((0, 22, 0.3), (1, 8, 0.4), (2, 6, 0.2)), 33 * ms, 33 * ms)
    larger = Stream("larger", costs((0, 30, 0.4), (1, 6, 0.5)), 66 * ms, 66 * ms)
    talk = Llm(
        "talk",
        steps(256, 0.05, (0, 400, 0.3), (1, 80, 0.3), (2, 100, 0.2)),
        steps(1, 0.01, (0, 40, 0.7), (1, 28, 0.9), (2, 35, 0.7)),
        Arrivals("poisson", 6000 * ms),
        Lengths(200, 800),
        Lengths(60, 200),
        ttft=1000 * ms,
        tpot=60 * ms,
    )
    return Setting("gaming", ("cpu", "igpu", "npu"), (hand, eye, seen, larger, talk), seconds * 1000 * ms)
