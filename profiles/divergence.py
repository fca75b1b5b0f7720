"""How far a model's predictions are from the original's, token by token, on given text.

    KL(original || other) = sum over the vocabulary of p (log p - log q), in nats per predicted token
    perplexity            = exp(mean of -log probability of the token that followed)
    top-1 agreement       = share of positions where both rank the same token first

Every position of a row that has a next token counts; padding never does. Elementwise work is in float32, on logits
shifted by their row's maximum; sums over the vocabulary and over tokens are in float64. The standard error treats
windows, not tokens, as independent, since tokens of one window are not.

A `Reference` keeps the original's shifted logits on disk, so that comparing several models runs the original once. In
float16 a value x is off by at most |x| / 2048: nothing at the most likely token (0) and little wherever there is
probability, so a mean KL moves by less than 1e-5 nats; it takes 2 bytes per token and vocabulary entry.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.profiles.text import Batch
from rlkit.recover.atomic import need_space, write_json
from rlkit.recover.progress import Progress, Tell, silent
from rlkit.recover.source import read_json

LogitsFn = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids (B, T) -> logits (B, T, V); rows are causal and padded on the right."""

Logits = NDArray[np.floating[Any]]
"""(n, V): the logits of n predicted positions, right up to a constant per position."""

Rows = Callable[[int], list[Logits]]
"""Number of a batch -> logits of each of its rows, at the positions that have a next token."""

