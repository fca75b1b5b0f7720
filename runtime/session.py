"""A bundle, opened: text to ids, ids to tokens as they come, ids to logits.

    session = open_bundle(Path("bundle"))
    for token in session.generate(session.encode("The capital of France is"), 16):
        print(token.text, end="", flush=True)

`stream` is the primitive and takes every option of a Request; `generate` folds it. Tokens come from onnxruntime-genai;
logits for measuring accuracy and for scoring prompts from a plain onnxruntime session over the same data, opened when
first asked for. Both hold the weights, so a process that does both has them twice.

Files of the bundle's adapters folder (written by export/adapters.py) are mapped when first named; each request may name
another. What a reply leaves in its cache is kept for a prompt that begins the same; docs/library.md has examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.runtime import flows, genai, generation
from rlkit.runtime.caches import KEPT_COUNT, KEPT_NBYTES, Cache, Caches
from rlkit.runtime.devices import choose, target_of
from rlkit.runtime.folder import graph_nbytes, providers, read_bundle, threads_here
from rlkit.runtime.generation import CHUNK_TOKENS
from rlkit.runtime.guided import grammar_text, refused
from rlkit.runtime.kv import graph_of
from rlkit.runtime.kv import overlay as kv_overlay
from rlkit.runtime.loaded import Loaded
from rlkit.runtime.plain import SILENT, Plain, damaged, first_line, unfit
from rlkit.runtime.request import Event, Guidance, Logprob, Request, Sampling, Token
from rlkit.runtime.scoring import scores
from rlkit.runtime.tuned import settings_for

__all__ = ["Sampling", "Session", "Token", "open_bundle", "read_bundle", "threads_here"]

APPENDING = ("cpu", "cuda", "webgpu")  # devices whose cache takes tokens more than once
KNOWN_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_names", "past_value_names"}
CHECKED_GUIDANCE = 64  # grammars remembered as sound


class Session:
    """An open bundle; make one with `open_bundle`.

    One thread at a time may stream; `encode`, `decode`, `apply_template` and `check` may be called beside it.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        manifest: dict[str, Any],
        threads: int,
        device: str = "cpu",
        *,
        kv: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.device = device
        self.kv = kv
        self.threads = threads
        self.why = "asked for"  # the device, in words for a person
        self.chunk_tokens = CHUNK_TOKENS  # of a prompt are read at once, unless a stream is told
        self._config, self._manifest, self._options = config, manifest, options or {}
        self._graph, self._cache = graph_of(folder, config, kv)
        self._model, self._tokenizer = self._open()
        self._loaded = Loaded(folder, self._model)
        self._plain: Plain | None = None
        self._sound: dict[Guidance, None] = {}  # grammars that compile, the latest last
        self.keep_caches(KEPT_COUNT, KEPT_NBYTES)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def context_length(self) -> int:
        """Prompt and reply together hold at most this many tokens."""
        return int(self._config["model"]["context_length"])

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return int(self._config["model"]["vocab_size"])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        eos = self._config["model"]["eos_token_id"]
        return tuple(eos) if isinstance(eos, list) else (eos,)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters in the bundle's folder now, by name."""
        return self._loaded.names

    @property
    def cache_token_nbytes(self) -> int:
        """Bytes of one token in the cache."""
        return self._cache.nbytes_per_token

    @property
    def nbytes(self) -> int:
        """What the open session takes: its files, those of the measuring graph once it is open, and its caches."""
        graphs = 1 + (self._plain is not None)
        return graphs * graph_nbytes(self.folder / self._graph) + self._caches.nbytes

    def keep_caches(self, count: int, nbytes: int = KEPT_NBYTES) -> None:
        """Bound the caches kept after their replies; 0 keeps none. Those kept until now are forgotten."""
        self._caches = Caches(self._new_cache, self.cache_token_nbytes, self.context_length, count, nbytes)

    def generator(self, room: int) -> genai.Generator:
        """genai's own generator with a cache for `room` tokens; stop tokens are never chosen. For measuring."""
        return self._generator(room, do_sample=False, min_length=room)

    def facts(self) -> dict[str, Any]:
        """What the bundle says of itself, without its long lists."""
        left_out = ("tensors", "sha256", "provenance")
        stated = {key: value for key, value in self._manifest.items() if key not in left_out}
        here = {"folder": str(self.folder), "context_length": self.context_length, "threads": self.threads}
        return {**stated, **here}

    def encode(self, text: str) -> list[int]:
        """Text to ids; special tokens written in it are recognized, none is added."""
        if not text:
            return []
        return [int(token) for token in self._tokenizer.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""
        return str(self._tokenizer.decode(np.asarray(ids, np.int32))) if len(ids) else ""

    def apply_template(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> str:
        """Messages ({"role", "content"}) as the prompt text of the bundle's chat template, ready for the reply.

        `tools` are functions as OpenAI describes them. Raises ValueError where the template does not take the messages.
        """
        given = {} if not tools else {"tools": json.dumps(list(tools))}
        try:
            text = self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True, **given)
        except Exception as error:
            why = f"{self.folder} has no chat template that takes these messages ({first_line(error)})"
            raise ValueError(f"{why}; give a plain prompt with --raw") from error
        return str(text)

    def check(self, request: Request) -> None:
        """Raise ValueError, before anything is computed, for a request that cannot run here.

        A prompt that leaves no room, ids that are none, an adapter that is unknown or damaged, a grammar that is none.
        """
        prompt, limit, vocab = len(request.prompt_ids), self.context_length, self.vocab_size
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab:
            raise ValueError(f"a prompt id is outside 0..{vocab - 1}; encode the text with this bundle's tokenizer")
        if prompt + min(request.max_new_tokens, 1) > limit:
            raise ValueError(
                f"the prompt has {prompt} tokens, but the context holds {limit} with the reply; shorten it"
            )
        if not all(0 <= token < vocab for token in request.sampling.bias):
            raise ValueError(f"a biased token is outside 0..{vocab - 1}; use this bundle's ids")
        if request.adapter is not None:
            self._loaded.load(request.adapter)
        if request.guidance is not None and request.guidance not in self._sound:
            self._generator(1, request.guidance)
            self._sound[request.guidance] = None
            if len(self._sound) > CHECKED_GUIDANCE:
                del self._sound[next(iter(self._sound))]

    def stream(
        self, request: Request, *, chunk_tokens: Callable[[], int] | None = None
    ) -> Generator[Event, None, None]:
        """Yield what happens, one bounded piece of work each: chunks of the prompt, tokens, and Finished.

        Closing it cancels; several may be pulled at in turn. `chunk_tokens` is asked before each chunk. Raises what
        `check` raises at once, and ValueError with the first event for an adapter of another model.
        """
        self.check(request)
        means = generation.Means(
            self._begin, self._tokenizer.create_stream, self._scores, self.context_length, self.stop_ids
        )
        return self._explained(request, generation.stream(request, means, chunk_tokens or (lambda: self.chunk_tokens)))

    def generate(  # noqa: PLR0913, the options of one generation
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
        ignore_stop: bool = False,
        adapter: str | None = None,
    ) -> Generator[Token, None, None]:
        """Yield tokens until one of `stop_ids` or the model's own (not yielded), `max_new_tokens`, or a full context.

        Closing the iterator cancels. `ignore_stop` goes on to the last token, for measuring. `adapter` is one of
        `adapters`, None the model as it is. Raises as `stream` does.
        """
        request = Request(
            tuple(int(token) for token in prompt_ids),
            max_new_tokens,
            Sampling(temperature, top_k, top_p, seed=seed),
            stop_ids=tuple(stop_ids),
            ignore_stop=ignore_stop,
            adapter=adapter,
        )
        return _tokens(self.stream(request))

    def unload_adapter(self, adapter: str) -> None:
        """Give an adapter's memory back; it is read again when next named. ValueError while a reply still uses it."""
        file = self._loaded.file(adapter)
        if self._plain is not None:
            self._plain.forget(file)
        self._caches.drop(adapter)
        self._loaded.unload(adapter)

    def logits(self, ids: NDArray[np.int64], adapter: str | None = None) -> NDArray[np.float32]:
        """Logits (B, T, V) of rows of ids (B, T), padded on the right: attention is causal, so no mask is needed.

        Raises ValueError for ids of another shape or length and for an adapter that is unknown or does not fit.
        """
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(f"ids must be a matrix (B, T), not shape {ids.shape}")
        if ids.shape[1] > self.context_length:
            raise ValueError(f"rows of {ids.shape[1]} tokens exceed the context of {self.context_length}; cut them")
        file = None if adapter is None else self._loaded.file(adapter)
        return self._measuring().logits(ids, file)

    def score(self, ids: Sequence[int], top: int = 0, adapter: str | None = None) -> list[Logprob]:
        """Logprobs of ids 1, 2, ... given those before, with the `top` likeliest at each place.

        Opens the measuring graph, which holds the weights once more. Raises ValueError as `check` does.
        """
        request = Request(tuple(ids), 0, adapter=adapter, prompt_logprobs=top)
        self.check(request)
        return [logprob for some in self._scores(request) for logprob in some]

    def close(self) -> None:
        """Give all memory back; a stream that is going on keeps its own, and whatever else is asked is a ValueError."""
        gone: Any = _Closed()
        self._caches = self._plain = self._model = self._tokenizer = self._loaded = gone

    def _measuring(self) -> Plain:
        if self._plain is None:
            self._plain = Plain(self.folder, self._config["model"]["decoder"], self.threads, self.kv)
        return self._plain

    def _scores(self, request: Request) -> Iterator[list[Logprob]]:
        """A prompt's logprobs, piece by piece."""
        file = None if request.adapter is None else self._loaded.file(request.adapter)
        return scores(self._measuring(), request.prompt_ids, request.prompt_logprobs or 0, file)

    def _begin(self, request: Request, count: int) -> flows.Flow:
        """A way into the model with room for a request's prompt and `count` tokens."""
        room = len(request.prompt_ids) + count
        if request.guidance is None and self._appends():
            return flows.Appended(self._caches, self._caches.take(request.prompt_ids, request.adapter, room))
        generator = self._adapted(request.adapter, room, request.guidance)
        return flows.Steered(generator, whole=self.device not in APPENDING)

    def _explained(self, request: Request, events: Generator[Event, None, None]) -> Generator[Event, None, None]:
        """The same; what the runtime says of an adapter that does not fit, or of a grammar, is put into words."""
        try:
            yield from events
        except RuntimeError as error:
            if request.guidance is not None and "mask" in str(error):
                raise refused(request.guidance, error) from error
            if request.adapter is None:
                raise
            raise unfit(request.adapter, self.folder, error) from error

    def _appends(self) -> bool:
        """Whether tokens may be appended one by one, and taken back: caches of keys and values on some devices only."""
        decoder, kind = self._config["model"]["decoder"], str(self._config["model"].get("type", ""))
        plain = set(decoder.get("inputs") or {}) <= KNOWN_INPUTS and not decoder.get("sliding_window")
        return plain and not kind.startswith(("phi3", "phimoe")) and self.device in APPENDING

    def _new_cache(self, adapter: str | None, room: int) -> Cache:
        return Cache(self._adapted(adapter, room), adapter, room)

    def _adapted(self, adapter: str | None, room: int, guidance: Guidance | None = None) -> genai.Generator:
        generator = self._generator(room, guidance, do_sample=False)
        if adapter is not None:
            self._loaded.activate(generator, adapter)
        return generator

    def _generator(self, room: int, guidance: Guidance | None = None, **search: bool | int) -> genai.Generator:
        """A generator of genai; ValueError where its grammar is none."""
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=room, **search)
        if guidance is None:
            return genai.Generator(self._model, params)
        params.set_guidance(guidance.kind.value, grammar_text(guidance))
        try:
            return genai.Generator(self._model, params)
        except RuntimeError as error:
            raise refused(guidance, error) from error

    def _open(self) -> tuple[genai.Model, Any]:
        import onnxruntime_genai as og

        quiet = {**self._options, "intra_op_num_threads": self.threads, "log_severity_level": SILENT}
        settings = {"model": {"decoder": {"session_options": quiet}}}
        try:
            config = genai.Config(str(self.folder))
            config.overlay(json.dumps(settings))
            if self.kv is not None:
                config.overlay(json.dumps(kv_overlay(self._graph)))
            if self.device == "cpu":
                config.clear_providers()  # a bundle for another device runs on this one too
            elif self.device not in providers(self._config):
                config.clear_providers()
                config.append_provider(self.device)
            return genai.Model(config), og.Tokenizer(str(self.folder))
        except Exception as error:  # the library raises bare RuntimeError and its own kinds
            if self.device != "cpu":
                why = f"{self.folder} cannot be opened on {self.device}: {first_line(error)}"
                raise ValueError(f"{why}; leave the provider out to run it on the CPU") from error
            raise damaged(self.folder, error) from error


