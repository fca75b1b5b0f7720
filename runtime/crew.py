"""A thread per unit that runs what it is handed, and says when it was done.

A unit of the processor has processors of its own: its thread is bound to them before it opens a session, and the
session's threads inherit that (on Linux; elsewhere threads stay where the system puts them). Sessions compute outside
of Python's lock; what Python does between steps is short, and the lock is handed over more often than usual.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self, TypeVar

from rlkit.runtime.workplan import Finish

SWITCH_SECONDS = 0.0005  # Python's own is 5 ms, as long as a frame
Task = Callable[[], object]
T = TypeVar("T")


class Threads:
    """One worker per unit; `processors` holds those of each, () where it may run anywhere. Close it, or use `with`."""

    def __init__(self, processors: Sequence[Sequence[int]], clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock, self._origin = clock, clock()
        self._done: SimpleQueue[Finish] = SimpleQueue()
        self._boxes: list[SimpleQueue[Task | None]] = [SimpleQueue() for _ in processors]
        self._busy = 0
        self._switch = sys.getswitchinterval()
        self._threads = [
            threading.Thread(target=self._serve, args=(index, tuple(mine)), name=f"unit {index}", daemon=True)
            for index, mine in enumerate(processors)
        ]

    def __enter__(self) -> Self:
        sys.setswitchinterval(SWITCH_SECONDS)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the steps that run, then for the threads."""
        sys.setswitchinterval(self._switch)
        for box in self._boxes:
            box.put(None)
        for thread in self._threads:
            thread.join()

    def begin(self) -> None:
        """Time is 0 now."""
        self._origin = self._clock()

    def now(self) -> int:
        """Ns since `begin`."""
        return self._clock() - self._origin

    def start(self, unit: int, task: Task) -> None:
        """Run a task on a unit, after what it runs now."""
        self._busy += 1
        self._boxes[unit].put(task)

    def wait(self, until: int) -> list[Finish]:
        """What has finished, in order of time; waits for the first one, until `until` at the latest."""
        found: list[Finish] = []
        seconds = (until - self.now()) / 1e9
        with contextlib.suppress(Empty):
            found.append(self._done.get(timeout=seconds) if seconds > 0 else self._done.get_nowait())
            while True:
                found.append(self._done.get_nowait())
        self._busy -= len(found)
        return sorted(found, key=lambda finish: finish.at)

    def rest(self) -> list[Finish]:
        """Wait for everything that runs."""
        found = [self._done.get() for _ in range(self._busy)]
        self._busy = 0
        return sorted(found, key=lambda finish: finish.at)

    def call(self, unit: int, task: Callable[[], T]) -> T:
        """Run a task on a unit while all are idle, and give its result; raises what it raised."""
        results: list[T] = []
        self.start(unit, lambda: results.append(task()))
        for finish in self.rest():
            if finish.error is not None:
                raise finish.error
        return results[0]

    def _serve(self, index: int, processors: tuple[int, ...]) -> None:
        if processors and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, processors)  # of this thread alone
        box, done = self._boxes[index], self._done
        while (task := box.get()) is not None:
            error: BaseException | None = None
            try:
                task()
            except BaseException as caught:  # told to the thread that waits for it
                error = caught
            done.put(Finish(index, self.now(), error))
            del task, error  # what a step held goes with it
