"""A work to spread that can go wrong: importable, as processes have to find it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Fussy(Exception):
    """An error that cannot be made from its words alone."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def opened(folder: Path) -> Callable[[Any], Any]:
    """Squares numbers and says so in a file; some tasks are bad for who does them."""
    number = len(list(folder.glob("process-*")))
    (folder / f"process-{os.getpid()}").touch()
    if (folder / "closed").exists():
        raise ValueError("it is closed")

    def do(task: Any) -> Any:
        with (folder / f"did-{task}").open("a") as said:
            said.write(f"{os.getpid()}\n")
        if task == "wrong":
            raise ValueError("wrong has no square; give a number")
        if task == "fussy":
            raise Fussy(1, 2)
        first = len((folder / f"did-{task}").read_text().splitlines()) == 1
        if task == "deadly" or (task == 5 and first and (folder / "kill").exists()):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": task * task, "opened": number >= 0}

    return do


def asked(folder: Path, task: Any) -> int:
    """How many times a task was begun."""
    path = folder / f"did-{task}"
    return len(path.read_text().splitlines()) if path.exists() else 0