CHUNK_VALUES = 2**18  # of one thread's buffers: 1 MB each, so that passes over a chunk stay in the core's cache
FLOAT16_FLOOR = -60000.0  # close to float16's end; exp of it is 0 all the same


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model against the original on the same text; KL in nats per token."""

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    perplexity_original: float
    perplexity_other: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Divergence:
        """The inverse of `to_json`."""
        return cls(**{name: table[name] for name in cls.__slots__})


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """Figures of n predicted tokens, one value each."""

    kl: NDArray[np.float64]
    nll_original: NDArray[np.float64]
    nll_other: NDArray[np.float64]
    same: NDArray[np.bool_]


def live(logits: LogitsFn, batches: Sequence[Batch]) -> Rows:
    """The rows of a model that is run as they are asked for."""
    return lambda number: predicted_rows(logits(batches[number].ids), batches[number])


def predicted_rows(logits: NDArray[np.float32], batch: Batch) -> list[Logits]:
    """Views of the logits of each row, without padding and without the last position, which nothing follows."""
    if logits.ndim != 3 or logits.shape[:2] != batch.ids.shape:
        raise ValueError(f"logits {logits.shape} do not fit ids {batch.ids.shape}; a model returns (B, T, V)")
    return [logits[row, : length - 1] for row, length in enumerate(batch.lengths)]


def compare(original: Rows, other: LogitsFn, batches: Sequence[Batch], tell: Tell = silent) -> Divergence:
    """The divergence of `other` from `original`, which is `live(logits, batches)` or a `Reference`."""
    if not batches:
        raise ValueError("there is no text to compare on; give at least one batch")
    parts: list[_Tokens] = []
    windows: list[int] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # numpy's loops run without the interpreter lock
        for number, batch in enumerate(batches):
            tell(Progress("divergence", number, len(batches)))
            chunks = _chunks(original(number), predicted_rows(other(batch.ids), batch), batch)
            parts += pool.map(_figures, chunks)
            windows += [int(length) - 1 for length in batch.lengths]
    tell(Progress("divergence", len(batches), len(batches)))
    return _fold(parts, np.array(windows))


_Chunk = tuple[Logits, Logits, NDArray[np.int64]]


def _chunks(original: list[Logits], other: list[Logits], batch: Batch) -> Iterator[_Chunk]:
    """Pieces of both models' rows, with the ids that follow."""
    for row, (mine, theirs) in enumerate(zip(original, other, strict=True)):
        if mine.shape != theirs.shape:
            why = f"logits {mine.shape} and {theirs.shape} differ in shape"
            raise ValueError(f"{why}; compare models of one vocabulary on the same text")
        following = batch.ids[row, 1 : batch.lengths[row]]
        step = max(1, CHUNK_VALUES // mine.shape[1])
        for at in range(0, len(following), step):
            yield mine[at : at + step], theirs[at : at + step], following[at : at + step]


def _figures(chunk: _Chunk) -> _Tokens:
    original, other, following = chunk
    with np.errstate(invalid="ignore"):  # what is no number is refused below, in words
        return _checked(_token_figures(original, other, following))


def _checked(tokens: _Tokens) -> _Tokens:
    if not all(np.isfinite(values).all() for values in (tokens.kl, tokens.nll_original, tokens.nll_other)):
        raise ValueError("the logits hold NaN or infinite values, so there is no divergence; check the model")
    return tokens


def _token_figures(original: Logits, other: Logits, following: NDArray[np.int64]) -> _Tokens:
    a, top_a = _shifted(original)  # (n, V) = log p + log_a
    b, top_b = _shifted(other)  # (n, V) = log q + log_b
    at = np.arange(len(following)), following
    chosen_a, chosen_b = a[at].astype(np.float64), b[at].astype(np.float64)
    ratio = a - b
    weight = np.exp(a, out=a)
    total_a = weight.sum(axis=1, dtype=np.float64)
    np.multiply(ratio, weight, out=ratio)
    expected = ratio.sum(axis=1, dtype=np.float64) / total_a
    total_b = np.exp(b, out=b).sum(axis=1, dtype=np.float64)
    log_a, log_b = np.log(total_a), np.log(total_b)
    kl = expected - log_a + log_b
    return _Tokens(np.maximum(kl, 0.0), log_a - chosen_a, log_b - chosen_b, top_a == top_b)


def _shifted(logits: Logits) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Float32 logits (n, V) minus their row's maximum, and where that is."""
    values = logits.astype(np.float32, copy=False)  # a half-precision argmax would be many times slower
    top = values.argmax(axis=1)
    return values - values[np.arange(len(top)), top][:, None], top


def _joined(parts: Sequence[_Tokens]) -> _Tokens:
    fields = ("kl", "nll_original", "nll_other", "same")
    return _Tokens(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def _fold(parts: Sequence[_Tokens], windows: NDArray[np.int64]) -> Divergence:
    tokens = _joined(parts)
    median, p99 = np.percentile(tokens.kl, (50.0, 99.0))
    return Divergence(
        kl_mean=float(tokens.kl.mean()),
        kl_stderr=_standard_error(tokens.kl, windows),
        kl_median=float(median),
        kl_p99=float(p99),
        top1_agreement=float(tokens.same.mean()),
        perplexity_original=float(np.exp(tokens.nll_original.mean())),
        perplexity_other=float(np.exp(tokens.nll_other.mean())),
        tokens=len(tokens.kl),
    )


def _standard_error(values: NDArray[np.float64], windows: NDArray[np.int64]) -> float:
    """The standard error of the mean of values that come in independent windows of these lengths."""
    if len(windows) == 1:
        windows = np.ones(len(values), dtype=np.int64)
    count = len(windows)
    if count < 2:
        return 0.0
    starts = np.concatenate([[0], np.cumsum(windows)[:-1]])
    excess = np.add.reduceat(values - values.mean(), starts)
    return float(np.sqrt(np.square(excess).sum() * count / (count - 1)) / len(values))


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The original's shifted logits on disk; called with a batch's number it gives that batch's rows."""

    path: Path  # logits (all predicted positions, V); mapped for one batch at a time, as mapped pages count as memory
    batches: tuple[Batch, ...]

    def __call__(self, number: int) -> list[Logits]:
        at = sum(batch.predicted for batch in self.batches[:number])
        logits = np.load(self.path, mmap_mode="r")
        found = []
        for length in self.batches[number].lengths:
            found.append(logits[at : at + length - 1])
            at += int(length) - 1
        return found


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Where a reference is kept and whose it is; `identity` must change whenever the model does."""

    folder: Path
    identity: str
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype {self.dtype!r} is not kept; use float16 or float32")

    def path(self, batches: Iterable[Batch]) -> Path:
        """The file of this model on this text."""
        digest = hashlib.sha256(f"{self.identity}\0{self.dtype}\0".encode())
        for batch in batches:
            digest.update(repr(batch.ids.shape).encode() + batch.ids.tobytes() + batch.lengths.tobytes())
        return self.folder / f"reference-{digest.hexdigest()[:16]}.npy"


def cached(spec: CacheSpec, logits: LogitsFn, batches: Sequence[Batch], tell: Tell = silent) -> Reference:
    """Open the reference of this model and text, computing it first if need be, where an interrupted run left off."""
    path = spec.path(batches)
    if not path.is_file():
        part, mark = path.with_suffix(".npy.part"), path.with_suffix(".json")
        _fill(part, mark, _Source(spec, logits, batches), tell)
        os.replace(part, path)
        mark.unlink()
    return Reference(path, tuple(batches))


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    spec: CacheSpec
    logits: LogitsFn
    batches: Sequence[Batch]


def _fill(part: Path, mark: Path, source: _Source, tell: Tell) -> None:
    """Write the missing batches into `part`; `mark` says how many are there, as after each of them it is rewritten."""
    batches = source.batches
    done = int(read_json(mark)["done"]) if part.is_file() and mark.is_file() else 0
    at = sum(batch.predicted for batch in batches[:done])
    for number in range(done, len(batches)):
        tell(Progress("reference", number, len(batches)))
        rows = predicted_rows(source.logits(batches[number].ids), batches[number])
        if number == 0:
            _make_room(part, source, rows[0].shape[1])
        kept = np.lib.format.open_memmap(part, mode="r+")  # anew for every batch: mapped pages count as memory
        for row in rows:
            for start in range(0, len(row), 16):  # in pieces that stay in cache
                piece, _top = _shifted(row[start : start + 16])
                kept[at : at + len(piece)] = np.maximum(piece, FLOAT16_FLOOR)
                at += len(piece)
        kept.flush()
        write_json(mark, {"done": number + 1})
    tell(Progress("reference", len(batches), len(batches)))


def _make_room(part: Path, source: _Source, vocab: int) -> None:
    positions = sum(batch.predicted for batch in source.batches)
    dtype = np.dtype(source.spec.dtype)
    part.parent.mkdir(parents=True, exist_ok=True)
    need_space(part.parent, positions * vocab * dtype.itemsize)
    np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=(positions, vocab))
