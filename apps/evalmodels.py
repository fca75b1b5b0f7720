"""Models for `rlkit eval`: what is evaluated, what it is called, what it is, how far it is from the reference.

A model is opened only if something has to be computed, and closed before the next one is.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.apps import heldout
from rlkit.apps.heldout import HeldOut
from rlkit.apps.scorers import Tokens as Tokenizer
from rlkit.apps.scorers import fingerprint, scorer_for
from rlkit.profiles import evaluation
from rlkit.profiles.divergence import Divergence, LogitsFn
from rlkit.profiles.taskscore import Scorer
from rlkit.recover import assets, cache, memory, source
from rlkit.recover.atomic import sha256, write_json
from rlkit.recover.progress import Tell, silent
from rlkit.recover.source import Source, SourceKind


@dataclass(frozen=True, slots=True)
class Ways:
    """How models are run: `device` and `dtype` for torch, `kv` and `workers` for bundles, `threads` for both."""

    device: str = "cpu"
    dtype: str | None = None
    kv: str | None = None
    workers: int = 1
    threads: int | None = None

    def of(self, found: Source) -> dict[str, Any]:
        """What of it concerns a model, as arguments of `scorer_for`."""
        if found.kind is SourceKind.BUNDLE:
            return {"kv": self.kv, "workers": self.workers, "threads": self.threads}
        return {"device": self.device, "dtype": self.dtype, "threads": self.threads}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to evaluate, by the name it has in tables."""

    name: str
    model: Source
    ways: Ways

    @property
    def facts(self) -> dict[str, str]:
        """What it is, for a report."""
        kind = str(self.model.kind)
        if self.model.kind is SourceKind.BUNDLE:
            return {"form": kind, "reference": _bare(self.model), "kv": self.ways.kv or "float"}
        dtype = self.ways.dtype or ("float32" if self.ways.device == "cpu" else "as stored")
        return {"form": kind, "reference": _bare(self.model), "device": self.ways.device, "dtype": dtype}

    @property
    def identity(self) -> str:
        """Changes with its weights, tokenizer and graph, and with what it computes in; not with threads or workers."""
        how = self.facts | {"reference": ""}
        return fingerprint(self.model, " ".join(f"{key}={value}" for key, value in sorted(how.items())))

    @contextlib.contextmanager
    def subject(self, tell: Tell = silent) -> Iterator[evaluation.Subject]:
        """The model for `evaluate`, closed with the block if it was opened."""
        with contextlib.ExitStack() as stack:

            def opened() -> tuple[Scorer, evaluation.Tokens]:
                stack.callback(memory.give_back)  # after it is closed
                judge = stack.enter_context(scorer_for(self.model.reference, **self.ways.of(self.model), tell=tell))
                return judge.scorer, _tokens(judge.tokens, judge.facts.context_length)

            yield evaluation.Subject(self.name, self.identity, opened)


def _tokens(tokens: Tokenizer, limit: int) -> evaluation.Tokens:
    return evaluation.Tokens(tokens.encode_special, limit, tokens.prefix)


def candidates(
    references: Sequence[str], ways: Ways, tell: Tell = silent, *, download: bool = False
) -> list[Candidate]:
    """Models by reference, each once, in order, with names as short as they can be told apart.

    With `download`, assets are fetched that are not kept. Raises FileNotFoundError or ValueError for what is no model.
    """
    found: dict[Path, Source] = {}
    for reference in references:
        model = source.resolve(reference, download=download and reference in assets.registry(), tell=tell)
        found.setdefault(model.file.resolve(), model)
    bare = [_bare(model) for model in found.values()]
    names = [
        name if bare.count(name) == 1 else model.reference for name, model in zip(bare, found.values(), strict=True)
    ]
    return [Candidate(name, model, ways) for name, model in zip(names, found.values(), strict=True)]


def _bare(model: Source) -> str:
    """A model's name without the folders of this machine."""
    path = Path(model.reference)
    return path.resolve().name if path.exists() else model.reference


def stick(reference: Candidate, text: str, min_tokens: int) -> HeldOut:
    """Where the reference's logits on a text are kept. Raises FileNotFoundError if there is no such text."""
    if reference.model.kind is not SourceKind.BUNDLE:
        return heldout.find(reference.model, text, min_tokens=min_tokens)
    kept = heldout.find_text(text)
    identity = hashlib.sha256(f"{reference.identity}{sha256(kept)}{min_tokens}".encode()).hexdigest()
    name = text if text == heldout.BUILTIN else ""
    return HeldOut(kept, cache.cache_folder() / "held-out" / identity[:16], identity, min_tokens, name)


def keep_reference(held_out: HeldOut, reference: Candidate, tell: Tell = silent) -> None:
    """Make sure the reference's logits are kept; it is loaded only if they are not."""
    if not held_out.ready:
        heldout.keep(held_out, _loaded(reference), tell)
        memory.give_back()


def divergence(held_out: HeldOut, candidate: Candidate, folder: Path, tell: Tell = silent) -> Divergence | str:
    """How far a model is from the reference; or why that cannot be said, as of a model of another vocabulary.

    Kept in `folder`, as the results on items are. Torch models run in the type and on the device of `heldout.load`.
    """
    digest = hashlib.sha256(f"{candidate.identity}{held_out.identity}".encode()).hexdigest()
    kept = folder / "divergence" / f"{digest[:32]}.json"
    with contextlib.suppress(ValueError, OSError, KeyError):
        return Divergence.from_json(source.read_json(kept))
    try:
        bundle = candidate.model.kind is SourceKind.BUNDLE
        logits = _bundle_logits(candidate) if bundle else _loaded(candidate)[0]
        found = held_out.divergence(logits, tell)
    except ValueError as error:
        return " ".join(str(error).split())
    finally:
        memory.give_back()
    write_json(kept, found.to_json())
    return found


def _loaded(candidate: Candidate) -> tuple[LogitsFn, heldout.Encode]:
    if candidate.model.kind is not SourceKind.BUNDLE:
        return heldout.load(candidate.model)
    with scorer_for(candidate.model.reference) as judge:  # its tokenizer outlives it
        encode = judge.tokens.encode_special
    return _bundle_logits(candidate), encode


def _bundle_logits(candidate: Candidate) -> LogitsFn:
    from rlkit.export.plan import default_threads
    from rlkit.runtime.plain import Plain

    folder, ways = candidate.model.path, candidate.ways
    decoder = source.read_json(folder / "genai_config.json")["model"]["decoder"]
    return Plain(folder, decoder, ways.threads or default_threads(), ways.kv).logits
