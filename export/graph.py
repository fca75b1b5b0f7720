"""The builder's graph: its names, what is added to it, what it stores.

The builder calls the node of module `model.layers.3.self_attn.o_proj` `/model/layers.3/attn/o_proj/MatMulNBits` and its
constants `model.layers.3.attn.o_proj.MatMulNBits.{qweight,scales,qzeros}`.

An adapted linear becomes

    x --+-- MatMulNBits (the quantized weight) ------------------------+-- Add -- y
        +-- MatMulNBits (A, 8-bit) -- MatMulNBits (B * scale, 8-bit) --+

in symmetric 8-bit blocks without zero points, on the grid of `packing.snap8`; as two float MatMuls where the sizes do
not split into blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rlkit.export.inventory import Adapter
from rlkit.export.plan import uses_float_branch
from rlkit.recover import packing
from rlkit.recover.contents import kind_of

PACKED_OPS = ("MatMulNBits", "GatherBlockQuantized")
LINEAR_OPS = ("MatMulNBits", "MatMul")
_BUILDER_NAMES = ((".attn.", ".self_attn."), (".final_norm_layernorm", ".final_norm"))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One module's constants in the written file: `weights` counts its numbers, `nbytes` is all they take."""

    name: str
    kind: str
    bits: int
    group: int | None
    weights: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def load(path: Path) -> ir.Model:
    """The graph of an ONNX file; its external tensors are mapped, not read."""
    return ir.load(path)


def matmul_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every MatMulNBits node."""
    return (node for node in model.graph if node.op_type == "MatMulNBits")


def module_of(name: str) -> str:
    """The checkpoint's module name of a node or constant of the builder."""
    dotted = name.strip("/").replace("/", ".")
    for theirs, ours in _BUILDER_NAMES:
        dotted = dotted.replace(theirs, ours)
    for tail in (".MatMulNBits", ".MatMul"):
        dotted = dotted.split(f"{tail}.", 1)[0].removesuffix(tail)
    return dotted


def add_adapter(
    model: ir.Model, adapter: Adapter, a: NDArray[np.float32], b: NDArray[np.float32], *, level: int
) -> None:
    """Add the branch scale * B (A x) to the node of `adapter.module`; ValueError if the graph has no such node.

    Float constants are of the type of the node's result.
    """
    named = (node for node in model.graph if module_of(node.name or "") == adapter.module)
    node = next((node for node in named if node.op_type in LINEAR_OPS), None)
    if node is None:
        raise ValueError(f"the graph has no node for {adapter.module}, so its adapter has no place")
    base = (node.name or "").rsplit("/", 1)[0]
    x = node.inputs[0]
    if uses_float_branch(adapter.rank, adapter.k):
        down = _float_product(model, x, a, f"{base}/lora_A")
        up = _float_product(model, down, b * np.float32(adapter.scale), f"{base}/lora_B")
    else:
        down = _snapped_product(model, x, packing.snap8(a), 1.0, f"{base}/lora_A", level)
        up = _snapped_product(model, down, packing.snap8(b), adapter.scale, f"{base}/lora_B", level)
    add_to(model, node.outputs[0], up, f"{base}/lora_Add")


def stored_tensors(model: ir.Model) -> list[StoredTensor]:
    """Every module's constants by real bytes, in the order of the graph's constants."""
    formats: dict[str, tuple[int, int | None]] = {}
    for node in model.graph:
        if node.op_type in PACKED_OPS:
            format_ = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
            formats |= {value.name or "": format_ for value in node.inputs if value is not None}
    found: dict[str, StoredTensor] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.INT64:  # shapes and positions are no weights
            continue
        module = module_of(name).removesuffix(".weight")
        bits, group = formats.get(name, (tensor.dtype.bitwidth, None))
        is_side_part = name in formats and not name.endswith(".qweight")
        weights = 0 if is_side_part else 8 * tensor.nbytes // bits
        before = found.get(module, StoredTensor(module, kind_of(module), bits, group, 0, 0))
        found[module] = replace(before, weights=before.weights + weights, nbytes=before.nbytes + tensor.nbytes)
    return list(found.values())


def _snapped_product(
    model: ir.Model, x: ir.Value | None, snapped: packing.Snapped, scale: float, name: str, level: int
) -> ir.Value:
    n, k = snapped.codes.shape
    constants = {
        "qweight": packing.blocks(snapped.codes, 8, snapped.block),
        # the codes stay as they are, whatever alpha / r is
        "scales": (snapped.scales * np.float32(scale)).astype(_kind(x).numpy()),
    }
    prefix = f"{name.strip('/').replace('/', '.')}.MatMulNBits"
    inputs = [x, *(constant(model, value, f"{prefix}.{part}") for part, value in constants.items())]
    attributes = {"K": k, "N": n, "bits": 8, "block_size": snapped.block, "accuracy_level": level}
    return _append(
        model,
        ir.node(
            "MatMulNBits", inputs, attributes, domain="com.microsoft", outputs=[_like(x, n, f"{name}/MatMulNBits")]
        ),
    )


def _float_product(model: ir.Model, x: ir.Value | None, weight: NDArray[np.float32], name: str) -> ir.Value:
    transposed = np.ascontiguousarray(weight.T.astype(_kind(x).numpy()))
    value = constant(model, transposed, f"{name.strip('/').replace('/', '.')}.MatMul.weight")
    return _append(model, ir.node("MatMul", [x, value], outputs=[_like(x, weight.shape[0], f"{name}/MatMul")]))


def _append(model: ir.Model, node: ir.Node) -> ir.Value:
    (output,) = node.outputs
    node.name = (output.name or "").removesuffix("/output_0")
    model.graph.append(node)
    return output


def add_to(model: ir.Model, y: ir.Value, branch: ir.Value, name: str) -> None:
    """Add the result of a branch to `y`, for every reader of `y` and as a result of the graph."""
    total = ir.Value(name=f"{name}/output_0", type=y.type, shape=y.shape)
    readers = [(use.node, use.idx) for use in y.uses()]
    is_output = y.is_graph_output()
    model.graph.append(ir.node("Add", [y, branch], name=name, outputs=[total]))
    for node, index in readers:
        node.replace_input_with(index, total)
    if is_output:
        model.graph.outputs[list(model.graph.outputs).index(y)] = total
        total.name, y.name = y.name, f"{name}/input_0"


def constant(model: ir.Model, array: NDArray[Any], name: str) -> ir.Value:
    """Register an array as a constant of the graph."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _like(x: ir.Value | None, size: int, name: str) -> ir.Value:
    shape = None if x is None or x.shape is None else ir.Shape([*x.shape[:-1], size])
    return ir.Value(name=f"{name}/output_0", type=ir.TensorType(_kind(x)), shape=shape)


def _kind(x: ir.Value | None) -> ir.DataType:
    """The type of a value; float32 where the graph does not say."""
    return x.type.dtype if x is not None and isinstance(x.type, ir.TensorType) else ir.DataType.FLOAT
