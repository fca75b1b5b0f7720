"""Graphs of a bundle whose attention keeps a quantized KV cache: small files over the data that is there already.

    GroupQueryAttention(q, k, v, past key float, past value float, ...)
    GroupQueryAttention(q, k, v, past key int8, past value int8, ..., k_scale, v_scale)

New keys and values are rounded when they enter the cache, and attention reads them from there, those of the prompt too.
At 4 bits two codes share a byte, the even channel in the low half, each with 8 added. The scales are constants of the
graph, so stock onnxruntime-genai runs it as it runs the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rlkit.export import graph
from rlkit.export.kvscales import CHANNEL, PER, TENSOR, Attention, LayerScales, Rotation, Scheme, file_name
from rlkit.export.lint import lint_model
from rlkit.export.targets import TARGETS

OP = "GroupQueryAttention"
PAST, PRESENT = slice(3, 5), slice(1, 3)  # places of key and value among inputs and outputs
COS, SIN, SCALES = 7, 8, (12, 13)
TYPES = {8: ir.DataType.INT8, 4: ir.DataType.UINT8}
ALL_LOGITS = "logits.onnx"


def attentions(model: ir.Model, folder: Path, head_size: int) -> tuple[Attention, ...]:
    """Every attention with a float cache, in the order of the graph, whose heads are of `head_size` numbers.

    Raises ValueError where there is none, or one whose cache is something else: then nothing here can be quantized.
    """
    found = tuple(_attention(node, folder, head_size) for node in model.graph if node.op_type == OP)
    if not found:
        raise ValueError(f"{folder} has no {OP} node, so it keeps no cache that could be quantized; leave --kv out")
    return found


def add_graphs(
    folder: Path,
    decoder: dict[str, Any],
    scheme: Scheme,
    scales: Mapping[str, LayerScales],
    *,
    allow_slow: bool = False,
) -> list[str]:
    """Write the graphs of a bundle with this cache beside its own; the names of the files.

    `decoder` is that block of its genai_config.json, `scales` are by node. Each file is complete or absent; those of
    another calibration are replaced. Raises ValueError for attention that the runtime refuses with such a cache, or
    computes slowly.
    """
    made = {}
    for name in dict.fromkeys((ALL_LOGITS, decoder["filename"])):
        if (folder / name).is_file():
            made[file_name(name, scheme.name)] = model = graph.load(folder / name)
            quantize(model, scheme, scales, int(decoder["head_size"]))
            findings = [finding for finding in lint_model(model, TARGETS["cpu"]) if finding.op == OP]
            if findings and not (allow_slow and all(finding.severity == "slow" for finding in findings)):
                why = f"{findings[0].node} in {name}: {findings[0].reason}; {findings[0].fix}"
                raise ValueError(why + ("; --allow-slow adds it all the same" if not allow_slow else ""))
    for name, model in made.items():  # the one that generates comes last: it is what offers the cache
        _write(model, folder / name)
    return list(made)


def quantize(model: ir.Model, scheme: Scheme, scales: Mapping[str, LayerScales], head_size: int) -> None:
    """Give every attention of a graph a quantized cache."""
    width = scheme.nbytes(head_size)
    for node in [node for node in model.graph if node.op_type == OP]:
        found = scales[node.name or ""]
        node.resize_inputs(max(len(node.inputs), SCALES[-1] + 1))
        prefix = (node.name or "").strip("/").replace("/", ".").removesuffix(f".{OP}")
        per = PER[TENSOR if max(found.keys.size, found.values.size) == 1 else CHANNEL]  # one kind for both, or refused
        for place, part, values in zip(SCALES, "kv", (found.keys, found.values), strict=True):
            wide = values if per == PER[TENSOR] else np.broadcast_to(values, max(found.keys.size, found.values.size))
            node.replace_input_with(place, graph.constant(model, np.array(wide, np.float32), f"{prefix}.{part}_scale"))
            node.attributes.add(ir.AttrString(f"{part}_quant_type", per))
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", scheme.bits))
        for cache in (*node.inputs[PAST], *node.outputs[PRESENT]):
            assert cache is not None and cache.shape is not None
            cache.type = ir.TensorType(TYPES[scheme.bits])
            cache.shape = ir.Shape([*cache.shape[:-1], width])  # the runtime makes its buffers of this size


def _attention(node: ir.Node, folder: Path, head_size: int) -> Attention:
    past, (key, value) = node.inputs[PAST], node.outputs[PRESENT]
    float_cache = all(
        cache is not None
        and cache.is_graph_input()
        and cache.dtype == ir.DataType.FLOAT
        and cache.shape is not None
        and len(cache.uses()) == 1
        for cache in past
    )
    if len(past) != 2 or not float_cache or not (key.is_graph_output() and value.is_graph_output()):
        why = f"{folder}: the cache of {node.name} is not float32 that enters and leaves the graph"
        raise ValueError(f"{why}, so it is not quantized; export the bundle again without --kv")
    heads = node.attributes["kv_num_heads"].as_int()
    return Attention(node.name or "", (key.name or "", value.name or ""), heads, head_size, _rotation(node))


def _rotation(node: ir.Node) -> Rotation | None:
    """The tables by which attention turns its keys; None where it does not, or chooses among tables as it runs."""
    if "do_rotary" not in node.attributes or not node.attributes["do_rotary"].as_int():
        return None
    tables = [node.inputs[place].const_value for place in (COS, SIN) if node.inputs[place] is not None]  # type: ignore[union-attr]
    if len(tables) != 2 or None in tables:
        return None
    cos, sin = (np.asarray(table.numpy(), np.float32) for table in tables)  # type: ignore[union-attr]
    interleaved = "rotary_interleaved" in node.attributes and bool(node.attributes["rotary_interleaved"].as_int())
    return Rotation(cos, sin, interleaved)


def _write(model: ir.Model, path: Path) -> None:
    """Write a graph over data that stays where it is, complete or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        ir.save(model, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
