"""A bundle as a scorer: what continuations' contexts share is read once, in plain onnxruntime.

Parts with nothing before them are read several at a time, padded on the right: attention is causal. What follows a
memory is read by itself, since the attention kernel for the CPU takes one such row only; its cost is that of its
tokens, and those are few. Where nothing but a part's last token is judged, the graph that generates reads it, if it is
open too: it leaves out the product with lm_head for all other tokens. It reads long beginnings that nothing is judged
in as well.

Kernels with integer activations round otherwise for a single token, and for the last of 129: products of matrices go by
blocks of 128 rows, and a block of one has a kernel of its own. Such passes get one more token, which nothing sees, so
that a figure does not depend on what is read together.

Several workers are processes with sessions of their own (recover/scorerpool.py).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.recover.likelihood import Continuation, Likelihood, Outcome, Pair, Part, alike
from rlkit.recover.prefixes import PASS_TOKENS
from rlkit.recover.scorerpool import ScorerPool
from rlkit.runtime.folder import graph_nbytes, read_bundle, threads_here
from rlkit.runtime.kv import check
from rlkit.runtime.loaded import ADAPTERS
from rlkit.runtime.plain import ADAPTER_SUFFIX, Plain, cache_names, first_line
from rlkit.runtime.session import Session, open_bundle

PASS_IDS = 512  # of one pass: their logits over a vocabulary of 150,000 take 314 MB
LEAN_NBYTES = 2**30  # a graph of more is not opened a second time
UNJUDGED = 64  # ids; so long a beginning costs more with the product with lm_head than in a pass of its own
BLOCK = 128  # rows of a matrix that the runtime's kernels take at a time

Past = Mapping[str, NDArray[Any]]


class BundleReader:
    """Reads parts by a bundle's graphs, with an adapter's file or without.

    `lean`, the graph that generates, is None where it need not be open.
    """

    def __init__(
        self,
        whole: Plain,
        lean: Plain | None,
        decoder: Mapping[str, Any],
        context_length: int,
        switch: int | None = None,
        adapter: Path | None = None,
    ) -> None:
        self.context_length, self.max_ids, self.switch = context_length, PASS_IDS, switch
        self._adapter = adapter
        self._whole, self._lean, self._names = whole, lean, cache_names(dict(decoder))

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[int, Outcome]]:
        """Yield (number of the part, Outcome)."""
        together: list[int] = []
        for number, part in enumerate(parts):
            last = part.positions.tolist() in ([], [len(part.ids) - 1])
            lean = self._lean is not None and (last or part.positions[0] >= UNJUDGED)
            if part.past is not None or lean or len(part.ids) > PASS_IDS:
                yield number, self._single(part)
            else:
                together.append(number)
        for group in alike([len(parts[number].ids) for number in together], PASS_TOKENS):
            some = [together[at] for at in group]
            yield from zip(some, self._padded([parts[number] for number in some]), strict=True)

    def cut(self, past: Past, length: int) -> Past:
        """The memory of the first `length` tokens."""
        return {name: np.ascontiguousarray(values[:, :, :length]) for name, values in past.items()}

    def _single(self, part: Part) -> Outcome:
        """Read one part, `PASS_IDS` at a time unless it must be read whole."""
        past: Past = part.past or {}
        kept: list[NDArray[np.float32]] = []
        for start, end in self._cuts(part):
            ids = part.ids[start:end]
            wanted = part.positions[(part.positions >= start) & (part.positions < end)] - start
            more = part.keep or end < len(part.ids)
            logits, past = self._run(ids[None], past, wanted, more)
            kept.append(logits)
        return Outcome(np.concatenate(kept), past if part.keep else None)

    def _cuts(self, part: Part) -> list[tuple[int, int]]:
        """Where to read a part piece by piece: a long beginning that nothing is judged in is left to the lean graph."""
        length = len(part.ids)
        if self.switch is not None and part.past_length + length > self.switch:
            return [(0, length)]
        first = int(part.positions[0]) if len(part.positions) else 0
        split = first if self._lean is not None and UNJUDGED <= first < length - 1 else 0
        starts = [*range(0, split, PASS_IDS), *range(split, length, PASS_IDS)]
        return list(pairwise([*starts, length]))

    def _run(
        self, ids: NDArray[np.int64], past: Past, wanted: NDArray[np.int64], more: bool
    ) -> tuple[NDArray[np.float32], Past]:
        """Logits (n, V) at the wanted positions of one row (1, T), and the memory if `more` is to be read."""
        names = list(self._names) if more else []
        length = ids.shape[1]
        behind = next(iter(past.values())).shape[2] if past else 0
        ids = even(ids, self.context_length - behind)
        if self._lean is not None and ids.shape[1] == length and wanted.tolist() in ([], [length - 1]):
            logits, *presents = self._lean.outputs(["logits", *names], ids, past, self._adapter)
            chosen = logits[0, -1:] if len(wanted) else logits[0, :0]
        else:
            logits, *presents = self._whole.outputs(["logits", *names], ids, past, self._adapter)
            chosen = logits[0, wanted]
        known = dict(zip(self._names.values(), presents, strict=True)) if more else {}
        return chosen.astype(np.float32), known if ids.shape[1] == length else self.cut(known, behind + length)

    def _padded(self, parts: Sequence[Part]) -> Iterator[Outcome]:
        """Read parts that nothing comes before in one pass."""
        ids = np.zeros((len(parts), max(len(part.ids) for part in parts)), np.int64)
        for row, part in enumerate(parts):
            ids[row, : len(part.ids)] = part.ids
        names = list(self._names) if any(part.keep for part in parts) else []
        logits, *presents = self._whole.outputs(["logits", *names], even(ids, self.context_length), None, self._adapter)
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


def open_reader(
    bundle: Path, *, threads: int | None = None, kv: str | None = None, adapter: str | None = None
) -> BundleReader:
    """Open a bundle's graphs to read with; `kv` is one of the caches it offers, `threads` None what it says itself.

    Raises FileNotFoundError or ValueError, one line with the remedy: no bundle, a damaged one, no such cache or
    adapter, or only the last token's logits.
    """
    config, manifest = read_bundle(bundle, threads)
    decoder, used = config["model"]["decoder"], threads or threads_here(config, manifest)
    whole = Plain(bundle, decoder, used, kv)
    file = None if adapter is None else adapter_file(bundle, adapter)
    whole.extend(np.zeros((1, 2), np.int64), {}, file)  # says at once if it keeps too few logits
    lean = None
    if (bundle / "logits.onnx").is_file() and graph_nbytes(bundle / decoder["filename"]) <= LEAN_NBYTES:
        lean = Plain(bundle, decoder, used, kv, whole=False)
        if lean.outputs(["logits"], np.zeros((1, 2), np.int64))[0].shape[1] != 1:
            lean = None
    length, switch = int(config["model"]["context_length"]), _switch(bundle / decoder["filename"])
    return BundleReader(whole, lean, decoder, length, switch, file)


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


def adapter_file(bundle: Path, name: str) -> Path:
    """The file of one of a bundle's adapters. Raises ValueError with those there are."""
    files = {file.name.removesuffix(ADAPTER_SUFFIX): file for file in bundle.glob(f"{ADAPTERS}/*{ADAPTER_SUFFIX}")}
    if name not in files:
        there = f"use {', '.join(sorted(files))}" if files else "it has none, so leave it out"
        raise ValueError(f"{bundle} has no adapter {name!r}; {there}")
    return files[name]


