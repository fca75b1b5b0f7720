"""What each tensor of a checkpoint becomes on a target, before anything is converted: bits, block, bytes, kernel.

A target is an entry of TARGETS: the kernels its provider has for packed weights. Whatever no kernel takes would be
dequantized whole at every call, tens to hundreds of times slower, without a word from the runtime; so the plan says
which kernel runs each matrix, and `export.lint` holds the written file to the same table.

Bytes are those of the exported file: packed codes + float32 scales + packed zero points; norms and tables in float32.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit.export.inventory import Adapter, Inventory, Packed, expected_inventory, read_checkpoint
from rlkit.recover import packing
from rlkit.recover.contents import kind_of
from rlkit.recover.recipe import Recipe
from rlkit.recover.source import ModelShape

EXACT = 0  # the accuracy level that leaves activations in float32: for checks, not for speed


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled multiplication with packed weights, and what it asks of a node."""

    name: str
    bits: int
    blocks: tuple[int, ...]
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a bundle runs: the builder's execution provider and the kernels for packed weights there."""

    name: str
    provider: str
    kernels: tuple[Kernel, ...]

    def kernel(self, bits: int, block: int, level: int) -> Kernel | None:
        """The kernel that takes such a node; None: it would be dequantized at every call."""
        for kernel in self.kernels:
            if kernel.bits == bits and block in kernel.blocks and level in kernel.levels:
                return kernel
        return None

    def remedy(self, bits: int) -> str:
        """What a node of this width must look like to run fast here."""
        fitting = [kernel for kernel in self.kernels if kernel.bits == bits]
        if not fitting:
            return f"{self.name} has no kernel for {bits} bits; use {sorted({k.bits for k in self.kernels})}"
        asked = " or ".join(f"accuracy_level {_either(k.levels)} and block {_either(k.blocks)}" for k in fitting)
        return f"{self.name} runs {bits} bits fast with {asked}"


def _either(values: tuple[int, ...]) -> str:
    return "/".join(str(value) for value in values)


