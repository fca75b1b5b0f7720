"""The next step of a request: its options by context, made once per bucket and kept for the run."""

from __future__ import annotations

from dataclasses import replace

from rlkit.profiles.scheduling.workload import CONTEXT, Llm, Phase
from rlkit.runtime.jobs import Option

__all__ = ["Steps"]

Choice = tuple[tuple[Option, ...], tuple[int | None, ...]]  # a job's options and remaining


class Steps:
    """Options of the steps of one language model, and by unit the time until the next target."""

    __slots__ = ("_chunks", "_decode", "_last", "_llm", "_prefill", "_units")

    def __init__(self, llm: Llm, units: int) -> None:
        self._llm, self._units = llm, units
        self._decode: dict[int, Choice] = {}
        self._prefill: dict[tuple[int, int], tuple[Option, ...]] = {}
        self._last: dict[tuple[int, int, int], Option] = {}
        # The chunks as asked: the first phase of each unit.
        self._chunks: dict[int, Phase] = {}
        for phase in llm.prefill:
            self._chunks.setdefault(phase.options[0].unit, phase)

    def decode(self, past: int) -> Choice:
        """The next token behind `past` tokens."""
        bucket = past // CONTEXT
        if bucket not in self._decode:
            options = tuple(_at(phase, bucket) for phase in self._llm.decode)
            least: list[int | None] = [None] * self._units
            for option in options:
                if least[option.unit] is None:
                    least[option.unit] = option.ns
            self._decode[bucket] = options, tuple(least)
        return self._decode[bucket]

    def prefill(self, past: int, prompt: int) -> Choice:
        """The next chunk of a prompt of which `past` tokens are read."""
        left = prompt - past
        key = past // CONTEXT, left
        if key not in self._prefill:
            self._prefill[key] = tuple(self._chunk(phase, past, left) for phase in self._llm.prefill)
        least: list[int | None] = [None] * self._units
        for unit, phase in self._chunks.items():
            least[unit] = self._rest(phase, past, prompt)
        return self._prefill[key], tuple(least)

    def _rest(self, phase: Phase, past: int, prompt: int) -> int:
        """Ns of all chunks left on this phase's unit alone."""
        total = 0
        while past < prompt:
            chunk = self._chunk(phase, past, prompt - past)
            total += chunk.ns
            past += chunk.units
        return total

    def _chunk(self, phase: Phase, past: int, left: int) -> Option:
        """The next chunk, or what is left of the prompt if that is shorter."""
        bucket = min(past // CONTEXT, len(phase.options) - 1)
        option = phase.options[bucket]
        if left >= option.units:
            return option
        key = id(phase), bucket, left  # the setting keeps the phase alive
        if key not in self._last:
            ns = option.ns
            if phase.least_ns:
                least = phase.least_ns[bucket]
                ns = least + (ns - least) * (left - 1) // (option.units - 1)
            spent = None if option.millijoule is None else option.millijoule * ns / option.ns
            self._last[key] = replace(option, ns=ns, units=left, millijoule=spent)
        return self._last[key]


def _at(phase: Phase, bucket: int) -> Option:
    return phase.options[min(bucket, len(phase.options) - 1)]
