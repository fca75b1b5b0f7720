"""One layer of a simulated KV cache: codes of what is old enough, 16 bit for the rest, and both read as one tensor.

Keys and values are a `Side` each. What enters is rounded to 16 bit (not where given scales round it at once, as the
runtime does), waits until it has left the window and its group of tokens is complete, and becomes codes. Attention
reads what is kept, of the newest tokens too. A tensor of all tokens exists only while a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from rlkit.recover import kvpack
from rlkit.recover.kvformat import KVFormat, KVScheme
from rlkit.recover.kvpack import Grid

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values (B, H, T, D)."""


class Side:
    """The keys, or the values, of a layer."""

    def __init__(
        self, form: KVFormat, window: int = 0, smooth: bool = False, scales: torch.Tensor | None = None
    ) -> None:
        self._form, self._window, self._smooth, self._given = form, window, smooth, scales
        self.held: torch.Tensor | None = None  # (B, H, tokens behind the codes, D), 16 bit
        self.packed: torch.Tensor | None = None  # (B, H, coded, D * bits / 8)
        self.grid: Grid | None = None
        self.mean: torch.Tensor | None = None  # (B, H, 1, D): what smoothing takes from keys

    @property
    def coded(self) -> int:
        """Tokens that are codes."""
        return 0 if self.packed is None else self.packed.shape[2]

    @property
    def length(self) -> int:
        """All tokens."""
        return self.coded + (0 if self.held is None else self.held.shape[2])

    def tensors(self) -> list[torch.Tensor]:
        """All that is kept."""
        found = [tensor for tensor in (self.held, self.packed, self.mean) if tensor is not None]
        return found + list(self.grid.tensors() if self.grid else ())

    def add(self, new: torch.Tensor) -> None:
        """Take in new tokens (B, H, T, D), and round what is due."""
        if self.held is None:
            self._begin(new)
        assert self.held is not None
        if not (self._form.static and self._window == 0):
            new = new.to(self.held.dtype)
        waiting = torch.cat([self.held, new], 2) if self.held.shape[2] else new
        due = self._form.settled(self.coded + waiting.shape[2], self._window, self._smooth) - self.coded
        if due > 0:
            self._settle(waiting[:, :, :due])
            waiting = waiting[:, :, due:]
        self.held = _owned(waiting.to(self.held.dtype))

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """Keys or values of all tokens (B, H, T, D), as what is kept stands for them."""
        assert self.held is not None
        if self.packed is None:
            return self.held.to(dtype)
        batch, heads, _, width = self.held.shape
        out = self.held.new_empty((batch, heads, self.length, width), dtype=dtype)
        old = out[:, :, : self.coded]
        if dtype == torch.float32:
            self._read_codes(old)
        else:
            old.copy_(self._read_codes(torch.empty_like(old, dtype=torch.float32)))
        if self.held.shape[2]:
            out[:, :, self.coded :] = self.held
        return out

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Codes of a group that is cut go back to 16 bit."""
        if self.held is None or length >= self.length:
            return
        if length <= 0:
            self.clear()
            return
        if length >= self.coded:
            self.held = _owned(self.held[:, :, : length - self.coded])
            return
        assert self.packed is not None and self.grid is not None
        kept = length // self._form.tokens_at_once * self._form.tokens_at_once
        self.held = _owned(self.read(torch.float32)[:, :, kept:length].to(self.held.dtype))
        self.packed = _owned(self.packed[:, :, :kept])
        if self._form.granularity != "tensor" and not self._form.static:
            groups = kept // self._form.tokens_at_once
            self.grid = _mapped(self.grid, lambda tensor: _owned(tensor[:, :, :groups]))

    def clear(self) -> None:
        """Forget everything."""
        self.held = self.packed = self.grid = self.mean = None

    def rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put other rows of the batch in place of these; `pick` takes them from a tensor (B, ...)."""
        self.held, self.packed, self.mean = (
            None if tensor is None else pick(tensor) for tensor in (self.held, self.packed, self.mean)
        )
        if self.grid is not None and not self._form.static:
            self.grid = _mapped(self.grid, pick)

    def _begin(self, new: torch.Tensor) -> None:
        kept = new.dtype if new.dtype in (torch.float16, torch.bfloat16) else torch.float16
        self.held = new.new_empty((*new.shape[:2], 0, new.shape[3]), dtype=kept)
        if self._given is not None:
            heads, width = new.shape[1], new.shape[3]
            wanted = heads * width if self._form.granularity == "channel" else 1
            if self._given.numel() != wanted:
                why = f"{self._given.numel()} scales were given for {heads} KV heads of {width} channels"
                raise ValueError(f"{why}, not {wanted}; give those of this model")
            self.grid = kvpack.given(self._given.to(new.device), heads)

    def _settle(self, new: torch.Tensor) -> None:
        """Round tokens (B, H, T, D), as many as are due, and put their codes behind those there are."""
        form, new = self._form, new.float().contiguous()
        if self._smooth:
            if self.mean is None:
                self.mean = new.double().mean(2, keepdim=True).to(kvpack.KEPT)  # in any order of sums the same
            new = new - self.mean.float()
        if form.static:
            assert self.grid is not None
            grid = self.grid
        elif form.granularity == "tensor" and self.grid is not None:
            grid = self._widened(new)
        else:
            grid = kvpack.grid_of(new, form)
        packed = kvpack.pack(kvpack.bounded(kvpack.codes_of(new, grid, form), form), form.bits)
        self.packed = packed if self.packed is None else torch.cat([self.packed, packed], 2)
        self.grid = (
            grid if self.grid is None or grid is self.grid or form.granularity == "tensor" else _joined(self.grid, grid)
        )

    def _widened(self, new: torch.Tensor) -> Grid:
        """The grid of a whole layer that reaches what new tokens (B, H, T, D) hold; the codes there are follow it."""
        assert self.grid is not None and self.packed is not None
        form = self._form
        steps = kvpack.codes_of(new, self.grid, form)
        if bool(((steps >= 0) & (steps < 1 << form.bits)).all()):
            return self.grid
        dims = kvpack.REDUCED[form.granularity]
        parts, (low, high) = kvpack.grouped(new, form), kvpack.ends(self.grid, form)
        low = torch.minimum(low, parts.amin(dims, keepdim=True))
        wide = kvpack.grid_between(low, torch.maximum(high, parts.amax(dims, keepdim=True)), form)
        shape = (*self.packed.shape[:3], new.shape[3])
        old = kvpack.read(self.packed, self.grid, form, new.new_empty(shape))
        self.packed = kvpack.pack(kvpack.bounded(kvpack.codes_of(old, wide, form), form), form.bits)
        return wide

    def _read_codes(self, out: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None and self.grid is not None
        kvpack.read(self.packed, self.grid, self._form, out)
        return out if self.mean is None else out.add_(self.mean.float())


class QuantizedLayer(CacheLayerMixin):
    """A layer's keys and values, as transformers asks for them. `recorded` holds what entered, if that is wanted."""

    is_sliding = False
    is_croppable = False  # a group that is cut and completed again has other codes

    def __init__(self, scheme: KVScheme, scales: Pair | None = None, *, record: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = scales or (None, None)
        self.scheme = scheme
        self.sides = (
            Side(scheme.keys, scheme.window, scheme.smooth, keys),
            Side(scheme.values, scheme.window, scales=values),
        )
        self._record = record
        self.recorded: list[Pair] = []
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Check that the scheme fits heads of this size; ValueError if not."""
        self.scheme.refuse(key_states.shape[-1], value_states.shape[-1])
        self.is_initialized = True

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in new tokens without reading any."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self._record:
            self.recorded.append((keys, values))
        for side, new in zip(self.sides, (keys, values), strict=True):
            side.add(new)

    def recorded_pair(self) -> Pair:
        """What entered, keys and values of all tokens, if it was recorded; ValueError if not."""
        if not self.recorded:
            raise ValueError("this cache did not record what entered; make it with record=True")
        keys, values = (torch.cat(part, 2) for part in zip(*self.recorded, strict=True))
        self.recorded = [(keys, values)]
        return keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Pair:
        """Take in new tokens; what the layer holds of all, in the type that they came in."""
        self.put(key_states, value_states)
        keys, values = (side.read(key_states.dtype) for side in self.sides)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens that the layer holds."""
        return self.sides[0].length

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a mask covers, and the first of them. A sliding window is the mask's own."""
        return self.get_seq_length() + query_length, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        return sum(tensor.untyped_storage().nbytes() for side in self.sides for tensor in side.tensors())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, -n as transformers counts them."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a negative number, not {tokens_to_remove}")
        for side in self.sides:
            side.crop(max(0, side.length + tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        for side in self.sides:
            side.clear()
        self.recorded, self.is_initialized = [], False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put rows of the batch in another order."""
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self._rows(lambda tensor: tensor[indices])

    def _rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for side in self.sides:
            side.rows(pick)


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with memory of its own size: a part of another would keep all of that alive."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def _mapped(grid: Grid, change: Callable[[torch.Tensor], torch.Tensor]) -> Grid:
    return Grid(change(grid.scales), None if grid.zeros is None else change(grid.zeros))


def _joined(first: Grid, second: Grid) -> Grid:
    """The grid of tokens behind one another."""
    zeros = None if first.zeros is None or second.zeros is None else torch.cat([first.zeros, second.zeros], 2)
    return Grid(torch.cat([first.scales, second.scales], 2), zeros)
