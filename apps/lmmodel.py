"""A bundle as lm-evaluation-harness asks of it: text in, numbers and text out; the harness itself is not needed.

Requests are scored in the order of their contexts, so that what they share is computed once. Graphs are opened when
they are first needed: a task that only scores never loads what generates. What does not go smoothly is counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.apps.lmtokens import Ids, Tokens, windows

if TYPE_CHECKING:
    from rlkit.recover.likelihood import Scorer
    from rlkit.runtime.request import Request, Sampling
    from rlkit.runtime.session import Session

GENERATED = 256  # tokens, where a task does not say; the harness's own default
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
AS_IT_IS = {"num_beams": 1, "use_cache": True}  # what tasks ask for and gets done anyway
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is there counts
PORTION = 64  # requests scored between two steps of the progress bar, for each worker

Pair = tuple[Ids, Ids]
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """Requests that needed something done to them."""

    truncated: int = 0  # the beginning of the context was cut off
    windowed: int = 0  # a continuation longer than the context, judged in parts
    empty: int = 0  # nothing to judge


@dataclass(frozen=True, slots=True)
class Opening:
    """How a bundle is opened; `workers` processes score, `adapter` is one of those in its folder."""

    folder: Path
    adapter: str | None = None
    device: str = "cpu"
    kv: str | None = None
    threads: int | None = None
    workers: int = 1

    def check(self) -> None:
        """Raise now, in one line, what opening would raise later."""
        from rlkit.runtime.bundlescorer import adapter_file
        from rlkit.runtime.devices import choose, target_of
        from rlkit.runtime.folder import read_bundle
        from rlkit.runtime.kv import check

        config, manifest = read_bundle(self.folder, self.threads)
        check(self.folder, config["model"]["decoder"], self.kv)
        if choose(self.device, target_of(manifest)).device.provider != "cpu":
            log.warning("replies come from the device %s, log-likelihoods from the CPU", self.device)
        if self.adapter is not None:
            adapter_file(self.folder, self.adapter)

    def session(self) -> Session:
        """What generates."""
        from rlkit.runtime.session import open_bundle

        return open_bundle(self.folder, device=self.device, threads=self.threads, kv=self.kv)

    def scorer(self) -> Scorer:
        """What judges continuations."""
        from rlkit.runtime.bundlescorer import BundleScorer

        return BundleScorer(self.folder, workers=self.workers, threads=self.threads, kv=self.kv, adapter=self.adapter)


class Model:
    """A bundle with its tokenizer; `length` is the most tokens of a request."""

    def __init__(self, opening: Opening, tokens: Tokens, length: int) -> None:
        self.opening, self.tokens, self.length = opening, tokens, length
        self.counts = Counts()

    @cached_property
    def session(self) -> Session:
        """What generates, opened when first needed."""
        return self.opening.session()

    @cached_property
    def scorer(self) -> Scorer:
        """What judges continuations, opened when first needed."""
        return self.opening.scorer()

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield (place, (logprob, greedy)) of (context, continuation) as they are judged.

        An empty continuation is as likely as can be, and a task would choose it for that: it gets minus infinity.
        """
        parts: list[tuple[int, Pair]] = []
        for place, texts in enumerate(pairs):
            context, continuation = self.tokens.pair(*texts)
            if not continuation:
                self.counts.empty += 1
                yield place, (-float("inf"), False)
            parts += ((place, part) for part in self._fitted(context, continuation))
        yield from self._summed(parts)

    def rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """Yield (place, logprob) of whole texts; an empty one has 0, and is counted."""
        parts: list[tuple[int, Pair]] = []
        for place, text in enumerate(texts):
            found = [(place, part) for part in self.tokens.windows(text, self.length)]
            if not found:
                self.counts.empty += 1
                yield place, 0.0
            parts += found
        for place, (logprob, _greedy) in self._summed(parts):
            yield place, logprob

    def generate(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[int, str]]:
        """Yield (place, reply) of (prompt, generation settings), prompts that begin alike one after the other.

        ValueError, before anything is generated, for settings that a bundle does not know.
        """
        requests = [(place, *self._request(*one)) for place, one in enumerate(asked)]
        for place, request, until in sorted(requests, key=lambda one: one[1].prompt_ids):
            yield place, self._reply(request, until)

    def template(self, messages: Sequence[Mapping[str, str]], *, opened: bool = True) -> str:
        """Messages as a prompt; unless `opened`, the last message is the beginning of the reply.

        Templates that refuse a system message get the others only, as with the harness's own models.
        """
        kept = [dict(message) for message in messages]
        begun = "" if opened or not kept else kept.pop()["content"]
        try:
            return self.session.apply_template(kept) + begun
        except ValueError:
            others = [message for message in kept if message["role"] != "system"]
            if len(others) in (0, len(kept)):
                raise
            log.warning("the chat template takes no system message; it is left out")
            return self.session.apply_template(others) + begun

    def facts(self) -> dict[str, Any]:
        """What was evaluated and what had to be done, for the results' config."""
        opening = self.opening
        about = {"bundle": opening.folder.resolve().name, "adapter": opening.adapter, "device": opening.device}
        return {**about, "kv": opening.kv, "max_length": self.length, **asdict(self.counts)}

    def _summed(self, parts: Sequence[tuple[int, Pair]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(place, (logprob, greedy)) once all parts of a place are judged."""
        left: dict[int, int] = {}
        for place, _part in parts:
            left[place] = left.get(place, 0) + 1
        sums = dict.fromkeys(left, (0.0, True))
        order = sorted(range(len(parts)), key=lambda at: parts[at][1][0])
        step = PORTION * self.opening.workers
        for start in range(0, len(order), step):
            some = order[start : start + step]
            for at, found in zip(some, self.scorer.score([parts[at][1] for at in some]), strict=True):
                place = parts[at][0]
                logprob, greedy = sums[place]
                sums[place] = (logprob + found.logprob, greedy and found.greedy)
                left[place] -= 1
                if not left[place]:
                    yield place, sums.pop(place)

    def _fitted(self, context: Ids, continuation: Ids) -> list[Pair]:
        """The pair within the context: cut from the left, or in parts where the continuation alone is too long."""
        if not continuation:
            return []
        if len(continuation) > self.length:
            self.counts.windowed += 1
            return list(windows(continuation, context[-1], self.length))
        over = len(context) + len(continuation) - 1 - self.length
        self.counts.truncated += over > 0
        return [(context[max(over, 0) :], continuation)]

    def _request(self, prompt: str, settings: Mapping[str, Any]) -> tuple[Request, list[str]]:
        """What to generate, and all texts that end it."""
        from rlkit.runtime.request import MOST_STOPS, Request

        until, count, sampling = _settings(settings)
        room = self.length - count
        if room < 1:
            why = f"{count} tokens to generate leave none of {self.length} for the prompt"
            raise ValueError(f"{why}; ask for fewer with --gen_kwargs max_gen_toks=N")
        ids = self.tokens.encode(prompt) or [self.tokens.prefix]
        self.counts.truncated += len(ids) > room
        special = {text: token for text in until if (token := self.tokens.special_id(text)) is not None}
        stops = tuple(text for text in until if text not in special)[:MOST_STOPS]
        made = Request(
            tuple(ids[-room:]), count, sampling, stops, stop_ids=tuple(special.values()), adapter=self.opening.adapter
        )
        return made, until

    def _reply(self, request: Request, until: Sequence[str]) -> str:
        from rlkit.runtime.request import Token

        made = [event.id for event in self.session.stream(request) if isinstance(event, Token)]
        text = self.tokens.decode(made)
        for stop in until:
            text = text.split(stop)[0]
        return text


def _settings(settings: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop texts, the most tokens and the sampling of a task's generation_kwargs."""
    from rlkit.runtime.request import Sampling

    left = dict(settings)
    until = left.pop("until", None) or []
    texts = [until] if isinstance(until, str) else list(until)
    lengths = [value for name in LENGTHS if (value := left.pop(name, None)) is not None]
    sampled = {name: value for name in SAMPLED if (value := left.pop(name, None)) is not None}
    drawn = left.pop("do_sample", None)
    sampled.setdefault("temperature", 1.0 if drawn else 0.0)
    if drawn is False:
        sampled["temperature"] = 0.0
    unknown = [f"{name}={value}" for name, value in left.items() if AS_IT_IS.get(name) != value]
    if unknown:
        known = ", ".join(("until", "do_sample", LENGTHS[0], *SAMPLED))
        raise ValueError(f"generation settings {', '.join(unknown)} are not offered; use {known}")
    count = int(lengths[0]) if lengths else GENERATED
    return [text for text in texts if text], count, Sampling(**sampled, seed=_seed())


def _seed() -> int:
    """Drawn from numpy's own generator, which the harness seeds."""
    import numpy as np

    return int(np.random.randint(2**31))


def open_model(  # noqa: PLR0913, one argument per model_args of the harness
    bundle: str | None = None,
    *,
    pretrained: str | None = None,
    adapter: str | None = None,
    device: str = "cpu",
    kv: str | None = None,
    threads: int | None = None,
    workers: int = 1,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    prefix_token_id: int | None = None,
    **unknown: Any,
) -> Model:
    """A bundle by the harness's model_args; `pretrained` is another name for `bundle`, which it names results by.

    ValueError or FileNotFoundError in one line for arguments that are none and for what cannot be opened.
    """
    from rlkit.runtime.folder import read_bundle

    if unknown:
        known = "bundle, adapter, device, kv, threads, workers, max_length, add_bos_token, prefix_token_id"
        raise ValueError(f"model_args {', '.join(unknown)} are unknown to rlkit; there are {known}")
    named = [folder for folder in (bundle, pretrained) if folder is not None]
    if len(named) != 1:
        raise ValueError(f"model_args name {len(named)} bundles; write --model_args bundle=FOLDER")
    opening = Opening(Path(named[0]), adapter, device, kv, threads, workers)
    opening.check()
    model = read_bundle(opening.folder)[0]["model"]
    context, eos = int(model["context_length"]), model["eos_token_id"]
    length = context if max_length is None else max_length
    if not 2 <= length <= context:
        raise ValueError(f"max_length={length} is outside 2..{context}, what the bundle's context holds")
    stop = eos[0] if isinstance(eos, list) else eos
    return Model(opening, Tokens(opening.folder, stop, add_bos=add_bos_token, prefix=prefix_token_id), length)
