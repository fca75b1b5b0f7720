"""Small ONNX models that try one operator, and a model cut into its nodes: to compare execution providers.

A probe is one node with random constants and inputs. `exposed` gives a model every intermediate value as an output;
`cut` also feeds every node from the graph's inputs instead of from other nodes, so that, given one provider's values,
another's errors do not add up on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rlkit.recover import packing

OPSET, IR_VERSION = 21, 10  # what runtimes from 1.20 on read
CONTEXT = 128  # positions of the rotary tables
FED = ".fed"  # of a value that a cut graph is given


@dataclass(frozen=True, slots=True)
class Product:
    """A MatMulNBits of `rows` rows: x (1, rows, k) times packed weights (n, k)."""

    bits: int
    block: int
    n: int = 72
    k: int = 256
    rows: int = 1
    zeros: bool = True
    bias: bool = False
    level: int = 0

    @property
    def name(self) -> str:
        """What tells it apart."""
        extras = ("zeros " if self.zeros else "") + ("bias " if self.bias else "")
        return f"{self.bits}-bit block {self.block} {self.rows} x {self.k} x {self.n} {extras}level {self.level}"


@dataclass(frozen=True, slots=True)
class Attention:
    """A GroupQueryAttention over `past` cached and `new` tokens; window of -1 sees all of them."""

    head: int
    heads: int = 4
    kv_heads: int = 2
    new: int = 1
    past: int = 0
    rotary: bool = True
    packed: bool = False
    window: int = -1
    smooth: bool = False
    normed: bool = False  # queries and keys are normalized by the operator
    rows: int = 1

    @property
    def name(self) -> str:
        """What tells it apart."""
        marks = {"rotary": self.rotary, "packed": self.packed, "smooth": self.smooth, "norms": self.normed}
        marks[f"window {self.window}"] = self.window >= 0
        marks[f"batch {self.rows}"] = self.rows > 1
        extras = " ".join(mark for mark, given in marks.items() if given)
        return f"heads {self.heads}/{self.kv_heads} x {self.head}, {self.new} new after {self.past} {extras}".rstrip()


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A model of one node, and what it is fed."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, NDArray[Any]]


def product(case: Product, seed: int = 0) -> Probe:
    """The probe of a multiplication; weights and inputs are of the size of one."""
    rng = np.random.default_rng(seed)
    groups = -(-case.k // case.block)
    top = 1 << case.bits
    codes = rng.integers(0, top, (case.n, case.k), dtype=np.uint8)
    constants: dict[str, NDArray[Any]] = {
        "qweight": packing.blocks(codes, case.bits, case.block),
        "scales": (rng.random((case.n, groups)) + 0.5).astype(np.float32) / top,
    }
    if case.zeros:
        constants["qzeros"] = packing.pack(rng.integers(0, top, (case.n, groups), dtype=np.uint8), case.bits)
    names = ["x", "qweight", "scales", "qzeros" if case.zeros else ""]
    if case.bias:
        constants["bias"] = rng.standard_normal(case.n).astype(np.float32)
        names += ["", "bias"]
    attributes: dict[str, Any] = {
        "K": case.k,
        "N": case.n,
        "bits": case.bits,
        "block_size": case.block,
        "accuracy_level": case.level,
    }
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes)
    x = rng.standard_normal((1, case.rows, case.k)).astype(np.float32)
    return Probe(case.name, _one_node(node, {"x": x}, constants), {"x": x})


def attention(case: Attention, seed: int = 0) -> Probe:
    """The probe of an attention; outputs y (rows, new, heads * head), keys and values with what was cached."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    q = normal(case.rows, case.new, case.heads * case.head)
    k, v = (normal(case.rows, case.new, case.kv_heads * case.head) for _ in "kv")
    feeds: dict[str, NDArray[Any]] = {"q": np.concatenate([q, k, v], 2)} if case.packed else {"q": q, "k": k, "v": v}
    feeds |= {name: normal(case.rows, case.kv_heads, case.past, case.head) for name in ("past_k", "past_v")}
    total = case.past + case.new
    feeds |= {"last": np.full(case.rows, total - 1, np.int32), "total": np.array(total, np.int32)}
    names = ["q", *(("", "") if case.packed else ("k", "v")), "past_k", "past_v", "last", "total"]
    constants: dict[str, NDArray[Any]] = {}
    if case.rotary:
        constants |= _tables(case.head)
        names += ["cos", "sin"]
    if case.normed:
        constants |= {name: 1 + normal(case.head) / 8 for name in ("q_norm", "k_norm")}
        names += [""] * (14 - len(names)) + ["q_norm", "k_norm"]
    attributes: dict[str, Any] = {"num_heads": case.heads, "kv_num_heads": case.kv_heads, "do_rotary": int(case.rotary)}
    attributes |= {"local_window_size": case.window, "smooth_softmax": int(case.smooth)}
    outputs = ["y", "keys", "values"]
    node = helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **attributes)
    return Probe(case.name, _one_node(node, feeds, constants), feeds)


def _tables(head: int) -> dict[str, NDArray[np.float32]]:
    """cos and sin (CONTEXT, head / 2) of rotary positions."""
    angles = np.arange(CONTEXT)[:, None] * (10000.0 ** -(np.arange(0, head, 2) / head))[None]
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def _one_node(
    node: onnx.NodeProto, feeds: dict[str, NDArray[Any]], constants: dict[str, NDArray[Any]]
) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "probe", inputs, outputs, stored)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


def operators(path: Path) -> dict[str, str]:
    """Every intermediate value and output of an ONNX file, in the graph's order -> the operator that computes it."""
    graph = onnx.load(path, load_external_data=False).graph
    return {name: node.op_type for node in graph.node if node.op_type != "Constant" for name in node.output if name}


def exposed(path: Path) -> onnx.ModelProto:
    """The model of an ONNX file with every value as an output; its constants inside."""
    model = onnx.load(path)
    given = {value.name for value in model.graph.output}
    extra = [name for name in operators(path) if name not in given]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in extra)
    return model


def cut(path: Path, values: dict[str, NDArray[Any]]) -> onnx.ModelProto:
    """The model of an ONNX file with every node fed from the graph's inputs.

    `values` holds one run's intermediate values, whose types and ranks are what the inputs get; the input that stands
    for value v is v + FED.
    """
    model = exposed(path)
    made = operators(path)
    used: dict[str, None] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in made:
                used[name] = None
                node.input[index] = name + FED
    for name in used:
        kind = helper.np_dtype_to_tensor_dtype(values[name].dtype)
        model.graph.input.append(helper.make_tensor_value_info(name + FED, kind, [None] * values[name].ndim))
    return model


def cut_feeds(model: onnx.ModelProto, values: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What a cut model is fed: `values` holds one run's inputs and intermediate values."""
    return {value.name: values[value.name.removesuffix(FED)] for value in model.graph.input}
