"""Measure generation as llama-bench does: prefill and decode apart, at a depth, of one bundle or of several in turn.

    pp512            a prompt of 512 tokens up to the first new token (TTFT); tokens/s count the prompt's
    tg128            128 tokens one by one (TPOT); the first of the 128 steps reads a random token
    pp512 @ d4096    the same after 4096 other tokens, which fill the cache beforehand and are not timed

Each bundle runs in a process of its own that does nothing else (`profiles/worker.py`), so its peak memory is its own.
With several, rounds alternate between them, and every other round goes backwards, so that what disturbs the machine
disturbs all alike; ratios are taken round by round and their median reported. What is timed is new random ids each
time: no cache of prefixes can answer. What fills the cache stays from round to round, as its time does not count.

What it does not know: the machine's load and clock. A spread far from 0 says that they were not steady.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rlkit.profiles.timing import Basis, Spread, Summary, Timing, percentile
from rlkit.recover.progress import Progress, Tell, silent

WARM_UPS = 1


class Kind(StrEnum):
    """What a test times, by llama-bench's names."""

    PREFILL = "pp"
    DECODE = "tg"


@dataclass(frozen=True, slots=True)
class Case:
    """`tokens` of a prompt, or generated one by one, after `depth` others."""

    kind: Kind
    tokens: int
    depth: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.depth < 0:
            raise ValueError(f"{self.tokens} tokens after {self.depth} are no test; use at least 1 after at least 0")

    @property
    def name(self) -> str:
        """pp512, tg128 @ d4096."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def room(self) -> int:
        """How many tokens it needs a cache for."""
        return self.depth + self.tokens + 1


@dataclass(frozen=True, slots=True)
class Work:
    """One timed piece: the cache holds `fill`, then come `prompt` and `new_tokens`; `room` is for the whole depth."""

    fill: list[int]
    prompt: list[int]
    new_tokens: int
    room: int


Generate = Callable[[Work], Iterator[float]]
"""Seconds of each new token; the first one's count from the start of the prompt, the fill's count for none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: `repeats` rounds of every test after the warm-ups."""

    tests: tuple[Case, ...]
    repeats: int = 5
    warm_ups: int = WARM_UPS
    vocab: int = 32000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError("there is no test to run; ask for prompt tokens or for generated ones")
        if self.repeats < 1 or self.warm_ups < 0:
            raise ValueError(f"{self.repeats} repeats after {self.warm_ups} warm-ups; use at least 1 repeat")
        if self.vocab < 2:
            raise ValueError(f"a vocabulary of {self.vocab} has no random prompts")

    @property
    def room(self) -> int:
        """The context that the longest test needs."""
        return max(test.room for test in self.tests)


def standard(prompts: Sequence[int] = (512,), generate: int = 128, depths: Sequence[int] = (0,)) -> tuple[Case, ...]:
    """Prefill of each length and decode at each depth, shallow first, so that peaks of memory are each test's own.

    0 leaves a kind out.
    """
    if min((*prompts, generate, *depths), default=0) < 0:
        raise ValueError(f"prompts {prompts}, {generate} generated tokens, depths {depths}: none may be negative")
    tests = []
    for depth in sorted(set(depths)):
        tests += [Case(Kind.PREFILL, tokens, depth) for tokens in sorted(set(prompts)) if tokens]
        tests += [Case(Kind.DECODE, generate, depth)] if generate else []
    return tuple(tests)


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to measure: a name, how it generates, what each of its tokens reads at a depth, and what runs it."""

    name: str
    generate: Generate
    peak_nbytes: Callable[[], int | None]
    nbytes_at: Callable[[int], int | None]
    threads: int | None = None
    provider: str = "cpu"


