"""Several processes with a model each: pairs to judge and prompts to reply to are shared out among them.

A call's pairs are cut into shares so that what begins alike stays together. A process opens its model with its first
piece of work, so that what goes wrong there is raised in the process that asked.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from rlkit.recover import interrupts
from rlkit.recover.likelihood import Continuation, Pair, asks_of

PORTIONS = 4  # for each worker and call, so that none is left with a long one alone


class Worker(Protocol):
    """What works in a process."""

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        """As `likelihood.Scorer` does."""

    def replies(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield (number of the prompt, ids of the likeliest reply), in any order; `most` new tokens of each."""


class ScorerPool:
    """`workers` processes, each with what `opening`, called there with its number, makes; that must be picklable.

    A process is given `together` prompts at once. Close it, or use it in a with statement, so that its processes end.
    """

    def __init__(self, opening: Callable[[int], Worker], workers: int, together: int = 8) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers, self._together = workers, together
        self._pool: ProcessPoolExecutor | None = ProcessPoolExecutor(
            workers, context, _begin, (opening, context.Value("i", 0))
        )

    def ask(self, name: str) -> Any:
        """What the method `name` of one of the workers returns. Raises what it raises."""
        (found,) = self._done([self._submit(name)])
        return found.result()

    def score(self, pairs: Sequence[Pair], limit: int) -> list[Continuation]:
        """One continuation for each pair, in their order, by models of `limit` tokens.

        Raises ValueError as `asks_of` does, and where a process ended.
        """
        shares = shared_out(pairs, limit, self._workers * PORTIONS)
        work = [[(list(pairs[n][0]), list(pairs[n][1])) for n in share] for share in shares]
        asked = {self._submit("score", some): share for some, share in zip(work, shares, strict=True)}
        found: dict[int, Continuation] = {}
        for future in self._done(asked):
            found |= dict(zip(asked[future], future.result(), strict=True))
        return [found[number] for number in range(len(pairs))]

    def replies(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """As a worker's; prompts of about the same length go to a process together."""
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
        shares = [order[start : start + self._together] for start in range(0, len(order), self._together)]
        asked = {
            self._submit("listed", [list(prompts[n]) for n in share], [most[n] for n in share]): share
            for share in shares
        }
        try:
            for future in self._done(asked):
                yield from ((asked[future][number], ids) for number, ids in future.result())
        finally:
            for future in asked:
                future.cancel()

    def close(self) -> None:
        """End the processes and give the memory back."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _submit(self, name: str, *arguments: Any) -> Future[Any]:
        if self._pool is None:
            raise ValueError("the scorer is closed; make it again")
        try:
            with interrupts.held():  # processes are started here, as many as there is work for
                return self._pool.submit(_call, name, *arguments)
        except BrokenProcessPool as error:
            raise self._ended() from error

    def _done(self, futures: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
        """Futures as they come, with what went wrong raised in words."""
        for future in as_completed(futures):
            if isinstance(error := future.exception(), BrokenProcessPool):
                raise self._ended() from error
            yield future

    def _ended(self) -> ValueError:
        why = "a process of the scorer ended early, most often for want of memory"
        return ValueError(f"{why}; use fewer workers than {self._workers}")


def shared_out(pairs: Sequence[Pair], limit: int, count: int) -> list[list[int]]:
    """Numbers of pairs in up to `count` shares of about equal numbers of tokens; what begins alike is side by side."""
    asks = asks_of(pairs, limit)
    order = sorted(range(len(asks)), key=lambda number: asks[number].row)
    total, done = sum(len(ask.row) for ask in asks), 0
    shares: list[list[int]] = [[] for _ in range(count)]
    at = 0
    context: tuple[int, ...] = ()
    for number in order:
        ask = asks[number]
        if ask.row[: ask.first + 1] != context:
            at, context = done * count // total, ask.row[: ask.first + 1]
        shares[at].append(number)
        done += len(ask.row)
    return [share for share in shares if share]


_own: dict[str, Any] = {}  # of a worker process: how its worker is made, its number, and the worker


def _begin(opening: Callable[[int], Worker], count: Any) -> None:
    interrupts.answered(signal.SIG_DFL)  # who waits for the processes waits for what they are at
    with count.get_lock():
        _own["number"] = count.value
        count.value += 1
    _own["opening"] = opening


def _call(name: str, *arguments: Any) -> Any:
    if "worker" not in _own:
        _own["worker"] = _own["opening"](_own["number"])
    if name == "listed":
        return list(_own["worker"].replies(*arguments))
    return getattr(_own["worker"], name)(*arguments)
