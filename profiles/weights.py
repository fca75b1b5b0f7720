"""The matrices of a model as they are stored: architecture, recipe and storage put together, equal layers once.

This is done once for a recipe; any number of steps is then counted with it (`profiles.operators`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from rlkit.profiles.architecture import Architecture
from rlkit.profiles.layer import Layer, Linear
from rlkit.profiles.storage import Format, Storage
from rlkit.recover.recipe import Recipe, Rule, Scheme

_EMBEDDING = "model.embed_tokens"
_SOLID = re.compile(r"[^?\[\]0-9]*")  # such a pattern matches a module in all layers or in none


@dataclass(frozen=True, slots=True)
class Adapters:
    """Low-rank branches of one rank beside the linears of layers that match, in place of those a recipe asks for."""

    rank: int
    match: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= 1024:
            raise ValueError(f"rank = {self.rank} is outside 0..1024; 0 means no adapters")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored matrix (n, k) that occurs `count` times, of which a token uses `active`; bytes are of one.

    For an expert's matrix `experts` is how many a layer has, and count and active are theirs; else it is 0.
    """

    name: str
    n: int
    k: int
    format: Format
    nbytes: int
    bias_nbytes: int = 0
    rank: int = 0
    adapter_nbytes: int = 0
    count: int = 1
    active: int = 1
    experts: int = 0

    @property
    def whole_nbytes(self) -> int:
        """Bytes of one with its bias and branch."""
        return self.nbytes + self.bias_nbytes + self.adapter_nbytes

    @property
    def bits(self) -> int:
        """Width of its codes."""
        return self.format.bits

    @property
    def streamed_nbytes(self) -> int:
        """Bytes that a decode step of one token reads of all of them, branches included, biases not."""
        return self.active * (self.nbytes + self.adapter_nbytes)


