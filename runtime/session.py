"""A bundle, opened: text to ids, ids to tokens as they come, ids to logits.

Tokens come from onnxruntime-genai; logits for measuring accuracy from a plain onnxruntime session over the same file
with the same options, opened when first asked for. Both hold the weights, so a process that does both has them twice.

    session = open_bundle(Path("bundle"))
    for token in session.generate(session.encode("The capital of France is"), 16):
        print(token.text, end="", flush=True)

Files of the bundle's adapters folder (written by export/adapters.py) are mapped when first named; each request may name
another.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.runtime.plain import ADAPTER_SUFFIX, SILENT, Plain, damaged, first_line, unfit

DEVICES = ("cpu", "cuda", "dml", "webgpu", "openvino", "qnn")  # as genai names the providers
ADAPTERS = "adapters"
SCHEMA_VERSION = 1  # of rlkit.json


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `seconds` since the one before, for the first since the start of the prefill."""

    id: int
    text: str
    seconds: float
    index: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest, and then nothing else matters."""

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise ValueError(f"temperature = {self.temperature} is outside 0..100; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} is outside 0..1; 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} is negative; 0 keeps every token")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise ValueError(f"seed = {self.seed} is outside 0..{2**31 - 1}")

    def search_options(self) -> dict[str, Any]:
        """The same as genai's search options."""
        if self.temperature == 0:
            return {"do_sample": False}
        options = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return options if self.seed is None else {**options, "random_seed": self.seed}