@dataclass(frozen=True, slots=True)
class Series:
    """The rounds of one test: seconds of each token, of prefill one number, the time to the first token.

    `nbytes_per_token` is what a decode step at mean depth reads; `peak_nbytes` is the process's peak so far.
    """

    test: Case
    rounds: tuple[tuple[float, ...], ...]
    nbytes_per_token: int | None = None
    peak_nbytes: int | None = None

    def __post_init__(self) -> None:
        if not self.rounds or not all(self.rounds) or min(min(seconds) for seconds in self.rounds) < 0:
            raise ValueError(f"{self.test.name} has a round without times; measure it again")
        if min(sum(seconds) for seconds in self.rounds) <= 0:
            raise ValueError(f"{self.test.name} has a round that took no time; measure it again with more tokens")

    @property
    def tokens_per_s(self) -> Summary:
        """Over rounds."""
        return Summary.of([self.test.tokens / sum(seconds) for seconds in self.rounds])

    @property
    def ttft(self) -> Summary | None:
        """Seconds to the first token over rounds, of prefill."""
        return Summary.of([sum(seconds) for seconds in self.rounds]) if self.test.kind is Kind.PREFILL else None

    @property
    def tpot(self) -> Summary | None:
        """A round's mean seconds per token over rounds, of decode."""
        means = [statistics.fmean(seconds) for seconds in self.rounds]
        return Summary.of(means) if self.test.kind is Kind.DECODE else None

    @property
    def token_seconds(self) -> Summary | None:
        """Seconds per token over all tokens of all rounds, of decode."""
        every = [second for seconds in self.rounds for second in seconds]
        return Summary.of(every) if self.test.kind is Kind.DECODE else None

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes that decode has to read, over the mean time it takes."""
        tpot = self.tpot
        return None if tpot is None or self.nbytes_per_token is None else self.nbytes_per_token / tpot.mean

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: what was measured, and for readers what follows from it."""
        found = {"tokens_per_s": self.tokens_per_s, "ttft_seconds": self.ttft, "tpot_seconds": self.tpot}
        found["token_seconds"] = self.token_seconds
        return {
            "test": self.test.name,
            "kind": str(self.test.kind),
            "tokens": self.test.tokens,
            "depth": self.test.depth,
            **{name: _summary_to_json(summary) for name, summary in found.items()},
            "bytes_per_s": self.bytes_per_s,
            "nbytes_per_token": self.nbytes_per_token,
            "peak_nbytes": self.peak_nbytes,
            "rounds": [list(seconds) for seconds in self.rounds],
        }

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Series:
        """The inverse of `to_json`."""
        test = Case(Kind(table["kind"]), table["tokens"], table["depth"])
        rounds = tuple(tuple(float(second) for second in seconds) for seconds in table["rounds"])
        return cls(test, rounds, table["nbytes_per_token"], table["peak_nbytes"])


