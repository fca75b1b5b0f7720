"""A bundle as a scorer: what continuations' contexts share is read once, in plain onnxruntime.

Parts with nothing before them are read several at a time, padded on the right: attention is causal. What follows a
memory is read by itself, since the attention kernel for the CPU takes one such row only; its cost is that of its
tokens, and those are few. Where nothing but a part's last token is judged, the graph that generates reads it, if it is
open too: it leaves out the product with lm_head for all other tokens.

Kernels with integer activations round otherwise for a single token, and for the last of 129: products of matrices go by
blocks of 128 rows, and a block of one has a kernel of its own. Such passes get one more token, which nothing sees, so
that a figure does not depend on what is read together.

Several workers are processes with a session each; a call's pairs are shared out so that what begins alike stays
together.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.recover.likelihood import Continuation, Likelihood, Outcome, Pair, Part, asks_of
from rlkit.runtime.folder import graph_nbytes, read_bundle, threads_here
from rlkit.runtime.kv import check
from rlkit.runtime.plain import Plain, cache_names

PASS_IDS = 512  # of one pass: their logits over a vocabulary of 150,000 take 314 MB
LEAN_NBYTES = 2**30  # a graph of more is not opened a second time
BLOCK = 128  # rows of a matrix that the runtime's kernels take at a time
PORTIONS = 4  # for each worker and call, so that none is left with a long one alone

Past = Mapping[str, NDArray[Any]]


class BundleReader:
    """Reads parts by a bundle's graphs; `lean`, the one that generates, is None where it need not be open."""

    def __init__(
        self,
        whole: Plain,
        lean: Plain | None,
        decoder: Mapping[str, Any],
        context_length: int,
        switch: int | None = None,
    ) -> None:
        self.context_length, self.max_ids, self.switch = context_length, PASS_IDS, switch
        self._whole, self._lean, self._names = whole, lean, cache_names(dict(decoder))

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[int, Outcome]]:
        """Yield (number of the part, Outcome)."""
        together: list[int] = []
        for number, part in enumerate(parts):
            last = part.positions.tolist() in ([], [len(part.ids) - 1])
            if part.past is not None or (self._lean is not None and last) or len(part.ids) > PASS_IDS:
                yield number, self._single(part)
            else:
                together.append(number)
        if together:
            yield from zip(together, self._padded([parts[number] for number in together]), strict=True)

    def cut(self, past: Past, length: int) -> Past:
        """The memory of the first `length` tokens."""
        return {name: np.ascontiguousarray(values[:, :, :length]) for name, values in past.items()}

    def _single(self, part: Part) -> Outcome:
        """Read one part, `PASS_IDS` at a time unless it must be read whole."""
        past: Past = part.past or {}
        kept: list[NDArray[np.float32]] = []
        step = PASS_IDS if self.switch is None or len(part.ids) <= self.switch else len(part.ids)
        for start in range(0, len(part.ids), step):
            ids = part.ids[start : start + step]
            wanted = part.positions[(part.positions >= start) & (part.positions < start + len(ids))] - start
            more = part.keep or start + step < len(part.ids)
            logits, past = self._run(ids[None], past, wanted, more)
            kept.append(logits)
        return Outcome(np.concatenate(kept), past if part.keep else None)

    def _run(
        self, ids: NDArray[np.int64], past: Past, wanted: NDArray[np.int64], more: bool
    ) -> tuple[NDArray[np.float32], Past]:
        """Logits (n, V) at the wanted positions of one row (1, T), and the memory if `more` is to be read."""
        names = list(self._names) if more else []
        length = ids.shape[1]
        behind = next(iter(past.values())).shape[2] if past else 0
        ids = even(ids, self.context_length - behind)
        if self._lean is not None and ids.shape[1] == length and wanted.tolist() in ([], [length - 1]):
            logits, *presents = self._lean.outputs(["logits", *names], ids, past)
            chosen = logits[0, -1:] if len(wanted) else logits[0, :0]
        else:
            logits, *presents = self._whole.outputs(["logits", *names], ids, past)
            chosen = logits[0, wanted]
        known = dict(zip(self._names.values(), presents, strict=True)) if more else {}
        return chosen.astype(np.float32), known if ids.shape[1] == length else self.cut(known, behind + length)

    def _padded(self, parts: Sequence[Part]) -> Iterator[Outcome]:
        """Read parts that nothing comes before in one pass."""
        ids = np.zeros((len(parts), max(len(part.ids) for part in parts)), np.int64)
        for row, part in enumerate(parts):
            ids[row, : len(part.ids)] = part.ids
        names = list(self._names) if any(part.keep for part in parts) else []
        logits, *presents = self._whole.outputs(["logits", *names], even(ids, self.context_length))
        for row, part in enumerate(parts):
            past = None
            if part.keep:
                cuts = (np.ascontiguousarray(values[row : row + 1, :, : len(part.ids)]) for values in presents)
                past = dict(zip(self._names.values(), cuts, strict=True))
            yield Outcome(logits[row, part.positions].astype(np.float32), past)