class Session:
    """An open bundle; make one with `open_bundle`. Not for use by two threads at once."""

    def __init__(
        self, folder: Path, config: dict[str, Any], manifest: dict[str, Any], threads: int | None, device: str = "cpu"
    ) -> None:
        self._folder = folder
        self.device = device
        self._config = config
        self._manifest = manifest
        self.threads: int = threads or threads_here(config, manifest)
        self._model, self._tokenizer = self._open()
        self._adapters: Any = None  # genai's, with those in self._loaded
        self._loaded: set[str] = set()
        self._plain: Plain | None = None

    @property
    def context_length(self) -> int:
        """Prompt and reply together hold at most this many tokens."""
        return int(self._config["model"]["context_length"])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        eos = self._config["model"]["eos_token_id"]
        return tuple(eos) if isinstance(eos, list) else (eos,)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters in the bundle's folder now, by name."""
        return tuple(sorted(file.name.removesuffix(ADAPTER_SUFFIX) for file in self._adapter_files()))

    def generator(self, room: int) -> Any:
        """genai's own generator with a cache for `room` tokens; stop tokens are never chosen. For measuring."""
        import onnxruntime_genai as og

        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=room, min_length=room)
        return og.Generator(self._model, params)

    def facts(self) -> dict[str, Any]:
        """What the bundle says of itself, without its long lists."""
        left_out = ("tensors", "sha256", "provenance")
        stated = {key: value for key, value in self._manifest.items() if key not in left_out}
        here = {"folder": str(self._folder), "context_length": self.context_length, "threads": self.threads}
        return {**stated, **here}

    def encode(self, text: str) -> list[int]:
        """Text to ids; special tokens written in it are recognized, none is added."""
        if not text:
            return []
        return [int(token) for token in self._tokenizer.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""
        return str(self._tokenizer.decode(np.asarray(ids, np.int32))) if len(ids) else ""

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages ({"role", "content"}) as the prompt text of the bundle's chat template, ready for the reply."""
        try:
            return str(self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True))
        except Exception as error:
            why = f"{self._folder} has no chat template that takes these messages ({first_line(error)})"
            raise ValueError(f"{why}; give a plain prompt with --raw") from error

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
        `adapters`, None the model as it is. Raises ValueError for a prompt that leaves no room and for an adapter that
        is unknown or damaged before anything is computed, for one of another model with the first token.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        length = self._length(prompt_ids, max_new_tokens)
        stops = set() if ignore_stop else {*self.stop_ids, *stop_ids}
        limits = {"max_length": length, "min_length": length if ignore_stop else 0}
        if adapter is not None:
            self._load_adapter(adapter)
        return self._tokens(list(prompt_ids), limits | sampling.search_options(), stops, adapter)

    def unload_adapter(self, adapter: str) -> None:
        """Give an adapter's memory back; it is read again when next named. ValueError while a reply still uses it."""
        file = self._adapter_file(adapter)
        if self._plain is not None:
            self._plain.forget(file)
        if adapter in self._loaded:
            try:
                self._adapters.unload(adapter)
            except RuntimeError as error:
                raise ValueError(
                    f"adapter {adapter} cannot be unloaded ({first_line(error)}); end its reply"
                ) from error
            self._loaded.discard(adapter)

    def logits(self, ids: NDArray[np.int64], adapter: str | None = None) -> NDArray[np.float32]:
        """Logits (B, T, V) of rows of ids (B, T), padded on the right: attention is causal, so no mask is needed.

        Raises ValueError for ids of another shape or length and for an adapter that is unknown or does not fit.
        """
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(f"ids must be a matrix (B, T), not shape {ids.shape}")
        if ids.shape[1] > self.context_length:
            raise ValueError(f"rows of {ids.shape[1]} tokens exceed the context of {self.context_length}; cut them")
        file = None if adapter is None else self._adapter_file(adapter)
        if self._plain is None:
            self._plain = Plain(self._folder, self._config["model"]["decoder"], self.threads)
        return self._plain.logits(ids, file)

    def _adapter_files(self) -> list[Path]:
        return [file for file in (self._folder / ADAPTERS).glob(f"*{ADAPTER_SUFFIX}") if file.is_file()]

    def _adapter_file(self, adapter: str) -> Path:
        """The file of one of `adapters`: a name is compared with those there are, never made into a path."""
        for file in self._adapter_files():
            if file.name == f"{adapter}{ADAPTER_SUFFIX}":
                return file
        there = f"use {', '.join(self.adapters)}" if self.adapters else "it has none, so leave the adapter out"
        raise ValueError(f"{self._folder} has no adapter {adapter!r}; {there}")

    def _load_adapter(self, adapter: str) -> None:
        import onnxruntime_genai as og

        file = self._adapter_file(adapter)
        if adapter in self._loaded:
            return
        if self._adapters is None:
            self._adapters = og.Adapters(self._model)
        try:
            self._adapters.load(str(file), adapter)
        except RuntimeError as error:
            raise damaged(file, error) from error
        self._loaded.add(adapter)

    def _length(self, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
        prompt, limit = len(prompt_ids), self.context_length
        vocab = int(self._config["model"]["vocab_size"])
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab:
            raise ValueError(f"a prompt id is outside 0..{vocab - 1}; encode the text with this bundle's tokenizer")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens} leaves nothing to do; use at least 1")
        if prompt >= limit:
            raise ValueError(
                f"the prompt has {prompt} tokens, but the context holds {limit} with the reply; shorten it"
            )
        return min(prompt + max_new_tokens, limit)

    def _tokens(
        self, prompt_ids: list[int], options: dict[str, Any], stops: set[int], adapter: str | None
    ) -> Generator[Token, None, None]:
        import onnxruntime_genai as og

        began = time.perf_counter()
        params = og.GeneratorParams(self._model)
        params.set_search_options(**options)
        generator = og.Generator(self._model, params)
        try:
            if adapter is not None:
                self._load_adapter(adapter)  # once more: it may have been unloaded since the request
                generator.set_active_adapter(self._adapters, adapter)
            generator.append_tokens(np.asarray([prompt_ids], np.int32))
        except RuntimeError as error:
            if adapter is None:
                raise
            raise unfit(adapter, self._folder, error) from error
        stream = self._tokenizer.create_stream()
        for index in range(options["max_length"] - len(prompt_ids)):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in stops:
                return
            text = str(stream.decode(token))
            now = time.perf_counter()
            yield Token(token, text, now - began, index)
            began = time.perf_counter()
            if generator.is_done():
                return

    def _open(self) -> tuple[Any, Any]:
        import onnxruntime_genai as og

        quiet = {"intra_op_num_threads": self.threads, "log_severity_level": SILENT}
        og.disable_telemetry_events()  # nothing about the model or its use leaves this machine
        settings = {"model": {"decoder": {"session_options": quiet}}}
        try:
            config = og.Config(str(self._folder))
            config.overlay(json.dumps(settings))
            if self.device == "cpu":
                config.clear_providers()  # a bundle for another device runs on this one too
            elif self.device not in self._providers():
                config.clear_providers()
                config.append_provider(self.device)
            model = og.Model(config)
            return model, og.Tokenizer(model)
        except Exception as error:  # the library raises bare RuntimeError and its own kinds
            if self.device != "cpu":
                why = f"{self._folder} cannot be opened on {self.device}: {first_line(error)}"
                raise ValueError(f"{why}; leave the provider out to run it on the CPU") from error
            raise damaged(self._folder, error) from error

    def _providers(self) -> set[str]:
        """The providers that the bundle names, in genai's spelling made small."""
        options = (self._config["model"]["decoder"].get("session_options") or {}).get("provider_options") or []
        return {str(name).lower() for entry in options for name in entry}


