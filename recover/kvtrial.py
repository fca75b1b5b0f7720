"""Simulated caches tried outside of a model: what they give back, what they weigh, how long attention takes over them.

Numpy in and numpy out, for rooms that have no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicLayer

from rlkit.recover.kvformat import KVScheme
from rlkit.recover.kvlayer import QuantizedLayer

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Keys and values (H, T, D) as a layer's cache gives them back, how many tokens of each are codes, its bytes."""

    keys: Floats
    values: Floats
    coded: tuple[int, int]
    nbytes: int


def kept(scheme: KVScheme, keys: Floats, values: Floats, chunk: int) -> Kept:
    """What a cache keeps of keys and values (H, T, D) that come in chunks. Raises ValueError for a static scheme."""
    if scheme.static:
        raise ValueError(f"kv {scheme.name} needs scales chosen beforehand; name a scheme that finds its own")
    layer = QuantizedLayer(scheme)
    for start in range(0, keys.shape[1], chunk):
        layer.put(*(torch.from_numpy(part[None, :, start : start + chunk]) for part in (keys, values)))
    found = [side.read(torch.float32)[0].numpy() for side in layer.sides]
    return Kept(found[0], found[1], (layer.sides[0].coded, layer.sides[1].coded), layer.nbytes)


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of a model: layers, query heads, KV heads, their size."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@torch.no_grad()
def attention_rounds(
    schemes: Sequence[KVScheme | None], shape: Shape, tokens: int, rounds: int
) -> Iterator[list[float]]:
    """Yield, for every round, seconds of each scheme to attend from one new token to `tokens` in all layers.

    A round takes the schemes in turn. Timed is what a decode step does with a cache: the new keys and values go in, all
    are read, and fused attention runs over them in float32. None is transformers' own cache, which keeps float32. Keys
    and values are random: times do not depend on them.
    """
    rng = torch.Generator().manual_seed(0)
    size = (1, shape.kv_heads, tokens, shape.head_dim)
    caches = []
    for scheme in schemes:
        layers = [DynamicLayer() if scheme is None else QuantizedLayer(scheme) for _ in range(shape.layers)]
        for layer in layers:
            layer.update(torch.randn(size, generator=rng), torch.randn(size, generator=rng))
        caches.append(layers)
    query = torch.randn(1, shape.heads, 1, shape.head_dim, generator=rng)
    new = torch.randn(1, shape.kv_heads, 1, shape.head_dim, generator=rng)
    for number in range(rounds + 1):
        seconds = [_attend(layers, query, new) for layers in caches]
        if number:  # the first touches everything for the first time
            yield seconds


def _attend(layers: Sequence[QuantizedLayer | DynamicLayer], query: torch.Tensor, new: torch.Tensor) -> float:
    start = time.perf_counter()
    for layer in layers:
        keys, values = layer.update(new, new)
        torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    return time.perf_counter() - start
