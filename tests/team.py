"""What `accelerate launch` runs in test_distill.py: train as told, write the loss curve of this process.

python team.py MODEL_FOLDER OUT_FOLDER [STATE_FILE] [STOP_AFTER_STEP]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from lessons import lessons, student
from rlkit.recover.distill import Distillation, distill
from rlkit.recover.model import load_model
from rlkit.recover.source import resolve

# Five rows in two parts, 3 + 2, for two processes: shares of 2, 1, 1 and 1 rows; and of three held-out rows 2 and 1.
PLAN = Distillation(
    steps=6, batch=5, adapter_lr=2e-3, scale_lr=4e-3, norm_lr=1e-3, warmup=1, accumulate=2, check_every=2, save_every=2
)
TRAIN, HELD_OUT = np.arange(3, 24), np.arange(3)


def main(model: str, out: str, state: str = "", stop: str = "0") -> None:
    """Train and write `out`/N.json for process N."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    teacher = load_model(resolve(model))[0]
    learner, corpus, curve = student(teacher), lessons(teacher), []
    path = Path(state) if state else None
    steps = distill(learner, corpus, TRAIN, PLAN, held_out=HELD_OUT, state=path, accelerator=accelerator)
    for step in steps:
        curve.append([step.index, step.kl, step.held_out])
        if step.index == int(stop):
            break
    size = float(sum(p.detach().double().abs().sum() for p in learner.parameters() if p.requires_grad))
    found = {"processes": accelerator.num_processes, "curve": curve, "rows": len(corpus.asked), "size": size}
    Path(out, f"{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
