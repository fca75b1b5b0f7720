"""Surroundings of machines that are not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlkit.runtime.gpus import Hardware
from rlkit.runtime.surroundings import Plugin, Seen, Surroundings

STOCK = {"onnxruntime": "1.31.1", "onnxruntime-genai": "0.18.0", "rlkit-edge": "0.1.0"}
PROCESSOR = Seen("CPUExecutionProvider", "cpu", "AMD", "")
RADEON = Hardware("gpu", "AMD", "AMD Radeon 890M", 2**33)
XDNA = Hardware("npu", "AMD", "NPU Compute Accelerator Device")
GEFORCE = Hardware("gpu", "NVIDIA", "GeForce RTX 5090", 2**35)

LINUX = Surroundings("Linux", "x86_64", STOCK, ("CPUExecutionProvider",), (PROCESSOR,))
WINDOWS = replace(LINUX, system="Windows", architecture="AMD64", hardware=(RADEON, XDNA))
WINDOWS_ARM = replace(LINUX, system="Windows", architecture="ARM64")
MAC = replace(LINUX, system="Darwin", architecture="arm64")
STRANGE = Surroundings("Plan9", "mips", {"onnxruntime": "1.31.1"})


def with_packages(around: Surroundings, **versions: str) -> Surroundings:
    """The same machine with more packages; an underscore stands for the dash of a name."""
    return replace(around, packages={**around.packages, **{k.replace("_", "-"): v for k, v in versions.items()}})


def with_webgpu(around: Surroundings, *, device: bool = True, problem: str | None = None) -> Surroundings:
    """The same machine with the WebGPU plug-in, and with its device or without."""
    ep = "WebGpuExecutionProvider"
    gpu = Seen(ep, "gpu", "AMD", "AMD Radeon 890M")
    more: dict[str, Any] = {"plugins": (Plugin("onnxruntime-ep-webgpu", "0.4.0", ep, problem),)}
    return replace(
        with_packages(around, onnxruntime_ep_webgpu="0.4.0"), seen=(*around.seen, *([gpu] if device else [])), **more
    )
