"""Ctrl-C and processes that work for this one: a terminal sends it to all of them, and one of them answers.

A process that begins would answer with a traceback from the middle of its imports. So Ctrl-C is `held` while it is
started; it inherits that, and says with `answered` what is to happen as soon as it can.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

HOLDS = hasattr(signal, "pthread_sigmask")  # not on Windows: there a process that begins says what it was at


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Ctrl-C comes when the block has ended, and to processes started in it when they are ready for it."""
    known = signal.getsignal(signal.SIGINT)
    if known is None or threading.current_thread() is not threading.main_thread():  # no other is interrupted
        with _masked():
            yield
        return
    came: list[int] = []
    with _masked():
        signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))  # another thread may have heard it
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, known)
            if came:
                signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _masked() -> Iterator[None]:
    """This thread does not hear it, nor do processes that it starts."""
    if not HOLDS:
        yield
        return
    resource_tracker.ensure_running()  # to start it would end this (Python 3.11)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def answered(by: signal.Handlers) -> None:
    """In a process that was started so: SIG_IGN, who started it ends it; SIG_DFL, it ends itself and says nothing."""
    signal.signal(signal.SIGINT, by)
    if HOLDS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
