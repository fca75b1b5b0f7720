"""What judges continuations for any model reference: a float model, a checkpoint folder, a .gguf file or a bundle.

    with scorer_for("smollm2-135m") as model:
        context = model.tokens.encode("The capital of France is")
        model.scorer.score([(context, model.tokens.encode(" Paris")), (context, model.tokens.encode(" Rome"))])
        model.tokens.decode(model.reply(context, 8))

Float models and checkpoints run in torch, bundles in plain onnxruntime on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit.recover import assets, source
from rlkit.recover.atomic import sha256
from rlkit.recover.likelihood import Scorer
from rlkit.recover.progress import Tell, silent
from rlkit.recover.source import Source, SourceKind


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


Reply = Callable[[Sequence[int], int], list[int]]
"""Prompt ids and the most new tokens -> the likeliest reply's ids, without the token that ends it."""


class Judge:
    """A scorer, its tokenizer, and what is known of the model; use it in a with statement, or close it.

    `opening` makes what replies; a bundle's is opened when it is first asked.
    """

    def __init__(
        self, scorer: Scorer, tokens: Tokens, facts: Facts, opening: Callable[[], Reply], stack: ExitStack
    ) -> None:
        self.scorer, self.tokens, self.facts = scorer, tokens, facts
        self._opening, self._stack = opening, stack
        self._reply: Reply | None = None

    def reply(self, ids: Sequence[int], most: int) -> list[int]:
        """The likeliest reply to a prompt, at most so many new tokens and what the context holds; stop tokens end it.

        Raises ValueError for an empty prompt and for one that leaves no room.
        """
        room = self.facts.context_length - len(ids)
        if not ids or room < 1:
            why = f"a prompt of {len(ids)} tokens in a context of {self.facts.context_length}"
            raise ValueError(f"{why} cannot be replied to; give at least one token and leave room for one")
        if self._reply is None:
            self._reply = self._opening()
        return self._reply(ids, min(most, room))

    def close(self) -> None:
        """End processes and give memory back."""
        self._stack.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def scorer_for(
    reference: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    workers: int = 1,
    threads: int | None = None,
    kv: str | None = None,
    tell: Tell = silent,
) -> Judge:
    """Open what `reference` names and judge with it.

    `device` (cpu, cuda, auto, ...) and `dtype` (float32 for CPUs, else the stored one, unless told) are for torch;
    `workers` processes, `threads` of each and the cache `kv` (runtime/kv.py) are for bundles. Raises FileNotFoundError
    or ValueError, one line with the remedy, for what cannot be opened and for choices that do not fit the model.
    """
    found = source.resolve(reference, download=isinstance(reference, str) and reference in assets.registry(), tell=tell)
    if found.kind is SourceKind.BUNDLE:
        if device not in ("cpu", "auto") or dtype is not None:
            what = f"device {device!r}" if dtype is None else f"dtype {dtype!r}"
            raise ValueError(f"{found.reference} is a bundle, judged on the CPU as exported; leave {what} out")
        return _bundle(found, workers, threads, kv)
    if workers != 1 or kv is not None:
        what = f"workers = {workers}" if kv is None else f"kv {kv!r}"
        raise ValueError(f"{found.reference} is no bundle, and {what} is for bundles; leave it out")
    return _torch(found, device, dtype, threads)


def _bundle(found: Source, workers: int, threads: int | None, kv: str | None) -> Judge:
    from rlkit.runtime.bundlescorer import BundleScorer
    from rlkit.runtime.folder import read_bundle

    config, _manifest = read_bundle(found.path, threads)
    tokens = _tokens_of_folder(found.path, config["model"])
    stack = ExitStack()
    scorer = stack.enter_context(BundleScorer(found.path, workers=workers, threads=threads, kv=kv))
    mark = fingerprint(found, f"kv={kv or 'float'}")
    vocab = int(config["model"]["vocab_size"])
    facts = Facts(found.reference, "bundle", mark, scorer.context_length, vocab, "cpu", "")

    def opening() -> Reply:
        from rlkit.runtime.session import open_bundle

        session = open_bundle(found.path, threads=threads, kv=kv)
        stack.callback(session.close)
        return lambda ids, most: [token.id for token in session.generate(list(ids), most)]

    return Judge(scorer, tokens, facts, opening, stack)


def _torch(found: Source, device: str, dtype: str | None, threads: int | None) -> Judge:
    from rlkit.recover.checkpoint import load_checkpoint
    from rlkit.recover.model import load_model
    from rlkit.recover.torchscorer import placed, replies, torch_scorer

    loaded, tokenizer = load_checkpoint(found.path) if found.kind is SourceKind.CHECKPOINT else load_model(found)
    model = placed(loaded, device, dtype, threads)
    scorer = torch_scorer(model)
    tokens = Tokens(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        lambda text: list(tokenizer.encode(text)),
        lambda ids: str(tokenizer.decode(list(ids))),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    kind = str(model.dtype).removeprefix("torch.")
    mark = fingerprint(found, f"dtype={kind}")
    vocab = int(model.config.get_text_config().vocab_size)
    facts = Facts(found.reference, str(found.kind), mark, scorer.context_length, vocab, str(model.device), kind)
    return Judge(scorer, tokens, facts, lambda: replies(model), ExitStack())


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


def fingerprint(found: Source, computed: str) -> str:
    """Names a model's weights, graph and tokenizer, whatever its folder is called, and how it is computed."""
    if found.gguf_file:
        files = [found.file]
    elif found.kind is SourceKind.BUNDLE:
        names = ("*.onnx", "*.onnx.data", "tokenizer.json", "genai_config.json")
        files = [file for name in names for file in sorted(found.path.glob(name))]
    else:
        names = ("*.safetensors", "adapter/*.safetensors", "config.json", "tokenizer.json")
        files = [file for name in names for file in sorted(found.path.glob(name))]
    parts = [f"{file.name} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join([*parts, computed]).encode()).hexdigest()
