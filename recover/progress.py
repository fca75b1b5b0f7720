"""Progress of long work, as plain events: the room that does the work says how far it is, `apps` draws the bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One sign of life: `done` of `total` units of `stage` are finished; `note` is a short current figure."""

    stage: str
    done: int
    total: int
    note: str = ""


Tell = Callable[[Progress], None]


def silent(_event: Progress) -> None:
    """The default listener: says nothing."""
