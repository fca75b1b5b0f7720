"""Several runs in one Chrome trace: each policy is a process with its units as tracks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlkit.profiles.scheduling.record import Run
from rlkit.profiles.scheduling.trace import trace

FLOWS = 100_000_000  # ids of arrows are apart by so much between runs


def together(runs: Iterable[Run]) -> dict[str, Any]:
    """The traces of all runs as one, in their order. ValueError: no runs."""
    events: list[dict[str, Any]] = []
    policies = []
    for place, run in enumerate(runs):
        policies.append(run.policy)
        for event in trace(run)["traceEvents"]:
            event["pid"] = place + 1
            if "id" in event:
                event["id"] += place * FLOWS
            events.append(event)
        named = {"ph": "M", "pid": place + 1, "tid": 0, "name": "process_sort_index", "args": {"sort_index": place}}
        events.append(named)
    if not policies:
        raise ValueError("a trace of no runs: give at least one")
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"policies": policies}}
