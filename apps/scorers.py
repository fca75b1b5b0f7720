"""What judges continuations for any model reference: a float model, a checkpoint folder, a .gguf file or a bundle.

    with scorer_for("smollm2-135m") as model:
        context = model.tokens.encode("The capital of France is")
        model.scorer.score([(context, model.tokens.encode(" Paris")), (context, model.tokens.encode(" Rome"))])
        model.tokens.decode(model.reply(context, 8))

Float models and checkpoints run in torch, bundles in plain onnxruntime on the CPU; several processes for either.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.recover import assets, cores, source
from rlkit.recover.atomic import sha256
from rlkit.recover.likelihood import Continuation, Pair, Scorer
from rlkit.recover.progress import Tell, silent
from rlkit.recover.scorerpool import ScorerPool, Worker
from rlkit.recover.source import Source, SourceKind

if TYPE_CHECKING:
    from rlkit.recover.torchscorer import TorchWorker


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model is. `fingerprint` is the same for the same weights, tokenizer and ways of computing.

    `stored` is the form it has on disk, `dtype` what it computes in: a bundle says that itself, so there it is empty.
    """

    reference: str
    stored: str
    fingerprint: str
    context_length: int
    vocab: int
    device: str
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenizer: text to ids without and with the special tokens that it adds by itself, and back.

    `prefix` is what comes before a text that nothing comes before: BOS, for a tokenizer without one EOS, or None.
    """

    encode: Callable[[str], list[int]]
    encode_special: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bos: int | None
    eos: int | None

    @property
    def prefix(self) -> int | None:
        """The first id of a text, where nothing else is."""
        return self.eos if self.bos is None else self.bos


Replies = Callable[[Sequence[Sequence[int]], Sequence[int]], Iterator[tuple[int, list[int]]]]
"""Prompts and the most new tokens of each -> (number of the prompt, ids of its likeliest reply), in any order.

The token that ends a reply is no part of it.
"""
Template = Callable[[Sequence[Mapping[str, str]]], str]
"""Messages as a prompt's text; ValueError for a model without a chat template."""


