"""Where simulations run: here, in processes of this machine, or on Ray; what was done is kept by its content.

A `Farm` takes works and yields (number of the work, its outcomes) as they are done, in any order. A simulation depends
on nothing but its work, so every farm gives the same. Kept outcomes are files named by the setting, the seed, the
policy and the simulator's own sources, so an interrupted sweep goes on and another one reuses what it shares with it:

    <folder>/<first two of the key>/<key>.json
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import logging
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlkit.profiles.scheduling.arrivals import expand
from rlkit.profiles.scheduling.engine import run
from rlkit.profiles.scheduling.outcome import Outcome, outcome
from rlkit.profiles.scheduling.policies import POLICIES
from rlkit.profiles.scheduling.settings import Prepared
from rlkit.recover.atomic import write_json
from rlkit.recover.source import read_json
from rlkit.runtime import jobs

__all__ = ["Farm", "Work", "here", "kept", "on_ray", "processes", "simulate"]

SCHEMA_VERSION = 1
AHEAD = 3  # works handed out for each worker: enough to keep it busy, few enough to stop soon
ADDRESS = re.compile(r"auto|local|(ray://)?[A-Za-z0-9_.\-\[\]:]+:\d{1,5}")


@dataclass(frozen=True, slots=True)
class Work:
    """One run of arrivals under some policies, by their names in `policies.POLICIES`."""

    prepared: Prepared
    seed: int
    policies: tuple[str, ...]


Farm = Callable[[Sequence[Work]], Iterator[tuple[int, list[Outcome]]]]


def simulate(work: Work) -> list[Outcome]:
    """One outcome for each policy."""
    load = expand(work.prepared.setting(work.seed), work.seed)
    return [outcome(run(load, POLICIES[name]())) for name in work.policies]


def here(works: Sequence[Work]) -> Iterator[tuple[int, list[Outcome]]]:
    """In this process, one after the other."""
    for number, work in enumerate(works):
        yield number, simulate(work)


def processes(workers: int) -> Farm:
    """In so many processes of this machine."""
    if workers < 1:
        raise ValueError(f"{workers} workers: use at least 1")
    return here if workers == 1 else functools.partial(_spread, workers)


def _spread(workers: int, works: Sequence[Work]) -> Iterator[tuple[int, list[Outcome]]]:
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pool = ProcessPoolExecutor(min(workers, max(len(works), 1)), context, _begin)
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting = iter(enumerate(works))
        running: dict[Future[list[Outcome]], int] = {}
        try:
            while True:
                while len(running) < AHEAD * workers and (following := next(waiting, None)) is not None:
                    running[pool.submit(simulate, following[1])] = following[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            why = "a process of the sweep ended early, most often for want of memory"
            raise ValueError(f"{why}; use fewer --workers than {workers}; what was done is kept") from error


def _begin() -> None:
    """Ctrl-C is for the process that asked; it ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def on_ray(address: str, workers: int) -> Farm:
    """On a Ray cluster: "auto", HOST:PORT, ray://HOST:PORT, or "local" for one of `workers` processes started here.

    Its nodes must have this version of rlkit. Raises ValueError for another form of address, ConnectionError where
    nothing answers, ImportError if ray is not installed.
    """
    if not ADDRESS.fullmatch(address):
        raise ValueError(f"Ray address {address!r} must be auto, local, HOST:PORT or ray://HOST:PORT")
    return functools.partial(_on_ray, address, workers)


def _on_ray(address: str, workers: int, works: Sequence[Work]) -> Iterator[tuple[int, list[Outcome]]]:
    ray: Any = importlib.import_module("ray")  # an extra: typed where it is installed, and not there otherwise
    failure: type[Exception] = importlib.import_module("ray.exceptions").RayError
    if not works:
        return
    where: dict[str, Any] = (
        {"num_cpus": workers, "include_dashboard": False} if address == "local" else {"address": address}
    )
    ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ahead = AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        remote = ray.remote(num_cpus=1)(_remotely)
        version, waiting, running = sources(), iter(enumerate(works)), dict[Any, int]()
        while True:
            while len(running) < ahead and (following := next(waiting, None)) is not None:
                running[remote.remote(following[1], version)] = following[0]
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            found, fault = ray.get(done)
            if fault:
                raise ValueError(fault)
            yield running.pop(done), found
    except failure as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"Ray at {address} failed: {first}; what was done is kept") from error
    finally:
        ray.shutdown()


def _remotely(work: Work, version: str) -> tuple[list[Outcome], str]:
    """The outcomes, or what is wrong in one line: what is raised there arrives as a page of text."""
    if sources() != version:
        return [], "a Ray node has another version of rlkit's simulator; install the same one there"
    try:
        return simulate(work), ""
    except ValueError as error:
        return [], str(error)


def kept(farm: Farm, folder: Path) -> Farm:
    """The same farm, but for what is in the folder already; what is new is added as soon as it is done."""

    def farmed(works: Sequence[Work]) -> Iterator[tuple[int, list[Outcome]]]:
        known: dict[int, dict[str, Outcome]] = {}
        asked: list[tuple[int, Work]] = []
        for number, work in enumerate(works):
            found = known[number] = _read(folder, work)
            missing = tuple(name for name in work.policies if name not in found)
            if missing:
                asked.append((number, replace(work, policies=missing)))
            else:
                yield number, [known.pop(number)[name] for name in work.policies]
        for place, outcomes in farm([work for _number, work in asked]):
            number, work = asked[place]
            found = known.pop(number) | dict(zip(work.policies, outcomes, strict=True))
            _write(folder, work, outcomes)
            yield number, [found[name] for name in works[number].policies]

    return farmed


def _read(folder: Path, work: Work) -> dict[str, Outcome]:
    """What is known of a work, by policy; what cannot be read is not known."""
    found = {}
    for name, path in _paths(folder, work):
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
            table = read_json(path)
            if table["schema_version"] == SCHEMA_VERSION:
                found[name] = Outcome.from_json(table["found"])
    return found


def _write(folder: Path, work: Work, outcomes: Sequence[Outcome]) -> None:
    for (_name, path), found in zip(_paths(folder, work), outcomes, strict=True):
        write_json(path, {"schema_version": SCHEMA_VERSION, "found": found.to_json()})


def _paths(folder: Path, work: Work) -> Iterator[tuple[str, Path]]:
    """The file of each policy: named by all that decides the outcome."""
    base = hashlib.sha256(repr((sources(), work.prepared.setting(work.seed), work.seed)).encode())
    for name in work.policies:
        whole = base.copy()
        whole.update(name.encode())
        key = whole.hexdigest()
        yield name, folder / key[:2] / f"{key}.json"


@functools.cache
def sources() -> str:
    """A digest of the simulator and the policies: other sources may give other outcomes."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(jobs.__file__)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
