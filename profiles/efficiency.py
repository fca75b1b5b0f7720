"""What single operators take on a measured machine, between the points that were measured.

    utilisation = ideal seconds / measured seconds,   ideal = dispatch + bytes / bandwidth + FLOPs / peak

The ideal grows as the real time does, so utilisation changes slowly and is interpolated: its logarithm, over those of
tokens, outputs and inputs for products (each format apart), of new and cached tokens, head size and heads per KV head
for attention, of rows and width for the rest. Beyond the outermost points it stays. It may exceed 1: low-bit products
compute in int8, and the peak is that of float32.

A decode step reads all weights, so what a product of few tokens takes depends on how much of the model the caches keep
from one step to the next. Products are therefore measured with their weights in the caches and far beyond them, and a
ladder of working sets says where between the two a model lies (`kept_share`).

What this does not know: other programs, other clocks than those of the calibration, and operators that no row is of;
for those ValueError is raised instead of a made-up number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.profiles.surface import Point, Surface
from rlkit.recover.atomic import write_json
from rlkit.recover.source import read_json

SCHEMA_VERSION = 2
FLOAT = 4  # bytes; of activations, scales and the cache in our CPU bundles
NEAR = 64  # cached tokens are compared as past + NEAR: a step after none and one after a few are alike
ACCESSES = {"norm": 4, "add": 3, "activation": 2}  # reads and writes of each element
LADDER = (4, 128)  # bits, block of the products that working sets are made of
ALIASES = {"elementwise": "add", "experts": "linear", "adapter": "linear", "embedding": "add"}


@dataclass(frozen=True, slots=True)
class Product:
    """A product of `tokens` rows with weights (n, k); `cached`: the weights were in the caches. block 0: floats."""

    bits: int
    block: int
    tokens: int
    n: int
    k: int
    cached: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of `tokens` new tokens after `past` cached ones."""

    tokens: int
    past: int
    heads: int
    kv_heads: int
    head_dim: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Rowwise:
    """An operator over `tokens` rows of `width`: one of ACCESSES."""

    kind: str
    tokens: int
    width: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ladder:
    """A product (width, width) of LADDER's format in a chain of operators with `nbytes` of weights together."""

    nbytes: int
    width: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Around:
    """What a reply costs beside the model: once at its start, and per token, for a vocabulary and number of layers."""

    vocab: int
    layers: int
    prompt_seconds: float
    token_seconds: float


@dataclass(frozen=True, slots=True)
class Peaks:
    """What utilisation is a share of: measured on the same machine with the same number of threads."""

    bytes_per_s: float
    flops_per_s: float
    dispatch_seconds: float
    threads: int = 1


ROWS: dict[str, type] = {
    "products": Product,
    "attentions": Attention,
    "rowwise": Rowwise,
    "ladder": Ladder,
    "around": Around,
}


