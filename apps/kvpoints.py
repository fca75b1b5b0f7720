"""Measure points of a KV frontier: torch models under simulated caches, bundles under the runtime's own.

A `Setup` is plain values, so that any process can open a `Bench` of it and measure; one model is loaded at a time.
KL is that to the reference's weights with a float cache, on one long row of a text, as windows and means of caches
show little in short ones; the reference's logits are kept on disk.

Activations of torch models are counted tensor by tensor, at two bytes a number. What a bundle's process needs besides
weights and cache, the runtime itself included, stands in their place there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.apps import heldout
from rlkit.apps.scorers import fingerprint
from rlkit.profiles import divergence, needle, tasks, text, worker
from rlkit.profiles.bench import Work
from rlkit.profiles.divergence import CacheSpec, LogitsFn
from rlkit.profiles.frontier import items as asking
from rlkit.profiles.frontier.items import Asked, Reading
from rlkit.profiles.frontier.search import Job, Measured, Totals
from rlkit.profiles.frontier.space import LONG, Point
from rlkit.profiles.needs import Memory
from rlkit.profiles.tasks import Task
from rlkit.recover import assets, cache, kvformat, memory, source
from rlkit.recover.atomic import sha256
from rlkit.recover.progress import Tell, silent
from rlkit.recover.source import Source, SourceKind

VERSION = 1  # of how points are measured: another one measures anew
KL_TOKENS = 768  # of the text: a screen, not a figure to publish
NEW = 16  # tokens by the clock
WARM = 8  # tokens of a prompt before it


@dataclass(frozen=True, slots=True)
class Setup:
    """What any process needs to measure: weights by name as references, their bytes, and how to run and ask them."""

    weights: dict[str, str]
    nbytes: dict[str, int]
    tasks: tuple[str, ...]
    items: int
    text: str = heldout.BUILTIN
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Setup:
        """The inverse of `to_json`."""
        return cls(**table | {"tasks": tuple(table["tasks"])})

    @property
    def reference(self) -> str:
        """The name of the weights that the others are measured against."""
        return next(iter(self.weights))


@dataclass(slots=True)
class _Open:
    """The one model that is loaded."""

    name: str = ""
    model: Any = None
    footprints: dict[tuple[str, int | None, int], Any] = field(default_factory=dict)
    kl: dict[tuple[str, str, int | None], float] = field(default_factory=dict)


class Bench:
    """Measures points of a setup; `measure` and `identify` are what search.py and store.py want."""

    def __init__(self, setup: Setup, tell: Tell = silent) -> None:
        self.setup, self._tell = setup, tell
        self._sources = {name: source.resolve(given) for name, given in setup.weights.items()}
        self._open = _Open()
        self.items = functools.cache(self._items)
        self._digest = functools.cache(lambda context, start, stop: asking.digest(self.items(context)[start:stop]))
        self._mark = functools.cache(lambda name: fingerprint(self._sources[name], ""))

    @functools.cached_property
    def reading(self) -> Reading:
        """The tokenizer that all of the weights share."""
        return reading_of(self._sources[self.setup.reference])

    @functools.cached_property
    def _benchmarks(self) -> dict[str, Task]:
        wanted = [name for name in self.setup.tasks if name not in LONG]
        if not wanted:
            return {}
        specs = tasks.find(",".join(wanted))
        wheel = assets.fetch(assets.find(tasks.ASSET), self._tell) if tasks.needs_asset(specs) else None
        return {task.name: task for task in tasks.load(specs, wheel)}

    def _items(self, context: int) -> list[Asked]:
        setup = self.setup
        return asking.of_context(setup.tasks, context, setup.items, self.reading, self._benchmarks, setup.seed)

    def totals(self, contexts: Sequence[int]) -> Totals:
        """Items of each context, and what a screen takes: its tokens over those of an item, on average."""
        counts = {context: len(self.items(context)) for context in contexts}
        read = sum(asking.tokens_read(self.items(context)) for context in contexts)
        screen = sum(KL_TOKENS + context for context in contexts) / len(contexts)
        return Totals(counts, screen * sum(counts.values()) / max(1, read))

    def identify(self, job: Job) -> str:
        """All that decides what a job finds, as a key: contents, not names."""
        setup, point = self.setup, job.point
        common = [VERSION, self._mark(point.weights), point.kv, point.chunk, point.context, setup.device, setup.dtype]
        if job.items:
            own: list[Any] = [self._digest(point.context, job.start, job.stop)]
        else:
            mark, given = self._mark(setup.reference), sha256(heldout.find_text(setup.text))
            own = ["screen", mark, given, KL_TOKENS, setup.nbytes[point.weights], setup.seed]
            own += [setup.threads] if self._is_bundle(point) else []  # seconds are measured there too
        return hashlib.sha256(json.dumps([*common, *own]).encode()).hexdigest()

    def prepare(self) -> None:
        """Do once what several processes would otherwise do at the same time: the reference's logits."""
        self._reference()

    def measure(self, point: Point, items: range) -> Measured:
        """Scores of a point's items; for no items bytes and KL, of a bundle seconds too."""
        bundle = self._is_bundle(point)
        if items:
            asked = self.items(point.context)[items.start : items.stop]
            return Measured(self._bundle_scores(point, asked) if bundle else self._torch_scores(point, asked))
        if bundle:
            return self._bundle_screen(point)
        found = self._footprint(point)
        needs = Memory(self.setup.nbytes[point.weights], found.cache_nbytes, found.activations_nbytes)
        return Measured((), needs, self._kl(point))

    def _is_bundle(self, point: Point) -> bool:
        return self._sources[point.weights].kind is SourceKind.BUNDLE

    def _kl(self, point: Point) -> float:
        """Does not depend on the context, so it is computed once for all of them."""
        known = self._open.kl
        key = (point.weights, point.kv, point.chunk)
        if key not in known:
            reference = self._reference()
            known[key] = divergence.compare(reference, self._logits(point), self._batches).kl_mean
        return known[key]

    @functools.cached_property
    def _batches(self) -> list[text.Batch]:
        given = heldout.find_text(self.setup.text)
        ids = self.reading.encode_special("\n\n".join(text.read_documents(given)))
        room = source.read_shape(self._sources[self.setup.reference]).max_context
        row = ids[: min(KL_TOKENS, room)]
        if len(row) < 2:
            raise ValueError(f"{given} has {len(row)} tokens, so there is nothing to compare on; name a longer text")
        return text.batches([row], max_ids=1)

    def _reference(self) -> divergence.Reference:
        mark = self._mark(self.setup.reference)
        spec = CacheSpec(cache.cache_folder() / "kv" / "reference", f"{mark} {self.setup.dtype}")

        def logits(ids: Any) -> Any:
            return self._plain()(ids)

        return divergence.cached(spec, logits, self._batches, self._tell)

    def _plain(self) -> LogitsFn:
        """The reference with its own float cache."""
        name = self.setup.reference
        if self._sources[name].kind is SourceKind.BUNDLE:
            return heldout.logits_of(self._sources[name].path)
        from rlkit.recover.model import logits_fn

        plain: LogitsFn = logits_fn(self._model(name))
        return plain

    def _logits(self, point: Point) -> LogitsFn:
        found = self._sources[point.weights]
        if found.kind is SourceKind.BUNDLE:
            from rlkit.export.plan import default_threads
            from rlkit.runtime.plain import Plain

            decoder = source.read_json(found.path / "genai_config.json")["model"]["decoder"]
            return Plain(found.path, decoder, self.setup.threads or default_threads(), point.kv).logits
        from rlkit.recover.kvcache import kv_logits

        model = self._model(point.weights)
        simulated: LogitsFn = kv_logits(model, kvformat.parse(point.kv), point.chunk or KL_TOKENS)
        return simulated

    def _model(self, name: str) -> Any:
        """A torch model, in place of the one that was loaded before."""
        if self._open.name != name:
            from rlkit.recover.checkpoint import load_checkpoint
            from rlkit.recover.model import load_model
            from rlkit.recover.torchscorer import placed

            self._open.name, self._open.model = "", None
            memory.give_back()
            found, setup = self._sources[name], self.setup
            checkpoint = found.kind is SourceKind.CHECKPOINT
            model, _tokenizer = load_checkpoint(found.path) if checkpoint else load_model(found)
            self._open.model = placed(model, setup.device, setup.dtype, setup.threads)
            self._open.name = name
        return self._open.model

    def _footprint(self, point: Point) -> Any:
        """Cache and activations do not depend on how weights are stored."""
        known = self._open.footprints
        key = (point.kv, point.chunk, point.context)
        if key not in known:
            from rlkit.recover.kvfootprint import footprint

            hay = needle.hay_of(point.context, self.reading.encode, self.setup.seed)
            ids = [one for sentence in hay for one in sentence]
            known[key] = footprint(self._model(point.weights), kvformat.parse(point.kv), ids, point.chunk)
        return known[key]

    def _torch_scores(self, point: Point, asked: Sequence[Asked]) -> tuple[float, ...]:
        from rlkit.recover.kvcache import kv_scorer

        model = self._model(point.weights)
        scorer = kv_scorer(model, kvformat.parse(point.kv), point.chunk or point.context)
        return asking.scores(asked, scorer)

    def _bundle_scores(self, point: Point, asked: Sequence[Asked]) -> tuple[float, ...]:
        from rlkit.runtime.bundlescorer import BundleScorer

        with BundleScorer(self._sources[point.weights].path, threads=self.setup.threads, kv=point.kv) as scorer:
            return asking.scores(asked, scorer)

    def _bundle_screen(self, point: Point) -> Measured:
        """Bytes and seconds of a bundle in a process of its own, at the end of a full context."""
        from rlkit.runtime.kv import graph_of

        folder, weights = self._sources[point.weights].path, self.setup.nbytes[point.weights]
        config = source.read_json(folder / "genai_config.json")
        held = graph_of(folder, config, point.kv)[1].nbytes_per_token * point.context
        ids = np.random.default_rng(self.setup.seed).integers(3, int(config["model"]["vocab_size"]), point.context)
        work = Work([], ids[: point.context - NEW].tolist(), NEW, point.context)
        setting = worker.Setting(threads=self.setup.threads)
        words = [*worker.command(folder, setting.device, setting.threads), point.kv]
        with worker.start(folder.name, words, worker.environment(folder, setting)) as process:
            list(process.generate(Work([], ids[:WARM].tolist(), 1, point.context)))  # what is done but once
            first, *others = process.generate(work)
            peak = process.peak_nbytes() or 0
        needs = Memory(weights, held, max(0, peak - weights - held))
        return replace(Measured((), needs, self._kl(point)), ttft_seconds=first, tpot_seconds=statistics.median(others))


def reading_of(model: Source) -> Reading:
    """The tokenizer of a model on disk; only that of a GGUF needs torch."""
    file = model.path / "tokenizer.json"
    if model.gguf_file or not file.is_file():
        from rlkit.recover.torchscorer import tokenizer_of

        known = tokenizer_of(model)
        start = known.bos_token_id if known.bos_token_id is not None else known.eos_token_id
        return Reading(
            lambda words: list(known.encode(words)),
            lambda words: list(known.encode(words, add_special_tokens=False)),
            start,
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Reading(
        lambda words: list(tokenizer.encode(words).ids),
        lambda words: list(tokenizer.encode(words, add_special_tokens=False).ids),
        _start(model.path, tokenizer),
    )


def _start(folder: Path, tokenizer: Any) -> int | None:
    """The id of the token that a text without context follows: BOS, else EOS, if there is one."""
    beside = folder / "tokenizer_config.json"
    named = source.read_json(beside) if beside.is_file() else {}
    for key in ("bos_token", "eos_token"):
        word = named.get(key)
        word = word.get("content") if isinstance(word, dict) else word
        if isinstance(word, str) and tokenizer.token_to_id(word) is not None:
            return int(tokenizer.token_to_id(word))
    return None