def open_bundle(bundle: Path, *, device: str = "cpu", threads: int | None = None) -> Session:
    """Open a bundle folder on a device; `threads` None means what the bundle says, within this process's cores.

    Raises FileNotFoundError or ValueError, one line with the remedy: no bundle, a damaged one, another device.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is not offered yet; use {' or '.join(DEVICES)}")
    config, manifest = read_bundle(bundle, threads)
    return Session(bundle, config, manifest, threads, device)


def read_bundle(bundle: Path, threads: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """genai_config.json and rlkit.json (empty where there is none) of a folder that can be opened with `threads`.

    Raises FileNotFoundError or ValueError, one line with the remedy.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads = {threads} cannot run anything; use at least 1, or leave it out")
    if not bundle.is_dir():
        raise FileNotFoundError(f"no bundle folder {bundle}; make one with: rlkit export CHECKPOINT -o {bundle}")
    if not (bundle / "genai_config.json").is_file():
        what = "a checkpoint" if (bundle / "config.json").is_file() else "no bundle: it holds no genai_config.json"
        raise ValueError(f"{bundle} is {what}; make a bundle with: rlkit export CHECKPOINT -o BUNDLE")
    config = _read_object(bundle / "genai_config.json")
    try:
        filename = str(config["model"]["decoder"]["filename"])
        _ = config["model"]["context_length"], config["model"]["vocab_size"], config["model"]["eos_token_id"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{bundle}/genai_config.json lacks {error}; export the bundle again") from error
    for name in (filename, "tokenizer.json"):
        if not (bundle / name).is_file():
            raise FileNotFoundError(f"{bundle} lacks {name}, so it is incomplete; export it again")
    return config, _manifest(bundle)


def _manifest(bundle: Path) -> dict[str, Any]:
    path = bundle / "rlkit.json"
    if not path.is_file():
        return {}
    manifest = _read_object(path)
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version!r}, newer than this rlkit's {SCHEMA_VERSION}; update rlkit"
        )
    return manifest


def threads_here(config: dict[str, Any], manifest: dict[str, Any]) -> int:
    """A number somebody chose or tuned holds, up to this process's cores; a default is made anew for this machine."""
    from rlkit.export.plan import default_threads

    cores = default_threads()
    written = (config["model"]["decoder"].get("session_options") or {}).get("intra_op_num_threads")
    chosen = (manifest.get("threads") or {}).get("chosen_by", "user") != "default"
    return min(written, cores) if chosen and isinstance(written, int) and written > 0 else cores


def _read_object(path: Path) -> dict[str, Any]:
    from rlkit.recover.source import read_json

    return read_json(path)
