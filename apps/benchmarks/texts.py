"""The texts that benchmarks of recovery learn from, and how fast they are sampled."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.apps import heldout
from rlkit.recover import source
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import Tell

LENGTH = 128
BUDGETS = {"16k": 16384, "64k": 65536, "256k": 262144}  # synthetic tokens
STEPS = {"16k": 32, "64k": 64, "256k": 128}  # of 16 rows each: 4 times over the text, twice, once


@dataclass(frozen=True, slots=True)
class Bench:
    """The model, the text it is measured on, the folder of everything that is kept, and who is told."""

    model: source.Source
    held_out: heldout.HeldOut
    out: Path
    tell: Tell

    def text(self, tokens: str) -> tuple[Path, float]:
        """The corpus of a budget, sampled once, and how many seconds that took."""
        folder, timing = self.out / "texts" / tokens, self.out / "texts" / f"{tokens}.json"
        if not folder.is_dir():
            from rlkit.recover.model import fast_dtype, load_model
            from rlkit.recover.synthesize import Sampling, synthesize

            model, tokenizer = load_model(self.model)
            began = time.perf_counter()
            sampling = Sampling(sequences=BUDGETS[tokens] // LENGTH, length=LENGTH)
            synthesize(model.to(fast_dtype()), tokenizer, sampling, folder, tell=self.tell)
            write_json(timing, {"seconds": time.perf_counter() - began})
        return folder, float(json.loads(timing.read_text(encoding="utf-8"))["seconds"])


def generation(bench: Bench) -> dict[str, Any]:
    """Tokens per second of synthesize and of the model's own generate at batch 1, one after the other, twice."""
    from rlkit.recover.model import fast_dtype, load_model
    from rlkit.recover.synthesize import Sampling, synthesize

    loaded, tokenizer = load_model(bench.model)
    model = loaded.to(fast_dtype())
    rates: dict[str, list[float]] = {"synthesize": [], "generate": []}
    for seed in range(2):
        folder, sampling = bench.out / "generation", Sampling(sequences=192, length=LENGTH, seed=seed)
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        corpus = synthesize(model, tokenizer, sampling, folder, tell=bench.tell)
        rates["synthesize"].append(corpus.ids.size / (time.perf_counter() - began))
        start = tokenizer("The", return_tensors="pt").input_ids
        began = time.perf_counter()
        made = model.generate(start, do_sample=True, min_new_tokens=LENGTH, max_new_tokens=LENGTH)
        rates["generate"].append((made.shape[1] - start.shape[1]) / (time.perf_counter() - began))
    shutil.rmtree(folder, ignore_errors=True)
    best = {name: sorted(found)[len(found) // 2] for name, found in rates.items()}
    return {"tokens_per_s": best, "ratio": best["synthesize"] / best["generate"]}
