"""onnxruntime-genai as it comes, behind the protocol of profiles/worker.py: no thread count, no option of ours.

python -m rlkit.apps.benchmarks.stock_worker BUNDLE
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.profiles.bench import Work
from rlkit.profiles.worker import answer


def main(bundle: str) -> None:
    """Answer requests until there are no more; what fills the cache is read anew each time, and not timed."""
    import onnxruntime_genai as og

    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # the library may print; only answers may reach the pipe

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=pipe)

    if not (Path(bundle) / "genai_config.json").is_file():
        say({"error": f"{bundle} is no bundle"})
        return
    model = og.Model(bundle)

    def generate(asked: Work) -> Iterator[float]:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=asked.room, min_length=asked.room)
        generator = og.Generator(model, params)
        if asked.fill:
            generator.append_tokens(np.asarray([asked.fill], np.int32))
        began = time.perf_counter()
        generator.append_tokens(np.asarray([asked.prompt], np.int32))
        for _ in range(asked.new_tokens):
            generator.generate_next_token()
            now = time.perf_counter()
            yield now - began
            began = time.perf_counter()

    answer(generate, sys.stdin, say)


if __name__ == "__main__":
    main(*sys.argv[1:])
