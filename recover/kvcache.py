"""Simulated KV caches on torch models: what a scheme of kvformat.py costs in accuracy, and the memory it takes.

    cache = QuantizedCache(parse("k4v4:smooth"), model.config)
    first = prefill(model, ids, cache, chunk=256)              # first.logits, first.activation_nbytes
    scorer = kv_scorer(model, parse("k8v4"))                   # as torch_scorer; kv_replies, kv_logits: as those

Attention reads keys and values as the cache holds them, those of the chunk being read too, as ONNX Runtime does. So
with given scales, and per token without smoothing, a scheme gives the same whatever the chunk. Otherwise it does not:
the window is that of the chunk's end, and means and ranges are of what has come so far. With 16 bit on both sides
chunks change nothing but the order of sums (kvchunks.py).

Layers with a sliding window keep all tokens and leave the window to the model's mask: right in what they compute, more
than they need in bytes, the 16-bit baseline too. Models with other memory than keys and values are refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache

from rlkit.recover.kvformat import FLOAT, KVScheme
from rlkit.recover.kvlayer import Pair, QuantizedLayer
from rlkit.recover.kvpeak import Peak
from rlkit.recover.likelihood import Likelihood, Outcome, Part
from rlkit.recover.torchscorer import TorchReader

CHUNK = 256  # tokens of a pass over a prompt, the paper's
KNOWN = ("full_attention", "sliding_attention")  # layers whose memory is keys and values of every token
WHOLE = KVScheme("k16v16", FLOAT, FLOAT)

Scales = Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Of keys and values of each layer: (KV heads * head_dim,) per channel, (1,) per tensor; see export/kvscales.py."""

Memory = list[Pair]
"""Keys and values (1, H, T, D) of each layer as the model made them, before any rounding."""


class QuantizedCache(Cache):
    """A cache of transformers whose layers keep codes. `record` keeps what entered as well, outside `nbytes`.

    Raises ValueError for models and head sizes that it does not fit, and for a static scheme without `scales`.
    """

    def __init__(self, scheme: KVScheme, config: Any, scales: Scales | None = None, *, record: bool = False) -> None:
        config = config.get_text_config(decoder=True)
        refuse(config, scheme)
        count = int(config.num_hidden_layers)
        if scheme.static and (scales is None or len(scales) != count):
            why = f"none of {count} layers' were given" if scales is None else f"{len(scales)} were given for {count}"
            raise ValueError(f"kv {scheme.name} needs scales chosen beforehand, and {why}; see rlkit kv-calibrate")
        given = [_tensors(pair) for pair in scales] if scales is not None else [None] * count
        self._kept = [QuantizedLayer(scheme, pair, record=record) for pair in given]
        super().__init__(layers=[*self._kept])
        self.peak: Peak | None = None

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        """Take in a layer's new tokens; its keys and values of all tokens, apart from any count of activations."""
        with self.peak.aside() if self.peak is not None else contextlib.nullcontext():
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept: codes, scales, zero points, means, and what is in 16 bit."""
        return sum(layer.nbytes for layer in self._kept)

    def tensors(self) -> list[torch.Tensor]:
        """All that is kept, layer by layer."""
        return [tensor for layer in self._kept for side in layer.sides for tensor in side.tensors()]

    def memory(self) -> Memory:
        """What entered, if it was recorded."""
        return [layer.recorded_pair() for layer in self._kept]

    def restore(self, memory: Memory, chunk: int) -> None:
        """Take in tokens that a model read before, in such chunks."""
        for layer, (keys, values) in zip(self._kept, memory, strict=True):
            for start, stop in spans(keys.shape[2], chunk):
                layer.put(keys[:, :, start:stop], values[:, :, start:stop])


def refuse(config: Any, scheme: KVScheme) -> None:
    """Raise ValueError, in one line, for a model whose memory is not keys and values of its own for every token."""
    config = config.get_text_config(decoder=True)
    name = getattr(config, "model_type", "this model")
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - set(KNOWN))
    shared = getattr(config, "num_kv_shared_layers", 0) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ())
    if kinds or shared or getattr(config, "is_encoder_decoder", False):
        what = f"layers of type {', '.join(kinds)}" if kinds else "layers that read other layers' keys"
        why = f"{name} has {what}, whose memory is not keys and values of each token"
        raise ValueError(f"{why}, so KV schemes are not simulated on it; name a model with attention in every layer")
    if scheme != WHOLE and not hasattr(config, "kv_lora_rank"):  # there keys are wider than head_dim
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        scheme.refuse(int(size))


@dataclass(frozen=True, slots=True, eq=False)
class Prefilled:
    """What reading a prompt gave: logits (B, V) after its last token, and the peak of a pass if it was watched.

    `activation_nbytes` are tensors that the model makes as it computes, in the type it computes in, apart from what
    the cache holds and from keys and values read out of it: a kernel that reads codes needs no such copy.
    """

    logits: torch.Tensor
    activation_nbytes: int | None


@torch.no_grad()
def prefill(
    model: Any, ids: torch.Tensor, cache: QuantizedCache, chunk: int | None = CHUNK, *, watch: bool = False
) -> Prefilled:
    """Read ids (B, T) behind what a cache holds, `chunk` tokens a pass; None reads them at once.

    Raises ValueError for no ids, for more than the model's context holds, and for a chunk of less than a token.
    """
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(f"ids of shape {tuple(ids.shape)} are no prompt; give (rows, tokens)")
    fits(model, cache.get_seq_length() + ids.shape[1])
    peak = Peak() if watch else None
    cache.peak = peak
    logits = ids.new_empty(0)
    try:
        with peak or contextlib.nullcontext():
            for start, stop in spans(ids.shape[1], chunk):
                logits = last_logits(model, ids[:, start:stop], cache, 1)[:, 0]
    finally:
        cache.peak = None
    return Prefilled(logits, None if peak is None else peak.nbytes)


def spans(tokens: int, chunk: int | None) -> Iterator[tuple[int, int]]:
    """Beginning and end of each chunk; ValueError for a chunk that holds nothing."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk of {chunk} tokens holds nothing; use {CHUNK}")
    width = chunk or tokens
    return ((start, min(start + width, tokens)) for start in range(0, tokens, width))


