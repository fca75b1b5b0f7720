"""A workload as `runtime.dispatch` takes it, with the simulator's books; the record is a `Run` like a simulated one."""

from __future__ import annotations

from functools import partial

from rlkit.profiles.scheduling.contention import rates
from rlkit.profiles.scheduling.record import NEVER, Run
from rlkit.profiles.scheduling.requests import Requests, Setups
from rlkit.profiles.scheduling.workload import Late, Llm, Stream, Workload, foresee
from rlkit.runtime.jobs import Job
from rlkit.runtime.workplan import Frames, Plan

__all__ = ["lengths", "planned"]


def planned(workload: Workload, policy: str) -> tuple[Plan, Run]:
    """The plan of a run, and the record that it fills."""
    setting = workload.setting
    record = Run(workload, policy, [NEVER] * len(workload), [NEVER] * len(workload))
    ready: list[Job] = []
    setups = Setups(workload)
    plan = Plan(
        units=setting.units,
        duration=setting.duration,
        streams=tuple(_frames(stream) for stream in setting.streams),
        workload=workload,
        record=record,
        requests=Requests(workload, record, ready, setups),
        setups=setups,
        ready=ready,
        cap=setting.cap,
        speeds=partial(_speeds, {}, setting.cap),
        foresee=partial(foresee, setting),
    )
    return plan, record


def lengths(workload: Workload) -> dict[int, tuple[int, int]]:
    """Tokens of the prompt and of the reply, by number of the request."""
    pairs = zip(workload.prompts, workload.outputs, strict=True)
    return {number: pair for number, pair in enumerate(pairs) if pair[0]}


def _frames(stream: Stream | Llm) -> Frames | None:
    if isinstance(stream, Llm):
        return None
    return Frames(stream.name, stream.period, stream.priority, stream.late is Late.DROP, stream.options)


def _speeds(known: dict[tuple[float, ...], tuple[float, ...]], cap: float, demands: list[float]) -> tuple[float, ...]:
    """Remembered: few combinations of steps occur."""
    key = tuple(demands)
    if key not in known:
        known[key] = rates(key, cap)
    return known[key]
