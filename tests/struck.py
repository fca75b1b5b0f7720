"""What a worker process imports while Ctrl-C is pressed: it interrupts whoever imports it there."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

from clerks import Clerk

if multiprocessing.current_process().name != "MainProcess":
    signal.raise_signal(signal.SIGINT)


def opened() -> Callable[[Any], Any]:
    """Interrupted again with every task."""

    def do(task: int) -> int:
        signal.raise_signal(signal.SIGINT)
        return -task

    return do


def clerk(number: int) -> Clerk:
    """For `ScorerPool`."""
    return Clerk(number)
