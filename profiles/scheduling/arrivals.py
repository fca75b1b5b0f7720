"""From a setting and a seed to a workload: when every frame and request comes, and how long requests are.

Every stream draws from its own PCG64 generator, seeded with (seed, its place), so a change to one stream leaves the
others as they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlkit.profiles.scheduling.workload import Arrivals, Lengths, Llm, Setting, Stream, Workload

__all__ = ["expand"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Jobs of one stream, (n,) each; `parents` are places within the stream before."""

    arrivals: Ints
    indices: Ints
    deadlines: Ints
    parents: Ints
    prompts: Ints
    outputs: Ints


def expand(setting: Setting, seed: int) -> Workload:
    """Draw a run. ValueError: a request whose cache can never fit beside the weights."""
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed {seed}: use a whole number of at least 0")
    drawn: dict[str, _Drawn] = {}
    waiting = list(enumerate(setting.streams))
    while waiting:  # parents first; Setting has made sure that there is no cycle
        place, stream = waiting.pop(0)
        if stream.after and stream.after not in drawn:
            waiting.append((place, stream))
            continue
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, place))))
        before = drawn[stream.after] if stream.after else None
        draw = (
            _requests(stream, setting, before, rng)
            if isinstance(stream, Llm)
            else _frames(stream, setting, before, rng)
        )
        drawn[stream.name] = draw
    return _merged(setting, seed, [drawn[stream.name] for stream in setting.streams])


def _merged(setting: Setting, seed: int, drawn: list[_Drawn]) -> Workload:
    sizes = [len(draw.arrivals) for draw in drawn]
    starts = np.cumsum([0, *sizes])
    streams = np.repeat(np.arange(len(drawn)), sizes)
    parents = []
    for stream, draw in zip(setting.streams, drawn, strict=True):
        first = starts[setting.index(stream.after)] if stream.after else 0
        parents.append(np.where(draw.parents < 0, -1, draw.parents + first))
    arrivals = np.concatenate([draw.arrivals for draw in drawn])
    order = np.argsort(arrivals, kind="stable")  # at the same time: streams in their order
    number = np.empty(len(order) + 1, np.int64)
    number[order] = np.arange(len(order))
    number[-1] = -1  # what a parent of -1 becomes

    def listed(field: str) -> list[int]:
        values: list[int] = np.concatenate([getattr(draw, field) for draw in drawn])[order].tolist()
        return values

    return Workload(
        setting=setting,
        seed=seed,
        arrivals=arrivals[order].tolist(),
        streams=streams[order].tolist(),
        indices=listed("indices"),
        deadlines=listed("deadlines"),
        parents=number[np.concatenate(parents)[order]].tolist(),
        prompts=listed("prompts"),
        outputs=listed("outputs"),
    )


def _frames(stream: Stream, setting: Setting, before: _Drawn | None, rng: np.random.Generator) -> _Drawn:
    """Frames with nominal times within the run, those of them that there are."""
    count = max(0, -(-(setting.duration - stream.offset) // stream.period))
    indices = np.arange(count if stream.count is None else min(count, stream.count), dtype=np.int64)
    nominal = stream.offset + indices * stream.period
    jitter = np.rint(rng.uniform(-0.5, 0.5, len(indices)) * stream.jitter).astype(np.int64)
    exists = rng.random(len(indices)) < stream.probability
    arrivals = np.maximum(nominal + jitter, 0)
    parents = np.full(len(indices), -1, np.int64)
    if before is not None:
        # Where in the stream before is the frame with the same number, if it is there at all?
        places = np.searchsorted(before.indices, indices)
        known = np.minimum(places, max(0, len(before.indices) - 1))
        exists &= (before.indices[known] == indices) if len(before.indices) else False
        parents = known
        arrivals = np.maximum(arrivals, before.arrivals[known]) if len(before.indices) else arrivals
    zeros = np.zeros(int(exists.sum()), np.int64)
    due = nominal + stream.deadline
    return _Drawn(arrivals[exists], indices[exists], due[exists], parents[exists], zeros, zeros)


def _requests(stream: Llm, setting: Setting, before: _Drawn | None, rng: np.random.Generator) -> _Drawn:
    if before is not None:
        parents = np.flatnonzero(rng.random(len(before.arrivals)) < stream.probability).astype(np.int64)
        arrivals = before.arrivals[parents]
    else:
        arrivals = _times(stream.arrivals, setting.duration, rng)
        arrivals = arrivals[rng.random(len(arrivals)) < stream.probability]
        parents = np.full(len(arrivals), -1, np.int64)
    prompts = _lengths(stream.prompt, len(arrivals), rng)
    outputs = _lengths(stream.output, len(arrivals), rng)
    most = int((prompts + outputs).max(initial=0)) * stream.kv_nbytes
    if (free := setting.free_nbytes) is not None and most > free:
        raise ValueError(
            f"setting {setting.name!r}: a request of stream {stream.name!r} needs a cache of {most:,} bytes and the "
            f"weights leave {free:,}: shorten prompts or outputs, or use smaller models"
        )
    return _Drawn(arrivals, np.arange(len(arrivals)), arrivals + stream.ttft, parents, prompts, outputs)


def _times(arrivals: Arrivals, duration: int, rng: np.random.Generator) -> Ints:
    """Times of requests within the run."""
    if arrivals.process == "times":
        times = np.array(sorted(arrivals.times), np.int64)
    elif arrivals.process == "periodic":
        times = np.arange(arrivals.offset, duration, arrivals.period, dtype=np.int64)
    else:
        times = np.array([arrivals.offset], np.int64)[:0]
        last = arrivals.offset
        while last < duration:
            some = max(16, (duration - last) // arrivals.period)
            gaps = np.maximum(1, np.rint(rng.exponential(arrivals.period, some))).astype(np.int64)
            times = np.concatenate([times, last + np.cumsum(gaps)])
            last = int(times[-1])
    return times[times < duration]


def _lengths(lengths: Lengths, count: int, rng: np.random.Generator) -> Ints:
    if lengths.median is None:
        return rng.integers(lengths.low, lengths.high + 1, count)
    drawn: NDArray[np.float64] = np.rint(lengths.median * np.exp(lengths.sigma * rng.standard_normal(count)))
    return np.clip(drawn, lengths.low, lengths.high).astype(np.int64)
