"""onnxruntime-genai as it comes, by the clock: no thread count and no option of ours, for comparisons."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class Stock:
    """A bundle opened as its own genai_config.json says. FileNotFoundError where it is none."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai as og

        if not (folder / "genai_config.json").is_file():
            raise FileNotFoundError(f"{folder} is no bundle: it holds no genai_config.json")
        og.disable_telemetry_events()
        self._model = og.Model(str(folder))

    def generate(self, fill: list[int], prompt: list[int], new_tokens: int, room: int) -> Iterator[float]:
        """Seconds of each new token, the first from the start of `prompt`; `fill` is read anew and not timed."""
        import onnxruntime_genai as og

        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=room, min_length=room)
        generator = og.Generator(self._model, params)
        if fill:
            generator.append_tokens(np.asarray([fill], np.int32))
        began = time.perf_counter()
        generator.append_tokens(np.asarray([prompt], np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            now = time.perf_counter()
            yield now - began
            began = time.perf_counter()
