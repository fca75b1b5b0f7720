"""Methods of recovery by name. Each is a function on a Workbench, made of the same few steps.

none          codes only: what the quantizer alone gives
recover-lora  as published (2510.08600, 2606.04238): adapters with random A and zero B, alpha 64, lr 1e-4, distilled
scales        group scales and norms distilled; they fold into the checkpoint and cost nothing at run time
corrected     closed-form low-rank corrections alternated with the codes; no gradient step
full          corrected, then adapters, scales and norms distilled together
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from rlkit.recover.adapter import random_low_rank
from rlkit.recover.workbench import Initial, Workbench

LORA_SCALING = 2.0  # alpha 64 over rank 32
LORA_RATE = 1e-4


@dataclass(frozen=True, slots=True)
class Method:
    """A method's name, what it does, its quantizer unless told, whether it has adapters, and its steps."""

    name: str
    about: str
    quantizer: str
    adapters: bool
    run: Callable[[Workbench], None]


def _none(bench: Workbench) -> None:
    bench.quantize(correct=False)


def _recover_lora(bench: Workbench) -> None:
    bench.quantize(correct=False)
    bench.distillation = replace(bench.distillation, adapter_lr=LORA_RATE)
    bench.train(("adapter",), initial=random_start(bench.distillation.seed), scaling=LORA_SCALING)


def _scales(bench: Workbench) -> None:
    bench.quantize(correct=False)
    bench.train(("scale", "norm"))


def _corrected(bench: Workbench) -> None:
    bench.quantize(correct=True)


def _full(bench: Workbench) -> None:
    bench.quantize(correct=True)
    bench.train(("adapter", "scale", "norm"), initial=random_start(bench.distillation.seed))


def random_start(seed: int) -> Initial:
    """Factors that change nothing yet, each module's drawn from a seed of its own."""
    return lambda name, n, k, rank: random_low_rank(n, k, rank, seed=seed + zlib.crc32(name.encode()))


METHODS = {
    method.name: method
    for method in (
        Method("none", "codes only", "gptq", False, _none),
        Method("recover-lora", "adapters from random, distilled, as published", "search", True, _recover_lora),
        Method("scales", "group scales and norms distilled; no cost at run time", "gptq", False, _scales),
        Method("corrected", "closed-form low-rank correction, no training", "gptq", True, _corrected),
        Method("full", "correction, then adapters, scales and norms distilled", "gptq", True, _full),
    )
}


def find(name: str) -> Method:
    """The method of that name; ValueError names them all."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