class Judge:
    """A scorer, its tokenizer, its chat template, and what is known of the model; close it, or use a with statement."""

    def __init__(
        self, scorer: Scorer, replies: Replies, template: Template, tokens: Tokens, facts: Facts, stack: ExitStack
    ) -> None:
        self.scorer, self.template, self.tokens, self.facts = scorer, template, tokens, facts
        self._replies, self._stack = replies, stack

    def reply(self, ids: Sequence[int], most: int) -> list[int]:
        """The likeliest reply to a prompt, at most so many new tokens and what the context holds; stop tokens end it.

        Raises ValueError for an empty prompt and for one that leaves no room.
        """
        return next(made for _number, made in self.replies([ids], most))

    def replies(self, prompts: Sequence[Sequence[int]], most: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (number of the prompt, its reply as of `reply`) as they come. Raises as `reply`, before any."""
        rooms = [self.facts.context_length - len(ids) for ids in prompts]
        for ids, room in zip(prompts, rooms, strict=True):
            if not ids or room < 1:
                why = f"a prompt of {len(ids)} tokens in a context of {self.facts.context_length}"
                raise ValueError(f"{why} cannot be replied to; give at least one token and leave room for one")
        yield from self._replies(prompts, [min(most, room) for room in rooms])

    def close(self) -> None:
        """End processes and give memory back."""
        self._stack.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def scorer_for(  # noqa: PLR0913, the ways of running a model
    reference: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    workers: int = 1,
    threads: int | None = None,
    kv: str | None = None,
    adapter: str | None = None,
    tell: Tell = silent,
) -> Judge:
    """Open what `reference` names and judge with it.

    `workers` processes with a model each share the work, each with `threads`. `device` (cpu, cuda, auto, ...) and
    `dtype` are for torch: unless told, models up to 400 M parameters compute in float32, larger in the stored type.
    The cache `kv` (runtime/kv.py) and `adapter`, one in its folder, are for bundles. Raises FileNotFoundError or
    ValueError, one line with the remedy, for what cannot be opened and for choices that do not fit the model.
    """
    found = source.resolve(reference, download=isinstance(reference, str) and reference in assets.registry(), tell=tell)
    if found.kind is SourceKind.BUNDLE:
        if device not in ("cpu", "auto") or dtype is not None:
            what = f"device {device!r}" if dtype is None else f"dtype {dtype!r}"
            raise ValueError(f"{found.reference} is a bundle, judged on the CPU as exported; leave {what} out")
        return _bundle(found, workers, threads, kv, adapter)
    if kv is not None or adapter is not None:
        what = f"adapter {adapter!r}" if kv is None else f"kv {kv!r}"
        raise ValueError(f"{found.reference} is no bundle, and {what} is for bundles; leave it out")
    if workers < 1:
        raise ValueError(f"workers = {workers} cannot do anything; use at least 1")
    return _torch(found, device, dtype, workers, threads)


def _bundle(found: Source, workers: int, threads: int | None, kv: str | None, adapter: str | None) -> Judge:
    from rlkit.runtime.bundlescorer import BundleScorer
    from rlkit.runtime.folder import read_bundle

    config, _manifest = read_bundle(found.path, threads)
    tokens = _tokens_of_folder(found.path, config["model"])
    stack = ExitStack()
    scorer = stack.enter_context(BundleScorer(found.path, workers=workers, threads=threads, kv=kv, adapter=adapter))
    mark = fingerprint(found, f"kv={kv or 'float'}", adapter)
    vocab = int(config["model"]["vocab_size"])
    facts = Facts(found.reference, "bundle", mark, scorer.context_length, vocab, "cpu", "")
    return Judge(scorer, scorer.replies, scorer.prompt, tokens, facts, stack)


def _torch(found: Source, device: str, dtype: str | None, workers: int, threads: int | None) -> Judge:
    from rlkit.recover.torchscorer import CPU_REPLIES, DEVICE_REPLIES, TorchWorker, placed, tokenizer_of

    stack = ExitStack()
    worker: TorchWorker | _Several
    if workers == 1:
        model, tokenizer = _loaded(found)
        worker = TorchWorker(placed(model, device, dtype, threads))
    else:
        tokenizer = tokenizer_of(found)
        each = threads or max(1, cores.default_threads() // workers)
        together = CPU_REPLIES if device == "cpu" else DEVICE_REPLIES
        worker = _Several(functools.partial(_torch_worker, found, device, dtype, each), workers, together)
        stack.callback(worker.close)
    tokens = Tokens(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        lambda text: list(tokenizer.encode(text)),
        lambda ids: str(tokenizer.decode(list(ids))),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    try:
        length, vocab, place, kind = worker.facts()
    except BaseException:
        stack.close()
        raise
    mark = fingerprint(found, f"dtype={kind}")
    facts = Facts(found.reference, str(found.kind), mark, length, vocab, place, kind)
    return Judge(worker, worker.replies, functools.partial(_prompt_text, tokenizer), tokens, facts, stack)


class _Several:
    """Torch models in processes of their own."""

    def __init__(self, opening: Callable[[int], Worker], workers: int, together: int) -> None:
        self._pool = ScorerPool(opening, workers, together)
        self.close, self.replies = self._pool.close, self._pool.replies
        self._facts: tuple[int, int, str, str] | None = None

    def facts(self) -> tuple[int, int, str, str]:
        """Those of the first that answers, which are the others' too."""
        if self._facts is None:
            self._facts = self._pool.ask("facts")
        return self._facts

    @property
    def context_length(self) -> int:
        """The most tokens of a pair, but for its last, that are read."""
        return self.facts()[0]

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        """By all of them."""
        return self._pool.score(pairs, self.context_length)


def _loaded(found: Source) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from rlkit.recover.checkpoint import load_checkpoint
    from rlkit.recover.model import load_model

    return load_checkpoint(found.path) if found.kind is SourceKind.CHECKPOINT else load_model(found)


def _torch_worker(found: Source, device: str, dtype: str | None, threads: int, number: int) -> TorchWorker:
    """The model of process `number`."""
    from rlkit.recover.torchscorer import TorchWorker, placed, spread

    return TorchWorker(placed(_loaded(found)[0], spread(device, number), dtype, threads))


def _prompt_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        given = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates raise errors of their own making
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the model has no chat template that takes these messages ({first})") from error


def _tokens_of_folder(folder: Path, model: dict[str, Any]) -> Tokens:
    """The tokenizer of a bundle, by the library that transformers' own are made of."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is no tokenizer ({error}); export the bundle again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    beside = folder / "tokenizer_config.json"
    named = source.read_json(beside) if beside.is_file() else {}
    eos = model["eos_token_id"]
    return Tokens(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        lambda text: list(tokenizer.encode(text).ids),
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)),
        _special(tokenizer, named.get("bos_token")),
        int(eos[0] if isinstance(eos, list) else eos),
    )


def _special(tokenizer: Any, named: Any) -> int | None:
    """The id of a special token as tokenizer_config.json names it: a text, or an object with its content."""
    text = named.get("content") if isinstance(named, dict) else named
    found = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return None if found is None else int(found)


def _added(named: dict[str, Any]) -> str:
    """What tokenizer_config.json says of tokens that are added to a text."""
    kept = {key: value for key, value in named.items() if key.endswith("_token") or key.startswith("add_")}
    return json.dumps(kept, sort_keys=True)


def fingerprint(found: Source, computed: str, adapter: str | None = None) -> str:
    """Names a model's weights, graph and tokenizer, whatever its folder is called, and how it is computed."""
    if found.gguf_file:
        files = [found.file]
    elif found.kind is SourceKind.BUNDLE:
        names = ("*.onnx", "*.onnx.data", "tokenizer.json", "genai_config.json")
        files = [file for name in names for file in sorted(found.path.glob(name))]
    else:
        names = ("*.safetensors", "adapter/*.safetensors", "config.json", "tokenizer.json")
        files = [file for name in names for file in sorted(found.path.glob(name))]
    if adapter is not None:
        from rlkit.runtime.bundlescorer import adapter_file

        files.append(adapter_file(found.path, adapter))
    parts = [f"{file.name} {sha256(file)}" for file in files]
    beside = found.path / "tokenizer_config.json"
    if beside.is_file() and not found.gguf_file:
        parts.append(_added(source.read_json(beside)))
    return hashlib.sha256("\n".join([*parts, computed]).encode()).hexdigest()
