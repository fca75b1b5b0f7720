"""What is asked of a bundle, and what comes back while it works: the vocabulary of generation.

    Request  --Session.stream-->  Prefilled, Prefilled, ..., Token, Token, ..., Finished

Every element of the stream is one bounded piece of work (a chunk of the prompt, or a token), so whoever pulls at
several streams in turn shares the model between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MOST_LOGPROBS = 20  # alternatives per token, as OpenAI's servers allow
MOST_STOPS = 16
SEEDS = 2**63


def _within(name: str, value: float, low: float, high: float, remedy: str) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} = {value} is outside {low}..{high}; {remedy}")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest; penalties and `bias` change the logits before.

    `top_k` 0 and `top_p` 1 keep every token, `min_p` those at least that share as likely as the likeliest.
    `repetition_penalty` divides (CTRL, Keskar et al. 2019), `presence_penalty` and `frequency_penalty` subtract, the
    latter per occurrence, as OpenAI's do. `bias` is added to the logits of the tokens it names. ValueError for a number
    outside its range.
    """

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 100, "0 takes the likeliest token")
        _within("top_p", self.top_p, 0, 1, "1 keeps every token")
        if self.top_p == 0:
            raise ValueError("top_p = 0 keeps no token; use more than 0, and 1 for every token")
        _within("min_p", self.min_p, 0, 1, "0 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} is negative; 0 keeps every token")
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed = {self.seed} is outside 0..{SEEDS - 1}")
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100, "1 changes nothing")
        for name in ("presence_penalty", "frequency_penalty"):
            _within(name, getattr(self, name), -2, 2, "0 changes nothing")
        for token, value in self.bias.items():
            _within(f"the bias of token {token}", value, -100, 100, "0 changes nothing")


class Grammar(StrEnum):
    """What a reply can be made to follow, by the runtime's names."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark_grammar"


@dataclass(frozen=True, slots=True)
class Guidance:
    """A reply's structure: a JSON schema (as text), a regular expression or a Lark grammar. ValueError without text."""

    kind: Grammar
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip() or "\0" in self.text:
            raise ValueError(f"the {self.kind.value} is empty or holds a NUL; say what the reply shall follow")


@dataclass(frozen=True, slots=True)
class Request:
    """One generation from ids (P,). ValueError for numbers that ask for nothing or too much.

    `stop`: strings that end the reply and are left out of it; `stop_ids`: tokens that do, beside the model's own.
    `logprobs`: None for none, else how many alternatives are listed beside each new token (0: its own alone);
    `prompt_logprobs`: the same for the prompt's tokens, from the second on. `ignore_stop` goes on to the last token.
    `max_new_tokens` 0 is allowed with `prompt_logprobs` only: the prompt is scored and nothing generated.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    guidance: Guidance | None = None
    adapter: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_stop: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("the prompt is empty; give at least one token")
        least = 0 if self.prompt_logprobs is not None else 1
        if self.max_new_tokens < least:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens} leaves nothing to do; use at least {least}")
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise ValueError(f"{len(self.stop)} stop strings; use at most {MOST_STOPS}, none of them empty")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            if wanted is not None and not 0 <= wanted <= MOST_LOGPROBS:
                raise ValueError(f"{name} = {wanted} is outside 0..{MOST_LOGPROBS}")


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural logarithm of its probability under the model as it is, before temperature and penalties.

    `top` lists (id, logprob) of the likeliest, best first.
    """

    id: int
    value: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Prefilled:
    """`done` of `total` prompt tokens are in the cache, `reused` of them since before; the last one has the logprobs.

    `logprobs` are of prompt tokens 1, 2, ..., where they were asked for.
    """

    done: int
    total: int
    seconds: float
    reused: int = 0
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `seconds` since the one before, for the first since the start of the prefill.

    `text` is what the reply grew by: empty while a character or a stop string may still be incomplete, so the texts of
    all tokens and of Finished joined are the reply.
    """

    id: int
    text: str
    seconds: float
    index: int
    logprob: Logprob | None = None


class Reason(StrEnum):
    """Why a reply ended: a stop token or string, or as many tokens as asked for or as the context holds."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a stream: `text` was held back for a stop string that did not come; `stop` is the one that did."""

    reason: Reason
    text: str = ""
    stop: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0


Event = Prefilled | Token | Finished
