"""What reading a prompt into a simulated cache takes: bytes of the cache, and of the activations at their peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlkit.recover.kvcache import QuantizedCache, prefill
from rlkit.recover.kvformat import HALF, KVScheme


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of the cache's tensors, and the most that tensors of a pass took, counted at two bytes a number."""

    cache_nbytes: int
    activations_nbytes: int


def footprint(model: Any, scheme: KVScheme, ids: Sequence[int], chunk: int | None) -> Footprint:
    """Read ids in chunks (None: at once) into an empty cache. Raises ValueError as QuantizedCache does.

    A model that computes in float32 makes activations of twice the size; what counts is a device that keeps 16 bit, as
    weights and cache do.
    """
    cache = QuantizedCache(scheme, model.config)
    given = torch.tensor([list(ids)], device=model.device)
    peak = prefill(model, given, cache, chunk, watch=True).activation_nbytes
    assert peak is not None  # it was watched
    return Footprint(cache.nbytes, peak * HALF // model.dtype.itemsize)
