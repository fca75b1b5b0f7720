"""Ctrl-C goes to worker processes too: they say nothing, whenever it comes, and none is left."""

from __future__ import annotations

import signal
import threading

import pytest

import struck
from rlkit.profiles import spread
from rlkit.recover import interrupts
from rlkit.recover.scorerpool import ScorerPool
from test_likelihood import items

pytestmark = pytest.mark.skipif(not interrupts.HOLDS, reason="this system cannot hold signals back")


def test_what_is_held_comes_afterwards() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest")
    assert done == ["the rest"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_what_another_thread_hears_is_held_too() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        listener = threading.Thread(target=_heard)
        listener.start()
        listener.join()
        done.append("the rest")
    assert done == ["the rest"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    noted: list[int] = []
    worker = threading.Thread(target=lambda: noted.extend(_masked_there()))
    worker.start()
    worker.join()
    assert signal.SIGINT in noted


def _heard() -> None:
    """A thread that was there before would not have the mask."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    signal.raise_signal(signal.SIGINT)


def _masked_there() -> set[int]:
    with interrupts.held():
        return set(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_workers_are_deaf_while_they_begin_and_work(capfd: pytest.CaptureFixture[str]) -> None:
    with spread.team(struck.opened, workers=2) as some:
        assert dict(some([1, 2, 3])) == {0: -1, 1: -2, 2: -3}
    assert capfd.readouterr().err == ""


def test_a_scorer_that_begins_ends_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    pool = ScorerPool(struck.clerk, 2)
    with pytest.raises(ValueError, match="a process of the scorer ended early"):
        pool.score(items(1), 256)
    pool.close()
    assert capfd.readouterr().err == ""