@dataclass(frozen=True, slots=True)
class Block:
    """`count` equal layers and the matrices of one."""

    count: int
    layer: Layer
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """A stored model: its blocks, lm_head, the embedding, and `vector_nbytes` of norms and the like.

    `embedding_nbytes` is 0 where the table is lm_head's; `row_nbytes` is a row of it.
    """

    blocks: tuple[Block, ...]
    head: Matrix
    embedding_nbytes: int
    row_nbytes: int
    vector_nbytes: int

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All matrices but the embedding, equal ones of all layers counted together, lm_head last."""
        found: dict[Matrix, tuple[int, int]] = {}
        for block in self.blocks:
            for matrix in block.matrices:
                key = replace(matrix, count=1, active=1)
                count, active = found.get(key, (0, 0))
                found[key] = count + block.count * matrix.count, active + block.count * matrix.active
        return (*(replace(key, count=count, active=active) for key, (count, active) in found.items()), self.head)

    @property
    def stored_nbytes(self) -> int:
        """Everything, all experts and the embedding included."""
        return self.vector_nbytes + self.embedding_nbytes + sum(m.count * m.whole_nbytes for m in self.matrices)

    @property
    def streamed_nbytes(self) -> int:
        """What decoding one token reads: of experts the active ones, of the embedding nothing but lm_head."""
        return self.vector_nbytes + sum(m.active * m.whole_nbytes for m in self.matrices)


def weigh(
    architecture: Architecture,
    recipe: Recipe | None = None,
    storage: Storage | None = None,
    adapters: Adapters | None = None,
) -> Weights:
    """How `architecture` is stored; without a recipe everything is as `storage.formats` say.

    Raises ValueError naming the matrix whose inputs no group of the recipe fits.
    """
    stored = storage or Storage()
    scheme_of = _schemes(recipe)
    patterns = [pattern for rule in (recipe.rules if recipe else ()) for pattern in rule.match]
    patterns += [pattern for pattern, _format in stored.formats] + list(adapters.match if adapters else ())
    alike = all(_SOLID.fullmatch(pattern) for pattern in patterns)
    found: Counter[tuple[Layer, tuple[Matrix, ...]]] = Counter()
    layers = architecture.kinds if alike else ((layer, 1) for layer in architecture.layers)
    for index, (layer, count) in enumerate(layers):
        prefix = f"model.layers.{index}"
        found[layer, tuple(_matrices(layer, architecture.hidden, prefix, scheme_of, stored, adapters))] += count
    head = Linear("lm_head", architecture.vocab, architecture.hidden, biased=architecture.head_bias)
    last = _matrix(head, "", scheme_of, stored, None)
    table = stored.format_of(scheme_of(_EMBEDDING), _EMBEDDING, architecture.hidden)
    table = last.format if architecture.tied else table
    vectors = sum(count * layer.vectors(architecture.hidden) for layer, count in architecture.kinds)
    return Weights(
        blocks=tuple(Block(count, layer, matrices) for (layer, matrices), count in found.items()),
        head=last,
        embedding_nbytes=0 if architecture.tied else table.nbytes(architecture.vocab, architecture.hidden),
        row_nbytes=table.nbytes(1, architecture.hidden),
        vector_nbytes=(vectors + architecture.last_norm) * stored.float_bits // 8,
    )


SchemeOf = Callable[[str], Scheme | None]


def _matrices(
    layer: Layer, hidden: int, prefix: str, scheme_of: SchemeOf, storage: Storage, adapters: Adapters | None
) -> Iterator[Matrix]:
    for linear in layer.linears(hidden):
        yield _matrix(linear, prefix, scheme_of, storage, adapters)


def _matrix(linear: Linear, prefix: str, scheme_of: SchemeOf, storage: Storage, adapters: Adapters | None) -> Matrix:
    module, n, k = f"{prefix}.{linear.module}" if prefix else linear.module, linear.n, linear.k
    scheme = None if linear.kept_float else scheme_of(module)
    try:
        form = storage.format_of(scheme, module, k, kept_float=linear.kept_float)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error
    rank = scheme.adapter_rank if scheme else 0
    if adapters is not None:
        rank = adapters.rank if Rule(adapters.match, _ANY).matches(module) and not linear.kept_float else 0
    expert = linear.module.startswith("mlp.experts.")
    return Matrix(
        name=short_name(linear.module),
        n=n,
        k=k,
        format=form,
        nbytes=form.nbytes(n, k),
        bias_nbytes=n * linear.biased * storage.float_bits // 8,
        rank=rank,
        adapter_nbytes=storage.adapter_nbytes(n, k, rank),
        count=linear.copies,
        active=linear.active,
        experts=linear.copies if expert else 0,
    )


_ANY = Scheme(16, 32)


def short_name(module: str) -> str:
    """ "q_proj", "router", "experts.gate_proj", "shared_expert.up_proj": what a table calls it."""
    parts = module.split(".")
    return ".".join(parts[-2:]) if "expert" in parts[-2:][0] else parts[-1]


def _schemes(recipe: Recipe | None) -> SchemeOf:
    """`recipe.scheme_for`, fast for recipes that name hundreds of modules one by one."""
    if recipe is None:
        return lambda _module: None
    return _lookup(recipe)


@lru_cache(maxsize=64)
def _lookup(recipe: Recipe) -> SchemeOf:
    named: dict[str, int] = {}
    globs: list[tuple[int, Rule]] = []
    for index, rule in enumerate(recipe.rules):
        wild = tuple(pattern for pattern in rule.match if re.search(r"[*?\[]", pattern))
        for pattern in set(rule.match) - set(wild):
            named.setdefault(pattern, index)
        if wild:
            globs.append((index, Rule(wild, rule.scheme)))

    def scheme_of(module: str) -> Scheme | None:
        last = len(recipe.rules)
        first = named.get(module, last)
        first = next((index for index, rule in globs if index < first and rule.matches(module)), first)
        scheme = recipe.rules[first].scheme if first < last else None
        return None if scheme is None or scheme.bits == 16 else scheme

    return scheme_of
