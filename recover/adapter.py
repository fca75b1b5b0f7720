"""Frozen matrices with what is trained beside them: low-rank factors, group scales, or both.

    y = W x + scaling B (A x)            A (r, K), B (N, r)
    W = (codes - zeros) * initial * exp(t)     codes (N, K); zeros, initial, t (N, K/group)

Scales are trained as `log_scales` t, which starts at zero: a step of Adam then changes every scale by about its
learning rate as a fraction, however small the scale is, and no step can turn its sign. `state` gives float16 values.

The folder format is PEFT's own (adapter_config.json, adapter_model.safetensors), values on the 8-bit block grid that
the exported graph stores (packing.snap8), so that nothing is lost between here and there.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlkit.recover.correct import LowRank
from rlkit.recover.packing import snap8, snap_block
from rlkit.recover.quantize import Quantized, snap_scales

PREFIX = "base_model.model."


class AdaptedLinear(torch.nn.Module):
    """A frozen matrix (N, K), computed with in `dtype`, and what is trained beside it, in float32.

    The layer starts as W + B A whatever `scaling` is: with scaling s the factors trained are A and B / s, so that a
    step in them counts s times as much. LoRA's alpha / rank goes here. With `train_scales` the matrix is rebuilt from
    its levels at every call, instead of being kept in `dtype`.
    """

    def __init__(
        self,
        linear: torch.nn.Linear,
        quantized: Quantized | torch.Tensor,
        low_rank: LowRank | None,
        dtype: torch.dtype,
        train_scales: bool = False,
        scaling: float = 1.0,
    ) -> None:
        super().__init__()
        self.bias = linear.bias
        self.dtype, self.scaling = dtype, scaling
        self._base: Quantized | torch.Tensor | None = quantized
        if not scaling > 0:
            raise ValueError(f"scaling = {scaling} would silence the adapter; use alpha / rank, above 0")
        if train_scales:
            if isinstance(quantized, torch.Tensor):
                raise ValueError("a float matrix has no scales to train; quantize it first or train its adapter only")
            self._base, self._zeros, self._scheme = None, quantized.zeros, quantized.scheme
            self.register_buffer("levels", _levels(quantized))  # (N, G, group), which the codes come back from
            self.register_buffer("initial", quantized.scales.detach().float().clone())  # (N, G)
            self.log_scales = torch.nn.Parameter(torch.zeros_like(self.initial))
        else:
            weight = quantized if isinstance(quantized, torch.Tensor) else quantized.dequantize()
            self.weight = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        if low_rank is not None:
            self.lora_a = torch.nn.Parameter(low_rank.a.detach().float().clone())
            self.lora_b = torch.nn.Parameter(low_rank.b.detach().float() / scaling)

    levels: torch.Tensor
    initial: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # once, for the matrix and the branch
            dtype = x.dtype
        else:
            dtype = self.dtype
        if "log_scales" in self._parameters:
            scales = self.initial * self.log_scales.exp()
            base: torch.Tensor = _ScaledLinear.apply(x.to(dtype), self.levels, scales)  # type: ignore[no-untyped-call]
            base = base if self.bias is None else base + self.bias.to(dtype)
        else:
            base = torch.nn.functional.linear(x.to(self.dtype), self.weight, self.bias)
        if "lora_a" not in self._parameters:
            return base
        narrow = torch.nn.functional.linear(x, self.lora_a)  # (..., r)
        return base + torch.nn.functional.linear(narrow * self.scaling, self.lora_b)

    def low_rank(self) -> LowRank | None:
        """The factors as they stand, detached, `scaling` folded into B; None without an adapter."""
        if "lora_a" not in self._parameters:
            return None
        return LowRank(self.lora_a.detach().cpu().clone(), self.lora_b.detach().cpu() * self.scaling)

    def state(self) -> Quantized | torch.Tensor:
        """The matrix the layer was given, a Quantized one with its scales as trained, on float16 values."""
        if self._base is not None:
            return self._base
        scales = snap_scales((self.initial * self.log_scales.detach().exp()).cpu())
        levels = self.levels.cpu().short() + self._zeros.short()[..., None]
        return Quantized(levels.to(torch.uint8).flatten(1), scales, self._zeros, self._scheme)


def _levels(quantized: Quantized) -> torch.Tensor:
    """Codes minus zero points (N, G, group): int8, or int16 where 8 bits and a zero point at an end need it."""
    n = len(quantized.codes)
    codes = quantized.codes.view(n, -1, quantized.scheme.group).short()
    levels = codes - quantized.zeros.short()[..., None]
    narrow = levels.to(torch.int8)
    return narrow if torch.equal(narrow.short(), levels) else levels


class _ScaledLinear(torch.autograd.Function):
    """x (..., K), levels (N, G, group), scales (N, G) -> x W^T in the dtype of x, W = levels * scales.

    W is rebuilt for the backward pass, so that only x, levels and scales live in between; with the output's gradient
    g: dL/dx = g W and dL/dscales = sum over the group of (g^T x) * levels.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, levels, scales)
        return torch.nn.functional.linear(x, _matrix(levels, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        x, levels, scales = ctx.saved_tensors
        outer = gradients[0].to(x.dtype)
        to_x = to_scales = None
        if ctx.needs_input_grad[0]:
            to_x = outer @ _matrix(levels, scales, x.dtype)
        if ctx.needs_input_grad[2]:
            weights = outer.flatten(0, -2).T @ x.flatten(0, -2)  # (N, K)
            to_scales = weights.view(levels.shape).float().mul_(levels).sum(-1)
        return to_x, None, to_scales


def _matrix(levels: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K): rounded once, from the float32 product."""
    return levels.float().mul_(scales[..., None]).to(dtype).flatten(1)


def random_low_rank(n: int, k: int, rank: int, seed: int) -> LowRank:
    """LoRA's start for a matrix (n, k): A uniform in +-1/sqrt(k) (Kaiming with a = sqrt(5), as in PEFT), B zero.

    To train it as published, with alpha and a branch of alpha / rank B A, hand AdaptedLinear scaling = alpha / rank.
    """
    if rank < 1:
        raise ValueError(f"rank = {rank} leaves no adapter; use at least 1")
    a = torch.empty(rank, k)
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    return LowRank(a, torch.zeros(n, rank))


def snap(low_rank: LowRank) -> LowRank:
    """The factors on the 8-bit grid; a factor whose rows are no multiple of 32 stays float, as export keeps it."""
    return LowRank(_snapped(low_rank.a), _snapped(low_rank.b))


def _snapped(matrix: torch.Tensor) -> torch.Tensor:
    if snap_block(matrix.shape[1]) is None:
        return matrix
    return torch.from_numpy(snap8(matrix.contiguous().numpy()).dequantized)


def save_adapters(folder: Path, low_ranks: dict[str, LowRank], base: str) -> None:
    """Write the factors by module name as a PEFT LoRA adapter with alpha = r, so that its scaling is 1."""
    from peft import LoraConfig

    ranks = {name: low_rank.a.shape[0] for name, low_rank in low_ranks.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    other: dict[str, Any] = {name: rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=other,
        alpha_pattern=other,
        target_modules=sorted(low_ranks),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, low_rank in low_ranks.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = low_rank.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = low_rank.b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")


def load_adapters(folder: Path) -> dict[str, LowRank]:
    """Read what `save_adapters` wrote, by module name; empty without the folder."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return {}
    tensors = load_file(file)
    names = [name[len(PREFIX) : -len(".lora_A.weight")] for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name: LowRank(tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"])
        for name in names
    }
