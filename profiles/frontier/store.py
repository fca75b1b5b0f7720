"""What was measured, kept by content: a file for each job, named by all that decides its result.

    <folder>/<first two of the key>/<key>.json

A file is complete or absent and never changed, so an interrupted search goes on, another one reuses what is there, and
any number of processes may write into one folder: who does a job twice writes the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlkit.profiles.frontier.search import Job, Measure, Measured
from rlkit.profiles.frontier.space import Point
from rlkit.recover.atomic import write_json
from rlkit.recover.source import read_json

SCHEMA_VERSION = 1

Identify = Callable[[Job], str]
"""A job's key, in hexadecimal: another one for whatever may change what is measured."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of results."""

    folder: Path
    identify: Identify

    def path(self, job: Job) -> Path:
        """The file of a job."""
        key = self.identify(job)
        return self.folder / key[:2] / f"{key}.json"

    def read(self, job: Job) -> Measured | None:
        """What is known of a job; None for nothing, and for what cannot be read."""
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            table = read_json(self.path(job))
            if table["schema_version"] == SCHEMA_VERSION:
                found = Measured.from_json(table["found"])
                return found if len(found.scores) == len(job.items) else None
        return None

    def write(self, job: Job, found: Measured) -> None:
        """Keep what a job found."""
        what = {"point": job.point.to_json(), "items": [job.start, job.stop]}
        write_json(self.path(job), {"schema_version": SCHEMA_VERSION, "job": what, "found": found.to_json()})


def kept(measure: Measure, store: Store) -> Measure:
    """The same measure, but for what is in the store already; what is new is added."""

    def measured(point: Point, items: range) -> Measured:
        job = Job(point, items.start, items.stop)
        known = store.read(job)
        if known is None:
            known = measure(point, items)
            store.write(job, known)
        return known

    return measured
