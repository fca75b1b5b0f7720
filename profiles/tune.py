"""Find the session options that are fastest for a bundle on this machine, within a time.

One thing after the other is varied (`options.axes`): what is best so far and its variants run in turns, each in a
process of its own, every other round backwards, after a round that does not count. A variant takes the lead where the
median of its paired ratios says that it is faster by more than LEAST and by more than the ratios' own noise, and where
neither prompts nor replies lose more than GUARD. What has won is held against the default once more in fresh
processes, as the best of many looks better than it is; what is not confirmed is not kept. Variables of the environment
come last and apart, with a comparison of their own, as only commands that start a process can set them.

    cost of a setting = PROMPT tokens of prefill + REPLY tokens of decode, by the measured seconds per token

What it does not know: the machine's load and clock; a longer context; other sizes of prompt.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from rlkit.profiles.options import Change, Facts, affinities, axes, counted
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.runtime.tuned import Tuned

PROMPT, REPLY = 512, 128  # tokens of the exchange that settings are judged by
LEAST = 0.02  # of the cost: less is not worth an option
GUARD = 0.05  # that prompts or replies may lose
HOPELESS = 1.4  # times the leader's cost, in two rounds: given up
LEAST_ROUNDS = 3  # before anything else is given up, so that its figures say something
FEWEST, MOST = 4, 9  # rounds that count
SECONDS = 100.0
BUSY = 0.2  # share of the machine
AGAIN = "once more"

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds per token of one round."""

    prefill: float
    decode: float

    def __post_init__(self) -> None:
        if not (0 < self.prefill < math.inf and 0 < self.decode < math.inf):
            raise ValueError(f"{self.prefill} and {self.decode} seconds per token are no measurement; measure again")

    @property
    def cost(self) -> float:
        """Seconds of the exchange that settings are judged by."""
        return PROMPT * self.prefill + REPLY * self.decode


@dataclass(frozen=True, slots=True)
class Verdict:
    """One setting against another, as times (below 1 is faster): medians of paired ratios, and the cost's noise."""

    cost: float
    prefill: float
    decode: float
    noise: float
    rounds: int
    faster: int  # rounds in which it was

    @classmethod
    def of(cls, mine: Sequence[Sample], base: Sequence[Sample]) -> Verdict:
        """From rounds that ran side by side; noise is twice the standard error of the median ratio.

        The error is taken from the median deviation (times 1.4826 a normal's standard deviation, times 1.2533 / sqrt(n)
        that of its median).
        """
        pairs = list(zip(mine, base, strict=True))
        ratios = [a.cost / b.cost for a, b in pairs]
        middle = statistics.median(ratios)
        spread = 1.4826 * statistics.median(abs(ratio - middle) for ratio in ratios)
        return cls(
            middle,
            statistics.median(a.prefill / b.prefill for a, b in pairs),
            statistics.median(a.decode / b.decode for a, b in pairs),
            2 * 1.2533 * spread / math.sqrt(len(ratios)),
            len(ratios),
            sum(ratio < 1 for ratio in ratios),
        )

    @property
    def wins(self) -> bool:
        """Whether it is faster by more than the noise and in all rounds (of six or more: all but one), and loses in
        neither part. With 2 % of noise per round about one in fifty wins that are none gets past this.
        """
        faster = self.cost < 1 - max(LEAST, self.noise) and self.rounds - self.faster <= _may_lose(self.rounds)
        return faster and self.prefill < 1 + GUARD and self.decode < 1 + GUARD


