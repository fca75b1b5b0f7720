"""Measure generation: time to first token, time per token, peak memory, of one bundle or of several in turn.

Each bundle runs in a process of its own that does nothing else (`profiles/worker.py`), so its peak memory is its own.
With several, rounds alternate between them, and every other round goes backwards, so that what disturbs the machine
disturbs all alike; ratios are taken round by round and their median reported. Every prompt is new random ids: no cache
of prefixes can answer. Medians over rounds are reported with the 10th and 90th percentile.

What it does not know: the machine's load and clock. A spread far from 0 says that they were not steady.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlkit.profiles.timing import Basis, Spread, Timing
from rlkit.recover.progress import Progress, Tell, silent

Generate = Callable[[list[int], int], Iterator[float]]
"""(prompt ids, new tokens) -> seconds of each token; the first one's count from the start of prefill."""

WARM_UPS = 2
PERCENTILES = (10.0, 90.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: for each prompt length, `repeats` rounds after the warm-ups."""

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    repeats: int = 5
    warm_ups: int = WARM_UPS
    vocab: int = 32000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_tokens or min(self.prompt_tokens) < 1:
            raise ValueError(f"prompt lengths {self.prompt_tokens} must be positive; for example 64,256")
        if self.new_tokens < 2:
            raise ValueError(f"{self.new_tokens} new tokens leave no time between tokens; use at least 2")
        if self.repeats < 1 or self.warm_ups < 0:
            raise ValueError(f"{self.repeats} repeats after {self.warm_ups} warm-ups; use at least 1 repeat")
        if self.vocab < 2:
            raise ValueError(f"a vocabulary of {self.vocab} has no random prompts")


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to measure: a name, how it generates, and what each of its tokens reads at a depth."""

    name: str
    generate: Generate
    peak_nbytes: Callable[[], int | None]
    nbytes_at: Callable[[int], int | None]
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One generation: seconds to the first token, mean seconds of the later ones, how many tokens came."""

    ttft_seconds: float
    tpot_seconds: float
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One subject's timings, one per prompt length, and the rounds behind each."""

    name: str
    timings: tuple[Timing, ...]
    rounds: tuple[tuple[Round, ...], ...]
    threads: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "threads": self.threads,
            "timings": [timing.to_json() for timing in self.timings],
            "rounds": [
                [{"ttft_seconds": r.ttft_seconds, "tpot_seconds": r.tpot_seconds} for r in rounds]
                for rounds in self.rounds
            ],
        }

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Measurement:
        """The inverse of `to_json`."""
        timings = tuple(Timing.from_json(timing) for timing in table["timings"])
        rounds = tuple(
            tuple(Round(r["ttft_seconds"], r["tpot_seconds"], timing.new_tokens) for r in kept)
            for timing, kept in zip(timings, table["rounds"], strict=True)
        )
        return cls(table["name"], timings, rounds, table["threads"])


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much slower than the first subject (above 1) another is: the median over paired rounds."""

    name: str
    against: str
    prompt_tokens: int
    ttft: float
    tpot: float


def measure(subjects: Sequence[Subject], plan: Plan, tell: Tell = silent) -> tuple[Measurement, ...]:
    """Measure all subjects in turn, round by round; the order of results is that of `subjects`."""
    if not subjects:
        raise ValueError("there is nothing to measure; name at least one bundle")
    rounds: dict[tuple[int, int], list[Round]] = {}  # (subject, prompt length) -> its rounds
    turns = list(_turns(len(subjects), plan))
    for done, (index, prompt_tokens, number) in enumerate(turns):
        subject = subjects[index]
        tell(Progress("bench", done, len(turns), f"{subject.name}, {prompt_tokens} prompt tokens"))
        measured = one_round(subject.generate, prompt(plan, prompt_tokens, number), plan.new_tokens)
        if number >= plan.warm_ups:
            rounds.setdefault((index, prompt_tokens), []).append(measured)
    tell(Progress("bench", len(turns), len(turns), ""))
    return tuple(_measurement(subject, index, plan, rounds) for index, subject in enumerate(subjects))


def _turns(subjects: int, plan: Plan) -> Iterator[tuple[int, int, int]]:
    """(subject, prompt length, round number): subjects alternate within a round, backwards in every other one."""
    for prompt_tokens in plan.prompt_tokens:
        for number in range(plan.warm_ups + plan.repeats):
            order = range(subjects)
            for index in order if number % 2 == 0 else reversed(order):
                yield index, prompt_tokens, number


def prompt(plan: Plan, prompt_tokens: int, number: int) -> list[int]:
    """The random ids of one round: the same for every subject, different for every round and length."""
    rng = random.Random(f"{plan.seed}/{prompt_tokens}/{number}")
    low = min(256, plan.vocab // 2)  # special tokens tend to have the lowest ids
    return [rng.randrange(low, plan.vocab) for _ in range(prompt_tokens)]


def one_round(generate: Generate, ids: list[int], new_tokens: int) -> Round:
    """Generate once and fold the stream of seconds."""
    seconds = list(generate(ids, new_tokens))
    if len(seconds) < 2:
        raise ValueError(f"the model stopped after {len(seconds)} of {new_tokens} tokens; switch off its stop tokens")
    return Round(seconds[0], statistics.fmean(seconds[1:]), len(seconds))


def _measurement(subject: Subject, index: int, plan: Plan, rounds: dict[tuple[int, int], list[Round]]) -> Measurement:
    peak = subject.peak_nbytes()
    timings = []
    for prompt_tokens in plan.prompt_tokens:
        depth = prompt_tokens + plan.new_tokens // 2
        timing = summarize(rounds[index, prompt_tokens], prompt_tokens)
        timings.append(replace(timing, nbytes_per_token=subject.nbytes_at(depth), peak_nbytes=peak))
    kept = tuple(tuple(rounds[index, prompt_tokens]) for prompt_tokens in plan.prompt_tokens)
    return Measurement(subject.name, tuple(timings), kept, subject.threads)


def summarize(rounds: Sequence[Round], prompt_tokens: int) -> Timing:
    """The medians of several rounds of one workload, with their spread."""
    ttft = [measured.ttft_seconds for measured in rounds]
    tpot = [measured.tpot_seconds for measured in rounds]
    spread = Spread(*_percentiles(ttft), *_percentiles(tpot), repeats=len(rounds))
    new_tokens = min(measured.new_tokens for measured in rounds)
    medians = statistics.median(ttft), statistics.median(tpot)
    return Timing(Basis.MEASURED, prompt_tokens, new_tokens, *medians, spread=spread)


def _percentiles(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def ratios(measurements: Sequence[Measurement]) -> tuple[Ratio, ...]:
    """Every later subject against the first, from rounds that ran side by side."""
    first, *others = measurements
    found = []
    for other in others:
        for timing, mine, base in zip(other.timings, other.rounds, first.rounds, strict=True):
            pairs = list(zip(mine, base, strict=True))
            ttft = statistics.median(a.ttft_seconds / b.ttft_seconds for a, b in pairs)
            tpot = statistics.median(a.tpot_seconds / b.tpot_seconds for a, b in pairs)
            found.append(Ratio(other.name, first.name, timing.prompt_tokens, ttft, tpot))
    return tuple(found)
