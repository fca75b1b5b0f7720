"""Adapters kept apart from the model: graph inputs that are empty by default, and the files that fill them.

A linear that can be adapted becomes

    x --+-- MatMulNBits or MatMul (the weight, as it was) --+-- Add -- y
        +-- MatMul (lora_A, input) -- MatMul (lora_B, input) --+

where A (k, r) and B (r, n), alpha / r folded in, are graph inputs whose default values have rank 0: without an adapter
the branch adds nothing and any runtime runs the model as ever. A file `adapters/NAME.onnx_adapter` holds the A and B of
one adapter under the inputs' names; onnxruntime and onnxruntime-genai map it and switch between files from one run to
the next, without opening the model again.

Where one matrix holds several modules (q, k, v; gate, up), it takes one A and one B for all: the A side by side, the B
in a block diagonal. That costs rank x columns zeros in B and saves the nodes of a branch for each.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rlkit.export.graph import module_of
from rlkit.export.inventory import adapter_tensor, read_adapters

Floats = NDArray[np.float32]

FOLDER = "adapters"
SUFFIX = ".onnx_adapter"
_PARTS_KEY = "rlkit.parts"  # on an A input: JSON, module -> columns of B
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = re.compile(r"none|((con|prn|aux|nul|com\d|lpt\d)(\..*)?)", re.IGNORECASE)  # our word; Windows' devices
_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """y += b (a x): a (r, k) and b (n, r), alpha / r folded into b."""

    a: Floats
    b: Floats


@dataclass(frozen=True, slots=True)
class Slot:
    """A node of the graph that takes an adapter: inputs A (k, r) and B (r, n) of numpy type `dtype`.

    `parts` are the modules whose columns the node computes, in order: module -> how many; they add up to n.
    """

    node: str
    k: int
    parts: dict[str, int]
    dtype: str

    @property
    def n(self) -> int:
        """Columns of B."""
        return sum(self.parts.values())

    @property
    def inputs(self) -> tuple[str, str]:
        """The names of A and B among the graph's inputs."""
        return f"{self.node}.lora_A.weight", f"{self.node}.lora_B.weight"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What was written: `file` relative to the bundle; `rank` the largest; `nbytes` read per token when active."""

    name: str
    file: str
    modules: int
    rank: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def wanted_modules(adapters: Mapping[str, Mapping[str, LowRank]]) -> dict[str, tuple[int, int]]:
    """(k, n) of every module that any of these adapters changes; ValueError if two disagree on one."""
    found: dict[str, tuple[int, int]] = {}
    for name, adapter in adapters.items():
        for module, low_rank in adapter.items():
            size = low_rank.a.shape[1], low_rank.b.shape[0]
            if found.setdefault(module, size) != size:
                why = f"adapter {name} has {module} as (K, N) = {size}, another adapter as {found[module]}"
                raise ValueError(f"{why}, so they are of different models; export them into bundles of their own")
    return found


def add_inputs(model: ir.Model, modules: Mapping[str, tuple[int, int]]) -> list[Slot]:
    """Give the nodes of `modules` (module -> (k, n)) a branch whose A and B are graph inputs; return their slots.

    Raises ValueError, leaving the graph as it was, for a module without a node of its sizes.
    """
    nodes = _linear_nodes(model)
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for module, size in modules.items():
        groups.setdefault(_node_for(module, nodes), {})[module] = size
    slots = [_slot(name, nodes[name], wanted) for name, wanted in groups.items()]
    there = {value.name for value in model.graph.inputs}
    for slot in slots:
        if there & {*slot.inputs}:
            raise ValueError(f"{slot.node} takes adapters already; give every module in one call")
    for slot in slots:
        _add_branch(model, nodes[slot.node], slot)
    return slots


def read_slots(model: ir.Model) -> list[Slot]:
    """The slots that `add_inputs` left in a graph, also in one read back from its file."""
    inputs = [value for value in model.graph.inputs if _PARTS_KEY in value.metadata_props]
    return [_read_slot(value) for value in inputs]


def read_peft(folder: Path) -> dict[str, LowRank]:
    """The adapter of a PEFT folder by module, alpha / r (or rsLoRA's alpha / sqrt r) folded into b.

    Raises FileNotFoundError or ValueError, one line with the remedy, for what is no plain low-rank adapter.
    """
    adapters = read_adapters(folder)
    file = folder / "adapter_model.safetensors"
    stored = {name: _floats(entry, name, file) for name, entry in _deserialize(file)}
    found: dict[str, LowRank] = {}
    for module, adapter in adapters.items():
        a, b = (stored[adapter_tensor(module, letter)] for letter in "AB")
        found[module] = LowRank(a, b * np.float32(adapter.scale))
    return found


def write_adapter(
    folder: Path, name: str, low_ranks: Mapping[str, LowRank], slots: Sequence[Slot], *, force: bool = False
) -> AdapterFile:
    """Write `folder`/adapters/`name`.onnx_adapter for a graph with these slots, complete or not at all.

    Raises ValueError for a name that is no plain file name or an adapter of another base, FileExistsError for a name
    that is taken (upper and lower case are the same to some file systems).
    """
    check_name(name)
    place = folder / FOLDER / f"{name}{SUFFIX}"
    for other in place.parent.glob(f"*{SUFFIX}"):
        same = other.name == place.name
        if other.name.lower() == place.name.lower() and not (force and same):
            raise FileExistsError(f"{folder} has an adapter {other.name.removesuffix(SUFFIX)!r}; choose another name")
    parameters = _parameters(name, low_ranks, slots)
    _export(parameters, place)
    rank = max(low_rank.a.shape[0] for low_rank in low_ranks.values())
    nbytes = sum(array.nbytes for array in parameters.values())
    return AdapterFile(name, f"{FOLDER}/{place.name}", len(low_ranks), rank, nbytes)


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can be an adapter's: letters, digits, dot, dash and underscore, 64 at most."""
    if not _PLAIN_NAME.fullmatch(name) or _RESERVED.fullmatch(name):
        why = "is reserved" if _RESERVED.fullmatch(name) else "is no plain name"
        raise ValueError(f"adapter name {name!r} {why}; use up to 64 letters, digits, dots, dashes or underscores")


def _linear_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """Module -> its node; of MatMuls only those with a constant weight (k, n)."""
    nodes: dict[str, ir.Node] = {}
    for node in model.graph:
        if node.op_type == "MatMulNBits" or (node.op_type == "MatMul" and _weight(node) is not None):
            nodes[module_of(node.name or "")] = node
    return nodes


def _weight(node: ir.Node) -> ir.Value | None:
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or not value.is_initializer() or value.shape is None or len(value.shape) != 2:
        return None
    return value


def _sizes(node: ir.Node) -> tuple[int, int]:
    """(k, n) of a linear node."""
    if node.op_type == "MatMulNBits":
        return node.attributes["K"].as_int(), node.attributes["N"].as_int()
    weight = _weight(node)
    assert weight is not None and weight.shape is not None
    k, n = (int(size) for size in weight.shape.numpy())
    return k, n


def _node_for(module: str, nodes: Mapping[str, ir.Node]) -> str:
    """The name of the node that computes a module: its own, or the packed one it is part of."""
    if module in nodes:
        return module
    parent, _, leaf = module.rpartition(".")
    for packed, leaves in _PACKED.items():
        if leaf in leaves and f"{parent}.{packed}" in nodes:
            return f"{parent}.{packed}"
    raise ValueError(f"the graph has no linear node for {module}, so its adapter is of another base; leave it out")


def _slot(name: str, node: ir.Node, wanted: Mapping[str, tuple[int, int]]) -> Slot:
    k, n = _sizes(node)
    wrong = next(((module, size) for module, size in wanted.items() if size[0] != k or size[1] > n), None)
    parts = {name: n} if name in wanted else _part_sizes(name, {module: size[1] for module, size in wanted.items()}, n)
    if wrong is None:
        wrong = next(((module, size) for module, size in wanted.items() if parts.get(module) != size[1]), None)
    if wrong is not None:
        why = f"the adapter has {wrong[0]} as (K, N) = {wrong[1]}, the graph {name} as {(k, n)}"
        raise ValueError(f"{why}; give an adapter of this very model")
    dtype = _DTYPES.get(node.outputs[0].dtype or _input_dtype(node))
    if dtype is None:
        raise ValueError(f"{name} computes in {node.outputs[0].dtype}; adapters need a float32 or float16 graph")
    return Slot(name, k, parts, dtype)


def _input_dtype(node: ir.Node) -> ir.DataType:
    x = node.inputs[0]
    return ir.DataType.FLOAT if x is None or x.dtype is None else x.dtype


def _part_sizes(name: str, given: Mapping[str, int], n: int) -> dict[str, int]:
    """Columns of every module packed in a node: k and v have as many, and so have gate and up; they add up to n."""
    parent, _, packed = name.rpartition(".")
    modules = [f"{parent}.{leaf}" for leaf in _PACKED[packed]]
    if packed == "qkv_proj":
        q, k, v = modules
        narrow = given.get(k) or given.get(v) or (n - given[q]) // 2
        return {q: n - 2 * narrow, k: narrow, v: narrow}
    return dict.fromkeys(modules, n // 2)


def _add_branch(model: ir.Model, node: ir.Node, slot: Slot) -> None:
    x, y = node.inputs[0], node.outputs[0]
    kind = ir.DataType.FLOAT if slot.dtype == "float32" else ir.DataType.FLOAT16
    rank = f"{slot.node}.rank"  # each its own: an adapter may have more ranks in some modules than in others
    a, b = (
        _empty_input(model, name, kind, shape, rank)
        for name, shape in zip(slot.inputs, [(slot.k, None), (None, slot.n)], strict=True)
    )
    a.metadata_props[_PARTS_KEY] = json.dumps(slot.parts)
    base = (node.name or "").rsplit("/", 1)[0]
    rows = None if y.shape is None else list(y.shape[:-1])
    down = _result(f"{base}/lora_inputs_A", kind, None if rows is None else [*rows, rank])
    up = _result(f"{base}/lora_inputs_B", kind, y.shape)
    total = _result(f"{base}/lora_inputs_Add", kind, y.shape)
    is_output = y.is_graph_output()
    ir.convenience.replace_all_uses_with(y, total, replace_graph_outputs=True)
    if is_output:
        total.name, y.name = y.name, f"{base}/lora_inputs_Add/input_0"
    nodes = [
        ir.node("MatMul", [x, a], outputs=[down], name=f"{base}/lora_inputs_A/MatMul"),
        ir.node("MatMul", [down, b], outputs=[up], name=f"{base}/lora_inputs_B/MatMul"),
        ir.node("Add", [y, up], outputs=[total], name=f"{base}/lora_inputs_Add"),
    ]
    model.graph.insert_after(node, nodes)


def _empty_input(model: ir.Model, name: str, kind: ir.DataType, shape: tuple[int | None, ...], rank: str) -> ir.Value:
    """A graph input with a default of rank 0; None in `shape` is the rank, free at run time."""
    empty = np.zeros([size or 0 for size in shape], np.float32 if kind is ir.DataType.FLOAT else np.float16)
    free = ir.Shape([size or rank for size in shape])
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=free, const_value=ir.tensor(empty, name=name))
    model.graph.inputs.append(value)
    model.graph.register_initializer(value)
    return value


def _result(name: str, kind: ir.DataType, shape: Any) -> ir.Value:
    return ir.Value(name=f"{name}/output_0", type=ir.TensorType(kind), shape=None if shape is None else ir.Shape(shape))


def _read_slot(value: ir.Value) -> Slot:
    assert value.shape is not None
    assert value.name is not None
    assert value.dtype is not None
    k = value.shape[0]
    assert isinstance(k, int)
    parts = {str(module): int(n) for module, n in json.loads(value.metadata_props[_PARTS_KEY]).items()}
    return Slot(value.name.removesuffix(".lora_A.weight"), k, parts, _DTYPES[value.dtype])


def _deserialize(file: Path) -> Any:
    """(name, {dtype, shape, data}) of every tensor; safetensors' numpy reader knows no bfloat16."""
    import safetensors

    return safetensors.deserialize(file.read_bytes())  # type: ignore[no-untyped-call]


def _floats(entry: Mapping[str, Any], name: str, file: Path) -> Floats:
    kind = _STORED.get(entry["dtype"])
    if kind is None:
        raise ValueError(f"{file}: {name} is of type {entry['dtype']}; save the adapter as {', '.join(_STORED)}")
    values = np.frombuffer(entry["data"], kind).reshape(entry["shape"])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _parameters(name: str, low_ranks: Mapping[str, LowRank], slots: Sequence[Slot]) -> dict[str, NDArray[Any]]:
    """Input name -> its array, for every slot that the adapter fills."""
    if not low_ranks:
        raise ValueError(f"adapter {name} changes no module; give one with tensors")
    sizes = {module: (slot.k, n) for slot in slots for module, n in slot.parts.items()}
    for module, low_rank in low_ranks.items():
        _check_fit(name, module, low_rank, sizes)
    found: dict[str, NDArray[Any]] = {}
    for slot in slots:
        if any(module in low_ranks for module in slot.parts):
            with np.errstate(over="ignore"):  # reported below, by name
                pair = [array.astype(slot.dtype) for array in _packed(low_ranks, slot)]
            if not all(np.isfinite(array).all() for array in pair):
                why = f"adapter {name}: {slot.node} has values that are no {slot.dtype} numbers"
                raise ValueError(f"{why}; it is damaged, or its scale too large for this graph")
            found |= dict(zip(slot.inputs, pair, strict=True))
    return found


def _check_fit(name: str, module: str, low_rank: LowRank, sizes: Mapping[str, tuple[int, int]]) -> None:
    if module not in sizes:
        why = f"adapter {name} changes {module}, which takes no adapter here"
        raise ValueError(f"{why}; give one of this model, and export with all its adapters")
    (rank, k), (n, inner) = low_rank.a.shape, low_rank.b.shape
    if rank != inner or rank == 0 or (k, n) != sizes[module]:
        found = f"A {low_rank.a.shape} and B {low_rank.b.shape}"
        raise ValueError(
            f"adapter {name}: {module} (K, N) = {sizes[module]} cannot take {found}; it is of another base"
        )


def _packed(low_ranks: Mapping[str, LowRank], slot: Slot) -> tuple[Floats, Floats]:
    """A (k, sum of ranks) and B (sum of ranks, n) of a slot's modules, those without an adapter left out."""
    rank = sum(low_ranks[module].a.shape[0] for module in slot.parts if module in low_ranks)
    a, b = np.zeros((slot.k, rank), np.float32), np.zeros((rank, slot.n), np.float32)
    row = column = 0
    for module, n in slot.parts.items():
        low_rank = low_ranks.get(module)
        if low_rank is not None:
            end = row + low_rank.a.shape[0]
            a[:, row:end] = low_rank.a.T
            b[row:end, column : column + n] = low_rank.b.T
            row = end
        column += n
    return a, b


def _export(parameters: Mapping[str, NDArray[Any]], place: Path) -> None:
    """Write the parameters in onnxruntime's adapter format, beside `place` and then renamed to it."""
    import onnxruntime as ort

    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in parameters.items()}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".part", dir=place.parent.parent) as scratch:
        part = Path(scratch) / place.name
        adapter.export_adapter(str(part))
        place.parent.mkdir(exist_ok=True)
        os.replace(part, place)
