"""One thing that `rlkit doctor` found, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad: nothing to do; worth knowing; something will be slow or fail; rlkit cannot run a model."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """`area` groups findings, `name` says what it is about, `fix` is a command or a step where there is one."""

    area: str
    name: str
    level: Level
    text: str
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "level": str(self.level)}


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them; OK for none."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)
