"""A machine without devices: processes that take exact times, and a system that answers what a test wants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import runs
from rlkit.apps.benchmarks.devices import items
from rlkit.apps.benchmarks.devices.command import launch
from rlkit.apps.benchmarks.devices.common import Asked, Family, Tools
from rlkit.apps.benchmarks.devices.present import System
from rlkit.export.targets import Target
from rlkit.profiles import standard
from rlkit.profiles.devicerun import read_run
from rlkit.recover.progress import Tell

WORDS = ("--models", "smollm2-135m", "--recipes", "w8,w4", "--contexts", "0,64", "--prompt", "8", "--generate", "2")
GPU_JSON = '[{"Name":"AMD Radeon(TM) 890M","DriverVersion":"32.0.1"},{"Name":"Microsoft Basic Render Driver"}]'


class Process:
    """A worker: each token takes 10 ms; it ends with an error at the given work, or as a key is pressed."""

    threads, provider = 3, "cpu"

    def __init__(self, world: World, name: str) -> None:
        self._world, self._name = world, name

    def generate(self, work: Any) -> Iterator[float]:
        self._world.asked.append((self._name, len(work.fill), work.new_tokens))
        stop = self._world.stop_at(self._name, len(work.fill), work.new_tokens)
        if stop is not None:
            raise stop
        yield from [0.01] * work.new_tokens

    def peak_nbytes(self) -> int:
        return 300_000_000


class World:
    """A machine with fake processes; remembers what it was asked."""

    def __init__(self, bundle: Path, **system: Any) -> None:
        self.bundle, self.asked, self.commands, self.clock = bundle, [], [], 0
        self.variables: list[Mapping[str, str]] = []
        self.stop_at: Callable[[str, int, int], BaseException | None] = lambda *_work: None
        facts: dict[str, Any] = {
            "name": "Linux",
            "ask": self._no_shell,
            "vulkan": list,
            "cpu": lambda: "Test CPU",
            **system,
        }
        self.tools = Tools(
            system=System(**facts),
            host=lambda: runs.SERVER,
            free_nbytes=lambda: 4 * 10**9,
            no_builder=str,
            bundle=self._bundle,
            start=self._start,
            now=self._now,
        )

    @staticmethod
    def _no_shell(_words: Sequence[str]) -> str:
        raise OSError("no shell here")

    @contextlib.contextmanager
    def _bundle(self, item: items.Item, _target: Target, _asked: Asked, _tell: Tell) -> Iterator[Path]:
        yield item.bundle or self.bundle

    @contextlib.contextmanager
    def _start(self, name: str, command: list[str], variables: Mapping[str, str]) -> Iterator[Process]:
        self.commands.append(command)
        self.variables.append(variables)
        yield Process(self, name)

    def _now(self) -> str:
        self.clock += 1
        return f"2026-11-22T10:00:{self.clock:02}Z"


def reasons(world: World, family: Family, out: Path, *words: str) -> list[tuple[str, str]]:
    assert launch(family, [*WORDS, "-o", str(out), *words], world.tools) == 0
    return [(skip.what, skip.reason) for skip in read_run(out).skips]


def absent(family: Family, world: World, out: Path, *words: str) -> str:
    """The only reason in the result."""
    ((what, why),) = reasons(world, family, out, *words)
    assert what == "everything" and read_run(out).rows == () and world.asked == []
    return why


def windows(bundle: Path, gpus: str = GPU_JSON, npus: str = "", cpu_name: str = "AMD Ryzen AI 9 HX 370") -> World:
    def ask(words: Sequence[str]) -> str:
        assert words[0] == "powershell"
        return npus if "COMPUTEACCELERATOR" in words[-1] else gpus

    return World(bundle, name="Windows", ask=ask, cpu=lambda: cpu_name)


def asked(out: Path, **about: Any) -> Asked:
    return Asked(out, ("smollm2-135m",), ("w4",), standard.tests_of((0,), 8, 2), 3, **about)
