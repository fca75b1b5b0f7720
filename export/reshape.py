"""Other sizes for the inputs of an ONNX graph that was written for fixed ones, where its operators do not mind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def reshaped(model: Path | bytes, shapes: Mapping[str, Sequence[int]]) -> bytes:
    """The model with these sizes of inputs by name; sizes of everything that follows are forgotten.

    Raises ValueError for an input that it does not have. Data in files beside the model is not taken along.
    """
    import onnx

    graph = (made := onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)).graph
    inputs = {value.name: value for value in graph.input}
    for name, sizes in shapes.items():
        if name not in inputs:
            raise ValueError(f"the graph has no input {name!r}; it has {', '.join(sorted(inputs))}")
        shape = inputs[name].type.tensor_type.shape
        shape.Clear()
        for size in sizes:
            shape.dim.add().dim_value = size
    for value in graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    del graph.value_info[:]
    return bytes(made.SerializeToString())
