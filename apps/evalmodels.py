"""Models for `rlkit eval`: what is evaluated, what it is called, what it is, how far it is from the reference.

A model is opened only if something has to be computed, and closed before the next one is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkit.apps import heldout
from rlkit.apps.heldout import HeldOut
from rlkit.apps.scorers import Judge, fingerprint, scorer_for
from rlkit.apps.scorers import Tokens as Tokenizer
from rlkit.profiles import evaluation, taskask
from rlkit.profiles.divergence import Divergence, LogitsFn
from rlkit.profiles.taskreply import Said
from rlkit.profiles.taskscore import Scorer
from rlkit.recover import assets, cache, memory, source
from rlkit.recover.atomic import sha256, write_json
from rlkit.recover.progress import Tell, silent
from rlkit.recover.source import Source, SourceKind
from rlkit.runtime.thoughts import OPEN, opens_thought

NO_TEMPLATE, NO_ROOM = "a model without a chat template for a message", "a message that leaves no room for a reply"
FLOAT32_PARAMETERS = 400_000_000  # as of recover/model.py, which needs torch
MANNERS = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Ways:
    """How models are run: `device` and `dtype` for torch, `kv` for bundles, `workers` and `threads` for both."""

    device: str = "cpu"
    dtype: str | None = None
    kv: str | None = None
    workers: int = 1
    threads: int | None = None

    def of(self, found: Source) -> dict[str, Any]:
        """What of it concerns a model, as arguments of `scorer_for`."""
        both = {"workers": self.workers, "threads": self.threads}
        if found.kind is SourceKind.BUNDLE:
            return {"kv": self.kv, **both}
        return {"device": self.device, "dtype": self.dtype, **both}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to evaluate, by the name it has in tables; `adapter` is one of a bundle's."""

    name: str
    model: Source
    ways: Ways
    adapter: str | None = None
    _known: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # reading large files takes a while

    @property
    def facts(self) -> dict[str, str]:
        """What it is, for a report."""
        kind = str(self.model.kind)
        if self.model.kind is SourceKind.BUNDLE:
            adapter = {} if self.adapter is None else {"adapter": self.adapter}
            return {"form": kind, "reference": _bare(self.model), "kv": self.ways.kv or "float", **adapter}
        dtype = self.ways.dtype or ("as stored" if _large(self.model) else "float32")
        return {"form": kind, "reference": _bare(self.model), "device": self.ways.device, "dtype": dtype}

    @property
    def identity(self) -> str:
        """Changes with its weights, tokenizer and graph, and with what it computes in; not with threads or workers."""
        told = {key: value for key, value in self.facts.items() if key != "adapter"} | {"reference": ""}
        how = " ".join(f"{key}={value}" for key, value in sorted(told.items()))
        if how not in self._known:
            self._known[how] = fingerprint(self.model, how, self.adapter)
        return self._known[how]

    @property
    def manner(self) -> str:
        """Changes with what else decides on replies: the chat template and the tokens that end one."""
        files = [self.model.path / name for name in MANNERS if not self.model.gguf_file]
        return " ".join(sha256(file) for file in files if file.is_file())

    @contextlib.contextmanager
    def subject(self, tell: Tell = silent) -> Iterator[evaluation.Subject]:
        """The model for `evaluate`, closed with the block if it was opened."""
        with contextlib.ExitStack() as stack:

            @functools.cache
            def judge() -> Judge:
                stack.callback(memory.give_back)  # after it is closed
                ways = self.ways.of(self.model)
                return stack.enter_context(scorer_for(self.model.reference, **ways, adapter=self.adapter, tell=tell))

            def opened() -> tuple[Scorer, taskask.Tokens]:
                return judge().scorer, _tokens(judge().tokens, judge().facts.context_length)

            yield evaluation.Subject(self.name, self.identity, opened, lambda: Talk(judge()), self.manner)


class Talk:
    """A model that is talked to: each message is a talk of its own, in the model's chat template."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def replies(self, texts: Mapping[str, str], most: int) -> Iterator[Said]:
        """Replies by item, as they come; where there can be none, why."""
        judge, prompts = self._judge, dict[str, str]()
        try:
            prompts = {name: judge.template([{"role": "user", "content": text}]) for name, text in texts.items()}
        except ValueError:
            yield from (Said(name, "", 0, False, NO_TEMPLATE) for name in texts)
        ids = {name: judge.tokens.encode(prompt) for name, prompt in prompts.items()}
        rooms = {name: judge.facts.context_length - len(some) for name, some in ids.items()}
        yield from (Said(name, "", 0, False, NO_ROOM) for name, room in rooms.items() if room < 1)
        asked = [name for name, room in rooms.items() if room >= 1]
        for number, made in judge.replies([ids[name] for name in asked], most):
            name = asked[number]
            text = (OPEN if opens_thought(prompts[name]) else "") + judge.tokens.decode(made)
            yield Said(name, text, len(made), len(made) < min(most, rooms[name]))


def _tokens(tokens: Tokenizer, limit: int) -> taskask.Tokens:
    return taskask.Tokens(tokens.encode_special, limit, tokens.prefix)


def _large(model: Source) -> bool:
    """Whether a torch model is held in the type that it is stored in; checkpoints never are."""
    return model.kind is not SourceKind.CHECKPOINT and source.read_shape(model).parameters > FLOAT32_PARAMETERS


def candidates(
    references: Sequence[str | tuple[str, str]], ways: Ways, tell: Tell = silent, *, download: bool = False
) -> list[Candidate]:
    """Models by reference, or by reference and adapter, each once, in order, with the shortest names that differ.

    With `download`, assets are fetched that are not kept. Raises FileNotFoundError or ValueError for what is no model,
    and for an adapter of what is no bundle.
    """
    found: dict[tuple[Path, str | None], Source] = {}
    for given in references:
        reference, adapter = given if isinstance(given, tuple) else (given, None)
        model = source.resolve(reference, download=download and reference in assets.registry(), tell=tell)
        if adapter is not None and model.kind is not SourceKind.BUNDLE:
            raise ValueError(f"{reference} is no bundle, and adapter {adapter!r} is for bundles; leave it out")
        found.setdefault((model.file.resolve(), adapter), model)
    bare = [_bare(model) for model in found.values()]
    alone = {name: len({key[0] for key, other in zip(found, bare, strict=True) if other == name}) == 1 for name in bare}
    return [
        Candidate(
            (name if alone[name] else model.reference) + (f" + {adapter}" if adapter else ""), model, ways, adapter
        )
        for name, ((_file, adapter), model) in zip(bare, found.items(), strict=True)
    ]


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
    from rlkit.runtime.bundlescorer import adapter_file
    from rlkit.runtime.plain import Plain

    folder, ways = candidate.model.path, candidate.ways
    decoder = source.read_json(folder / "genai_config.json")["model"]["decoder"]
    plain = Plain(folder, decoder, ways.threads or default_threads(), ways.kv)
    if candidate.adapter is None:
        return plain.logits
    file = adapter_file(folder, candidate.adapter)
    return lambda ids: plain.logits(ids, file)
