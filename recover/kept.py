"""Layer states on disk while the other layers are worked on: one safetensors file per layer, codes packed.

What an interrupted run finished is found again, and the whole model's codes never lie in memory unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlkit.recover import packing
from rlkit.recover.correct import LowRank
from rlkit.recover.layers import LayerState
from rlkit.recover.quantize import Quantized
from rlkit.recover.recipe import Scheme

QUANTIZED, CORRECTED, LOW_RANK, OTHER = "quantized", "corrected", "low_rank", "other"


class Kept:
    """A folder of layer states; `schemes` says how each module's codes are packed."""

    def __init__(self, folder: Path, schemes: Mapping[str, Scheme]) -> None:
        self._folder, self._schemes = folder, schemes
        self._file_of: dict[str, Path] = {}  # "quantized.model.layers.0.mlp.gate_proj" -> file
        self._others: dict[str, Path] = {}
        self.logs: dict[str, dict[str, Any]] = {}  # by prefix, in the order of the layers
        for file in sorted(folder.glob("layer-*.safetensors")):
            self._enter(file)

    def _enter(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                keys, metadata = list(opened.keys()), opened.metadata()
        except SafetensorError:
            file.unlink()  # cut off while being written: that layer is done again
            return
        for key in keys:
            kind, _, rest = key.partition(".")
            if kind == OTHER:
                self._others[rest] = file
            else:
                self._file_of[f"{kind}.{rest.rpartition('.')[0]}"] = file
        self.logs[metadata["prefix"]] = json.loads(metadata["log"])

    def save(self, state: LayerState) -> None:
        """Keep a layer."""
        tensors: dict[str, torch.Tensor] = {}
        for name, quantized in state.quantized.items():
            tensors |= _packed(f"{QUANTIZED}.{name}", quantized)
        for name, (quantized, low_rank) in state.corrected.items():
            tensors |= _packed(f"{CORRECTED}.{name}", quantized)
            tensors |= {f"{LOW_RANK}.{name}.a": low_rank.a, f"{LOW_RANK}.{name}.b": low_rank.b}
        tensors |= {f"{OTHER}.{name}": tensor for name, tensor in state.others.items()}
        file = self._folder / f"layer-{len(self.logs):04d}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"prefix": state.prefix, "log": json.dumps(state.log)}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file.with_suffix(".part"), metadata)
        file.with_suffix(".part").replace(file)
        self._enter(file)

    def quantized(self, name: str) -> Quantized:
        """A module as the quantizer left it."""
        return self._load(QUANTIZED, name)

    def corrected(self, name: str) -> tuple[Quantized, LowRank] | None:
        """A module's codes and low-rank correction, if it has one."""
        file = self._file_of.get(f"{LOW_RANK}.{name}")
        if file is None:
            return None
        with safe_open(file, framework="pt") as opened:
            low_rank = LowRank(*(opened.get_tensor(f"{LOW_RANK}.{name}.{part}") for part in "ab"))
        return self._load(CORRECTED, name), low_rank

    def others(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Norms and biases that equalization changed."""
        for name, file in self._others.items():
            with safe_open(file, framework="pt") as opened:
                yield name, opened.get_tensor(f"{OTHER}.{name}")

    def _load(self, kind: str, name: str) -> Quantized:
        scheme = self._schemes[name]
        with safe_open(self._file_of[f"{kind}.{name}"], framework="pt") as opened:
            codes, scales, zeros = (opened.get_tensor(f"{kind}.{name}.{part}") for part in ("codes", "scales", "zeros"))
        bits, groups = scheme.bits, scales.shape[1]
        unpacked = _unpacked(codes, bits, codes.shape[1] * 8 // bits)
        return Quantized(unpacked, scales, _unpacked(zeros, bits, groups), scheme)


class States(Mapping[str, Quantized]):
    """Quantized matrices by module name, read when asked for: corrected ones for `adapted`, with trained scales."""

    def __init__(
        self, kept: Kept, names: list[str], adapted: Collection[str], scales: Mapping[str, torch.Tensor]
    ) -> None:
        self._kept, self._names, self._adapted, self._scales = kept, names, adapted, scales

    def __getitem__(self, name: str) -> Quantized:
        if name not in self._names:
            raise KeyError(name)
        pair = self._kept.corrected(name) if name in self._adapted else None
        found = pair[0] if pair else self._kept.quantized(name)
        scales = self._scales.get(name, found.scales)
        return Quantized(found.codes, scales, found.zeros, found.scheme)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _packed(name: str, quantized: Quantized) -> dict[str, torch.Tensor]:
    bits = quantized.scheme.bits
    return {
        f"{name}.codes": torch.from_numpy(packing.pack(quantized.codes.numpy(), bits)),
        f"{name}.scales": quantized.scales,
        f"{name}.zeros": torch.from_numpy(packing.pack(quantized.zeros.numpy(), bits)),
    }


def _unpacked(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(packing.unpack(packed.numpy(), bits, count)))
