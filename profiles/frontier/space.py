"""What a frontier is searched over: weights x KV caches x prefill chunks, at every context; TOML in, points out.

    weights = ["float", "w4"]           # what they mean is said by who measures them; the first is the reference
    kv = ["k16v16", "k8v8", "k4v4:smooth"]
    groups = [32, 64]                   # of caches whose name does not say their group
    chunks = [256, "whole"]             # tokens of a prompt that are read at once
    contexts = [1024, 4096]
    tasks = ["needle", "long-qa"]
    items = 24                          # of each task at each context

The reference of a context is the first weights with everything in 16 bit and the prompt read at once, as in KV Pareto.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rlkit.recover import kvformat
from rlkit.recover.kvformat import KVScheme

FLOAT = "float"
WHOLE = "whole"
KEPT = "k16v16"  # the cache of the reference
TASKS = ("needle", "long-qa", "lambada", "gsm8k", "mmlu")
LONG = ("needle", "long-qa")  # made to the length of the context
CONTEXTS = (1024, 4096)
CHUNK = 256  # KV Pareto's
GROUPS = (32, 64)
SMOOTHED = ("k8v8:smooth", "k8v4:smooth", "k8v2:smooth", "k4v4:smooth", "k4v2:smooth", "k2v2:smooth")
KV = (KEPT, *SMOOTHED, "k4v4", "kivi4", "kivi2")
ITEMS = 24
FEWEST_ITEMS, MOST_ITEMS = 4, 10_000
SHORTEST = 16
MOST_POINTS = 20_000


@dataclass(frozen=True, slots=True)
class Point:
    """One way to run a model: how weights and cache are kept, and how many tokens of a prompt are read at once.

    `chunk` None reads the whole prompt at once. `kv` is a name that `kvformat.parse` reads, or of a bundle's own cache.
    """

    weights: str
    kv: str
    chunk: int | None
    context: int

    @property
    def name(self) -> str:
        """w4 k8v4:smooth, chunks of 256."""
        read = "whole prompts" if self.chunk is None else f"chunks of {self.chunk}"
        return f"{self.weights} {self.kv}, {read}"

    @property
    def key(self) -> str:
        """The same for equal points, short, safe as the name of a file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Point:
        """The inverse of `to_json`."""
        return cls(**{item.name: table[item.name] for item in fields(cls)})


@dataclass(frozen=True, slots=True)
class Space:
    """Everything that is combined; caches are given by name, the reference's among them or not.

    Raises ValueError for values that no point can have.
    """

    weights: tuple[str, ...] = (FLOAT,)
    kv: tuple[str, ...] = KV
    groups: tuple[int, ...] = (kvformat.GROUP,)
    chunks: tuple[int | None, ...] = (CHUNK,)
    contexts: tuple[int, ...] = CONTEXTS
    tasks: tuple[str, ...] = LONG
    items: int = ITEMS
    bundles: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weights", "kv", "groups", "chunks", "contexts", "tasks"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty, so there is no point to measure; give at least one")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} has a value twice: {', '.join(map(str, values))}; leave one of them out")
        _known_tasks(self.tasks)
        _some_tokens(self.contexts, self.chunks)
        if not FEWEST_ITEMS <= self.items <= MOST_ITEMS:
            raise ValueError(f"{self.items} items of a task are not {FEWEST_ITEMS} to {MOST_ITEMS}; use {ITEMS}")
        self.schemes()

    def schemes(self) -> dict[str, KVScheme]:
        """The simulated caches by their own names, each once, whatever it was called and however it was grouped."""
        found = (kvformat.parse(name, group) for name in self.kv for group in self.groups)
        return {scheme.name: scheme for scheme in (kvformat.parse(KEPT), *found)}

    def points(self) -> list[Point]:
        """Every combination, each once, by context; the first of a context is its reference.

        Raises ValueError if there are more than MOST_POINTS.
        """
        found = list(dict.fromkeys(self._points()))
        if len(found) > MOST_POINTS:
            raise ValueError(f"{len(found):,} points are more than {MOST_POINTS:,}; combine less")
        return found

    def _points(self) -> Iterator[Point]:
        schemes = tuple(self.schemes())
        for context in self.contexts:
            yield self.reference(context)
            for weights in self.weights:
                for kv in self.bundles.get(weights, schemes):
                    for chunk in (None,) if weights in self.bundles else self._chunks(context):
                        yield Point(weights, kv, chunk, context)

    def reference(self, context: int) -> Point:
        """What others at this context are measured against."""
        first = self.weights[0]
        return Point(first, self.bundles.get(first, (KEPT,))[0], None, context)

    def _chunks(self, context: int) -> Iterator[int | None]:
        """Chunks that are no whole prompt already."""
        for chunk in self.chunks:
            yield None if chunk is None or chunk >= context else chunk

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _known_tasks(tasks: Sequence[str]) -> None:
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"there is no task {task!r} here; use {', '.join(TASKS)}")


def _some_tokens(contexts: Sequence[int], chunks: Sequence[int | None]) -> None:
    for context in contexts:
        if context < SHORTEST:
            raise ValueError(f"a context of {context} tokens holds no task; use {SHORTEST} or more")
    for chunk in chunks:
        if chunk is not None and chunk < 1:
            raise ValueError(f"a chunk of {chunk} tokens reads nothing; use 1 or more, or {WHOLE}")


def chunk_of(word: str | int) -> int | None:
    """256, or "whole" as None; ValueError for anything else."""
    if word == WHOLE:
        return None
    try:
        return int(word)
    except ValueError as error:
        raise ValueError(f"a chunk of {word!r} is no number of tokens; use such as {CHUNK}, or {WHOLE}") from error


def read(path: Path) -> dict[str, Any]:
    """What a space file says, as arguments of Space.

    Raises FileNotFoundError, or ValueError for unknown keys and values of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no space file {path}; write a TOML file such as: kv = ['k8v8', 'k4v4:smooth']"
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    known = [item.name for item in fields(Space) if item.name != "bundles"]
    for key in table:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}; known here: {', '.join(known)}")
    return {key: _value(path, key, value) for key, value in table.items()}


def _value(path: Path, key: str, value: Any) -> Any:
    if key == "items":
        if type(value) is not int:
            raise ValueError(f"{path}: items is a whole number, not {value!r}")
        return value
    numbers = key in ("groups", "contexts", "chunks")
    kind: tuple[type, ...] = (int,) if numbers else (str,)
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    for one in values:
        if type(one) not in kind and not (key == "chunks" and one == WHOLE):
            what = "whole numbers" if numbers else "strings"
            raise ValueError(f"{path}: {key} is a list of {what}, and {one!r} is none")
    return tuple(chunk_of(one) if key == "chunks" else one for one in values)
