"""What a forecast says of a step under the names that a profile has for its kernels, starts apart from kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlkit.profiles.account import Model
from rlkit.profiles.operators import operators
from rlkit.profiles.rates import Spent
from rlkit.profiles.step import Kind, Operator, Step


@dataclass(frozen=True, slots=True)
class Part:
    """What a forecast says of all operators of one name in a step: `seconds` of their kernels, and of their starts."""

    kind: str
    name: str
    bits: int
    count: int
    flops: float
    nbytes: float
    seconds: float
    start_seconds: float


def expected(model: Model, step: Step) -> tuple[Part, ...]:
    """What a forecast says of a step, operators of one name and width together, under the names of a profile."""
    rates = model.rates_at(step.past_tokens, step.batch)
    found: dict[tuple[str, int], Part] = {}
    for op in operators(model.architecture, model.weights, model.place.storage, step, model.place.options):
        for part in _parts(op, rates.spent(op)):
            before = found.get((part.name, part.bits))
            found[part.name, part.bits] = part if before is None else _sum(before, part)
    return tuple(found.values())


def _parts(op: Operator, spent: Spent) -> Iterator[Part]:
    """An operator under the name that a profile has for it; a bias that is added apart is a row of its own."""
    name, bits = _name(op), op.bits if op.kind is Kind.LINEAR else 0
    times = op.count
    kernel = times * max(spent.compute, spent.memory)
    apart = op.kind is Kind.LINEAR and op.launches > 1
    amounts = float(times * op.flops), float(times * op.nbytes)
    yield Part(str(op.kind), name, bits, times, *amounts, kernel, times * spent.dispatch)
    if apart:
        yield Part(str(Kind.LINEAR), "bias", 0, times * (op.launches - 1), 0.0, 0.0, 0.0, 0.0)


def _name(op: Operator) -> str:
    """A forecast tells windows and what is inside of experts apart, which run as one kind of kernel."""
    if op.name.startswith("experts.") or (op.name == "activation" and not op.launches):
        return "experts"
    return "attention" if op.name.startswith("attention") else op.name


def _sum(a: Part, b: Part) -> Part:
    return Part(
        a.kind,
        a.name,
        a.bits,
        a.count + b.count,
        a.flops + b.flops,
        a.nbytes + b.nbytes,
        a.seconds + b.seconds,
        a.start_seconds + b.start_seconds,
    )
