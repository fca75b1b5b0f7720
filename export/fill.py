"""The builder's graph gets its matrices: float MatMul and Gather nodes without data become what the plan says.

    MatMul(x, weight)                  -> MatMulNBits(x, qweight, scales, qzeros)           packed
                                       -> MatMul(x, weight (K, N))                          float
    Gather(table, ids)                 -> GatherBlockQuantized(lm_head's rows, ids, ...)    tied, where the target can
                                       -> Gather(table, ids)                                float

Nothing is read here: constants are LazyTensors, which ask the store when the file is written (write.py), one by one.
A node of the graph may be several matrices of the store (q, k and v as one) or rows of one (where the model fuses
what the graph keeps apart); rows of packed matrices are cut and stacked exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rlkit.export.graph import constant, module_of
from rlkit.export.inventory import EMBEDDING, Inventory
from rlkit.export.matrix import Matrix, stack
from rlkit.export.plan import Plan
from rlkit.export.store import Store

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
HEAD = "lm_head"
DOMAIN = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix of the store, or some of its rows."""

    module: str
    rows: tuple[int, int] | None = None


def fill(model: ir.Model, store: Store, plan: Plan) -> None:
    """Give every matrix of the graph its data, lazily; ValueError names one that the store does not have."""
    inventory, head, memory = store.inventory, None, _Memory()
    for node in list(model.graph):
        if node.op_type == "MatMul" and _constant_of(node, 1) is not None:
            parts = parts_of(inventory, module_of(node.name or ""))
            if not parts:
                continue  # small and real: a router, say
            if all(part.module in inventory.packed for part in parts):
                made = _pack(model, node, _Loader(store, plan, parts, memory), plan)
                head = made if parts[0].module == HEAD else head
            else:
                _fill_float(node, 1, store, parts, transposed=True)
    embedding = next((node for node in model.graph if _name_of(_constant_of(node, 0)) == EMBEDDING), None)
    if embedding is not None:
        _fill_embedding(model, embedding, head, store, plan)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise ValueError(f"{inventory.name} lacks {module_of(name)}; its shards or its config.json are damaged")


def _fill_embedding(model: ir.Model, node: ir.Node, head: ir.Node | None, store: Store, plan: Plan) -> None:
    """Packed rows where the target looks them up, its own or lm_head's; else a float table."""
    inventory, own = store.inventory, Part(EMBEDDING.removesuffix(".weight"))
    if plan.target.shares_embedding and own.module in inventory.packed:
        loader = _Loader(store, plan, [own], _Memory())
        _look_up(model, node, _constants(model, loader, own.module, plan), loader.bits, loader.group)
    elif plan.target.shares_embedding and inventory.shares_embedding and head is not None:
        bits, block = (head.attributes[name].as_int() for name in ("bits", "block_size"))
        _look_up(model, node, list(head.inputs[1:]), bits, block)
    else:
        _fill_float(node, 0, store, [own], transposed=False)


def parts_of(inventory: Inventory, module: str) -> list[Part]:
    """Which matrices of the store a node of the graph holds; none for what is not the store's."""
    if _has(inventory, module):
        return [Part(module)]
    base, _, last = module.rpartition(".")
    if last == "qkv_proj" and all(_has(inventory, f"{base}.{name}") for name in QKV):
        return [Part(f"{base}.{name}") for name in QKV]
    if last == "gate_up_proj" and all(_has(inventory, f"{base}.{name}") for name in GATE_UP):
        return [Part(f"{base}.{name}") for name in GATE_UP]
    shape = inventory.shape
    if last in QKV and _has(inventory, f"{base}.qkv_proj"):
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        start, stop = {"q_proj": (0, query), "k_proj": (query, query + key), "v_proj": (query + key, query + 2 * key)}[
            last
        ]
        return [Part(f"{base}.qkv_proj", (start, stop))]
    if last in GATE_UP and _has(inventory, f"{base}.gate_up_proj"):
        start = GATE_UP.index(last) * shape.ffn
        return [Part(f"{base}.gate_up_proj", (start, start + shape.ffn))]
    return []


def _has(inventory: Inventory, module: str) -> bool:
    return module in inventory.packed or inventory.weight_name(module) in inventory.floats


@dataclass(slots=True)
class _Memory:
    """The packed matrix that was read last: its three constants are written one after the other."""

    owner: object = None
    matrix: Matrix | None = None


class _Loader:
    """The packed matrix of one node, as the plan wants it stored."""

    def __init__(self, store: Store, plan: Plan, parts: list[Part], memory: _Memory) -> None:
        self._store, self.parts, self._memory = store, parts, memory
        packed = [store.inventory.packed[part.module] for part in parts]
        planned = {tensor.name: tensor for tensor in plan.tensors}
        first = planned[parts[0].module]
        self.bits, self.level = first.bits, first.accuracy_level or 0
        self.group, self.k = first.group or packed[0].group, packed[0].k
        rows = [part.rows or (0, matrix.n) for part, matrix in zip(parts, packed, strict=True)]
        self.n = sum(stop - start for start, stop in rows)
        self.zero_points = any(planned[part.module].zero_points for part in parts)

    def matrix(self) -> Matrix:
        """Stacked, in the target's width."""
        if self._memory.owner is not self or self._memory.matrix is None:
            self._memory.matrix = None  # before the next one is read
            whole = stack([self._one(part) for part in self.parts])
            self._memory.matrix = whole.widened(self.bits).split(self.group)
            self._memory.owner = self
        return self._memory.matrix

    def _one(self, part: Part) -> Matrix:
        matrix = self._store.matrix(part.module)
        return matrix.rows(*part.rows) if part.rows else matrix


