"""Depth networks as ONNX: for any size of image, or for one; a pair's network up to any of its stages.

    mono      image (B, 3, H, W) RGB in 0..1            -> depth (B, 1, H, W) on the network's LogScale
    stereo    left, right (B, 3, H, W) RGB in 0..1      -> disparity (B, 1, H, W) in pixels of the left image

A file tells what it is in its metadata (META), so that it can be run without the folder it was made from; run time
(runtime/visionrun.py) pads images to the network's stride and takes results back to metres. A stage is a file of its
own: the runtime computes all of a graph, so that one with all stages would answer as late as its last one does.

The propagation of a stereo network is one loop in the graph (visionscan.py); `unroll` writes it out column by column
instead, which takes a fixed size, for devices that run no loops. Batch norms behind a convolution are folded into it.

torch's exporter of traced graphs is used: the one of torch.export needs onnxscript besides, and for open sizes tens of
seconds for graphs that compute the same.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx

from rlkit.export.visionscan import DOMAIN, NAME, with_loops
from rlkit.recover import depthfile
from rlkit.recover.atomic import write_bytes
from rlkit.recover.depthfile import Description, Kind

Module = Any  # a torch.nn.Module; torch is imported inside functions alone
OPSET = 17
META = "rlkit.depth"
SCHEMA_VERSION = 1
INPUTS = {Kind.MONO: ("image",), Kind.STEREO: ("left", "right")}
OUTPUTS = {Kind.MONO: "depth", Kind.STEREO: "disparity"}
OPEN = {0: "batch", 2: "height", 3: "width"}
TRACED = (2, 3)  # what the open sizes are traced at, in strides: neither equal nor 1


def export_depth(
    network: Path, out: Path, *, size: tuple[int, int] | None = None, stage: int | None = None, unroll: bool = False
) -> Path:
    """Write a network's folder as an ONNX file, complete or not at all; returns its path.

    size: height and width, None for any multiples of the stride. stage: 1 to 4 of a stereo network, None for its last.
    Raises ValueError for sizes that are no multiples of the stride, for a stage it does not have, and for a loop that
    shall be unrolled without a size; what depthfile.load raises for a folder that is none.
    """
    module, description = depthfile.load(network)
    write_bytes(out, to_onnx(module, description, size=size, stage=stage, unroll=unroll))
    return out


def to_onnx(
    network: Module,
    description: Description,
    *,
    size: tuple[int, int] | None = None,
    stage: int | None = None,
    unroll: bool = False,
) -> bytes:
    """`export_depth` of a network at hand, as a serialized model."""
    stride = network.shape.stride if description.kind is Kind.MONO else _stereo_stride()
    if size is not None:
        _need_size(size, stride)
    if unroll and size is None:
        raise ValueError("a loop of unknown length cannot be unrolled; give a size, or keep the loop")
    if stage is not None and description.kind is Kind.MONO:
        raise ValueError(f"stage {stage} of a network of one image is none; only networks of pairs have stages")
    shown = network.eval() if description.kind is Kind.MONO else _up_to(network, stage)
    made = _traced(shown, description.kind, size or (TRACED[0] * stride, TRACED[1] * stride), size is None, unroll)
    if with_loops(made) and unroll:
        raise AssertionError("an unrolled graph has a loop")
    facts = {"schema_version": SCHEMA_VERSION, "stride": stride, "stage": stage, **description.to_json()}
    made.producer_name, made.producer_version = "rlkit", ""
    made.metadata_props.append(onnx.StringStringEntryProto(key=META, value=json.dumps(facts, sort_keys=True)))
    onnx.checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString(deterministic=True))


def _need_size(size: tuple[int, int], stride: int) -> None:
    said = "x".join(map(str, reversed(size)))
    if len(size) != 2 or any(type(side) is not int or side < stride or side % stride for side in size):
        raise ValueError(f"a size of {said} (width x height) does not fit a stride of {stride}; use multiples of it")


def _stereo_stride() -> int:
    from rlkit.recover.anynet import STRIDE

    return STRIDE


def _up_to(network: Module, stage: int | None) -> Module:
    from rlkit.recover.anynet import AnyNet, UpTo

    assert isinstance(network, AnyNet)
    return UpTo(network, network.shape.stages if stage is None else stage).eval()


def _traced(network: Module, kind: Kind, size: tuple[int, int], is_open: bool, unroll: bool) -> onnx.ModelProto:
    """The graph of a network at a size; with `is_open` for others, too."""
    import torch

    names, out = INPUTS[kind], OUTPUTS[kind]
    images = tuple(torch.zeros(1, 3, *size) for _ in names)
    options: dict[str, Any] = {"dynamic_axes": dict.fromkeys((*names, out), OPEN)} if is_open else {}
    refine = None if unroll or kind is Kind.MONO else _looped(network)
    if refine is not None:
        options["custom_opsets"] = {DOMAIN: 1}
    try:
        # It warns of its age, of constants it does not fold, and of sizes compared while tracing, all as it should be.
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            path = Path(folder, "traced.onnx")
            torch.onnx.export(
                network,
                images,
                path,
                input_names=list(names),
                output_names=[out],
                opset_version=OPSET,
                dynamo=False,
                **options,
            )
            return onnx.load(path)
    finally:
        if refine is not None:
            refine[0].propagate = refine[1]


def _looped(network: Module) -> tuple[Any, Any] | None:
    """Let the propagation be exported as one node that `with_loops` replaces; what it was before, None without one."""
    import torch

    from rlkit.recover.propagate import unrolled

    module: Any = network
    refine = module.network.refine
    if refine is None or module.stage != module.network.shape.stages:
        return None

    class Propagate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Any, weights: Any) -> Any:
            return unrolled(values, weights)

        @staticmethod
        def symbolic(g: Any, values: Any, weights: Any) -> Any:
            return g.op(f"{DOMAIN}::{NAME}", values, weights).setType(values.type())

    before = refine.propagate
    refine.propagate = Propagate.apply
    return refine, before
