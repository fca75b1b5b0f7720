"""The stream of one reply: chunks of the prompt, tokens, the end; whoever pulls decides when the next is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from rlkit.runtime.flows import Flow
from rlkit.runtime.request import Event, Finished, Logprob, Prefilled, Reason, Request, Token
from rlkit.runtime.sampling import Logits, Sampler, logprob_of
from rlkit.runtime.stops import Stops

CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Means:
    """What a stream needs of a session.

    `begin` opens the flow of a request that makes `count` tokens; `decoder` makes a decoder of ids to text;
    `score(ids, top)` yields after every piece of work, the logprobs of all but the first id last.
    """

    begin: Callable[[Request, int], Flow]
    decoder: Callable[[], Any]
    score: Callable[[Request], Iterator[list[Logprob]]]
    context_length: int
    stop_ids: tuple[int, ...]


def stream(request: Request, means: Means, chunk_tokens: Callable[[], int]) -> Generator[Event, None, None]:
    """Yield what happens, one bounded piece of work each; `chunk_tokens` is asked before every chunk of the prompt."""
    prompt = len(request.prompt_ids)
    logprobs: tuple[Logprob, ...] = ()
    if request.prompt_logprobs is not None:
        scored = yield from _scored(request, means)
        logprobs = tuple(scored)
    count = min(request.max_new_tokens, means.context_length - prompt)
    if count < 1:
        yield Prefilled(prompt, prompt, 0.0, logprobs=logprobs)
        yield Finished(Reason.LENGTH, prompt_tokens=prompt)
        return
    began = time.perf_counter()
    flow = means.begin(request, count)
    try:
        spent = yield from _prefilled(request, flow, logprobs, chunk_tokens, began)
        yield from _reply(request, flow, means, count, spent)
    finally:
        flow.close()


def _scored(request: Request, means: Means) -> Generator[Event, None, list[Logprob]]:
    """The prompt's logprobs; nothing of it is in a cache meanwhile."""
    found: list[Logprob] = []
    began = time.perf_counter()
    for some in means.score(request):
        found += some
        yield Prefilled(0, len(request.prompt_ids), time.perf_counter() - began)
        began = time.perf_counter()
    return found


def _prefilled(
    request: Request, flow: Flow, logprobs: tuple[Logprob, ...], chunk_tokens: Callable[[], int], began: float
) -> Generator[Event, None, float]:
    """The prompt's way into the cache; the seconds of all of it."""
    ids, done, spent = request.prompt_ids, flow.reused, 0.0
    while done < len(ids):
        chunk = len(ids) if flow.whole else max(1, chunk_tokens())
        flow.feed(ids[done : done + chunk])
        done = min(done + chunk, len(ids))
        seconds = time.perf_counter() - began
        spent += seconds
        yield Prefilled(done, len(ids), seconds, flow.reused, logprobs if done == len(ids) else ())
        began = time.perf_counter()
    return spent


def _reply(request: Request, flow: Flow, means: Means, count: int, spent: float) -> Generator[Event, None, None]:
    """Tokens until a stop or `count`; `spent` are the seconds of the prompt, which the first token has too."""
    guided = request.guidance is not None  # a grammar that is at its end allows nothing but a stop token
    ends = set() if request.ignore_stop and not guided else {*means.stop_ids, *request.stop_ids}
    never = means.stop_ids if request.ignore_stop and not guided else ()
    sampler = Sampler(request.sampling, request.prompt_ids, never)
    text, stops = means.decoder(), Stops(() if request.ignore_stop else request.stop)
    prompt, made, shown, stop = len(request.prompt_ids), 0, "", None
    reason = Reason.LENGTH
    while made < count and stop is None:
        began = time.perf_counter() - spent
        logits = flow.logits()
        token = flow.choose(sampler, logits)
        if token in ends:
            reason = Reason.STOP
            break
        sampler.saw(token)
        shown, stop = stops.push(str(text.decode(token)))
        logprob = _logprob(request, logits, token)
        yield Token(token, shown, time.perf_counter() - began, made, logprob)
        made, spent = made + 1, 0.0
    rest = "" if stop is not None else stops.rest()
    if stop is not None:
        reason = Reason.STOP
    yield Finished(reason, rest, stop, prompt, made, flow.reused)


def _logprob(request: Request, logits: Logits, token: int) -> Logprob | None:
    return None if request.logprobs is None else logprob_of(logits, token, request.logprobs)
