"""Keys and values rounded to codes of 2, 4 or 8 bits and packed, and read again: the arithmetic of simulated caches.

    tensor   dtype            shape                                meaning
    codes    uint8            (B, H, T, D)                         one code of `bits` bits per number, 0 .. 2^bits - 1
    packed   uint8            (B, H, T, D * bits / 8)              byte j of w holds channels j, j + w, j + 2w, ...,
                                                                   the first of them in its lowest bits
    scales   float16 *        (B, H, T, D / group, 1)  token       shapes that spread over `grouped` numbers
    zeros                     (B, H, T / group, 1, D)  channel
                              (B, H, T / group, 1, 1)  block
                              (B, 1, 1, 1, 1)          tensor

    * given scales: float32, (1, H, 1, 1, D) per channel, (1, 1, 1, 1, 1) per tensor, and no zeros

    value = (code - zero) * scale        zero = 2^(bits-1) where there are none
    value = code * scale + zero          where the zero is a group's minimum

All in float32, one rounding per operation, so that any other implementation of these lines finds the same bits. A scale
is never below 1/2048 of its group's largest value: so far float16 counts zero points exactly, and finer steps than the
16 bits that keys come in would hold nothing. Channels lie planes apart, not side by side, because planes are unpacked
by operations on whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlkit.recover.kvformat import KVFormat

KEPT = torch.float16  # scales, zeros and means
LEAST, MOST = 2.0**-24, 65504.0  # float16's smallest and largest
EXACT = 2048  # up to here float16 holds every integer

REDUCED = {"token": (4,), "channel": (3,), "block": (3, 4), "tensor": (1, 2, 3, 4)}


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Scales and zeros of some tokens, as above; `zeros` None where the format is symmetric."""

    scales: torch.Tensor
    zeros: torch.Tensor | None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What there is of both."""
        return (self.scales,) if self.zeros is None else (self.scales, self.zeros)


def grouped(x: torch.Tensor, form: KVFormat) -> torch.Tensor:
    """Numbers (B, H, T, D) as a view of five dimensions over which the format's scales spread."""
    if form.granularity == "token":
        return x.view(*x.shape[:3], x.shape[3] // form.group, form.group)  # (B, H, T, D / group, group)
    if form.granularity in ("channel", "block") and not form.static:
        return x.view(*x.shape[:2], x.shape[2] // form.group, form.group, x.shape[3])  # (B, H, T / group, group, D)
    return x.unsqueeze(2)  # (B, H, 1, T, D)


def grid_of(x: torch.Tensor, form: KVFormat) -> Grid:
    """The scales and zeros that numbers (B, H, T, D) want; T is a multiple of `form.tokens_at_once`."""
    dims = REDUCED[form.granularity]
    parts = grouped(x.float(), form)
    return grid_between(parts.amin(dims, keepdim=True), parts.amax(dims, keepdim=True), form)


def grid_between(low: torch.Tensor, high: torch.Tensor, form: KVFormat) -> Grid:
    """Scales and zeros of groups with these least and largest values, float32."""
    largest = torch.maximum(low.abs(), high.abs())
    if form.symmetric:
        return Grid(_scale(largest / _half_range(form), LEAST), None)
    scale = _scale(torch.maximum((high - low) / _levels(form), largest / EXACT), LEAST)
    if form.minimum:
        return Grid(scale, low.clamp(-MOST, MOST).to(KEPT))
    return Grid(scale, torch.round(-low / scale.float()).to(KEPT))


def codes_of(x: torch.Tensor, grid: Grid, form: KVFormat) -> torch.Tensor:
    """Codes (B, H, T, D) of numbers, still float32 and unbounded: beyond 0 .. 2^bits - 1 the grid does not reach."""
    parts, scales = grouped(x.float(), form), grid.scales.float()
    if grid.zeros is None:
        steps = torch.round(parts / scales) + _middle(form)
    elif form.minimum:
        steps = torch.round((parts - grid.zeros.float()) / scales)
    else:
        steps = torch.round(parts / scales + grid.zeros.float())
    return steps.reshape(x.shape)


def bounded(steps: torch.Tensor, form: KVFormat) -> torch.Tensor:
    """Codes as uint8, those beyond the grid at its ends."""
    return steps.clamp_(0, _levels(form)).to(torch.uint8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (..., D) uint8 to bytes (..., D * bits / 8)."""
    if bits == 8:
        return codes
    planes = codes.chunk(8 // bits, dim=-1)
    packed = planes[0].clone()
    for number, plane in enumerate(planes[1:], 1):
        packed |= plane << (number * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Write the codes of bytes (..., D * bits / 8) into `out` (..., D), of any type of numbers."""
    width, last = packed.shape[-1], 8 // bits - 1
    for number in range(last + 1):
        plane = packed >> (number * bits) if number else packed
        if number < last:
            plane = plane & ((1 << bits) - 1)
        out[..., number * width : (number + 1) * width] = plane
    return out


def read(packed: torch.Tensor, grid: Grid, form: KVFormat, out: torch.Tensor) -> torch.Tensor:
    """Write what bytes (B, H, T, D * bits / 8) stand for into `out` (B, H, T, D), float32 or a view of it."""
    parts = grouped(unpack(packed, form.bits, out), form)
    if grid.zeros is None:
        parts.sub_(_middle(form)).mul_(grid.scales.float())
    elif form.minimum:
        parts.mul_(grid.scales.float()).add_(grid.zeros.float())
    else:
        parts.sub_(grid.zeros.float()).mul_(grid.scales.float())
    return out


def given(scales: torch.Tensor, heads: int) -> Grid:
    """The grid of scales that hold for every token: (H * D,) per channel, H heads one after the other, or (1,)."""
    return Grid(scales.float().view(1, 1 if scales.numel() == 1 else heads, 1, 1, -1), None)


def ends(grid: Grid, form: KVFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest number that a grid reaches."""
    scales = grid.scales.float()
    if grid.zeros is None:
        return -_middle(form) * scales, _half_range(form) * scales
    if form.minimum:
        return grid.zeros.float(), grid.zeros.float() + _levels(form) * scales
    return -grid.zeros.float() * scales, (_levels(form) - grid.zeros.float()) * scales


def _scale(wanted: torch.Tensor, least: float) -> torch.Tensor:
    return wanted.clamp(least, MOST).to(KEPT)


def _levels(form: KVFormat) -> int:
    """The largest code."""
    return (1 << form.bits) - 1


def _middle(form: KVFormat) -> int:
    """The code of 0 in a symmetric format."""
    return 1 << (form.bits - 1)


def _half_range(form: KVFormat) -> int:
    """The most steps up from 0 in a symmetric format."""
    return _middle(form) - 1