def open_bundle(bundle: Path, *, device: str = "cpu", threads: int | None = None, kv: str | None = None) -> Session:
    """Open a bundle folder.

    `device` is what runtime/devices.py chooses by: cpu, auto, a kind or a provider; Session.why says how it went.
    `threads` None means what was tuned on this machine, else what the bundle says, within this process's cores. `kv` is
    one of the caches that the bundle offers (runtime/kv.py), None its own. Raises FileNotFoundError or ValueError, one
    line with the remedy: no bundle, a damaged one, no such device or cache.
    """
    config, manifest = read_bundle(bundle, threads)
    choice = choose(device, target_of(manifest))
    tuned = settings_for(bundle) if threads is None and choice.device.provider == "cpu" else None
    options = {} if tuned is None else tuned.session_options
    used = threads or (threads_here(config, manifest) if tuned is None else tuned.threads)
    session = Session(bundle, config, manifest, used, choice.device.provider, kv=kv, options=options)
    session.why = choice.why
    return session


class _Closed:
    """In place of what a closed session gave back."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError("the session is closed; open it again with open_bundle")


def _tokens(events: Generator[Event, None, None]) -> Generator[Token, None, None]:
    try:
        for event in events:
            if isinstance(event, Token):
                yield event
    finally:
        events.close()
