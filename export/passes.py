"""Changes to the builder's graph while its matrices are still without data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rlkit.export.graph import constant, module_of

HEAD = "/lm_head/"


def keep_last_logits(model: ir.Model) -> None:
    """Let lm_head see the last position only: what generation asks for, without the prompt's other logits.

    The output becomes (batch, 1, vocabulary). Raises ValueError if the graph has no lm_head.
    """
    node = next((node for node in model.graph if (node.name or "").startswith(HEAD) and "MatMul" in node.op_type), None)
    if node is None or node.inputs[0] is None:
        raise ValueError("the graph has no lm_head, so its last logits cannot be told apart; export with --logits all")
    hidden = node.inputs[0]
    last = constant(model, np.array([-1], np.int64), "lm_head.last")
    gather = ir.node("Gather", [hidden, last], {"axis": 1}, name="/lm_head/last/Gather")
    gather.outputs[0].name, gather.outputs[0].type = "/lm_head/last/Gather/output_0", hidden.type
    model.graph.append(gather)
    readers = [(use.node, use.idx) for use in hidden.uses() if use.node is not gather]
    for user, position in readers:
        if (user.name or "").startswith(HEAD):  # lm_head itself, and its adapter
            user.replace_input_with(position, gather.outputs[0])
    for output in model.graph.outputs:
        if output.name == "logits" and output.shape is not None:
            output.shape = ir.Shape([output.shape[0], 1, *output.shape[2:]])


def join_gate_and_up(model: ir.Model, may_join: frozenset[str]) -> int:
    """Make gate and up of the MLPs named in `may_join` one product whose result is split; how many were joined.

    `may_join` holds modules ("model.layers.0.mlp") whose two matrices have one scheme. Their nodes must be MatMuls
    that have no data yet.
    """
    nodes = {module_of(node.name or ""): node for node in model.graph if node.op_type == "MatMul"}
    joined = 0
    for mlp in sorted(may_join):
        gate, up = (nodes.get(f"{mlp}.{part}") for part in ("gate_proj", "up_proj"))
        if gate is not None and up is not None and gate.inputs[0] is up.inputs[0]:
            _join(model, gate, up)
            joined += 1
    return joined


def _join(model: ir.Model, gate: ir.Node, up: ir.Node) -> None:
    base, parts = (gate.name or "").rsplit("/gate_proj/", 1)[0], [_weight(gate), _weight(up)]
    (rows, left), (_rows, right) = (_sizes(value) for value in parts)
    name = (parts[0].name or "").replace(".gate_proj.", ".gate_up_proj.")
    whole = ir.Value(name=name, type=parts[0].type, shape=ir.Shape([rows, left + right]))
    model.graph.initializers.add(whole)
    product = ir.node("MatMul", [gate.inputs[0], whole], name=f"{base}/gate_up_proj/MatMul")
    product.outputs[0].name, product.outputs[0].type = f"{base}/gate_up_proj/MatMul/output_0", gate.outputs[0].type
    sizes = constant(model, np.array([left, right], np.int64), f"{name}.sizes")
    inputs = [product.outputs[0], sizes]
    split = ir.node("Split", inputs, {"axis": -1}, num_outputs=2, name=f"{base}/gate_up_proj/Split")
    before = [gate.outputs[0], up.outputs[0]]
    for new, old in zip(split.outputs, before, strict=True):
        new.type, new.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(
        model.graph, gate, [gate, up], [product, split], before, list(split.outputs)
    )
    for weight in parts:
        del model.graph.initializers[weight.name or ""]


def _weight(node: ir.Node) -> ir.Value:
    value = node.inputs[1]
    assert value is not None
    return value


def _sizes(value: ir.Value) -> tuple[int, int]:
    assert value.shape is not None
    k, n = (int(size) for size in value.shape)  # type: ignore[arg-type]
    return k, n