@dataclass(frozen=True, slots=True)
class Trial:
    """A variant that was tried: against what led then, or why it could not be measured."""

    axis: str
    label: str
    verdict: Verdict | None
    won: bool
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The settings to keep (the default's where nothing won), against the default, and how they were found."""

    tuned: Tuned
    default: Tuned
    against: Verdict | None  # of the options; None where they are the default's
    trials: tuple[Trial, ...]
    left_out: tuple[str, ...]  # what the time did not suffice for
    seconds: float
    load: float | None = None  # share of the machine that others used before it began

    @property
    def busy(self) -> bool:
        """Whether others used so much that what was found suits a busy machine."""
        return self.load is not None and self.load > BUSY

    @property
    def changed(self) -> bool:
        """Whether anything is better than the default."""
        return self.tuned != self.default

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        kept = ("threads", "session_options", "environment")
        return {
            "changed": self.changed,
            **{name: getattr(self.tuned, name) for name in kept},
            "default": {name: getattr(self.default, name) for name in kept},
            "against_default": None if self.against is None else asdict(self.against),
            "trials": [trial.to_json() for trial in self.trials],
            "left_out": list(self.left_out),
            "seconds": self.seconds,
            "load": self.load,
            "busy": self.busy,
        }


class Bench(Protocol):
    """Something that measures settings; what `tune` asks of it."""

    def round(self, tuned: Tuned) -> Sample:
        """Measure once; opens what is not open. ChildProcessError where the settings do not work."""

    def fresh(self) -> None:
        """Close everything, so that what comes is measured in new processes."""

    @property
    def opening(self) -> float:
        """Seconds that opening took, the longest so far."""

    @property
    def round_seconds(self) -> float:
        """Seconds that a round takes, without opening."""

    @property
    def room(self) -> int:
        """How many settings can be open at a time; with more, each round opens them anew."""


@dataclass(slots=True)
class Search:
    """One search: the time that is left, and what was found so far."""

    bench: Bench
    facts: Facts
    default: Tuned
    seconds: float
    inexact: bool
    tell: Tell
    clock: Clock
    began: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (self.clock() - self.began)

    def say(self, note: str) -> None:
        """Progress is the time that has passed, so that the time left is right."""
        done = min(self.clock() - self.began, self.seconds)
        self.tell(Progress("tune", round(10 * done), round(10 * self.seconds), note))

    def take(self, tuned: Tuned, note: str) -> Sample:
        """One measured round."""
        self.say(note)
        return self.bench.round(tuned)

    def rounds_for(self, subjects: int, *, spare: float) -> int:
        """How many counting rounds of so many subjects fit, all but one to be opened; 0 for too few."""
        opening = self.bench.opening
        each = self.bench.round_seconds + (opening if subjects > self.bench.room else 0.0)
        fit = int((self.left - spare - (subjects - 1) * opening) / (subjects * max(each, 1e-6))) - 1
        return min(fit, MOST) if fit >= FEWEST else 0

    def final(self) -> float:
        """Seconds to set aside for the last comparison."""
        return 2 * self.bench.opening + 2 * (FEWEST + 1) * self.bench.round_seconds


def tune(
    bench: Bench,
    facts: Facts,
    default: Tuned,
    *,
    seconds: float = SECONDS,
    inexact: bool = False,
    tell: Tell = silent,
    clock: Clock = time.monotonic,
) -> Outcome:
    """Search within `seconds`; the last comparison begun may go a little over.

    Raises ValueError for a time that is too short to say anything, and ChildProcessError where the default fails.
    """
    if not seconds > 0:
        raise ValueError(f"{seconds} seconds leave no time to measure; give at least 10")
    search = Search(bench, facts, default, seconds, inexact, tell, clock, began=clock())
    search.take(default, "the default")
    best = default
    pages: tuple[str, tuple[Change, ...]] | None = None
    for axis, offered in axes(facts, inexact=inexact):
        changes = affinities(facts, best.threads) if offered is None else offered
        if axis == "pages":
            pages = axis, changes
        else:
            best = _heat(search, axis, changes, best, spare=search.final())
    best, against = _confirm(search, best, default)
    if pages is not None:
        with_pages = _heat(search, *pages, best, spare=search.final())
        best = _confirm(search, with_pages, best)[0]
    search.tell(Progress("tune", round(10 * seconds), round(10 * seconds), ""))
    return Outcome(best, default, against, tuple(search.trials), tuple(search.left_out), clock() - search.began)


def _heat(search: Search, axis: str, changes: Sequence[Change], best: Tuned, *, spare: float) -> Tuned:
    """Let variants of `best` run against it; return the winner, or `best`."""
    variants = {change.label: change.apply(best) for change in changes}
    variants = {label: tuned for label, tuned in variants.items() if tuned != best}
    while variants:
        rounds = search.rounds_for(1 + len(variants), spare=spare)
        if rounds:
            break
        label = list(variants)[-1]
        search.left_out.append(label)
        del variants[label]
    if not variants:
        return best
    found, notes = _rounds(search, axis, variants, best, rounds=rounds, spare=spare)
    winner, lead = best, 1.0
    for label, tuned in variants.items():
        if label in notes:
            verdict = _hopeless(found[label], found[None])
            search.trials.append(Trial(axis, label, verdict, False, notes[label]))
            continue
        verdict = Verdict.of(found[label], found[None])
        search.trials.append(Trial(axis, label, verdict, verdict.wins))
        if verdict.wins and verdict.cost < lead:
            winner, lead = tuned, verdict.cost
    return winner


def _hopeless(mine: list[Sample], base: list[Sample]) -> Verdict | None:
    return Verdict.of(mine, base[: len(mine)]) if mine else None


def _rounds(
    search: Search, axis: str, variants: dict[str, Tuned], best: Tuned, *, rounds: int, spare: float
) -> tuple[dict[str | None, list[Sample]], dict[str, str]]:
    """Samples of every variant and of `best` (None), in turns; and why some were given up."""
    running: dict[str | None, Tuned] = {None: best}
    running.update(variants)
    found: dict[str | None, list[Sample]] = {name: [] for name in running}
    notes: dict[str, str] = {}
    for number in range(1 + rounds):
        order = list(running) if number % 2 == 0 else list(reversed(running))
        for name in order:
            try:
                sample = search.take(running[name], f"{axis}: {name or 'as before'}")
            except ChildProcessError as error:
                if name is None:
                    raise
                notes[name] = str(error)
                del running[name]
                continue
            if number:  # the first round warms up
                found[name].append(sample)
        for name in [name for name in running if name is not None and number]:
            why = _given_up(found[name], found[None], rounds)
            if why:
                notes[name] = why
                del running[name]
        if len(running) == 1 or (number >= FEWEST and search.left < spare):
            break
    return found, notes


def _given_up(mine: list[Sample], base: list[Sample], rounds: int) -> str:
    """Why more rounds are no use, if so: it is far slower, or as many were lost as no winner may lose."""
    ratios = [a.cost / b.cost for a, b in zip(mine, base, strict=True)]
    if len(ratios) >= 2 and min(ratios) > HOPELESS:
        return "far slower"
    lost = sum(ratio >= 1 for ratio in ratios)
    return "no faster" if lost > _may_lose(rounds) and len(mine) >= LEAST_ROUNDS else ""


def _may_lose(rounds: int) -> int:
    return 1 if rounds >= 6 else 0


def _confirm(search: Search, best: Tuned, base: Tuned) -> tuple[Tuned, Verdict | None]:
    """The best against what was before, in fresh processes; the latter where that does not hold."""
    if best == base:
        return base, None
    search.bench.fresh()
    rounds = search.rounds_for(2, spare=search.bench.opening) or FEWEST
    found, notes = _rounds(search, AGAIN, {AGAIN: best}, base, rounds=rounds, spare=0.0)
    label = _label(best, base)
    if notes:
        search.trials.append(Trial(AGAIN, label, _hopeless(found[AGAIN], found[None]), False, notes[AGAIN]))
        return base, None
    verdict = Verdict.of(found[AGAIN], found[None])
    search.trials.append(Trial(AGAIN, label, verdict, verdict.wins))
    return (best, verdict) if verdict.wins else (base, None)


def _label(best: Tuned, base: Tuned) -> str:
    """What differs, in words."""
    words = [counted(best.threads)] if best.threads != base.threads else []
    words += [f"{name}={value}" for name, value in best.session_options.items() if name not in base.session_options]
    return ", ".join(words + [f"{name}={value}" for name, value in best.environment.items()])


def kept(outcome: Outcome, about: dict[str, Any]) -> Tuned:
    """The settings as they are written, with what is known about them."""
    return replace(outcome.tuned, about={**about, "against_default": outcome.to_json()["against_default"]})
