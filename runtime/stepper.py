"""Single steps of a bundle's graph in plain onnxruntime, at any depth, with or without the runtime's own profiler.

A step reads `past` tokens of a cache that random numbers fill and appends its own, as often as one likes: past and
present share one buffer wherever the bundle says that genai shares it, so that nothing is copied that genai would not
copy. What a step leaves out is genai's own work: choosing the token, and the loop around it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.runtime.kv import graph_of
from rlkit.runtime.plain import cache_names, cache_of, open_graph
from rlkit.runtime.session import read_bundle, threads_here

Clock = Callable[[], float]


class Stepper:
    """An open graph; make one with `open_stepper`."""

    def __init__(self, folder: Path, config: dict[str, Any], session: Any, clock: Clock) -> None:
        self._folder, self._config, self._session, self._clock = folder, config, session, clock
        self.threads: int = session.get_session_options().intra_op_num_threads
        self._buffers: dict[str, Any] = {}
        self._room = -1

    def step(self, new_tokens: int, past_tokens: int, seed: int = 0) -> float:
        """Seconds of one step of `new_tokens` random ids after `past_tokens`, until its logits are there.

        Raises ValueError where the context does not hold them.
        """
        total, limit = past_tokens + new_tokens, int(self._config["model"]["context_length"])
        if new_tokens < 1 or past_tokens < 0 or total > limit:
            why = f"{new_tokens} tokens after {past_tokens} are no step in a context of {limit}"
            raise ValueError(f"{why}; use at least 1 after at least 0, and fewer together")
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, int(self._config["model"]["vocab_size"]), (1, new_tokens))
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past_tokens, total)[None],
        }
        binding = self._bound(given, past_tokens, total)
        began = self._clock()
        self._session.run_with_iobinding(binding)
        return self._clock() - began

    def close(self) -> list[dict[str, Any]]:
        """End the session; the events of its profile, none if it had none."""
        profile = self._session.end_profiling() if self._session.get_session_options().enable_profiling else ""
        self._buffers, self._session = {}, None
        if not profile:
            return []
        try:
            events: list[dict[str, Any]] = json.loads(Path(profile).read_text(encoding="utf-8"))
        finally:
            Path(profile).unlink(missing_ok=True)
        return events

    def _bound(self, given: dict[str, NDArray[Any]], past_tokens: int, total: int) -> Any:
        binding = self._session.io_binding()
        shared = bool(self._config["search"].get("past_present_share_buffer"))
        self._fill(total if shared else past_tokens)
        for value in self._session.get_inputs():
            if value.name in self._buffers:
                binding.bind_ortvalue_input(value.name, self._buffers[value.name])
            else:
                kind = np.int32 if value.type == "tensor(int32)" else np.int64
                binding.bind_cpu_input(value.name, given[value.name].astype(kind))
        presents = cache_names(self._config["model"]["decoder"]) if shared else {}
        for output in self._session.get_outputs():
            if output.name in presents:
                binding.bind_ortvalue_output(output.name, self._buffers[presents[output.name]])
            else:
                binding.bind_output(output.name, "cpu")
        return binding

    def _fill(self, room: int) -> None:
        """Make caches for `room` tokens, full of random numbers: no kernel is faster for them, none meets denormals."""
        if room == self._room:
            return
        import onnxruntime as ort

        rng = np.random.default_rng(0)
        self._buffers.clear()
        for value in self._session.get_inputs():
            if value.name not in ("input_ids", "attention_mask", "position_ids"):
                heads, size, kind = cache_of(value, self._config["model"]["decoder"], self._folder)
                numbers = _random(rng, (1, heads, room, size), kind)
                self._buffers[value.name] = ort.OrtValue.ortvalue_from_numpy(numbers)
        self._room = room


def _random(rng: np.random.Generator, shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
    if np.issubdtype(kind, np.integer):
        return rng.integers(0, 100, shape).astype(kind)
    return (rng.standard_normal(shape, np.float32) / 8).astype(kind)


def open_stepper(
    bundle: Path,
    threads: int | None = None,
    profile: Path | None = None,
    clock: Clock = time.perf_counter,
    *,
    kv: str | None = None,
) -> Stepper:
    """Open a bundle's graph as generation runs it; `profile`, a file name's start, has kernels timed until `close`.

    `threads` None means what the bundle says; `kv` is one of the caches it offers. Raises FileNotFoundError or
    ValueError where it is no bundle, or has no such cache.
    """
    config, manifest = read_bundle(bundle, threads)
    decoder, used = config["model"]["decoder"], threads or threads_here(config, manifest)
    filename, _cache = graph_of(bundle, config, kv)
    return Stepper(bundle, config, open_graph(bundle / filename, decoder, used, profile), clock)
