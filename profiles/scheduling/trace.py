"""A run as a Chrome trace, the JSON that ui.perfetto.dev and chrome://tracing open.

One track per unit with its steps (late ones and those that the end cut off are marked), flow arrows from a step to the
next of its request and to what comes after a frame, instants where something was dropped, and two counters: the sum of
the demands of the running steps, in percent of the shared bandwidth, and the jobs that have come and are not over.
Times are microseconds there; `args` hold the nanoseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlkit.profiles.scheduling.record import NEVER, Fate, Row, Run
from rlkit.recover.atomic import write_text

__all__ = ["trace", "write"]

Event = dict[str, Any]
PROCESS = 1
DROPS = 1_000  # the track of what was dropped, behind the units'


def trace(run: Run) -> dict[str, Any]:
    """The trace as JSON values."""
    setting = run.workload.setting
    names = [*enumerate(setting.units), (DROPS, "dropped")]
    title = f"{setting.name}, {run.policy}, seed {run.workload.seed}"
    events: list[Event] = [_named("process_name", 0, title)]
    for track, name in names:
        events += [_named("thread_name", track, name)]
        events += [{**_named("thread_sort_index", track, ""), "args": {"sort_index": track}}]
    rows = sorted((*run.rows, *run.cut), key=lambda row: (row[0], row[3].unit))
    events += [_slice(run, row) for row in rows]
    events += _drops(run)
    events += _flows(run, rows)
    events += _counted("bandwidth, %", _demands(run, rows))
    events += _counted("jobs waiting or running", _queue(run))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"setting": setting.name, "policy": run.policy},
    }


def write(run: Run, path: Path) -> None:
    """Write the trace, whole or not at all."""
    write_text(path, json.dumps(trace(run), separators=(",", ":")))


def _us(ns: int) -> float:
    return ns / 1000


def _named(what: str, track: int, name: str) -> Event:
    return {"ph": "M", "pid": PROCESS, "tid": track, "name": what, "args": {"name": name}}


def _slice(run: Run, row: Row) -> Event:
    start, finish, number, option = row
    workload = run.workload
    name = workload.setting.streams[workload.streams[number]].name
    args: dict[str, Any] = {"job": number, "index": workload.indices[number], "start_ns": start, "finish_ns": finish}
    args |= {"alone_ns": option.ns, "demand": option.demand, "variant": option.variant, "tokens": option.units}
    if not workload.prompts[number]:
        args["deadline_ns"] = workload.deadlines[number]
        args["late"] = finish > workload.deadlines[number]
    if run.finished[number] == NEVER or finish > run.finished[number]:
        args["fate"] = run.fate(number).value
    event: Event = {"ph": "X", "pid": PROCESS, "tid": option.unit, "name": name, "cat": "step", "args": args}
    event |= {"ts": _us(start), "dur": _us(finish - start)}
    if args.get("late"):
        event["cname"] = "terrible"
    return event


def _drops(run: Run) -> Iterator[Event]:
    workload = run.workload
    for number, time in enumerate(run.dropped):
        if time != NEVER:
            name = workload.setting.streams[workload.streams[number]].name
            args = {"job": number, "index": workload.indices[number], "deadline_ns": workload.deadlines[number]}
            place = {"pid": PROCESS, "tid": DROPS, "ts": _us(time), "s": "t"}
            yield {"ph": "i", "name": f"{name} dropped", "cat": "drop", **place, "args": args}


def _flows(run: Run, rows: list[Row]) -> Iterator[Event]:
    """From each step to the next of its job, and from a finished job to the first step of what comes after it."""
    last: dict[int, Row] = {}
    for arrow, row in enumerate(rows):
        number = row[2]
        before = last.get(number) or last.get(run.workload.parents[number])
        last[number] = row
        if before is None:
            continue
        place = {"pid": PROCESS, "cat": "flow", "name": "then", "id": arrow}
        # A flow's ends bind to the slices that hold their times on their tracks.
        yield {"ph": "s", **place, "tid": before[3].unit, "ts": _us(before[1] - 1)}
        yield {"ph": "f", "bp": "e", **place, "tid": row[3].unit, "ts": _us(row[0])}


def _demands(run: Run, rows: list[Row]) -> list[tuple[int, float]]:
    scale = 100.0 / run.workload.setting.cap
    changes = [(start, option.demand * scale) for start, _, _, option in rows]
    return changes + [(finish, -option.demand * scale) for _, finish, _, option in rows]


def _queue(run: Run) -> list[tuple[int, float]]:
    """Up when a job has come (for what comes after a frame: when that is done), down when it is over."""
    workload, changes = run.workload, []
    for number, arrival in enumerate(workload.arrivals):
        parent = workload.parents[number]
        fate = run.fate(number)
        if parent >= 0:
            if run.finished[parent] == NEVER:
                continue
            arrival = max(arrival, run.finished[parent])
        if arrival > workload.setting.duration:
            continue
        changes.append((arrival, 1.0))
        if fate is not Fate.UNFINISHED:
            changes.append((run.finished[number] if fate is Fate.DONE else run.dropped[number], -1.0))
    return changes


def _counted(name: str, changes: list[tuple[int, float]]) -> Iterator[Event]:
    """A counter's value wherever it changes."""
    by_time: dict[int, float] = {}
    for time, change in changes:
        by_time[time] = by_time.get(time, 0.0) + change
    value, shown = 0.0, None
    for time in sorted(by_time):
        value += by_time[time]
        rounded = round(value, 6) + 0.0  # what is left of sums that cancel is 0, not -0
        if rounded != shown:
            shown = rounded
            yield {"ph": "C", "pid": PROCESS, "tid": 0, "name": name, "ts": _us(time), "args": {"value": rounded}}
