"""Results of device scripts with invented times, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from rlkit.profiles.bench import Case, Kind, Series
from rlkit.profiles.benchfile import Host
from rlkit.profiles.devicerun import RANDOM, Part, Promise, Row, Run, Skip
from rlkit.profiles.standard import MODELS

PREFILL, DECODE, DEEP = Case(Kind.PREFILL, 512), Case(Kind.DECODE, 4), Case(Kind.DECODE, 4, 1024)
LAPTOP = Host("AMD Ryzen AI 9 HX 370 w/ Radeon 890M", "Windows AMD64", 12, 32 * 2**30)
SERVER = Host("AMD EPYC 9V74 80-Core Processor", "Linux x86_64", 2, 24 * 2**30)
CPU = Part("cpu", "CPUExecutionProvider", LAPTOP.cpu)
IGPU = Part("webgpu", "WebGpuExecutionProvider", "AMD Radeon(TM) 890M", "32.0.1", notes=("how it was timed",))
VERSIONS = {"rlkit-edge": "0.1.0", "onnxruntime": "1.31.1"}
DATE = "2026-11-22T10:00:00Z"


def series(test: Case = DECODE, seconds: float = 0.01, scatter: float = 0.01) -> Series:
    """Three rounds around a time per token (of prefill: of the prompt)."""
    rounds = [seconds * (1 + scatter * shift) for shift in (-1, 0, 1)]
    if test.kind is Kind.PREFILL:
        return Series(test, tuple((each,) for each in rounds), None, 400_000_000)
    return Series(test, tuple((each,) * test.tokens for each in rounds), 100_000_000, 420_000_000)


def row(test: Case = DECODE, seconds: float = 0.01, promise: float | None = None, **about: Any) -> Row:
    """A result of smollm2-135m w4 unless told otherwise; `promise` is the forecast's seconds."""
    shape = MODELS[about.get("model", "smollm2-135m")]
    facts: dict[str, Any] = {
        "model": "smollm2-135m",
        "recipe": "w4",
        "weights": RANDOM,
        "architecture": shape.architecture,
        "parameters": shape.parameters,
        "nbytes": 80_000_000,
        "bits_per_weight": 4.8,
        "threads": 12,
        "date": DATE,
        "versions": VERSIONS,
        "forecast": None if promise is None else Promise(promise, "hx370:cpu", "uncalibrated"),
    }
    scatter = about.pop("scatter", 0.01)
    return Row(series=series(test, seconds, scatter), **{**facts, **about})


def run(*rows: Row, host: Host = LAPTOP, part: Part = CPU, skips: tuple[Skip, ...] = (), date: str = DATE) -> Run:
    """A file's content."""
    return Run(date, host, part, VERSIONS, "forecasts of hx370:cpu, uncalibrated", rows, skips)
