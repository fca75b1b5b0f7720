"""How far the training of a depth network came, in one safetensors file that is complete or absent.

value:NAME                    parameters and running statistics
mean:NAME, square:NAME        Adam's two running averages of a parameter
metadata                      the run's fingerprint, steps taken and seconds they took
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from rlkit.recover.atomic import write_bytes
from rlkit.recover.trainstate import AVERAGES, fingerprint


@dataclass(frozen=True, slots=True)
class StateFile:
    """Where a run of the given key keeps its state; `key` holds JSON values that decide its result."""

    path: Path
    key: Any

    def save(self, step: int, seconds: float, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the state after `step` steps."""
        tensors = {f"value:{name}": value for name, value in network.state_dict().items()}
        for name, parameter in network.named_parameters():
            state = optimizer.state[parameter]
            tensors |= {f"{ours}:{name}": state[theirs] for ours, theirs in AVERAGES.items()}
        stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {"key": fingerprint(self.key), "step": str(step), "seconds": repr(seconds)}
        write_bytes(self.path, save(stored, metadata))

    def restore(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Put values and averages back; the steps taken and their seconds, 0 if there is no file.

        Raises ValueError for a file of another run or a damaged one: neither is overwritten unasked.
        """
        if not self.path.is_file():
            return 0, 0.0
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}); remove it to train from the start") from error
        if metadata.get("key") != fingerprint(self.key):
            why = "is the state of another training (other settings, data or network)"
            raise ValueError(f"{self.path} {why}; remove it to train from the start, or choose another place")
        step = int(metadata["step"])
        network.load_state_dict({name: tensors[f"value:{name}"] for name in network.state_dict()})
        for name, parameter in network.named_parameters():
            averages = {theirs: tensors[f"{ours}:{name}"].to(parameter.device) for ours, theirs in AVERAGES.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **averages}
        return step, float(metadata["seconds"])
