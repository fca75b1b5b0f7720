"""Results of rlkit bench with invented times, for tests of what is made of them."""

from __future__ import annotations

from rlkit.profiles.bench import Case, Kind, Measurement, Series
from rlkit.profiles.benchfile import Entry, Host, Result

PREFILL, DECODE = Case(Kind.PREFILL, 64), Case(Kind.DECODE, 2, depth=64)
HOST = Host("Some CPU 9000", "Linux x86_64", 2, 2**34)


def measurement(name: str, prefill: tuple[float, ...] = (0.5, 1.0), factor: float = 1.0) -> Measurement:
    first = Series(PREFILL, tuple((second,) for second in prefill), peak_nbytes=200_000_000)
    rounds = tuple((0.02 * factor, 0.02 * second * factor) for second in prefill)
    return Measurement(name, (first, Series(DECODE, rounds, 50_000_000, 210_000_000)), 2)


def entry(name: str, target: str = "cpu", **about: object) -> Entry:
    return Entry("w4", target, "LlamaForCausalLM", 134_515_008, 50_000_000, 2.97, measurement(name, **about))  # type: ignore[arg-type]


def result(*entries: Entry, repeats: int = 2) -> Result:
    versions = {"rlkit-edge": "0.1.0", "onnxruntime": "1.31.1", "onnxruntime-genai": "0.18.0"}
    return Result("2026-11-22", HOST, versions, repeats, 1, entries or (entry("a"),))
