"""Seconds of a model's operators from the table of single operators measured on this machine.

    product      its format, tokens and sizes; experts: as many products as different experts are expected to run
    adapter      two products, the inputs to the rank and the rank to the outputs, in the blocks of the export
    attention    float32 caches alone; other caches were not measured
    the rest     by the bytes it moves, as the measured operator most like it, and the starts of those it consists of

Operators that were not measured run at the peaks of the unit. `streamed_nbytes` is what a step reads of weights and
cache together: the smaller, the more of it is still in the processor's caches (see profiles.efficiency).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rlkit.profiles.efficiency import ACCESSES, FLOAT, Table, product_nbytes
from rlkit.profiles.rates import CALIBRATED, Band, Peaks, Spent
from rlkit.profiles.step import Kind, Operator
from rlkit.recover.packing import snap_block

CACHE_BITS = 8 * FLOAT
GATED = 5  # reads and writes of each element by an activation and its product, run one after the other


def streamed_nbytes(ops: Iterable[Operator]) -> int:
    """What one step reads of weights and cache."""
    return sum(op.count * (op.weight_nbytes + op.kv_nbytes) for op in ops)


def seconds(table: Table, op: Operator, streamed: float | None = None) -> float:
    """Seconds of one run of an operator; ValueError if nothing like it was measured."""
    return _BY_KIND.get(op.kind, _rowwise)(table, op, streamed)


def _product(table: Table, op: Operator, streamed: float | None) -> float:
    n, k, block = _shape(op, 3)
    bits = op.bits if block else 8 * FLOAT
    extra = max(op.launches - 1, 0) * table.dispatch_seconds
    if op.kind != Kind.EXPERTS:
        return table.seconds("linear", bits, block, op.tokens, n, k, streamed) + extra
    each = product_nbytes(op.bits, block, n, k)
    read = max(op.weight_nbytes / each, 1.0)  # different experts
    runs = op.flops / (2.0 * n * k)  # rows over all of them
    return read * table.seconds("linear", bits, block, max(round(runs / read), 1), n, k, streamed) + extra


def _adapter(table: Table, op: Operator, streamed: float | None) -> float:
    n, k, rank = _shape(op, 3)
    total = 0.0
    for outputs, inputs in ((rank, k), (n, rank)):
        block = snap_block(inputs) if op.bits == 8 else None
        form = (8, block) if block else (8 * FLOAT, 0)
        total += table.seconds("linear", *form, op.tokens, outputs, inputs, streamed)
    return total


def _attention(table: Table, op: Operator, _streamed: float | None) -> float:
    new, past, heads, kv_heads, size = _shape(op, 5)
    if op.bits != CACHE_BITS:
        raise ValueError(f"attention over a cache of {op.bits} bits was not measured; a float32 cache was")
    rows = max(op.tokens // new, 1)  # sequences of the batch
    return rows * table.attention_seconds(new, past, heads, kv_heads, size)


def _norm(table: Table, op: Operator, _streamed: float | None) -> float:
    extra = max(op.launches - 1, 0) * table.dispatch_seconds
    return table.seconds("norm", tokens=op.tokens, n=_width(op, ACCESSES["norm"])) + extra


def _rowwise(table: Table, op: Operator, _streamed: float | None) -> float:
    """Elementwise operators, embeddings among them; those that move nothing cost their start."""
    if op.activation_nbytes < FLOAT or not op.launches:
        return op.launches * table.dispatch_seconds
    if op.name == "activation" and op.launches == 2:
        width = _width(op, GATED)
        return sum(table.seconds(kind, tokens=op.tokens, n=width) for kind in ("activation", "add"))
    extra = (op.launches - 1) * table.dispatch_seconds
    return table.seconds("add", tokens=op.tokens, n=_width(op, ACCESSES["add"])) + extra


def _width(op: Operator, accesses: int) -> int:
    """Elements in each row, by the bytes moved."""
    return max(round(op.activation_nbytes / (FLOAT * accesses * op.tokens)), 1)


def _shape(op: Operator, length: int) -> tuple[int, ...]:
    if len(op.shape) != length or min(op.tokens, *op.shape) < 0:
        raise ValueError(f"{op.name} does not say its sizes ({op.shape}), so nothing measured can be looked up")
    return op.shape


_BY_KIND: dict[Kind, Callable[[Table, Operator, float | None], float]] = {
    Kind.LINEAR: _product,
    Kind.EXPERTS: _product,
    Kind.ADAPTER: _adapter,
    Kind.ATTENTION: _attention,
    Kind.NORM: _norm,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """The rates of a machine whose single operators were measured: what profiles.rates.Rates asks for.

    `peaks` answer for operators that were not measured, and say what bounds the others. `streamed`: what a decode step
    reads, None for far more than the caches hold; the seconds are those of the loop around the model.
    """

    table: Table
    peaks: Peaks
    streamed: float | None = None
    prompt_seconds: float = 0.0
    token_seconds: float = 0.0
    _known: dict[Operator, Spent] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def label(self) -> str:
        """Calibrated."""
        return CALIBRATED

    @property
    def bytes_per_s(self) -> float:
        """The measured read bandwidth."""
        return self.peaks.bytes_per_s

    @property
    def dispatch_seconds(self) -> float:
        """What starting an operator takes."""
        return self.table.dispatch_seconds

    @property
    def straight(self) -> float:
        """Interpolated times bend a little everywhere."""
        return 2e-3

    def fitted(self, streamed_nbytes: float, vocab: int, layers: int) -> Measured:
        """For a model that reads so much in a decode step."""
        loop = self.table.prompt_seconds(vocab, layers), self.table.token_seconds(vocab, layers)
        return Measured(self.table, self.peaks, streamed_nbytes, *loop)

    @property
    def roofs(self) -> dict[str, float]:
        """The measured peaks."""
        return self.peaks.roofs

    @property
    def band(self) -> Band:
        """What was seen over whole models: a tenth around TPOT, a little more around TTFT, and as much again."""
        why = "single operators were measured here; how whole models compare is what `rlkit compare` says"
        return Band((0.75, 1.3), (0.8, 1.25), why)

    def spent(self, op: Operator) -> Spent:
        """Seconds of one run, as a whole on the side that bounds it."""
        if op not in self._known:  # the same ones come up at every depth
            self._known[op] = self._spent(op)
        return self._known[op]

    def _spent(self, op: Operator) -> Spent:
        compute, memory, dispatch = self.peaks.spent(op)
        try:
            whole = seconds(self.table, op, self.streamed)
        except ValueError:
            return Spent(compute, memory, dispatch)
        started = min(dispatch, whole)
        rest = whole - started
        return Spent(rest, 0.0, started) if compute > memory else Spent(0.0, rest, started)

    def assumptions(self) -> tuple[str, ...]:
        """When and where it was measured, and how steady the machine was."""
        facts = self.table.facts
        where = f"{facts.get('cpu', 'this machine')}, {self.table.peaks.threads} threads"
        forms = ", ".join(f"{bits}/{block}" if block else f"{bits}" for bits, block in self.table.formats())
        steady = f"trials spread by {100 * float(facts.get('spread', 0.0)):.0f} %"
        return (
            f"{CALIBRATED} on {facts.get('date', 'an unknown day')} ({where}; {steady}): each operator takes what one "
            f"like it took; products were measured in bits/block {forms}",
            *self.peaks.notes,
            f"starting an operator takes {1e6 * self.table.dispatch_seconds:.2f} us",
        )
