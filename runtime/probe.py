"""Time single operators in onnxruntime, and what onnxruntime-genai adds to each token, with the options of bundles.

    seconds of an operator = seconds of a run over a model of `count` equal ones / count

which includes the executor's cost of starting it. A trial is one run; `Trials` says what is typical of several: the
median of the faster half, since what disturbs a run makes it slower, and how far all of them lie above it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkit.recover.atomic import write_bytes, write_json
from rlkit.runtime.plain import SILENT

if TYPE_CHECKING:  # made by export/repeats.py, which imports onnx
    from rlkit.export.repeats import Repeated

Clock = Callable[[], float]
FEWEST, MOST = 3, 200  # trials
REPLY = 32  # tokens


@dataclass(frozen=True, slots=True)
class Trials:
    """What repeated runs took, per operator: `seconds` is the median of the faster half."""

    seconds: float
    median: float
    count: int

    @property
    def spread(self) -> float:
        """(median - seconds) / median: near 0 on a quiet machine."""
        return 1.0 - self.seconds / self.median if self.median > 0 else 0.0

    @classmethod
    def of(cls, taken: list[float], parts: int = 1) -> Trials:
        """Fold the seconds of several runs, each of `parts` operators."""
        ordered = sorted(taken)
        faster = ordered[: (len(ordered) + 1) // 2]
        return cls(statistics.median(faster) / parts, statistics.median(ordered) / parts, len(ordered))


def repeat(once: Callable[[], object], seconds: float, parts: int = 1, clock: Clock = time.perf_counter) -> Trials:
    """Run `once` for about `seconds`, FEWEST to MOST times after one warm-up."""
    once()
    taken: list[float] = []
    began = clock()
    while len(taken) < FEWEST or (clock() - began < seconds and len(taken) < MOST):
        start = clock()
        once()
        taken.append(clock() - start)
    return Trials.of(taken, parts)


class Probe:
    """An open session over repeated operators; make one with `open_probe`."""

    def __init__(self, repeated: Repeated, session: Any, values: list[Any], clock: Clock) -> None:
        self._repeated, self._session, self._clock = repeated, session, clock
        self._values = values  # the session reads initializers that it has not packed from here

    def time(self, tokens: int, seconds: float, past: int = 0) -> Trials:
        """What one operator takes over `tokens` rows, after `past` cached ones where it has a cache."""
        binding = self._session.io_binding()
        rng = np.random.default_rng(0)
        cached = bool(self._repeated.caches)
        for name, width in self._repeated.widths.items():
            x = rng.standard_normal((1, tokens, width) if cached else (tokens, width), dtype=np.float32)
            binding.bind_cpu_input(name, x)
        kept = self._bind_caches(binding, tokens + past) if cached else []
        binding.bind_output(self._repeated.last, "cpu")
        run = self._session.run_with_iobinding
        found = repeat(lambda: run(binding), seconds, self._repeated.count, self._clock)
        del kept
        return found

    def _bind_caches(self, binding: Any, total: int) -> list[Any]:
        """Caches with room for `total` tokens, each both input and output as in generation."""
        import onnxruntime as ort

        binding.bind_cpu_input("last", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total", np.array(total, np.int32))
        heads, head = self._repeated.cache_shape
        values = []
        for past, present in self._repeated.caches:
            value = ort.OrtValue.ortvalue_from_numpy(np.full((1, heads, total, head), 0.125, np.float32))
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
            values.append(value)
        return values


def open_probe(repeated: Repeated, threads: int, clock: Clock = time.perf_counter) -> Probe:
    """Open repeated operators on the CPU with so many threads."""
    import onnxruntime as ort

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = SILENT
    values = [ort.OrtValue.ortvalue_from_numpy(value) for value in repeated.constants.values()]
    options.add_external_initializers(list(repeated.constants), values)
    session = ort.InferenceSession(repeated.model, options, providers=["CPUExecutionProvider"])
    return Probe(repeated, session, values, clock)


@dataclass(frozen=True, slots=True)
class TokenTrials:
    """Seconds around the model: of starting a reply (a generator, the prompt, its first token), and of each token."""

    prompt: Trials
    token: Trials


def time_tokens(
    model: bytes, config: dict[str, Any], threads: int, seconds: float, clock: Clock = time.perf_counter
) -> TokenTrials:
    """Generate with a model that computes nothing (export.repeats.decoder), several replies in about `seconds`."""
    import onnxruntime_genai as og

    og.disable_telemetry_events()
    replies: list[list[float]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        write_bytes(Path(folder, "model.onnx"), model)
        options = config["model"]["decoder"]["session_options"]
        options |= {"intra_op_num_threads": threads, "log_severity_level": SILENT}
        write_json(Path(folder, "genai_config.json"), config)
        opened = og.Model(folder)
        reply(opened, clock)
        began = clock()
        while len(replies) < FEWEST or (clock() - began < seconds and len(replies) < MOST):
            replies.append(reply(opened, clock))
        del opened  # before its folder goes
    later = [taken for each in replies for taken in each[1:]]
    return TokenTrials(Trials.of([each[0] for each in replies]), Trials.of(later))


def reply(model: Any, clock: Clock) -> list[float]:
    """Seconds of each token of one reply; the first one's count from before there is a generator."""
    import onnxruntime_genai as og

    taken = []
    start = clock()
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=64)
    generator = og.Generator(model, params)
    generator.append_tokens(np.zeros((1, 8), np.int32))
    for _ in range(REPLY):
        generator.generate_next_token()
        generator.get_next_tokens()
        now = clock()
        taken.append(now - start)
        start = now
    return taken
