"""onnxruntime-genai as it comes (runtime/stock.py), behind the protocol of profiles/worker.py.

python -m rlkit.apps.benchmarks.stock_worker BUNDLE
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlkit.profiles.bench import Work
from rlkit.profiles.worker import answer
from rlkit.runtime.stock import Stock


def main(bundle: str) -> None:
    """Answer requests until there are no more."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # the library may print; only answers may reach the pipe

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=pipe)

    try:
        stock = Stock(Path(bundle))
    except OSError as error:
        say({"error": str(error)})
        return

    def generate(asked: Work) -> Iterator[float]:
        return stock.generate(asked.fill, asked.prompt, asked.new_tokens, asked.room)

    answer(generate, sys.stdin, say)


if __name__ == "__main__":
    main(*sys.argv[1:])
