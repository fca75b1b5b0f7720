"""Low-rank adapters over frozen quantized linears: y = W x + B (A x), A (r, K), B (N, r), scaling 1.

The folder format is PEFT's own (adapter_config.json, adapter_model.safetensors), values on the 8-bit block grid that
the exported graph stores (packing.snap8), so that nothing is lost between here and there.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlkit.recover.correct import LowRank
from rlkit.recover.packing import snap8, snap_block

PREFIX = "base_model.model."


class AdaptedLinear(torch.nn.Module):
    """A frozen matrix (N, K) in `dtype` with trainable float32 factors beside it."""

    def __init__(self, linear: torch.nn.Linear, weight: torch.Tensor, low_rank: LowRank, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        self.bias = linear.bias
        self.lora_a = torch.nn.Parameter(low_rank.a.float().clone())
        self.lora_b = torch.nn.Parameter(low_rank.b.float().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        base = torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        branch = torch.nn.functional.linear(torch.nn.functional.linear(x, self.lora_a), self.lora_b)
        return base + branch

    def low_rank(self) -> LowRank:
        """The factors as they stand, detached."""
        return LowRank(self.lora_a.detach().clone(), self.lora_b.detach().clone())


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