def fits(model: Any, tokens: int) -> None:
    """Raise ValueError for more tokens than a model's context holds."""
    limit = _context(model)
    if tokens > limit:
        raise ValueError(f"{tokens} tokens are more than the model's context of {limit}; give {limit} or fewer")


def _context(model: Any) -> int:
    return int(model.config.get_text_config().max_position_embeddings)


def last_logits(model: Any, ids: torch.Tensor, cache: QuantizedCache, last: int) -> torch.Tensor:
    """Read ids (B, T) in one pass behind what a cache holds; logits (B, last, V) at their end."""
    partly = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **partly).logits[:, -last:]
    return logits


class KVReader:
    """Reads parts by a model under a scheme, one at a time, so that no padding enters a cache.

    A memory is what the model made before rounding: cut anywhere, it is rounded again as if nothing had followed.
    """

    def __init__(self, model: Any, scheme: KVScheme, chunk: int, context_length: int, scales: Scales | None) -> None:
        plain = TorchReader(model, context_length)
        self.context_length, self.max_ids, self.switch = context_length, plain.max_ids, plain.switch
        self._model, self._scheme, self._chunk, self._scales = model, scheme, chunk, scales
        self.cache()  # what does not fit is said before anything is read
        list(spans(1, chunk))

    def cache(self, *, record: bool = False) -> QuantizedCache:
        """An empty cache of the scheme."""
        return QuantizedCache(self._scheme, self._model.config, self._scales, record=record)

    @torch.no_grad()
    def read(self, parts: Sequence[Part]) -> Iterator[tuple[int, Outcome]]:
        """Yield (number of the part, Outcome)."""
        for number, part in enumerate(parts):
            yield number, self._read(part)

    def cut(self, past: Memory, length: int) -> Memory:
        """The memory of the first `length` tokens."""
        return [(keys[:, :, :length], values[:, :, :length]) for keys, values in past]

    def _read(self, part: Part) -> Outcome:
        cache, kept = self.cache(record=part.keep), list[NDArray[np.float32]]()
        if part.past_length:
            cache.restore(part.past, self._chunk)
        whole = self.switch is not None and part.past_length + len(part.ids) > self.switch
        for start, stop in spans(len(part.ids), None if whole else self._chunk):
            ids = torch.from_numpy(np.ascontiguousarray(part.ids[start:stop]))[None].to(self._model.device)
            wanted = part.positions[(part.positions >= start) & (part.positions < stop)] - start
            width = stop - start - int(wanted[0]) if len(wanted) else 1
            rows = torch.from_numpy(wanted).to(self._model.device) - (stop - start - width)
            kept.append(last_logits(self._model, ids, cache, width)[0, rows].float().cpu().numpy())
        return Outcome(np.concatenate(kept), cache.memory() if part.keep else None)