@dataclass(frozen=True, slots=True)
class Table:
    """Everything measured, and the answers drawn from it; `facts` say on what machine and how steady it was."""

    peaks: Peaks
    products: tuple[Product, ...] = ()
    attentions: tuple[Attention, ...] = ()
    rowwise: tuple[Rowwise, ...] = ()
    ladder: tuple[Ladder, ...] = ()
    around: tuple[Around, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    _surfaces: dict[Any, Surface] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = [value for name in ROWS for row in getattr(self, name) for value in _durations(row)]
        numbers += [self.peaks.bytes_per_s, self.peaks.flops_per_s]
        bad = [value for value in numbers if not (math.isfinite(value) and value > 0)]
        if bad or not 0 <= self.peaks.dispatch_seconds < 1:
            raise ValueError(f"the calibration holds {bad[:1] or self.peaks}, which is no duration or rate; repeat it")

    @property
    def dispatch_seconds(self) -> float:
        """Seconds to start an operator that does next to nothing."""
        return self.peaks.dispatch_seconds

    def seconds(
        self,
        kind: str,
        bits: int = 0,
        block: int = 0,
        tokens: int = 1,
        n: int = 1,
        k: int = 0,
        streamed_nbytes: float | None = None,
    ) -> float:
        """Seconds of one operator, its start included.

        kind "linear" (or adapter, experts): `tokens` rows times weights (n, k) of `bits` in blocks; 32 bits and block 0
        are floats. Other kinds, those of ACCESSES: `tokens` rows of width n. `streamed_nbytes`: what one step reads
        together; None: far more than the caches hold. Raises ValueError for what was not measured.
        """
        kind = ALIASES.get(kind, kind)
        if min(tokens, n) < 1 or k < 0:
            raise ValueError(f"{tokens} tokens of {k} inputs and {n} outputs are no operator; use positive sizes")
        if kind != "linear":
            ideal = self._ideal_rows(kind, tokens, n)
            return ideal / self._surface(("rowwise", kind)).at((tokens, n))
        block = self._nearest_block(bits, block)
        ideal = self._ideal_product(bits, block, tokens, n, k)
        far = ideal / self._surface(("product", bits, block, False)).at((tokens, n, k))
        share = self.kept_share(streamed_nbytes, n * k)
        if share == 0.0:
            return far
        near = ideal / self._surface(("product", bits, block, True)).at((tokens, n, k))
        return max(far + share * (near - far), min(near, far))

    def attention_seconds(self, tokens: int, past: int, heads: int, kv_heads: int, head_dim: int) -> float:
        """Seconds of one fused attention with float32 cache, its start included."""
        if min(tokens, heads, kv_heads, head_dim) < 1 or past < 0 or heads % kv_heads:
            raise ValueError(f"attention of {heads} heads on {kv_heads}, {tokens} after {past} tokens, is none")
        if not self.attentions:
            raise ValueError("no attention was measured; run `rlkit calibrate` again")
        place = (tokens, past + NEAR, head_dim, heads / kv_heads)
        utilisation = self._surface(("attention",)).at(place)
        return self._ideal_attention(tokens, past, heads, kv_heads, head_dim) / utilisation

    def token_seconds(self, vocab: int, layers: int) -> float:
        """Seconds per token beside the model: binding its caches, choosing a token among `vocab`."""
        return self._around(vocab, layers, "token_seconds")

    def prompt_seconds(self, vocab: int, layers: int) -> float:
        """Seconds to the first token beside the model: a generator is made, and the first token chosen."""
        return self._around(vocab, layers, "prompt_seconds")

    def kept_share(self, streamed_nbytes: float | None, size: float) -> float:
        """How much of what a step reads behaves as if it were in the caches, for products of so many weights: 1 all, 0
        none; below 0 where operators that wait for each other take longer than alone.
        """
        if streamed_nbytes is None:
            return 0.0
        shares = {float(width): self._share(width, streamed_nbytes) for width in {rung.width for rung in self.ladder}}
        if not shares:
            return 0.0
        widths = sorted(shares)
        logs = [2.0 * math.log(width) for width in widths]
        return float(np.interp(math.log(size), logs, [shares[width] for width in widths]))

    def _share(self, width: int, streamed_nbytes: float) -> float:
        """Where a working set of products (width, width) lies between those in the caches and those far from them."""
        near, far = (
            self._ideal_product(*LADDER, 1, width, width)
            / self._surface(("product", *LADDER, cached)).at((1, width, width))
            for cached in (True, False)
        )
        if far < 1.05 * near:
            return 0.0
        rungs = sorted((rung for rung in self.ladder if rung.width == width), key=lambda rung: rung.nbytes)
        sizes = [math.log(rung.nbytes) for rung in rungs]
        here = float(np.interp(math.log(max(streamed_nbytes, 1.0)), sizes, [rung.seconds for rung in rungs]))
        return (far - here) / (far - near)

    def formats(self) -> tuple[tuple[int, int], ...]:
        """(bits, block) of the products that were measured."""
        return tuple(sorted({(row.bits, row.block) for row in self.products}))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON and TOML values: a list of columns, and a list per row, for each class."""
        tables = {
            name: {
                "columns": [f.name for f in fields(kind)],
                "rows": [list(astuple(row)) for row in getattr(self, name)],
            }
            for name, kind in ROWS.items()
        }
        return {"schema_version": SCHEMA_VERSION, "peaks": asdict(self.peaks), **tables, "facts": dict(self.facts)}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Table:
        """The inverse of `to_json`; ValueError for another version or a damaged table."""
        version = table.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"this calibration has schema_version {version!r}, not {SCHEMA_VERSION}; calibrate again")
        try:
            made = {
                name: tuple(kind(**dict(zip(table[name]["columns"], row, strict=True))) for row in table[name]["rows"])
                for name, kind in ROWS.items()
            }
            return cls(Peaks(**table["peaks"]), **made, facts=table.get("facts", {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this calibration is damaged ({error}); run `rlkit calibrate` again") from error

    def _around(self, vocab: int, layers: int, name: str) -> float:
        """A plane over vocabulary and layers through what was measured, none of it negative."""
        if not self.around:
            return 0.0
        sizes = np.array([[1.0, row.vocab, row.layers] for row in self.around])
        plane, *_ = np.linalg.lstsq(sizes, np.array([getattr(row, name) for row in self.around]), rcond=None)
        least: float = min(getattr(row, name) for row in self.around)
        return max(float(plane @ [1.0, vocab, layers]), 0.5 * least)

    def _nearest_block(self, bits: int, block: int) -> int:
        """The measured block nearest to the one asked for; ValueError if no width like it was measured."""
        blocks = sorted({row.block for row in self.products if row.bits == bits})
        if not blocks:
            have = ", ".join(sorted({str(row.bits) for row in self.products})) or "no"
            raise ValueError(f"products of {bits} bits were not measured here, but of {have} bits; calibrate again")
        return min(blocks, key=lambda known: (abs(math.log2(max(known, 1) / max(block, 1))), -known))

    def _surface(self, key: tuple[Any, ...]) -> Surface:
        if key not in self._surfaces:
            self._surfaces[key] = Surface.through(self._points(key), f"{key[0]} {key[1:]}")
        return self._surfaces[key]

    def _points(self, key: tuple[Any, ...]) -> dict[Point, float]:
        """Measured utilisation by position."""
        if key[0] == "rowwise":
            rows = [row for row in self.rowwise if row.kind == key[1]]
            return {(r.tokens, r.width): self._ideal_rows(r.kind, r.tokens, r.width) / r.seconds for r in rows}
        if key[0] == "attention":
            return {
                (r.tokens, r.past + NEAR, r.head_dim, r.heads / r.kv_heads): (
                    self._ideal_attention(*astuple(r)[:-1]) / r.seconds
                )
                for r in self.attentions
            }
        _name, bits, block, cached = key
        # Where only one of the two was measured, it makes no difference: many tokens, or matrices that fit no cache.
        alike = [row for row in self.products if (row.bits, row.block) == (bits, block)]
        rows_by_place: dict[Point, Product] = {}
        for row in sorted(alike, key=lambda row: row.cached == cached):
            rows_by_place[row.tokens, row.n, row.k] = row
        return {
            place: self._ideal_product(bits, block, r.tokens, r.n, r.k) / r.seconds
            for place, r in rows_by_place.items()
        }

    def _ideal(self, nbytes: float, flops: float) -> float:
        return self.peaks.dispatch_seconds + nbytes / self.peaks.bytes_per_s + flops / self.peaks.flops_per_s

    def _ideal_product(self, bits: int, block: int, tokens: int, n: int, k: int) -> float:
        return self._ideal(product_nbytes(bits, block, n, k) + FLOAT * tokens * (n + k), 2.0 * tokens * n * k)

    def _ideal_attention(self, tokens: int, past: int, heads: int, kv_heads: int, head_dim: int) -> float:
        return self._ideal(*attention_work(tokens, past, heads, kv_heads, head_dim))

    def _ideal_rows(self, kind: str, tokens: int, width: int) -> float:
        if kind not in ACCESSES:
            raise ValueError(f"operators of kind {kind!r} are not measured; there are linear, {', '.join(ACCESSES)}")
        return self._ideal(FLOAT * ACCESSES[kind] * tokens * width, 0.0)


def product_nbytes(bits: int, block: int, n: int, k: int) -> float:
    """Bytes of weights (n, k) with float32 scales and packed zero points; block 0: plain numbers of `bits`."""
    if not block:
        return n * k * bits / 8
    groups = -(-k // block)
    return n * (groups * block * bits / 8 + groups * FLOAT + math.ceil(groups * bits / 8))


def attention_work(tokens: int, past: int, heads: int, kv_heads: int, head_dim: int) -> tuple[float, float]:
    """(bytes, FLOPs) of one causal attention: the cache read once, scores, softmax and sums of the pairs."""
    pairs = tokens * past + tokens * (tokens + 1) / 2
    nbytes = 2 * FLOAT * kv_heads * head_dim * (past + 2 * tokens) + 2 * FLOAT * heads * head_dim * tokens
    return nbytes, heads * pairs * (4 * head_dim + 5)


def _durations(row: Any) -> list[float]:
    return [float(getattr(row, f.name)) for f in fields(row) if f.name.endswith("seconds")]


def leave_one_out(table: Table) -> dict[str, list[float]]:
    """How well the others foretell each row: |forecast / measured - 1| by class, a measure of the gaps between points.

    Rows at the corners are foretold from one side, so this is more than the error between points.
    """
    errors: dict[str, list[float]] = {}
    for name, tell in _TELL.items():
        rows = getattr(table, name)
        for index, row in enumerate(rows):
            parts = {part: getattr(table, part) for part in ROWS} | {name: rows[:index] + rows[index + 1 :]}
            try:
                told = tell(Table(table.peaks, **parts), row)
            except ValueError:  # the only one of its kind
                continue
            errors.setdefault(name, []).append(abs(told / row.seconds - 1.0))
    return errors


_TELL: dict[str, Callable[[Table, Any], float]] = {
    "products": lambda table, r: table.seconds(
        "linear", r.bits, r.block, r.tokens, r.n, r.k, 1.0 if r.cached else None
    ),
    "attentions": lambda table, r: table.attention_seconds(r.tokens, r.past, r.heads, r.kv_heads, r.head_dim),
    "rowwise": lambda table, r: table.seconds(r.kind, tokens=r.tokens, n=r.width),
}


def save(table: Table, path: Path) -> None:
    """Write a table as JSON, complete or not at all."""
    write_json(path, table.to_json())


def load(path: Path) -> Table:
    """Read a table; FileNotFoundError or ValueError in one line with the remedy."""
    if not path.is_file():
        raise FileNotFoundError(f"no calibration {path}; make one with: rlkit calibrate")
    try:
        return Table.from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
