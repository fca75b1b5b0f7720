"""What a depth network's ONNX file says of itself, and which of its convolutions are at its ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx

CONVOLUTIONS = ("Conv", "ConvTranspose")


def ends(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of convolutions that no other precedes, and of those that no other follows.

    These see what is least like the rest: the image itself, and the values that are the answer.
    """
    nodes = list(onnx.load(path, load_external_data=False).graph.node)
    convolutions = [node for node in nodes if node.op_type in CONVOLUTIONS]
    after = _reached([(list(node.input), list(node.output)) for node in nodes], convolutions, forward=True)
    before = _reached([(list(node.output), list(node.input)) for node in reversed(nodes)], convolutions, forward=False)
    first = tuple(node.name for node in convolutions if not after & set(node.input[:1]))
    last = tuple(node.name for node in convolutions if not before & set(node.output))
    return first, last


def _reached(
    steps: Iterable[tuple[list[str], list[str]]], convolutions: list[onnx.NodeProto], *, forward: bool
) -> set[str]:
    """Values that depend on a convolution's output, or that its input depends on; steps are in the order of the way."""
    found = {name for node in convolutions for name in (node.output if forward else node.input[:1])}
    for taken, given in steps:
        if found & set(taken):
            found.update(given)
    return found
