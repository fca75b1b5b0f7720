"""The standard set that per-device benchmarks measure: shapes by name, recipes, depths, and the tests made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlkit.profiles.bench import Case, Kind
from rlkit.recover.source import ModelShape

MODELS: dict[str, ModelShape] = {
    "smollm2-135m": ModelShape("LlamaForCausalLM", 30, 576, 1536, 9, 3, 64, 49_152, True, 8192, False),
    "qwen3-0.6b": ModelShape("Qwen3ForCausalLM", 28, 1024, 3072, 16, 8, 128, 151_936, True, 40_960, True),
    "qwen3-1.7b": ModelShape("Qwen3ForCausalLM", 28, 2048, 6144, 16, 8, 128, 151_936, True, 40_960, True),
    "qwen3-4b": ModelShape("Qwen3ForCausalLM", 36, 2560, 9728, 32, 8, 128, 151_936, True, 40_960, True),
    "llama-3.1-8b": ModelShape("LlamaForCausalLM", 32, 4096, 14_336, 32, 8, 128, 128_256, False, 131_072, False),
}
RECIPES = ("w8", "w4", "w4w2-gateup")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: models by name, depths of decode, tokens of a prompt and of decode, rounds of each test."""

    models: tuple[str, ...]
    contexts: tuple[int, ...]
    prompt: int
    new_tokens: int
    repeats: int


FULL = Scale(("smollm2-135m", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b"), (0, 1024, 4096), 512, 128, 3)
QUICK = Scale(("smollm2-135m",), (0, 1024), 512, 128, 2)
SOFTWARE = Scale(("smollm2-135m",), (0,), 16, 2, 1)  # a software driver takes seconds for every token


def tests_of(contexts: Sequence[int], prompt: int, new_tokens: int) -> tuple[Case, ...]:
    """A prompt after nothing, and decode after each context, shallow first; ValueError for a negative one."""
    prefill = (Case(Kind.PREFILL, prompt),) if prompt else ()
    return (*prefill, *(Case(Kind.DECODE, new_tokens, depth) for depth in sorted(set(contexts))))


def model_name(architecture: str, parameters: int) -> str:
    """How results name a model: as MODELS does where the sizes are the same, else by family and size."""
    for name, shape in MODELS.items():
        if (shape.architecture, shape.parameters) == (architecture, parameters):
            return name
    family = architecture.removesuffix("ForCausalLM") or "model"
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
    return f"{family} {size}" if parameters >= 1e6 else f"{family} {parameters}"