class BundleScorer:
    """Judges continuations by a bundle, and replies; `workers` processes share the work, each with `threads` threads.

    Without `threads`, each has its share of those that the bundle says. `adapter` is one of the bundle's. What replies
    is opened when it is first asked. Close it, or use it in a with statement, so that its processes end.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        workers: int = 1,
        threads: int | None = None,
        kv: str | None = None,
        adapter: str | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers = {workers} cannot do anything; use at least 1")
        config, manifest = read_bundle(bundle, threads)
        self._length = int(config["model"]["context_length"])
        self._bundle, self._threads, self._kv, self._adapter = bundle, threads, kv, adapter
        self._pool: ScorerPool | None = None
        self._alone: Likelihood | None = None
        self._session: Session | None = None
        self._tokenizer: Any = None
        if workers == 1:
            self._alone = Likelihood(open_reader(bundle, threads=threads, kv=kv, adapter=adapter))
            return
        check(bundle, config["model"]["decoder"], kv)
        if adapter is not None:
            adapter_file(bundle, adapter)
        each = threads or max(1, threads_here(config, manifest) // workers)
        self._pool = ScorerPool(functools.partial(_worker, bundle, each, kv, adapter), workers)

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
        return self._open_pool().score(pairs, self._length)

    def replies(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield (number of the prompt, ids of the likeliest reply without its stop token), in any order.

        `most` new tokens of each prompt's reply; prompt and reply must fit the context.
        """
        if self._alone is None:
            yield from self._open_pool().replies(prompts, most)
            return
        if self._session is None:
            self._session = open_bundle(self._bundle, threads=self._threads, kv=self._kv)
        for number in sorted(range(len(prompts)), key=lambda number: list(prompts[number])):
            made = self._session.generate(prompts[number], most[number], adapter=self._adapter)
            yield number, [token.id for token in made]

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages ({"role", "content"}) as the text of the bundle's chat template, ready for the reply.

        No model is opened for it. Raises ValueError where there is no template that takes them.
        """
        import onnxruntime_genai as og

        try:
            self._tokenizer = self._tokenizer or og.Tokenizer(str(self._bundle))
            return str(self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True))
        except Exception as error:  # the library raises bare RuntimeError and its own kinds
            why = f"{self._bundle} has no chat template that takes these messages ({first_line(error)})"
            raise ValueError(f"{why}; give a plain prompt") from error

    def close(self) -> None:
        """End the processes and give the memory back."""
        if self._pool is not None:
            self._pool.close()
        if self._session is not None:
            self._session.close()
        self._alone = self._pool = self._session = None

    def _open_pool(self) -> ScorerPool:
        if self._pool is None:
            raise ValueError("the scorer is closed; make it again with BundleScorer")
        return self._pool

    def __enter__(self) -> BundleScorer:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _worker(bundle: Path, threads: int, kv: str | None, adapter: str | None, _number: int) -> BundleScorer:
    return BundleScorer(bundle, threads=threads, kv=kv, adapter=adapter)
