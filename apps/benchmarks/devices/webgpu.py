"""The standard set on a GPU through WebGPU, in an environment with onnxruntime-webgpu.

    python -m rlkit.apps.benchmarks.devices.webgpu -o webgpu.json
    python -m rlkit.apps.benchmarks.devices.webgpu -o software.json --software --quick

The runtime takes onnxruntime's place, so it lives in an environment of its own: that of --python, else one made beside
the result file. Steps of the graph are timed in plain onnxruntime with the cache on the device
(`runtime/elsewhere.py`). --software takes Chromium's software Vulkan driver, in float32: it shows that everything
runs, and its speed is that of a CPU. docs/webgpu.md says which results of prompts are not to be trusted; their speed
is measured all the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlkit.apps.benchmarks import webgpu_parity
from rlkit.apps.benchmarks.devices.command import launch
from rlkit.apps.benchmarks.devices.common import Absent, Asked, Family, Ready
from rlkit.apps.benchmarks.devices.foreign import having
from rlkit.apps.benchmarks.devices.present import Chip, System
from rlkit.export.targets import target_named
from rlkit.profiles.devicerun import Part

PROVIDER = "WebGpuExecutionProvider"
RUNTIME = webgpu_parity.RUNTIME
SOFTWARE = Chip("SwiftShader")
HOW = "steps of the graph in plain onnxruntime, cache on the device; the likeliest token is chosen on the CPU"
NOT_A_GPU = "a software driver computes on the CPU: these speeds say nothing of any GPU"


def find(system: System, asked: Asked) -> Ready:
    """The first GPU and the runtime for it; Absent where either is missing."""
    chip, variables = _software() if asked.software else (_gpu(system), {})
    foreign, versions = having(asked, RUNTIME, PROVIDER, variables)
    notes = (HOW, NOT_A_GPU) if asked.software else (HOW,)
    part = Part("webgpu", PROVIDER, chip.name, chip.driver, software=asked.software, notes=notes)

    def command(bundle: Path, threads: int | None) -> list[str]:
        return foreign.command("onnx", "webgpu", bundle, threads)

    return Ready(part, versions, command, variables, "float32" if asked.software else None)


def _gpu(system: System) -> Chip:
    found = system.gpus()
    if not found:
        raise Absent("no GPU: the system lists none; --software measures a software driver instead")
    return found[0]


def _software() -> tuple[Chip, dict[str, str]]:
    try:
        return SOFTWARE, webgpu_parity.vulkan("software")
    except webgpu_parity.Unavailable as why:
        raise Absent(str(why)) from why


FAMILY = Family("webgpu", "a GPU through WebGPU", "igpu", target_named("webgpu"), find)

if __name__ == "__main__":
    sys.exit(launch(FAMILY))
