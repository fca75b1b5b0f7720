"""Whether reading a prompt in chunks changes anything but the order of sums: the same prompt at once, and in chunks.

Matrix products and attention over other numbers of rows add in another order, so float32 differs in its last bits, and
rounding keys and values to 16 bit makes more of it: what falls on the other side of a tie differs by a whole step. In
float64 those last bits are 2^-53 of a number, and 16-bit tensors and logits are what says that nothing else differs.

Models compute parts in float32 whatever type they are in (norms, angles); `Exactly` makes those float64 as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlkit.recover.kvcache import WHOLE, QuantizedCache, fits, last_logits, spans

EVERY = 8  # logits of every so many tokens are looked at


class Exactly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which whatever would be made as float32, or turned into it, is float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, in float64 where it asks for float32."""
        asked = dict(kwargs or {})
        if asked.get("dtype") == torch.float32:
            asked["dtype"] = torch.float64
        return func(*args, **asked)


@dataclass(frozen=True, slots=True)
class Apart:
    """Chunks against the whole prompt: logits at most, nats per token, how many 16-bit numbers of the cache differ."""

    chunk: int
    logits: float
    kl: float
    differ: int
    numbers: int


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    logits: torch.Tensor  # (tokens / EVERY, V) float64
    kept: tuple[torch.Tensor, ...]


def apart(model: Any, ids: Sequence[int], chunks: Sequence[int], *, exact: bool) -> Iterator[Apart]:
    """Read ids at once, then in chunks of each size, into caches of 16 bit.

    `exact` computes in float64, for which the model must be in it (`model.double()`). Raises ValueError for a model
    that is not, fewer ids than EVERY or more than its context holds, and chunks that hold nothing.
    """
    if exact and model.dtype != torch.float64:
        raise ValueError(f"a model in {model.dtype} does not compute in float64; turn it into that first")
    fits(model, len(ids))
    if len(ids) < EVERY:
        raise ValueError(f"{len(ids)} tokens are too few to look at every {EVERY}th; give more")
    whole = _read(model, ids, None, exact)
    for chunk in chunks:
        found = _read(model, ids, chunk, exact)
        pairs = list(zip(whole.kept, found.kept, strict=True))
        yield Apart(
            chunk,
            float((whole.logits - found.logits).abs().max()),
            _kl(whole.logits, found.logits),
            sum(int((one != other).sum()) for one, other in pairs),
            sum(one.numel() for one, _other in pairs),
        )


@torch.no_grad()
def _read(model: Any, ids: Sequence[int], chunk: int | None, exact: bool) -> _Read:
    cache = QuantizedCache(WHOLE, model.config)
    given = torch.tensor([list(ids)], device=model.device)
    found = []
    with Exactly() if exact else contextlib.nullcontext():  # type: ignore[no-untyped-call]
        for start, stop in spans(len(ids), chunk):
            logits = last_logits(model, given[:, start:stop], cache, stop - start)[0]
            found.append(logits[(-start - 1) % EVERY :: EVERY].double())
    return _Read(torch.cat(found), tuple(cache.tensors()))


def _kl(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean divergence of the second from the first, in nats."""
    own, other = first.log_softmax(-1), second.log_softmax(-1)
    return max(0.0, float((own.exp() * (own - other)).sum(-1).mean()))
