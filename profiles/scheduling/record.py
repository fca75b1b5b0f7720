"""What happened in a run, simulated or real: steps, frames and requests, as the metrics and the trace read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from rlkit.profiles.scheduling.workload import Workload
from rlkit.runtime.jobs import Option

__all__ = ["NEVER", "Fate", "Row", "Run"]

NEVER = -1  # the time of what has not happened

Row = tuple[int, int, int, Option]  # start, finish, number of the job, how it ran; start and finish in ns


class Fate(StrEnum):
    """What became of a frame or a request: exactly one of these."""

    DONE = "done"
    DROPPED = "dropped"
    UNFINISHED = "unfinished"


@dataclass(slots=True)
class Run:
    """One run of a workload under one policy; lists by job number hold `NEVER` for what has not happened.

    rows       finished steps, in order of finish; `setup` before a step is part of it
    cut        steps that the end of the run cut off; their finish is the end
    finished   by number: when the frame, or the request's last token, was there
    dropped    by number: when it was given up, by the engine, a policy, or because what it comes after was dropped
    submitted  by request: when it could first run (its arrival, or when the frame that it comes after was done)
    tokens     by request: the times of its tokens
    """

    workload: Workload
    policy: str
    finished: list[int]
    dropped: list[int]
    rows: list[Row] = field(default_factory=list)
    cut: list[Row] = field(default_factory=list)
    submitted: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    @property
    def steps(self) -> list[tuple[int, int, int, int, str]]:
        """Finished steps as (start, finish, unit, number of the job, variant)."""
        return [(start, finish, option.unit, number, option.variant) for start, finish, number, option in self.rows]

    @property
    def events(self) -> int:
        """Arrivals, starts and finishes of steps, drops: what the engine has handled, each counted once."""
        drops = len(self.dropped) - self.dropped.count(NEVER)
        return len(self.workload) + 2 * len(self.rows) + len(self.cut) + drops

    def fate(self, number: int) -> Fate:
        """What became of a job."""
        if self.finished[number] != NEVER:
            return Fate.DONE
        return Fate.DROPPED if self.dropped[number] != NEVER else Fate.UNFINISHED