def _summary_to_json(summary: Summary | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    return {"mean": summary.mean, "std": summary.std, "p50": summary.p50, "p95": summary.p95}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One subject's series, one per test."""

    name: str
    series: tuple[Series, ...]
    threads: int | None = None
    provider: str = "cpu"

    def timing(self) -> Timing:
        """The first prefill and the first decode as one workload, by medians; the decode may be at another depth.

        Raises ValueError where either was not measured.
        """
        prefill = next((series for series in self.series if series.test.kind is Kind.PREFILL), None)
        decode = next((series for series in self.series if series.test.kind is Kind.DECODE), None)
        if prefill is None or decode is None:
            raise ValueError(f"{self.name} was measured without prompt or without new tokens; measure both")
        ttft = [sum(seconds) for seconds in prefill.rounds]
        tpot = [statistics.fmean(seconds) for seconds in decode.rounds]
        spread = Spread(*_edges(ttft), *_edges(tpot), repeats=len(tpot))
        peaks = [series.peak_nbytes for series in (prefill, decode) if series.peak_nbytes is not None]
        return Timing(
            Basis.MEASURED,
            prefill.test.tokens,
            decode.test.tokens,
            statistics.median(ttft),
            statistics.median(tpot),
            decode.nbytes_per_token,
            max(peaks, default=None),
            spread,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        about = {"name": self.name, "threads": self.threads, "provider": self.provider}
        return {**about, "series": [series.to_json() for series in self.series]}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Measurement:
        """The inverse of `to_json`; ValueError for what another version or program wrote."""
        try:
            series = tuple(Series.from_json(row) for row in table["series"])
            return cls(table["name"], series, table["threads"], table["provider"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"a measurement lacks {error}, so it is of another version; measure again") from error


def _edges(values: Sequence[float]) -> tuple[float, float]:
    return percentile(values, 10.0), percentile(values, 90.0)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much slower than the first subject (above 1) another is: the median over paired rounds."""

    name: str
    against: str
    test: Case
    time: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "against": self.against, "test": self.test.name, "time": self.time}


def measure(subjects: Sequence[Subject], plan: Plan, tell: Tell = silent) -> tuple[Measurement, ...]:
    """Measure all subjects in turn, round by round; the order of results is that of `subjects`.

    Raises ValueError for no subjects and for a model that stops before its last token.
    """
    if not subjects:
        raise ValueError("there is nothing to measure; name at least one bundle")
    total, done = len(plan.tests) * (plan.warm_ups + plan.repeats) * len(subjects), 0
    found: list[list[Series]] = [[] for _ in subjects]
    for test in plan.tests:
        rounds: list[list[tuple[float, ...]]] = [[] for _ in subjects]
        for index, number in _turns(len(subjects), plan):
            tell(Progress("bench", done, total, f"{subjects[index].name}, {test.name}"))
            seconds = one_round(subjects[index].generate, work(plan, test, number))
            done += 1
            if number >= plan.warm_ups:
                rounds[index].append(seconds)
        for subject, taken, series in zip(subjects, rounds, found, strict=True):
            series.append(_series(subject, test, taken))
    tell(Progress("bench", total, total, ""))
    return tuple(
        Measurement(subject.name, tuple(series), subject.threads, subject.provider)
        for subject, series in zip(subjects, found, strict=True)
    )


def _turns(subjects: int, plan: Plan) -> Iterator[tuple[int, int]]:
    """(subject, round number): subjects alternate within a round, backwards in every other one."""
    for number in range(plan.warm_ups + plan.repeats):
        order = range(subjects)
        for index in order if number % 2 == 0 else reversed(order):
            yield index, number


def _series(subject: Subject, test: Case, rounds: Sequence[tuple[float, ...]]) -> Series:
    decodes = test.kind is Kind.DECODE
    nbytes = subject.nbytes_at(test.depth + test.tokens // 2) if decodes else None
    return Series(test, tuple(rounds), nbytes, subject.peak_nbytes())


def work(plan: Plan, test: Case, number: int) -> Work:
    """What one round does: the same for every subject; what is timed differs from round to round."""
    fill = _ids(plan, f"fill/{test.depth}", test.depth)
    room = max(other.room for other in plan.tests if other.depth == test.depth)
    decodes = test.kind is Kind.DECODE
    prompt = _ids(plan, f"{test.name}/{number}", 1 if decodes else test.tokens)
    return Work(fill, prompt, test.tokens if decodes else 1, room)


def _ids(plan: Plan, key: str, count: int) -> list[int]:
    rng = random.Random(f"{plan.seed}/{key}")
    low = min(256, plan.vocab // 2)  # special tokens tend to have the lowest ids
    return [rng.randrange(low, plan.vocab) for _ in range(count)]


def one_round(generate: Generate, asked: Work) -> tuple[float, ...]:
    """Generate once and fold the stream of seconds."""
    seconds = tuple(round(second, 9) for second in generate(asked))  # the clock knows no more
    if len(seconds) != asked.new_tokens:
        why = f"the model stopped after {len(seconds)} of {asked.new_tokens} tokens"
        raise ValueError(f"{why}; switch off its stop tokens")
    return seconds


def ratios(measurements: Sequence[Measurement]) -> tuple[Ratio, ...]:
    """Every later subject against the first, from rounds that ran side by side."""
    first, *others = measurements
    found = []
    for other in others:
        for mine, base in zip(other.series, first.series, strict=True):
            pairs = zip(mine.rounds, base.rounds, strict=True)
            time = statistics.median(sum(a) / sum(b) for a, b in pairs)
            found.append(Ratio(other.name, first.name, mine.test, time))
    return tuple(found)
