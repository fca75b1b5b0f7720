"""What the server counts, in Prometheus' text format (version 0.0.4), and the speeds it measured last.

Counters of the engines are asked for when they are shown; what is counted here is what only the server sees.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NAMED_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/rlkit/stats", "/")
FIRST_TOKEN_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
NEWEST = 32  # replies that the speeds shown are medians of


@dataclass(frozen=True, slots=True)
class Timings:
    """What one request took, by the clock on the wall: seconds include the turns of others.

    `tokens_per_s` counts from the second token of each reply on; None without one.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prompt_seconds: float
    first_token_seconds: float | None
    tokens_per_s: float | None

    def to_json(self) -> dict[str, Any]:
        """As the last chunk of a stream has it."""
        return {name: getattr(self, name) for name in self.__slots__}


class Metrics:
    """Counts of requests and of replies; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, int]] = Counter()
        self._gone = 0
        self._first: dict[str, Counter[float]] = {}
        self._first_sum: Counter[str] = Counter()
        self._newest: dict[str, deque[Timings]] = {}
        self.started = time.time()

    def answered(self, path: str, status: int) -> None:
        """An HTTP answer begins."""
        with self._lock:
            self._answers[path if path in NAMED_PATHS else "other", status] += 1

    def left(self) -> None:
        """A client went away before its answer was complete."""
        with self._lock:
            self._gone += 1

    def replied(self, model: str, timings: Timings) -> None:
        """A reply of a model is complete."""
        seconds = timings.first_token_seconds
        with self._lock:
            self._newest.setdefault(model, deque(maxlen=NEWEST)).append(timings)
            if seconds is not None:
                bound = next((bound for bound in FIRST_TOKEN_BOUNDS if seconds <= bound), float("inf"))
                self._first.setdefault(model, Counter())[bound] += 1
                self._first_sum[model] += seconds  # type: ignore[assignment]  # a counter of seconds

    def measured(self, model: str) -> dict[str, Any] | None:
        """Medians over the newest replies of a model; None before the first."""
        with self._lock:
            newest = list(self._newest.get(model, ()))
        if not newest:
            return None
        return {
            "replies": len(newest),
            "ttft_seconds": _median(timing.first_token_seconds for timing in newest),
            "tokens_per_s": _median(timing.tokens_per_s for timing in newest),
            "prompt_tokens": _median(float(timing.prompt_tokens) for timing in newest),
            "last": newest[-1].to_json(),
            "newest": [timing.to_json() for timing in newest],
        }

    def render(self, engines: Mapping[str, Mapping[str, Any]], nbytes: Mapping[str, int]) -> str:
        """Everything as text; `engines` are the numbers of each loaded model's engine, by name."""
        with self._lock:
            answers, gone = dict(self._answers), self._gone
            first = {model: dict(found) for model, found in self._first.items()}
            sums = dict(self._first_sum)
        lines = [
            *_head("rlkit_http_answers_total", "counter", "HTTP answers by path and status."),
            *(
                _line("rlkit_http_answers_total", {"path": path, "status": str(status)}, count)
                for (path, status), count in sorted(answers.items())
            ),
            *_head("rlkit_clients_gone_total", "counter", "Clients that left before their answer was complete."),
            _line("rlkit_clients_gone_total", {}, gone),
            *_head("rlkit_uptime_seconds", "gauge", "Seconds since the server started."),
            _line("rlkit_uptime_seconds", {}, time.time() - self.started),
            *_head("rlkit_model_bytes", "gauge", "Bytes of memory that an open bundle takes."),
            *(_line("rlkit_model_bytes", {"model": name}, value) for name, value in sorted(nbytes.items())),
            *_engine_lines(engines),
            *_histogram("rlkit_first_token_seconds", "Seconds from a request to its first token.", first, sums),
        ]
        return "\n".join(lines) + "\n"


GAUGES = ("active", "waiting")


def _engine_lines(engines: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    keys = dict.fromkeys(key for stats in engines.values() for key in stats)
    for key in keys:
        gauge = key in GAUGES
        name = f"rlkit_engine_{key}" if gauge else f"rlkit_engine_{key}_total"
        yield from _head(name, "gauge" if gauge else "counter", f"Engine: {key.replace('_', ' ')}.")
        for model, stats in sorted(engines.items()):
            if key in stats:
                yield _line(name, {"model": model}, stats[key])


def _histogram(
    name: str, about: str, counts: Mapping[str, Mapping[float, int]], sums: Mapping[str, float]
) -> Iterable[str]:
    yield from _head(name, "histogram", about)
    for model, found in sorted(counts.items()):
        below = 0
        for bound in FIRST_TOKEN_BOUNDS:
            below += found.get(bound, 0)
            yield _line(f"{name}_bucket", {"model": model, "le": str(bound)}, below)
        total = sum(found.values())
        yield _line(f"{name}_bucket", {"model": model, "le": "+Inf"}, total)
        yield _line(f"{name}_sum", {"model": model}, sums[model])
        yield _line(f"{name}_count", {"model": model}, total)


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inner}}} {value}" if inner else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _median(values: Iterable[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None