def even(ids: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Rows of ids (B, T) with one more id each where a product would end in a block of one row, and there is room."""
    lone = ids.size % BLOCK == 1 and ids.shape[1] < room
    return np.pad(ids, ((0, 0), (0, 1))) if lone else ids


def open_reader(bundle: Path, *, threads: int | None = None, kv: str | None = None) -> BundleReader:
    """Open a bundle's graphs to read with; `kv` is one of the caches it offers, `threads` None what it says itself.

    Raises FileNotFoundError or ValueError, one line with the remedy: no bundle, a damaged one, no such cache, or only
    the last token's logits.
    """
    config, manifest = read_bundle(bundle, threads)
    decoder, used = config["model"]["decoder"], threads or threads_here(config, manifest)
    whole = Plain(bundle, decoder, used, kv)
    whole.extend(np.zeros((1, 2), np.int64), {})  # says at once if it keeps too few logits
    lean = None
    if (bundle / "logits.onnx").is_file() and graph_nbytes(bundle / decoder["filename"]) <= LEAN_NBYTES:
        lean = Plain(bundle, decoder, used, kv, whole=False)
        if lean.outputs(["logits"], np.zeros((1, 2), np.int64))[0].shape[1] != 1:
            lean = None
    return BundleReader(
        whole, lean, decoder, int(config["model"]["context_length"]), _switch(bundle / decoder["filename"])
    )


def _switch(graph: Path) -> int | None:
    """The length beyond which a graph of two rotary tables takes the other, None for one with a single table.

    It is a constant that the attention mask's length is compared with; the graph says so in names that the builder
    gives, so that nothing need parse it. 0, which has all rows read whole, where it says so in another way.
    """
    text = graph.read_bytes()
    if b"/rope_caches_subgraph/Greater" not in text:
        return None
    found = re.search(rb"/attn_mask_subgraph/Gather/output_0\n./model/constants/INT64/(\d+)\x12", text, re.DOTALL)
    return int(found[1]) if found else 0


class BundleScorer:
    """Judges continuations by a bundle; `workers` processes share the work, each with `threads` threads.

    Without `threads`, each has its share of those that the bundle says. Close it, or use it in a with statement, so
    that its processes end.
    """

    def __init__(self, bundle: Path, *, workers: int = 1, threads: int | None = None, kv: str | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers = {workers} cannot do anything; use at least 1")
        config, manifest = read_bundle(bundle, threads)
        self._length = int(config["model"]["context_length"])
        self._pool: ProcessPoolExecutor | None = None
        self._alone: Likelihood | None = None
        if workers == 1:
            self._alone = Likelihood(open_reader(bundle, threads=threads, kv=kv))
            return
        check(bundle, config["model"]["decoder"], kv)
        each = threads or max(1, threads_here(config, manifest) // workers)
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (bundle, each, kv))
        self._workers = workers

    @property
    def context_length(self) -> int:
        """The most tokens of a pair, but for its last, that are read."""
        return self._length

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        """One continuation for each pair (context ids, continuation ids), in their order.

        Raises ValueError for a pair without context or continuation, for a continuation longer than the context, and
        where a process ended.
        """
        if self._alone is not None:
            return self._alone.score(pairs)
        if self._pool is None:
            raise ValueError("the scorer is closed; make it again with BundleScorer")
        shares = shared_out(pairs, self._length, self._workers * PORTIONS)
        found: dict[int, Continuation] = {}
        work = [[(list(pairs[n][0]), list(pairs[n][1])) for n in share] for share in shares]
        try:
            for share, results in zip(shares, self._pool.map(_score, work), strict=True):
                found |= dict(zip(share, results, strict=True))
        except BrokenProcessPool as error:
            why = "a process of the scorer ended early, most often for want of memory"
            raise ValueError(f"{why}; use fewer workers than {self._workers}") from error
        return [found[number] for number in range(len(pairs))]

    def close(self) -> None:
        """End the processes and give the memory back."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._alone = self._pool = None

    def __enter__(self) -> BundleScorer:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def shared_out(pairs: Sequence[Pair], limit: int, count: int) -> list[list[int]]:
    """Numbers of pairs in up to `count` shares of about equal numbers of tokens; what begins alike is side by side."""
    asks = asks_of(pairs, limit)
    order = sorted(range(len(asks)), key=lambda number: asks[number].row)
    total, done = sum(len(ask.row) for ask in asks), 0
    shares: list[list[int]] = [[] for _ in range(count)]
    at = 0
    context: tuple[int, ...] = ()
    for number in order:
        ask = asks[number]
        if ask.row[: ask.first + 1] != context:
            at, context = done * count // total, ask.row[: ask.first + 1]
        shares[at].append(number)
        done += len(ask.row)
    return [share for share in shares if share]


_own: list[Likelihood] = []  # the scorer of a worker process


def _begin(bundle: Path, threads: int, kv: str | None) -> None:
    _own.append(Likelihood(open_reader(bundle, threads=threads, kv=kv)))


def _score(pairs: list[tuple[list[int], list[int]]]) -> list[Continuation]:
    return _own[0].score(pairs)
