"""Plain rounding of a float matrix in numpy, for those who have neither calibration text nor a torch model at hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from rlkit.recover.layers import in_blocks
from rlkit.recover.packing import Bytes, Floats
from rlkit.recover.quantize import quantize_nearest
from rlkit.recover.recipe import Scheme


def round_matrix(weight: NDArray[np.float32], scheme: Scheme) -> tuple[Bytes, Floats, Bytes]:
    """Codes (N, K), scales (N, G) and zero points (N, G) of `weight` (N, K) by range search, block by block.

    Raises ValueError if `scheme` cannot hold the matrix or it is not finite.
    """
    own = torch.from_numpy(np.require(weight, requirements=["C", "W"]))
    found = in_blocks(own, partial(quantize_nearest, scheme=scheme))
    return found.codes.numpy(), found.scales.numpy(), found.zeros.numpy()
