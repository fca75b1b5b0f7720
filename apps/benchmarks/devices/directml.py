"""The standard set on a GPU through DirectML, on Windows, in an environment with onnxruntime-directml.

    python -m rlkit.apps.benchmarks.devices.directml -o directml.json

DirectML is in sustained engineering: its last onnxruntime is 1.24.4, and WebGPU is the way that is developed. It has
kernels for 4 and 8 bits; 2-bit codes are stored in 4-bit fields, exactly, and gain nothing. Steps of the graph are
timed in plain onnxruntime with the cache on the device (`runtime/elsewhere.py`). Not run by its authors, who had no
Windows machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlkit.apps.benchmarks.devices.command import launch
from rlkit.apps.benchmarks.devices.common import Absent, Asked, Family, Ready
from rlkit.apps.benchmarks.devices.foreign import having
from rlkit.apps.benchmarks.devices.present import System
from rlkit.apps.benchmarks.devices.webgpu import HOW
from rlkit.export.targets import target_named
from rlkit.profiles.devicerun import Part

PROVIDER = "DmlExecutionProvider"
RUNTIME = "onnxruntime-directml==1.24.4"


def find(system: System, asked: Asked) -> Ready:
    """The first GPU and the runtime for it; Absent where either is missing."""
    if system.name != "Windows":
        raise Absent(f"DirectML is a part of Windows, and this is {system.name}")
    found = system.gpus()
    if not found:
        raise Absent("no GPU: Windows lists no display adapter but software ones")
    foreign, versions = having(asked, RUNTIME, PROVIDER, {})
    part = Part("directml", PROVIDER, found[0].name, found[0].driver, notes=(HOW,))

    def command(bundle: Path, threads: int | None) -> list[str]:
        return foreign.command("onnx", "dml", bundle, threads)

    return Ready(part, versions, command)


FAMILY = Family("directml", "a GPU through DirectML", "igpu", target_named("igpu", "dml"), find)

if __name__ == "__main__":
    sys.exit(launch(FAMILY))
