"""One record for forecast and measurement, so that comparing them is subtraction.

    TTFT   seconds from the start of prefill to the first token
    TPOT   seconds per later token: (end - first token) / (new_tokens - 1)

`tokens_per_s` is decode speed, 1 / TPOT; `end_to_end_tokens_per_s` counts the prompt's time too. `nbytes_per_token` is
what a decode step at mean depth has to read: every weight once, and the KV cache so far; activations are left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Basis(StrEnum):
    """Where a timing comes from."""

    FORECAST = "forecast"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True)
class Summary:
    """Repeated measurements in four numbers; `std` is the sample's standard deviation, None of a single one."""

    mean: float
    std: float | None
    p50: float
    p95: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of at least one value; ValueError of none."""
        if not values:
            raise ValueError("there is nothing to summarize; measure at least one round")
        std = statistics.stdev(values) if len(values) > 1 else None
        p95 = percentile(values, 95.0)
        return cls(statistics.fmean(values), std, statistics.median(values), p95, len(values))

    @property
    def error(self) -> float | None:
        """The standard error of the mean."""
        return None if self.std is None else self.std / self.count**0.5

    def text(self, digits: int = 1) -> str:
        """ "281.6 ± 0.4", without the second number where it is unknown."""
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f" ± {self.std:.{digits}f}")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` percent lie, between two neighbours where it falls between them."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100.0
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True, slots=True)
class Spread:
    """The 10th and 90th percentile of repeated measurements, in seconds."""

    ttft_p10_seconds: float
    ttft_p90_seconds: float
    tpot_p10_seconds: float
    tpot_p90_seconds: float
    repeats: int


@dataclass(frozen=True, slots=True)
class Timing:
    """What generating `new_tokens` after `prompt_tokens` costs; unknown is None."""

    basis: Basis
    prompt_tokens: int
    new_tokens: int
    ttft_seconds: float
    tpot_seconds: float
    nbytes_per_token: int | None = None
    peak_nbytes: int | None = None
    spread: Spread | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 1:
            raise ValueError(f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens: each must be at least 1")
        for name in ("ttft_seconds", "tpot_seconds"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} = {seconds} is no duration; measure again with more tokens")

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: tokens after the first."""
        return 1.0 / self.tpot_seconds

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prefill speed."""
        return self.prompt_tokens / self.ttft_seconds

    @property
    def seconds(self) -> float:
        """From the start of prefill to the last token."""
        return self.ttft_seconds + (self.new_tokens - 1) * self.tpot_seconds

    @property
    def end_to_end_tokens_per_s(self) -> float:
        """New tokens over all the time, prefill included."""
        return self.new_tokens / self.seconds

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes a decode step has to read, over the time it takes."""
        return None if self.nbytes_per_token is None else self.nbytes_per_token / self.tpot_seconds

    def minus(self, other: Timing) -> Gap:
        """How far this timing is from `other`, the one taken as true; both must be of the same workload."""
        mine, theirs = (self.prompt_tokens, self.new_tokens), (other.prompt_tokens, other.new_tokens)
        if mine != theirs:
            raise ValueError(f"workloads differ, {mine} against {theirs} (prompt, new) tokens; compare equal ones")
        return Gap(
            self.ttft_seconds - other.ttft_seconds,
            self.tpot_seconds - other.tpot_seconds,
            self.ttft_seconds / other.ttft_seconds - 1.0,
            self.tpot_seconds / other.tpot_seconds - 1.0,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the derived speeds are included for readers."""
        return {
            **asdict(self),
            "basis": str(self.basis),
            "tokens_per_s": self.tokens_per_s,
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "end_to_end_tokens_per_s": self.end_to_end_tokens_per_s,
            "bytes_per_s": self.bytes_per_s,
        }

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Timing:
        """The inverse of `to_json`."""
        kept = {name: table[name] for name in cls.__slots__ if name not in ("basis", "spread")}
        spread = table.get("spread")
        return cls(basis=Basis(table["basis"]), spread=Spread(**spread) if spread else None, **kept)


@dataclass(frozen=True, slots=True)
class Gap:
    """A difference of two timings; relative ones are (mine / theirs) - 1, so negative means faster."""

    ttft_seconds: float
    tpot_seconds: float
    ttft_relative: float
    tpot_relative: float


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three digits: 2.31, 15.2, 152."""
    value = 1e3 * seconds
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
