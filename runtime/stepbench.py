"""Times the steps of a bundle as schedules run them: chunks of a prompt, then tokens; one process per bundle.

    python -m rlkit.runtime.stepbench        a job as JSON on standard input, the answer as JSON on standard output

Steps are the events of `Session.stream`, from one to the next, so they hold what the runtime does around the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlkit.recover.memory import peak_nbytes
from rlkit.runtime.framebench import serve
from rlkit.runtime.request import Finished, Prefilled, Request
from rlkit.runtime.session import Session, open_bundle

Clock = Callable[[], float]
NEW_TOKENS = 16
SHORT = 32  # tokens of the prompt before tokens at little depth
FEWEST, MOST = 2, 20  # rounds


@dataclass(frozen=True, slots=True)
class Job:
    """What to time: a bundle, with prompts of so many tokens in chunks of these sizes."""

    model: str
    provider: str = "cpu"
    threads: int = 1
    chunks: tuple[int, ...] = (256, 64)
    prompt_tokens: int = 512
    seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Rows (tokens of the step, tokens before it, seconds), one per step of any round, and what the bundle takes."""

    prefill: tuple[tuple[int, int, float], ...]
    decode: tuple[tuple[int, int, float], ...]
    load_seconds: float
    memory_nbytes: int | None
    weights_nbytes: int
    kv_nbytes: int
    context: int


def answer(job: Job) -> Answer:
    """Time a job in this process; ValueError for a prompt beyond the bundle's context."""
    import onnxruntime_genai  # noqa: F401, its own memory is not the bundle's

    before = peak_nbytes()
    began = time.perf_counter()
    session = open_bundle(Path(job.model), device=job.provider, threads=job.threads)
    load = time.perf_counter() - began
    session.keep_caches(0)  # every prompt is read
    weights = session.nbytes
    if job.prompt_tokens + NEW_TOKENS > session.context_length:
        why = f"{job.prompt_tokens} + {NEW_TOKENS} tokens exceed the context of {session.context_length}"
        raise ValueError(f"{job.model}: {why}; ask for a shorter --prompt")
    prefill, decode = time_steps(session, job.chunks, job.prompt_tokens, job.seconds)
    after = peak_nbytes()
    grown = None if before is None or after is None else max(after - before, 0)
    room = session.context_length
    return Answer(tuple(prefill), tuple(decode), load, grown, weights, session.cache_token_nbytes, room)


Rows = list[tuple[int, int, float]]


def time_steps(
    session: Session, chunks: Sequence[int], prompt_tokens: int, seconds: float, clock: Clock = time.perf_counter
) -> tuple[Rows, Rows]:
    """Rows of prefill and decode over FEWEST to MOST rounds in about `seconds`, after one that is not counted."""
    rng = np.random.default_rng(0)
    prefill: Rows = []
    decode: Rows = []
    short = min(SHORT, prompt_tokens)
    for chunk in (*chunks, short):
        _one(session, rng, short, chunk, clock)
    began, rounds = clock(), 0
    while rounds < FEWEST or (clock() - began < seconds and rounds < MOST):
        for tokens, chunk in [(short, short), *((prompt_tokens, chunk) for chunk in chunks)]:
            read, said = _one(session, rng, tokens, chunk, clock)
            prefill += read if tokens > short else []
            decode += said
        rounds += 1
    return prefill, decode


def _one(session: Session, rng: np.random.Generator, tokens: int, chunk: int, clock: Clock) -> tuple[Rows, Rows]:
    """One reply: its chunks, and its tokens but the first, which comes with the last chunk's logits."""
    ids = tuple(int(token) for token in rng.integers(3, session.vocab_size, tokens))
    request = Request(ids, min(NEW_TOKENS, session.context_length - tokens), ignore_stop=True)
    prefill: Rows = []
    decode: Rows = []
    done = made = 0
    last = clock()
    for event in session.stream(request, chunk_tokens=lambda: chunk):
        now = clock()
        if isinstance(event, Prefilled):
            prefill.append((event.done - done, done, now - last))
            done = event.done
        elif not isinstance(event, Finished):
            if made:
                decode.append((1, done + made, now - last))
            elif prefill:  # the choice of the first token is part of the last chunk
                *step, spent = prefill[-1]
                prefill[-1] = (step[0], step[1], spent + now - last)
            made += 1
        last = now
    return prefill, decode


def main() -> None:
    """Answer the job on standard input."""
    serve(lambda job: answer(Job(**{**job, "chunks": tuple(job["chunks"])})))


if __name__ == "__main__":
    main()