def kv_scorer(
    model: Any,
    scheme: KVScheme,
    chunk: int = CHUNK,
    *,
    context_length: int | None = None,
    scales: Scales | None = None,
) -> Likelihood:
    """The scorer of a model under a scheme, as `torch_scorer`. Raises ValueError as QuantizedCache does."""
    return Likelihood(KVReader(model, scheme, chunk, context_length or _context(model), scales))


def kv_replies(
    model: Any, scheme: KVScheme, chunk: int = CHUNK, *, scales: Scales | None = None
) -> Callable[[Sequence[int], int], list[int]]:
    """The likeliest reply of a model under a scheme: prompt ids and the most new tokens -> new ids, as `replies`.

    A reply ends where the model's context does; a prompt beyond it raises ValueError.
    """
    stops = model.generation_config.eos_token_id
    if stops is None:
        stops = model.config.get_text_config().eos_token_id
    ends = set(stops if isinstance(stops, list) else [stops])
    reader = KVReader(model, scheme, chunk, _context(model), scales)

    @torch.no_grad()
    def reply(ids: Sequence[int], most: int) -> list[int]:
        cache, new = reader.cache(), list[int]()
        if not most:
            return new
        whole = reader.switch is not None and len(ids) > reader.switch
        prompt = torch.tensor([list(ids)], device=model.device)
        token = int(prefill(model, prompt, cache, None if whole else chunk).logits.argmax())
        while token not in ends:
            new.append(token)
            if len(new) == most or len(ids) + len(new) > reader.context_length:
                break
            token = int(last_logits(model, torch.tensor([[token]], device=model.device), cache, 1).argmax())
        return new

    return reply


def kv_logits(
    model: Any, scheme: KVScheme, chunk: int = CHUNK, *, scales: Scales | None = None
) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """A LogitsFn under a scheme: ids (B, T) int64 -> logits (B, T, V) float32, each row from an empty cache.

    Padding on the right follows everything it could change, but for windows, groups of tokens, means and ranges: where
    those matter, give rows without.
    """
    reader = KVReader(model, scheme, chunk, _context(model), scales)

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        fits(model, ids.shape[1])
        parts = [Part(row, None, 0, np.arange(len(row)), False) for row in ids]
        return np.stack([outcome.logits for _number, outcome in reader.read(parts)])

    return logits


def kv_samples(model: Any, rows: Sequence[Sequence[int]]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Keys and values (tokens, KV heads, head_dim) of each layer over all rows: what scales are chosen on."""
    fits(model, max(map(len, rows)))
    reader = KVReader(model, WHOLE, CHUNK, _context(model), None)
    parts = [Part(np.asarray(row, np.int64), None, 0, np.array([len(row) - 1]), True) for row in rows]
    memories = [outcome.past for _number, outcome in reader.read(parts)]
    return [
        (_sample([pair[0] for pair in layer]), _sample([pair[1] for pair in layer]))
        for layer in zip(*memories, strict=True)
    ]


def _sample(rows: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    """Tokens (n, H, D) of rows (1, H, T, D)."""
    found: NDArray[np.float32] = torch.cat([row[0] for row in rows], 1).transpose(0, 1).float().cpu().numpy()
    return found


def _tensors(pair: tuple[NDArray[np.float32], NDArray[np.float32]]) -> Pair:
    keys, values = (torch.from_numpy(np.array(part, np.float32)) for part in pair)
    return keys, values