# Source: onnxruntime 1.31 (x64 and arm64), its kernel selection read and each row run on x64 AVX512-VNNI, 2026-11.
_ANY_BLOCK = (16, 32, 64, 128, 256)
TARGETS: dict[str, Target] = {
    "cpu": Target(
        "cpu",
        "cpu",
        (
            Kernel("2-bit x int8 activations", 2, (32, 64, 128), (4,)),
            Kernel("4-bit x int8 activations", 4, _ANY_BLOCK, (4,)),
            Kernel("4-bit x float32 activations", 4, _ANY_BLOCK, (0, 1, 2, 3)),
            Kernel("8-bit x int8 activations", 8, _ANY_BLOCK, (4,)),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What one tensor becomes; bits = 32 and group = None where it stays float."""

    name: str
    kind: str
    bits: int
    group: int | None
    zero_points: bool
    accuracy_level: int | None
    nbytes: int
    kernel: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A checkpoint on a target, tensor by tensor."""

    target: Target
    accuracy_level: int
    tensors: tuple[TensorPlan, ...]

    @property
    def nbytes(self) -> int:
        """Predicted bytes of all tensors of the exported file."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def by_kind(self) -> dict[str, int]:
        """Predicted bytes per kind of tensor."""
        total: dict[str, int] = {}
        for tensor in self.tensors:
            total[tensor.kind] = total.get(tensor.kind, 0) + tensor.nbytes
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for manifests."""
        tensors = [asdict(tensor) for tensor in self.tensors]
        head = {"target": self.target.name, "accuracy_level": self.accuracy_level, "nbytes": self.nbytes}
        return {**head, "tensors": tensors}


def target_named(name: str) -> Target:
    """The entry of TARGETS; ValueError naming the ones there are."""
    if name not in TARGETS:
        raise ValueError(f"target {name!r} is not offered yet; use {' or '.join(TARGETS)}")
    return TARGETS[name]


def plan_checkpoint(checkpoint: Path, *, target: str = "cpu", accuracy_level: int = 4) -> Plan:
    """Plan the export of a checkpoint folder; ValueError if a tensor cannot be expressed on the target."""
    return plan_inventory(read_checkpoint(checkpoint), target=target, accuracy_level=accuracy_level)


def plan_recipe(shape: ModelShape, recipe: Recipe, *, target: str = "cpu", accuracy_level: int = 4) -> Plan:
    """The plan that a checkpoint made of such a model with `recipe` will have."""
    return plan_inventory(expected_inventory(shape, recipe), target=target, accuracy_level=accuracy_level)


def plan_inventory(inventory: Inventory, *, target: str, accuracy_level: int) -> Plan:
    """Plan what is already read."""
    where = target_named(target)
    if accuracy_level not in range(5):
        raise ValueError(f"accuracy_level = {accuracy_level} does not exist; use 4 (int8 activations) or 0 (exact)")
    _check_float_linears(inventory)
    planned = [_packed_plan(matrix, where, accuracy_level, inventory) for matrix in inventory.packed.values()]
    planned += [_adapter_plan(adapter, where, accuracy_level) for adapter in inventory.adapters.values()]
    planned += [_float_plan(name, shape) for name, shape in inventory.floats.items() if not _left_out(name, inventory)]
    planned.append(_rotary_plan(inventory.shape))
    return Plan(where, accuracy_level, tuple(sorted(planned, key=lambda tensor: tensor.name)))


def default_threads() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Windows and macOS have no affinity call
        return os.cpu_count() or 1


def uses_float_branch(rank: int, k: int) -> bool:
    """Whether an adapter must stay float: 8-bit blocks need both its sizes to be multiples of 32."""
    return packing.snap_block(rank) is None or packing.snap_block(k) is None


def _packed_plan(matrix: Packed, target: Target, level: int, inventory: Inventory) -> TensorPlan:
    kernel = target.kernel(matrix.bits, matrix.group, level)
    if kernel is None and level != EXACT:
        what = (
            f"{matrix.module}: {matrix.bits} bits in groups of {matrix.group} at accuracy_level {level} have no kernel"
        )
        raise ValueError(f"{what}; {target.remedy(matrix.bits)}")
    groups = matrix.k // matrix.group
    nbytes = matrix.n * (matrix.k * matrix.bits // 8 + 4 * groups + -(-groups * matrix.bits // 8))
    reasons = []
    if matrix.module == "lm_head" and inventory.shares_embedding:
        reasons.append("shared: the embedding reads its rows (GatherBlockQuantized)")
    if kernel is None:
        reasons.append("exact check: dequantized at every call")
    return TensorPlan(
        matrix.module,
        kind_of(matrix.module),
        matrix.bits,
        matrix.group,
        True,
        level,
        nbytes,
        kernel.name if kernel else "dequantize, then float",
        "; ".join(reasons),
    )


def _adapter_plan(adapter: Adapter, target: Target, level: int) -> TensorPlan:
    size = adapter.rank * (adapter.k + adapter.n)
    name = f"{adapter.module}.lora"
    if uses_float_branch(adapter.rank, adapter.k):
        why = f"rank {adapter.rank} or input {adapter.k} is no multiple of 32, so there are no 8-bit blocks"
        return TensorPlan(name, "adapter", 32, None, False, None, 4 * size, "float MatMul", why)
    block_a, block_b = packing.snap_block(adapter.k) or 0, packing.snap_block(adapter.rank) or 0
    scales = adapter.rank * adapter.k // block_a + adapter.n * adapter.rank // block_b
    kernel = target.kernel(8, block_b, level)
    label = kernel.name if kernel else "dequantize, then float"
    why = f"rank {adapter.rank}, A in blocks of {block_a}, B of {block_b}"
    return TensorPlan(name, "adapter", 8, block_b, False, level, size + 4 * scales, label, why)


def _float_plan(name: str, shape: tuple[int, ...]) -> TensorPlan:
    kind = kind_of(name)
    module, op = name.removesuffix(".weight"), _FLOAT_OPS.get(kind, "float")
    return TensorPlan(module, kind, 32, None, False, None, 4 * math.prod(shape), op)


_FLOAT_OPS = {"embedding": "Gather", "lm_head": "float MatMul", "norm": "layer norm"}


def _rotary_plan(shape: ModelShape) -> TensorPlan:
    nbytes = 4 * shape.max_context * shape.head_dim  # cos and sin, half a head each
    return TensorPlan("rotary tables", "other", 32, None, False, None, nbytes, "GroupQueryAttention")


def _left_out(name: str, inventory: Inventory) -> bool:
    """A shared embedding's float table is for other readers: the graph reads lm_head's packed rows."""
    return name.endswith("inv_freq") or (inventory.shares_embedding and name == "model.embed_tokens.weight")


def _check_float_linears(inventory: Inventory) -> None:
    for name, shape in inventory.floats.items():
        if len(shape) == 2 and kind_of(name) in {"attention", "gate_up", "down"}:
            module = name.removesuffix(".weight")
            why = "the model builder reads a quantized layer's linears only as packed weights"
            raise ValueError(f"{inventory.name}: {module} is not quantized, but {why}; give it 8 bits in the recipe")
