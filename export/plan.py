"""What each tensor of a model becomes on a target, before anything is converted: bits, block, bytes, kernel, and why.

Whatever no kernel takes would be dequantized whole at every call, tens to hundreds of times slower, without a word from
the runtime; so the plan says which kernel runs each matrix (export.targets), and `export.lint` holds the written file
to the same table. Two changes of form lose nothing and are made where a kernel asks for them: codes in wider fields,
and groups split into smaller ones with the same scale and zero point.

Bytes are those of the exported files: packed codes, whole blocks + scales + packed zero points; scales, norms and
tables in the type of the target's activations.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlkit.export.inventory import EMBEDDING, Adapter, Inventory, Packed, expected_inventory, read_checkpoint
from rlkit.export.targets import EXACT, LEVELS, TARGETS, Kernel, Target, target_named
from rlkit.recover import cores, packing
from rlkit.recover.contents import KINDS, kind_of
from rlkit.recover.recipe import Recipe
from rlkit.recover.source import ModelShape

__all__ = ["EXACT", "TARGETS", "Kernel", "Plan", "Target", "TensorPlan", "plan_inventory", "target_named"]

ADAPTER_FORMS = ("branch", "files", "merged")
_FLOAT_OPS = {"embedding": "Gather", "norm": "layer norm"}
_TABLE = EMBEDDING.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What one tensor becomes; bits are 32 or 16 and group is None where it stays float."""

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
    """A model on a target, tensor by tensor."""

    target: Target
    accuracy_level: int
    tensors: tuple[TensorPlan, ...]
    adapters: str = "branch"

    @property
    def nbytes(self) -> int:
        """Predicted bytes of all tensors of the exported files."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def exact(self) -> bool:
        """Whether it is for checks: at a level that some matrices have no kernel for."""
        return self.accuracy_level == EXACT != self.target.level

    def by_kind(self) -> dict[str, int]:
        """Predicted bytes per kind of tensor."""
        total: dict[str, int] = {}
        for tensor in self.tensors:
            total[tensor.kind] = total.get(tensor.kind, 0) + tensor.nbytes
        return total

    def summary(self) -> list[dict[str, Any]]:
        """One row per kind and form: those fields of TensorPlan, how many tensors, their bytes, all reasons."""
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for tensor in sorted(self.tensors, key=lambda one: KINDS.index(one.kind)):
            form = {name: getattr(tensor, name) for name in _FORM}
            row = rows.setdefault(tuple(form.values()), {**form, "tensors": 0, "nbytes": 0, "reasons": []})
            row["tensors"] += 1
            row["nbytes"] += tensor.nbytes
            row["reasons"] += [tensor.reason] if tensor.reason and tensor.reason not in row["reasons"] else []
        return list(rows.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for manifests."""
        where = {name: getattr(self.target, name) for name in ("device", "provider", "dtype")}
        return {
            "target": self.target.name,
            **where,
            "accuracy_level": self.accuracy_level,
            "adapters": self.adapters,
            "nbytes": self.nbytes,
            "notes": list(self.target.notes),
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote, unknown keys ignored; ValueError if it is none."""
        known = [field.name for field in fields(TensorPlan)]
        try:
            tensors = tuple(TensorPlan(**{key: one[key] for key in known if key in one}) for one in value["tensors"])
            target = target_named(value["target"], dtype=value.get("dtype"))
            return Plan(target, value["accuracy_level"], tensors, value.get("adapters", "branch"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no plan ({error} is missing or wrong); export the model again") from error


_FORM = ("kind", "bits", "group", "zero_points", "accuracy_level", "kernel")


def plan_checkpoint(checkpoint: Path, *, target: Target | str = "cpu", accuracy_level: int | None = None) -> Plan:
    """Plan the export of a checkpoint folder; ValueError if a tensor cannot be expressed on the target."""
    return plan_inventory(read_checkpoint(checkpoint), target=target, accuracy_level=accuracy_level)


def plan_recipe(
    shape: ModelShape,
    recipe: Recipe,
    *,
    target: Target | str = "cpu",
    accuracy_level: int | None = None,
    adapters: str = "branch",
) -> Plan:
    """The plan that a checkpoint made of such a model with `recipe` will have."""
    inventory = expected_inventory(shape, recipe)
    return plan_inventory(inventory, target=target, accuracy_level=accuracy_level, adapters=adapters)


def plan_inventory(
    inventory: Inventory,
    *,
    target: Target | str = "cpu",
    accuracy_level: int | None = None,
    adapters: str = "branch",
) -> Plan:
    """Plan what is already read, at the target's own accuracy level unless told otherwise.

    `adapters`: branch (in the graph, 8-bit blocks), files (.onnx_adapter, float) or merged (gone). Raises ValueError
    naming the first tensor that the target cannot run, and the remedy.
    """
    where = target_named(target) if isinstance(target, str) else target
    level = where.level if accuracy_level is None else accuracy_level
    if level not in LEVELS:
        raise ValueError(f"accuracy_level = {level} does not exist; use 4 (int8 activations) or 0 (exact)")
    if adapters not in ADAPTER_FORMS:
        raise ValueError(f"adapters = {adapters!r} is no form of adapters; use {', '.join(ADAPTER_FORMS)}")
    empty = Plan(where, level, (), adapters)
    planned = [_packed_plan(matrix, empty, inventory) for matrix in inventory.packed.values()]
    if adapters != "merged":
        planned += [_adapter_plan(adapter, empty) for adapter in inventory.adapters.values()]
    planned += [_float_plan(name, shape, where, inventory) for name, shape in _float_tensors(inventory, where).items()]
    planned.append(_rotary_plan(inventory.shape, where))
    return replace(empty, tensors=tuple(sorted(planned, key=lambda tensor: tensor.name)))


def default_threads() -> int:
    """The cores that this process may use; see `recover.cores`."""
    return cores.default_threads()


def uses_float_branch(rank: int, k: int) -> bool:
    """Whether an adapter must stay float: 8-bit blocks need both its sizes to be multiples of 32."""
    return packing.snap_block(rank) is None or packing.snap_block(k) is None


def _packed_plan(matrix: Packed, plan: Plan, inventory: Inventory) -> TensorPlan:
    target, level = plan.target, plan.accuracy_level
    if matrix.module == _TABLE:
        return _table_plan(matrix, target)
    bits = target.stored_bits(matrix.bits)
    kernel, group = _fitting(matrix, bits, plan)
    if kernel is None and not plan.exact:
        found = f"{matrix.bits} bits in groups of {matrix.group} at accuracy_level {level}"
        sizes = "" if matrix.k % matrix.group == 0 else f" for {matrix.k} inputs"
        raise ValueError(f"{matrix.module}: {found}{sizes} have no kernel; {target.remedy(bits)}")
    zero_points = matrix.zero_points or bits != matrix.bits or "implied_zeros" not in target.supports
    return TensorPlan(
        matrix.module,
        kind_of(matrix.module),
        bits,
        group,
        zero_points,
        level,
        _packed_nbytes(matrix, bits, group, zero_points, target),
        kernel.name if kernel else "dequantize, then float",
        "; ".join(_reasons(matrix, bits, group, kernel, plan, inventory)),
    )


def _fitting(matrix: Packed, bits: int, plan: Plan) -> tuple[Kernel | None, int]:
    """The kernel for a matrix and the largest blocks, its groups or parts of them, that the kernel takes."""
    for group in (matrix.group, *(part for part in (128, 64, 32, 16) if part < matrix.group)):
        kernel = plan.target.kernel(bits, group, plan.accuracy_level, matrix.k, matrix.n)
        if kernel is not None and matrix.group % group == 0:
            return kernel, group
    return None, matrix.group


def _packed_nbytes(matrix: Packed, bits: int, group: int, zero_points: bool, target: Target) -> int:
    groups = -(-matrix.k // group)
    zeros = -(-groups * bits // 8) if zero_points else 0
    floats = target.float_nbytes * (groups + matrix.offsets * -(-matrix.k // matrix.group))
    return matrix.n * (groups * group * bits // 8 + floats + zeros)


def _reasons(
    matrix: Packed, bits: int, group: int, kernel: Kernel | None, plan: Plan, inventory: Inventory
) -> list[str]:
    reasons = [f"it takes {kernel.asks}" if kernel else "exact check: dequantized at every call"]
    name = plan.target.name
    if bits != matrix.bits:
        reasons.append(f"{matrix.bits} bits in {bits}-bit fields, lossless: {name} has no {matrix.bits}-bit kernel")
    if group != matrix.group:
        reasons.append(
            f"groups of {matrix.group} in blocks of {group}, lossless: none for {matrix.group}, K {matrix.k}"
        )
    if matrix.offsets:
        reasons.append("float offsets as a branch on the sums of groups: the file's own numbers")
    if matrix.module == "lm_head" and inventory.shares_embedding:
        shared = plan.target.shares_embedding
        how = "shared: the embedding reads its rows (GatherBlockQuantized)"
        reasons.append(how if shared else f"not shared: {name} has no GatherBlockQuantized")
    return reasons


def _table_plan(matrix: Packed, target: Target) -> TensorPlan:
    """A quantized embedding that is no lm_head: looked up packed where the target can, else a float table."""
    if target.shares_embedding:
        nbytes = _packed_nbytes(matrix, matrix.bits, matrix.group, matrix.zero_points, target)
        form = (matrix.bits, matrix.group, matrix.zero_points)
        return TensorPlan(_TABLE, "embedding", *form, None, nbytes, "GatherBlockQuantized", "rows are looked up")
    why = f"a float table: {target.name} has no GatherBlockQuantized"
    size = target.float_nbytes
    return TensorPlan(_TABLE, "embedding", 8 * size, None, False, None, size * matrix.n * matrix.k, "Gather", why)


def _adapter_plan(adapter: Adapter, plan: Plan) -> TensorPlan:
    target, level = plan.target, plan.accuracy_level
    size, width = adapter.rank * (adapter.k + adapter.n), target.float_nbytes
    name = f"{adapter.module}.lora"
    if plan.adapters == "files":
        why = f"rank {adapter.rank}, an input of the graph, in adapters/*.onnx_adapter"
        return TensorPlan(name, "adapter", 8 * width, None, False, None, width * size, "float MatMul", why)
    if uses_float_branch(adapter.rank, adapter.k):
        _refuse_float(name, target)
        why = f"rank {adapter.rank} or input {adapter.k} is no multiple of 32, so there are no 8-bit blocks"
        return TensorPlan(name, "adapter", 8 * width, None, False, None, width * size, "float MatMul", why)
    block_a, block_b = packing.snap_block(adapter.k) or 0, packing.snap_block(adapter.rank) or 0
    scales = adapter.rank * adapter.k // block_a + adapter.n * adapter.rank // block_b
    kernel = target.kernel(8, block_b, level, adapter.rank, adapter.n)
    if kernel is None and not plan.exact:
        found = f"{name} as a branch of 8-bit blocks at accuracy_level {level} has no kernel"
        other = "merge it into float weights (--adapters merged), or keep it apart (--adapters files)"
        raise ValueError(f"{found}; {target.remedy(8)}; or {other}")
    label = kernel.name if kernel else "dequantize, then float"
    why = f"rank {adapter.rank}, A in blocks of {block_a}, B of {block_b}"
    return TensorPlan(name, "adapter", 8, block_b, False, level, size + width * scales, label, why)


def _float_tensors(inventory: Inventory, target: Target) -> dict[str, tuple[int, ...]]:
    """The float tensors of the exported file: without a table that is shared, with a tied lm_head's own copy."""
    shape = inventory.shape
    shared = inventory.shares_embedding and target.shares_embedding
    found = {name: size for name, size in inventory.floats.items() if not name.endswith("inv_freq")}
    if shared:  # the float table of a checkpoint is for other readers
        found.pop(EMBEDDING, None)
    elif _TABLE not in inventory.packed:
        found.setdefault(EMBEDDING, (shape.vocab, shape.hidden))
    if "lm_head" not in inventory.packed:
        found.setdefault("lm_head.weight", (shape.vocab, shape.hidden))
    return found


def _float_plan(name: str, shape: tuple[int, ...], target: Target, inventory: Inventory) -> TensorPlan:
    kind, module, width = kind_of(name), name.removesuffix(".weight"), target.float_nbytes
    linear = module != name and len(shape) == 2 and kind in {"attention", "gate_up", "down", "lm_head"}
    if linear:
        _refuse_float(module, target)
    op = "float MatMul" if linear else _FLOAT_OPS.get(kind, "float")
    reason = "left float, so every weight is read whole" if linear else ""
    if name == EMBEDDING:
        reason = "rows are looked up"
        if inventory.shares_embedding:
            reason += f"; a table of its own: {target.name} has no GatherBlockQuantized"
    return TensorPlan(module, kind, 8 * width, None, False, None, width * math.prod(shape), op, reason)


def _refuse_float(name: str, target: Target) -> None:
    if target.ops is not None and "MatMul" not in target.ops:
        why = f"{name} is a float matrix, and {target.name} multiplies packed weights of {target.widths[0]} bits only"
        raise ValueError(f"{why}; give it {target.widths[0]} bits in the recipe")


def _rotary_plan(shape: ModelShape, target: Target) -> TensorPlan:
    width = target.float_nbytes
    nbytes = width * shape.max_context * shape.head_dim  # cos and sin, half a head each
    op = "GroupQueryAttention" if "rotary" in target.supports else "RotaryEmbedding"
    return TensorPlan("rotary tables", "other", 8 * width, None, False, None, nbytes, op)
