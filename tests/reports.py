"""A report of invented numbers, for tests of what is made of reports."""

from __future__ import annotations

from rlkit.profiles.divergence import Divergence
from rlkit.profiles.machine import Machine
from rlkit.profiles.report import BundleResult, Chat, Report, Stage
from rlkit.profiles.timing import Basis, Spread, Timing


def divergence(kl: float, top1: float, perplexity: float) -> Divergence:
    return Divergence(kl, kl / 30, kl / 2, kl * 6, top1, 46.5, perplexity, 4096)


def measured(ttft: float, tpot: float, nbytes: int) -> Timing:
    spread = Spread(0.96 * ttft, 1.07 * ttft, 0.97 * tpot, 1.05 * tpot, repeats=5)
    return Timing(Basis.MEASURED, 64, 64, ttft, tpot, nbytes, 412_000_000, spread)


def forecast(ttft: float, tpot: float, nbytes: int) -> Timing:
    return Timing(Basis.FORECAST, 64, 64, ttft, tpot, nbytes, 230_000_000)


def bundle(name: str, **changes: object) -> BundleResult:
    mixed = name != "w4"
    sizes = {"attention": 16_600_000, "down": 16_600_000, "lm_head": 17_700_000, "norm": 140_000, "other": 2_100_000}
    sizes["gate_up"] = 17_900_000 if mixed else 33_200_000
    if mixed:
        sizes["adapter"] = 4_560_000
    streamed = sum(sizes.values()) - sizes["other"]
    fields: dict[str, object] = {
        "name": name,
        "recipe": "w4w2-gateup" if mixed else "w4",
        "lowest_bits": 2 if mixed else 4,
        "nbytes_by_kind": sizes,
        "bits_per_weight": 8 * streamed / 134_515_008,
        "divergence": divergence(0.551, 0.655, 68.0) if mixed else divergence(0.052, 0.893, 48.9),
        "agreement": divergence(0.0043, 0.945, 68.2),
        "forecast": forecast(0.093, 0.0021 if mixed else 0.0023, streamed),
        "measurement": measured(0.171, 0.0098, streamed) if mixed else measured(0.152, 0.0079, streamed),
        "tpot_ratio": 1.24 if mixed else None,
    }
    return BundleResult(**{**fields, **changes})  # type: ignore[arg-type]


def report(**changes: object) -> Report:
    fields: dict[str, object] = {
        "model": "smollm2-135m",
        "parameters": 134_515_008,
        "reference_format": "GGUF Q4_1",
        "held_out_text": "LAMBADA contexts, 4096 predicted tokens, seed 0",
        "machine": Machine("Some CPU 9000", "Linux x86_64", 2, 2, 2**34, 38e9, 0.04, 217e9, 0.2, "2026-11-22"),
        "command": "rlkit demo",
        "date": "2026-11-22",
        "provenance": ("weights: a file with sha256 b179", "synthetic text: 96 sequences sampled from the model"),
        "stages": (
            Stage("round to nearest", divergence(2.99, 0.31, 907.0), 4.0),
            Stage("error compensation", divergence(1.13, 0.52, 121.0), 64.0),
            Stage("low-rank correction", divergence(0.68, 0.62, 80.0), 31.0),
            Stage("distillation", divergence(0.55, 0.66, 68.0), 240.0),
        ),
        "bundles": (bundle("w4"), bundle("w4w2-gateup")),
        "chat": Chat("What is the capital of France?", "The capital of France is Paris.", "w4w2-gateup"),
        "versions": {"rlkit-edge": "0.1.0", "onnxruntime": "1.31.1"},
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]
