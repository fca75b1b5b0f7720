"""Session options that may make a bundle faster on one machine and slower on another: what `rlkit tune` tries.

None of them changes what is computed, but other kernels do: those are tried only where somebody asks (`inexact`).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rlkit.recover import cores
from rlkit.runtime import hugepages
from rlkit.runtime.tuned import Tuned
from rlkit.runtime.tunedbundle import AFFINITIES

SMALL_PAGES = {hugepages.TUNABLES: hugepages.SMALL}


@dataclass(frozen=True, slots=True)
class Change:
    """One thing done differently from what came before."""

    label: str
    threads: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def apply(self, to: Tuned) -> Tuned:
        """The settings with this change in them."""
        return replace(
            to,
            threads=self.threads or to.threads,
            session_options={**to.session_options, **self.options},
            environment={**to.environment, **self.environment},
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides which changes can matter here."""

    processors: tuple[int, ...]  # logical ones that may be used
    per_core: tuple[int, ...]  # the first of each core, the fastest cores first
    fast: int  # how many cores are about as fast as the fastest
    limited: bool  # a quota leaves less than the cores
    huge_pages: bool  # they have to be asked for, and malloc can
    arm64: bool
    two_bits: bool  # among the bundle's weights


def facts_here(*, two_bits: bool) -> Facts:
    """Of this machine."""
    processors = cores.allowed()
    per_core, fast = cores.by_speed(cores.one_per_core(processors))
    limit = cores.quota()
    limited = limit is not None and limit < len(processors)
    arm64 = platform.machine().lower() in ("aarch64", "arm64")
    return Facts(processors, per_core, fast, limited, hugepages.must_be_asked_for(), arm64, two_bits)


def axes(facts: Facts, *, inexact: bool = False) -> Iterator[tuple[str, tuple[Change, ...] | None]]:
    """(what is varied, the changes), what matters most first; None stands for `affinities` of the threads chosen."""
    yield "threads", tuple(Change(counted(number), threads=number) for number in thread_counts(facts))
    yield "spinning", (Change("no spinning", options={"session.intra_op.allow_spinning": "0"}),)
    yield "affinity", None
    yield "splitting", (Change("blocks that shrink", options={"session.dynamic_block_base": "4"}),)
    arena = Change("no arena", options={"enable_cpu_mem_arena": False, "enable_mem_pattern": False})
    yield "memory", (arena, Change("no memory pattern", options={"enable_mem_pattern": False}))
    if inexact and facts.arm64:
        yield "kernels", (Change("no KleidiAI", options={"mlas.disable_kleidiai": "1"}),)
    elif inexact and facts.two_bits:
        yield "kernels", (Change("2-bit look-up tables", options={"mlas.use_lut_gemm": "1"}),)
    if facts.huge_pages:
        yield "pages", (Change("small pages", environment=SMALL_PAGES),)


def thread_counts(facts: Facts) -> tuple[int, ...]:
    """Numbers of threads worth trying, the most promising first; the default is among them or beside them."""
    physical, logical = len(facts.per_core), len(facts.processors)
    wanted = [physical, facts.fast, 0 if facts.limited else logical, physical - 1, (3 * physical + 3) // 4]
    wanted += [(physical + 1) // 2] if physical > 2 else []
    return tuple(dict.fromkeys(number for number in wanted if 1 <= number <= logical))


def affinities(facts: Facts, threads: int) -> tuple[Change, ...]:
    """Threads held on cores of their own; the runtime numbers processors from 1 and leaves the first thread alone."""
    if not 1 < threads <= len(facts.per_core):
        return ()
    held = ";".join(str(number + 1) for number in facts.per_core[1:threads])
    return (Change("threads held on cores", options={AFFINITIES: held}),)


def counted(number: int) -> str:
    """1 thread, 2 threads."""
    return f"{number} thread{'s' if number > 1 else ''}"
