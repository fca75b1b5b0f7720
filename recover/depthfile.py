"""A depth network on disk: `network.json` says what it is and how it was made, `model.safetensors` holds its values.

    network.json   schema_version, kind (mono or stereo), shape (its channels), scale (mono: metres at both ends of its
                   range), size (height and width it was trained at), made (free facts: steps, seeds, what it came from)

`read` needs no torch; `load` builds the network.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlkit.recover.atomic import fresh_folder, write_json
from rlkit.recover.depthsample import LogScale
from rlkit.recover.source import read_json

if TYPE_CHECKING:
    from torch import nn

SCHEMA_VERSION = 1
DESCRIPTION, VALUES = "network.json", "model.safetensors"


class Kind(StrEnum):
    """What a network reads: one image, or a rectified pair."""

    MONO = "mono"
    STEREO = "stereo"


@dataclass(frozen=True, slots=True)
class Description:
    """What a network is; `shape` are the fields of its DepthShape or AnyShape, `scale` is None for stereo."""

    kind: Kind
    shape: dict[str, Any]
    size: tuple[int, int]
    scale: LogScale | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.kind is Kind.MONO) != (self.scale is not None):
            raise ValueError(f"a {self.kind} network has the scale {self.scale}; only mono networks have one")
        if len(self.size) != 2 or any(type(side) is not int or side < 1 for side in self.size):
            raise ValueError(f"size {self.size} is none of an image; give height and width in pixels")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        scale = asdict(self.scale) if self.scale else None
        fields = {"kind": str(self.kind), "shape": self.shape, "size": list(self.size), "scale": scale}
        return {"schema_version": SCHEMA_VERSION, **fields, "made": self.made}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Inverse of to_json; ValueError naming what is wrong."""
        if fields.get("schema_version") != SCHEMA_VERSION:
            version = fields.get("schema_version")
            raise ValueError(
                f"schema_version {version} is not {SCHEMA_VERSION}; make the network with this rlkit again"
            )
        try:
            scale = None if fields["scale"] is None else LogScale(**fields["scale"])
            return cls(Kind(fields["kind"]), dict(fields["shape"]), tuple(fields["size"]), scale, dict(fields["made"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"it describes no depth network ({error!r})") from error


def read(folder: Path) -> Description:
    """The description of a network's folder; ValueError or FileNotFoundError in one line if it is none."""
    if not (folder / DESCRIPTION).is_file():
        full = folder / "networks" / "full"  # of a work folder
        remedy = f"give one of its networks, such as {full}" if full.is_dir() else "see rlkit depth train"
        raise FileNotFoundError(f"{folder} has no {DESCRIPTION}, so it is no depth network; {remedy}")
    try:
        return Description.from_json(read_json(folder / DESCRIPTION))
    except ValueError as error:
        raise ValueError(f"{folder / DESCRIPTION}: {error}") from error


def build(description: Description, seed: int = 0) -> nn.Module:
    """The network of a description, with new values drawn from the seed. ValueError for a shape that is none."""
    import torch

    from rlkit.recover.anynet import AnyNet, AnyShape
    from rlkit.recover.depthnets import DepthNet, DepthShape

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if description.kind is Kind.MONO:
            return DepthNet(DepthShape.from_json(description.shape))
        return AnyNet(AnyShape.from_json(description.shape))


def load(folder: Path) -> tuple[nn.Module, Description]:
    """The network, for inference, and its description; ValueError if values are damaged or of another network."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = read(folder)
    try:
        network = build(description)
    except ValueError as error:
        raise ValueError(f"{folder / DESCRIPTION}: {error}") from error
    try:
        network.load_state_dict(load_file(folder / VALUES))
    except (SafetensorError, OSError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / VALUES} does not hold this network ({line}); make it again") from error
    if not all(math.isfinite(float(value.double().sum())) for value in network.state_dict().values()):
        raise ValueError(f"{folder / VALUES} holds NaN or infinite values; make it again")
    return network.eval(), description


def save(folder: Path, network: nn.Module, description: Description, *, force: bool = False) -> None:
    """Write a network's folder, complete or not at all; FileExistsError if it is there and not `force`."""
    from safetensors.torch import save_file

    with fresh_folder(folder, force=force) as work:
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, work / VALUES)
        write_json(work / DESCRIPTION, description.to_json())
