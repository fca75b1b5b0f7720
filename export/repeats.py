"""ONNX models of one operator many times over, to time that operator where it runs.

A decode step reads every weight once, so none of them is in a cache when its turn comes: a model of `count` products
has `count` different matrices. They are slices of one random array that start a page apart, so a gigabyte of them takes
next to no memory here. Equal matrices would not do: the runtime keeps one packed copy of equal contents, and then times
its caches.

Products and attentions do not depend on each other and are outputs all; asking for the last alone runs all of them.
Elementwise operators are a chain, so that what they write is reused as in a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 21, 10  # what runtimes from 1.20 on read
STEP = 4096  # bytes between the starts of two matrices; a multiple of every alignment
SCALE = 2.0**-6
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
LEVEL = 4  # accuracy_level of our CPU bundles: products in int8


@dataclass(frozen=True, slots=True, eq=False)
class Repeated:
    """`count` nodes of one operator.

    `model` is serialized; `constants` are its initializers, which live outside of it; `widths` its float inputs with
    the size of their rows; `caches` pairs of an input and the output that is the same memory; `last` the output to ask
    for.
    """

    model: bytes
    count: int
    last: str
    widths: dict[str, int]
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    caches: tuple[tuple[str, str], ...] = ()
    cache_shape: tuple[int, int] = (0, 0)  # KV heads, head size


def products(bits: int, block: int, n: int, k: int, count: int) -> Repeated:
    """`count` MatMulNBits of x (tokens, k) with packed weights (n, k); bits of 32 and block 0: MatMul of floats."""
    if bits == 32:
        return _float_products(n, k, count)
    groups = -(-k // block)
    codes = _slices((n, groups, block * bits // 8), np.dtype(np.uint8), count)
    scales = np.full((n, groups), SCALE, np.float32)
    constants: dict[str, NDArray[Any]] = {"scales": scales, "zeros": _zeros(bits, n, groups)}
    nodes = []
    sizes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": LEVEL}
    for index in range(count):
        constants[f"w{index}"] = codes(index)
        names = ["x", f"w{index}", "scales", "zeros"]
        nodes.append(helper.make_node("MatMulNBits", names, [f"y{index}"], domain="com.microsoft", **sizes))
    return _of_products(nodes, constants, n, k)


def _float_products(n: int, k: int, count: int) -> Repeated:
    weights = _slices((k, n), np.dtype(np.float32), count)
    constants = {f"w{index}": weights(index) for index in range(count)}
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{index}"]) for index, name in enumerate(constants)]
    return _of_products(nodes, constants, n, k)


def chain(bits: int, block: int, width: int, count: int) -> Repeated:
    """`count` times norm (with its residual), product, x * sigmoid(x), product: each waits for the one before, as in a
    model. The products are MatMulNBits (width, width), different ones all.
    """
    groups = -(-width // block)
    codes = _slices((width, groups, block * bits // 8), np.dtype(np.uint8), 2 * count)
    constants: dict[str, NDArray[Any]] = {
        "gamma": np.ones(width, np.float32),
        "scales": np.full((width, groups), SCALE, np.float32),
        "zeros": _zeros(bits, width, groups),
    }
    sizes: dict[str, Any] = {"K": width, "N": width, "bits": bits, "block_size": block, "accuracy_level": LEVEL}
    nodes = []

    def product(x: str, index: int) -> str:
        constants[f"w{index}"] = codes(index)
        names = [x, f"w{index}", "scales", "zeros"]
        nodes.append(helper.make_node("MatMulNBits", names, [f"y{index}"], domain="com.microsoft", **sizes))
        return f"y{index}"

    sum_, x = "x", "x"
    for index in range(count):
        made, names = [f"n{index}", "", "", f"s{index}"], [sum_, x, "gamma"]
        op = "SkipSimplifiedLayerNormalization"
        nodes.append(helper.make_node(op, names, made, domain="com.microsoft", epsilon=1e-5))
        first = product(f"n{index}", 2 * index)
        nodes.append(helper.make_node("Sigmoid", [first], [f"g{index}"]))
        nodes.append(helper.make_node("Mul", [first, f"g{index}"], [f"a{index}"]))
        sum_, x = f"s{index}", product(f"a{index}", 2 * index + 1)
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["tokens", width])]
    outputs = [helper.make_tensor_value_info(x, FLOAT, ["tokens", width])]
    return Repeated(_model(nodes, inputs, outputs, constants), count, x, {"x": width}, constants)


def _zeros(bits: int, n: int, groups: int) -> NDArray[np.uint8]:
    """The middle code of every group, packed (n, ceil(groups * bits / 8))."""
    return np.full((n, -(-groups * bits // 8)), sum(1 << bits - 1 << at for at in range(0, 8, bits)), np.uint8)


def _slices(shape: tuple[int, ...], kind: np.dtype[Any], count: int) -> Callable[[int], NDArray[Any]]:
    """Matrices of different contents that share one array of random bytes, or of numbers of the size of one."""
    size = int(np.prod(shape))
    rng = np.random.default_rng(0)
    step = STEP // kind.itemsize
    if kind == np.uint8:
        pool: NDArray[Any] = np.frombuffer(rng.bytes(size + count * step), np.uint8)
    else:
        pool = rng.standard_normal(size + count * step, dtype=np.float32)
    return lambda index: pool[index * step : index * step + size].reshape(shape)


def _of_products(nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]], n: int, k: int) -> Repeated:
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["tokens", k])]
    outputs = [helper.make_tensor_value_info(node.output[0], FLOAT, ["tokens", n]) for node in nodes]
    model = _model(nodes, inputs, outputs, constants)
    return Repeated(model, len(nodes), nodes[-1].output[0], {"x": k}, constants)


def attentions(heads: int, kv_heads: int, head: int, count: int, positions: int) -> Repeated:
    """`count` GroupQueryAttention with rotary tables of `positions`, each with a cache of its own."""
    angles = np.arange(positions)[:, None] * (10000.0 ** -(np.arange(0, head, 2) / head))[None]  # (positions, head / 2)
    constants = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    widths = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
    inputs = [helper.make_tensor_value_info(name, FLOAT, [1, "tokens", width]) for name, width in widths.items()]
    inputs += [helper.make_tensor_value_info("last", INT32, [1]), helper.make_tensor_value_info("total", INT32, [])]
    outputs, nodes, caches = [], [], []
    for index in range(count):
        past, present = [f"past_k{index}", f"past_v{index}"], [f"k{index}", f"v{index}"]
        inputs += [helper.make_tensor_value_info(name, FLOAT, [1, kv_heads, "room", head]) for name in past]
        outputs += [helper.make_tensor_value_info(name, FLOAT, [1, kv_heads, "room", head]) for name in present]
        outputs.append(helper.make_tensor_value_info(f"y{index}", FLOAT, [1, "tokens", heads * head]))
        caches += list(zip(past, present, strict=True))
        sizes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1}
        names = [*widths, *past, "last", "total", "cos", "sin"]
        made = [f"y{index}", *present]
        nodes.append(helper.make_node("GroupQueryAttention", names, made, domain="com.microsoft", **sizes))
    model = _model(nodes, inputs, outputs, constants)
    return Repeated(model, count, f"y{count - 1}", widths, constants, tuple(caches), (kv_heads, head))


POINTWISE = ("norm", "add", "activation")


def pointwise(kind: str, width: int, count: int) -> Repeated:
    """A chain of `count` operators over x (tokens, width): norm (with its residual), add, or x * sigmoid(x)."""
    constants: dict[str, NDArray[Any]] = {}
    nodes, before = [], ("x", "x")
    for index in range(count):
        y, other = f"y{index}", f"z{index}"
        if kind == "norm":
            made = [y, "", "", other]
            constants["gamma"] = np.ones(width, np.float32)
            names = [*before, "gamma"]
            op = "SkipSimplifiedLayerNormalization"
            nodes.append(helper.make_node(op, names, made, domain="com.microsoft", epsilon=1e-5))
            before = (y, other)
        elif kind == "add":
            nodes.append(helper.make_node("Add", [before[0], "x"], [y]))
            before = (y, y)
        else:  # two nodes that the runtime joins, as in our bundles
            nodes.append(helper.make_node("Sigmoid", [before[0]], [other]))
            nodes.append(helper.make_node("Mul", [before[0], other], [y]))
            before = (y, y)
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["tokens", width])]
    outputs = [helper.make_tensor_value_info(before[0], FLOAT, ["tokens", width])]
    return Repeated(_model(nodes, inputs, outputs, constants), count, before[0], {"x": width}, constants)


def decoder(vocab: int, layers: int) -> tuple[bytes, dict[str, Any]]:
    """A model that looks like a decoder from outside and computes nothing, with its genai_config: what a token costs
    beside the model. The likeliest token is number 0 or 1 always; a layer caches 8 numbers.
    """
    ids = ["batch", "tokens"]
    inputs = [helper.make_tensor_value_info(name, INT64, ids) for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("logits", FLOAT, ["batch", 1, vocab])]
    table = np.zeros((2, vocab), np.float32)  # (2, vocab)
    table[0, 1] = table[1, 0] = 1.0
    stored = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([-1]), "end"),
        numpy_helper.from_array(np.array(2), "two"),
    ]
    nodes = [
        helper.make_node("Gather", ["input_ids", "end"], ["last"], axis=1),
        helper.make_node("Mod", ["last", "two"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["logits"], axis=0),
    ]
    for index in range(layers):
        for part in ("key", "value"):
            past, present = f"past_key_values.{index}.{part}", f"present.{index}.{part}"
            inputs.append(helper.make_tensor_value_info(past, FLOAT, ["batch", 1, "room", 8]))
            outputs.append(helper.make_tensor_value_info(present, FLOAT, ["batch", 1, "room", 8]))
            nodes.append(helper.make_node("Identity", [past], [present]))
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return bytes(model.SerializeToString()), _genai_config(vocab, layers)


def _genai_config(vocab: int, layers: int) -> dict[str, Any]:
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    past = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    block = {
        "session_options": {"log_id": "probe", "provider_options": []},
        "filename": "model.onnx",
        "head_size": 8,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": layers,
        "inputs": names | past,
        "outputs": {"logits": "logits"} | present,
    }
    special = {"bos_token_id": vocab - 1, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    model = {"type": "llama", "context_length": 4096, "vocab_size": vocab, "decoder": block, **special}
    return {"model": model, "search": {"do_sample": False, "max_length": 2048, "past_present_share_buffer": True}}


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, NDArray[Any]],
) -> bytes:
    """A serialized model whose initializers are to be given to the session."""
    stored = [_outside(name, value) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "repeated", inputs, outputs, stored)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString())


def _outside(name: str, value: NDArray[Any]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
    tensor.external_data.add(key="location", value="given")
    return tensor