def _pack(model: ir.Model, node: ir.Node, loader: _Loader, plan: Plan) -> ir.Node:
    """Put a MatMulNBits in the place of a MatMul."""
    name = (node.name or "").removesuffix("/MatMul") + "/MatMulNBits"
    constants = _constants(model, loader, name.strip("/").replace("/", "."), plan)
    sizes = {"K": loader.k, "N": loader.n, "bits": loader.bits, "block_size": loader.group}
    attributes = {**sizes, "accuracy_level": loader.level}
    made = ir.node("MatMulNBits", [node.inputs[0], *constants], attributes, domain=DOMAIN, name=name)
    _replace(model, node, [made])
    return made


def _constants(model: ir.Model, loader: _Loader, prefix: str, plan: Plan) -> list[ir.Value | None]:
    """Codes, scales and, where they are needed, zero points of a packed matrix."""
    kind, byte = _dtype(plan), ir.DataType.UINT8
    groups, width = -(-loader.k // loader.group), loader.group * loader.bits // 8
    parts: dict[str, tuple[Callable[[], NDArray[Any]], ir.DataType, tuple[int, ...]]] = {
        "qweight": (lambda: loader.matrix().blocks(), byte, (loader.n, groups, width)),
        "scales": (lambda: loader.matrix().scales, kind, (loader.n, groups)),
        "qzeros": (lambda: loader.matrix().qzeros, byte, (loader.n, -(-groups * loader.bits // 8))),
    }
    if not loader.zero_points:
        del parts["qzeros"]
    return [_lazy(model, f"{prefix}.{part}", *what) for part, what in parts.items()]


def _look_up(model: ir.Model, node: ir.Node, constants: list[ir.Value | None], bits: int, block: int) -> None:
    """Let the embedding read packed rows: codes (n, groups, width), scales and zero points as MatMulNBits has them."""
    qweight, *rest = constants
    assert qweight is not None and qweight.shape is not None
    n, groups, width = qweight.shape.numpy()
    name = "/model/embed_tokens"
    shape = constant(model, np.array([n, groups * width], np.int64), "model.embed_tokens.sizes")
    flat = ir.node("Reshape", [qweight, shape], name=f"{name}/Reshape")
    flat.outputs[0].name = f"{name}/Reshape/output_0"
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    inputs = [flat.outputs[0], node.inputs[1], *rest]
    made = ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, name=f"{name}/GatherBlockQuantized")
    _replace(model, node, [flat, made])


def _replace(model: ir.Model, node: ir.Node, made: list[ir.Node]) -> None:
    """Put nodes in the place of one, whose result the last of them has, and drop constants nothing reads any more."""
    (output,), (result,) = node.outputs, made[-1].outputs
    result.shape, result.type = output.shape, output.type
    constants = [value for value in node.inputs if value is not None and value.is_initializer()]
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, [output], [result])
    for value in constants:
        if not value.uses():
            model.graph.initializers.pop(value.name or "", None)


def _fill_float(node: ir.Node, index: int, store: Store, parts: list[Part], *, transposed: bool) -> None:
    """Lazy data for a float matrix: rows of the store's tensors, stacked, (K, N) where the node wants it so."""
    value = node.inputs[index]
    assert value is not None and value.shape is not None
    kind = value.type.dtype if isinstance(value.type, ir.TensorType) else ir.DataType.FLOAT

    def load() -> NDArray[Any]:
        found = [_float_part(store, part) for part in parts]
        whole = found[0] if len(found) == 1 else np.concatenate(found)
        return np.ascontiguousarray(whole.T if transposed else whole)

    shape = value.shape.numpy()
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(load().astype(kind.numpy()), name=value.name),
        dtype=kind,
        shape=ir.Shape(shape),
        name=value.name,
    )


def _float_part(store: Store, part: Part) -> NDArray[np.float32]:
    inventory = store.inventory
    name = inventory.weight_name(part.module)
    weight = store.tensor(name) if name in inventory.floats else store.matrix(part.module).dequantize()
    return weight[part.rows[0] : part.rows[1]] if part.rows else weight


def _lazy(model: ir.Model, name: str, load: Callable[[], NDArray[Any]], kind: Any, shape: tuple[int, ...]) -> ir.Value:
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(load().astype(kind.numpy(), copy=False)), name=name),
        dtype=kind,
        shape=ir.Shape(shape),
        name=name,
    )
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _dtype(plan: Plan) -> ir.DataType:
    return ir.DataType.FLOAT16 if plan.target.dtype == "float16" else ir.DataType.FLOAT


def _constant_of(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value if value is not None and value.is_initializer() else None


def _name_of(value: ir.Value | None) -> str | None:
    return None if value is None else value.name
