"""How far a training run came, in one safetensors file that is complete or absent, for the run that takes over.

parameter:NAME, mean:NAME, square:NAME   a trained parameter and Adam's two running averages, float32
kept:NAME                                the parameter as it was in the state to go back to
metadata                                 the run's fingerprint, and the numbers of `Standing` as JSON
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

Parameters = Mapping[str, torch.nn.Parameter]
AVERAGES = {"mean": "exp_avg", "square": "exp_avg_sq"}  # ours -> torch.optim.AdamW's


@dataclass(slots=True)
class Standing:
    """Steps taken, the least held-out divergence so far and looks since, and the parameters to go back to."""

    step: int = 0
    best: float = math.inf
    stale: int = 0
    finished: bool = False
    kept_step: int = 0
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def keep(self, parameters: Parameters) -> None:
        """Make these the parameters to go back to."""
        self.kept_step = self.step
        self.kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def judge(self, divergence: float, parameters: Parameters) -> None:
        """Keep the parameters if their held-out divergence is the least so far."""
        if divergence < self.best:
            self.best, self.stale = divergence, 0
            self.keep(parameters)
        else:
            self.stale += 1


def fingerprint(description: Any, *arrays: NDArray[Any]) -> str:
    """A key of a run: the same for the same JSON value and arrays."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class StateFile:
    """Where a run of the given key keeps its state, and whose parameters and averages go there."""

    path: Path
    key: str
    parameters: Parameters
    optimizer: torch.optim.Optimizer

    def save(self, standing: Standing) -> None:
        """Write the state beside its place and rename it."""
        tensors = {f"kept:{name}": value for name, value in standing.kept.items()}
        for name, parameter in self.parameters.items():
            tensors[f"parameter:{name}"] = parameter.detach()
            state = self.optimizer.state[parameter]
            tensors |= {f"{ours}:{name}": state[theirs] for ours, theirs in AVERAGES.items()}
        numbers = {name: getattr(standing, name) for name in ("step", "best", "stale", "finished", "kept_step")}
        part = self.path.with_name(self.path.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, part, metadata={"key": self.key, "standing": json.dumps(numbers)})
        os.replace(part, self.path)

    def restore(self) -> Standing:
        """Put parameters and averages back and say how far the run came; a fresh standing if there is no file.

        Raises ValueError for a file of another run or a damaged one: neither is overwritten unasked.
        """
        if not self.path.is_file():
            return Standing()
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}); remove it to train from the start") from error
        if metadata.get("key") != self.key:
            raise ValueError(
                f"{self.path} is the state of another run (other settings, rows or parameters); remove it to train "
                "from the start, or choose another place"
            )
        standing = Standing(**json.loads(metadata["standing"]))
        self._put_back(tensors, standing)
        return standing

    @torch.no_grad()
    def _put_back(self, tensors: dict[str, torch.Tensor], standing: Standing) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter:{name}"])
            averages = {theirs: tensors[f"{ours}:{name}"].to(parameter.device) for ours, theirs in AVERAGES.items()}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(standing.step)), **averages}
            if f"kept:{name}" in tensors:
                standing.kept[name] = tensors[f"kept:{name}"].to(parameter.device)
