"""Hands in other processes: those of this machine with a pipe each, or actors of a Ray cluster; see spread.py.

A hand is at one task at a time and answers once for each. The first answer says that it is ready.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any

from rlkit.recover import interrupts

Do = Callable[[Any], Any]
"""What does a task."""
Opening = Callable[[], Do]
"""Called once in a process."""

TRIES = 3  # that a task has to end its process
LEAVE_SECONDS = 5.0  # that an idle process has to end by itself
STORE_NBYTES = 80 * 2**20  # of a Ray started here: tasks and results are small; it accepts no less


class Gone(Exception):
    """A hand's process ended before it answered; in words why, where that is known."""


class Crew:
    """Hands that do a task each; what is particular to a kind of them is below. None stands for getting ready."""

    def __init__(self, opening: Opening, workers: int) -> None:
        self._opening, self._workers = opening, workers
        self._idle: list[Any] = []
        self._busy: dict[Any, int | None] = {}

    def _hire(self) -> Any:
        """A new hand, which will answer when it is ready."""
        raise NotImplementedError

    def _give(self, hand: Any, task: Any) -> None:
        """Hand out a task."""
        raise NotImplementedError

    def _wait(self) -> list[Any]:
        """Busy hands that have answered, or are gone; at least one."""
        raise NotImplementedError

    def _take(self, hand: Any) -> tuple[bool, Any]:
        """A hand's answer: whether it did it, and the result or the error. Raises Gone."""
        raise NotImplementedError

    def _dismiss(self, hand: Any, *, now: bool) -> None:
        """End a hand's process, without waiting for what it does if it is to be now."""
        raise NotImplementedError

    def __call__(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        waiting, falls, left = deque(range(len(tasks))), Counter[int | None](), len(tasks)
        while len(self._idle) + len(self._busy) < min(self._workers, len(tasks)):
            self._recruit()
        try:
            while left:
                while waiting and self._idle:
                    hand, number = self._idle.pop(), waiting.popleft()
                    self._busy[hand] = number
                    self._give(hand, tasks[number])
                for hand in self._wait():
                    at = self._busy[hand]
                    found = self._answer(hand, falls)
                    if found is None:  # gone
                        waiting.extend([] if at is None else [at])
                    elif at is not None:
                        left -= 1
                        yield at, found[0]
        finally:  # what is not waited for any more must not answer a later call
            for hand in [hand for hand, number in self._busy.items() if number is not None]:
                del self._busy[hand]
                self._dismiss(hand, now=True)

    def _recruit(self) -> None:
        """One more hand, known before Ctrl-C can come, so that `close` ends it."""
        with interrupts.held():
            self._busy[self._hire()] = None

    def _answer(self, hand: Any, falls: Counter[int | None]) -> tuple[Any] | None:
        """A hand's result, the hand idle again; None for one that is gone, another in its place."""
        number = self._busy.pop(hand)
        try:
            well, found = self._take(hand)
        except Gone as gone:
            self._dismiss(hand, now=True)
            falls[number] += 1
            if falls[number] == TRIES:
                what = "before it could begin" if number is None else "at the same task"
                why = f"a process ended {TRIES} times {what} ({str(gone) or 'most often for want of memory'})"
                raise ValueError(f"{why}; use fewer --workers than {self._workers}; what was done is kept") from None
            self._recruit()
            return None
        self._idle.append(hand)
        if not well:
            raise found
        return (found,)

    def close(self) -> None:
        hands = [(hand, False) for hand in self._idle] + [(hand, True) for hand in self._busy]
        self._idle, self._busy = [], {}
        for hand, now in hands:
            self._dismiss(hand, now=now)


@dataclass(frozen=True, slots=True, eq=False)
class _Process:
    process: SpawnProcess
    line: connection.Connection[Any, Any]


class Processes(Crew):
    """Processes of this machine, with a pipe each."""

    def _hire(self) -> _Process:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._opening, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its end is the end of the line
        return _Process(process, ours)

    def _give(self, hand: _Process, task: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # gone: what is read next says so
            hand.line.send(task)

    def _wait(self) -> list[_Process]:
        ready = set(map(id, connection.wait([hand.line for hand in self._busy])))
        return [hand for hand in self._busy if id(hand.line) in ready]

    def _take(self, hand: _Process) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = hand.line.recv()
        except (EOFError, OSError):
            raise Gone from None
        return answer

    def _dismiss(self, hand: _Process, *, now: bool) -> None:
        hand.line.close()
        hand.process.join(0 if now else LEAVE_SECONDS)
        hand.process.kill()
        hand.process.join()


def _serve(opening: Opening, line: connection.Connection[Any, Any]) -> None:
    """In a process: answer that it is ready, then every task, until the line ends."""
    interrupts.answered(signal.SIG_IGN)  # Ctrl-C is for the process that asked; it ends this one
    desk = _Desk(opening)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        line.send(desk.ready())
        while True:
            line.send(desk.do(line.recv()))


class _Desk:
    """Where tasks are done: opened once, errors are answers."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._do: Do | None = None

    def ready(self) -> tuple[bool, Any]:
        """(True, None) once it is open, or (False, what went wrong)."""
        return self._try(lambda _task: None, None)

    def do(self, task: Any) -> tuple[bool, Any]:
        """(True, result), or (False, what went wrong)."""
        return self._try(lambda given: None if self._do is None else self._do(given), task)

    def _try(self, do: Do, task: Any) -> tuple[bool, Any]:
        try:
            self._do = self._do or self._opening()
            return True, do(task)
        except Exception as error:
            return False, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error, or one of its words if it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@dataclass(slots=True, eq=False)
class _Actor:
    actor: Any
    answer: Any


class Rays(Crew):
    """Actors of a Ray cluster with a processor each."""

    def __init__(self, opening: Opening, workers: int, address: str) -> None:
        import ray as library

        ray: Any = library
        self._ray, self._began = ray, not ray.is_initialized()
        if self._began:
            try:
                with interrupts.held():  # processes of a Ray that has begun in part are not known to it
                    _begin_ray(ray, address, workers)
            except BaseException:
                ray.shutdown()
                raise
        cores = int(ray.cluster_resources().get("CPU", 1))
        super().__init__(opening, max(1, cores if workers == 1 else workers))
        self._kind = ray.remote(num_cpus=1, max_restarts=0)(_Desk)

    def _hire(self) -> _Actor:
        actor = self._kind.remote(self._opening)
        return _Actor(actor, actor.ready.remote())

    def _give(self, hand: _Actor, task: Any) -> None:
        hand.answer = hand.actor.do.remote(task)

    def _wait(self) -> list[_Actor]:
        ready = set(self._ray.wait([hand.answer for hand in self._busy])[0])
        return [hand for hand in self._busy if hand.answer in ready]

    def _take(self, hand: _Actor) -> tuple[bool, Any]:
        from ray.exceptions import RayActorError, RayError

        try:
            answer: tuple[bool, Any] = self._ray.get(hand.answer)
        except RayActorError as error:
            cause = str(error).strip().splitlines()[-1].strip()  # of an actor that could not be made the error there
            raise Gone(cause if "Error" in cause else "") from None
        except RayError as error:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"Ray failed: {first}; see its logs; what was done is kept") from error
        return answer

    def _dismiss(self, hand: _Actor, *, now: bool) -> None:
        self._ray.kill(hand.actor)

    def close(self) -> None:
        super().close()
        if self._began:
            self._ray.shutdown()


def _begin_ray(ray: Any, address: str, workers: int) -> None:
    """Join a cluster, or start one of `workers` processes here that reports to nobody."""
    quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
    if address != "local":
        ray.init(address=address, **quiet)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # as processes without Ray; its own 15 starves on a busy machine
    ray.init(address="local", num_cpus=workers, include_dashboard=False, object_store_memory=STORE_NBYTES, **quiet)
