"""The standard set on a Ryzen AI NPU, on Windows, with folders that AMD's tool has finished.

    rlkit export CHECKPOINT -o bundles/w4 --target npu      then, on Windows, what its npu.json says
    python -m rlkit.apps.benchmarks.devices.npu -o npu.json --python PYTHON --bundles bundles/w4-hybrid

PYTHON is the interpreter of the Ryzen AI environment. Random weights cannot be made for the NPU here:
`model_generate` compiles each folder. A finished folder has no rlkit.json, so the folder it was made from must lie
beside it. The NPU multiplies 4-bit weights only; 2-bit codes are stored in 4-bit fields. Ids are handed to
onnxruntime-genai of PYTHON (`runtime/elsewhere.py`). Not run by its authors, who had no NPU; it follows the Ryzen AI
documentation 1.8.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rlkit.apps.benchmarks.devices.command import launch
from rlkit.apps.benchmarks.devices.common import Absent, Asked, Family, Ready
from rlkit.apps.benchmarks.devices.foreign import Foreign
from rlkit.apps.benchmarks.devices.present import Chip, System, older
from rlkit.export.npu import DRIVER, RYZEN_AI, TOOL
from rlkit.export.targets import target_named
from rlkit.profiles.devicerun import Part

PROVIDER = "RyzenAI"
UNMADE = (
    f"no bundle given, and {TOOL} has to finish each on Windows; follow the npu.json of `rlkit export --target npu`"
)
FIRST = re.compile(r"\b[78][0-9]4[0-9](U|HS|H|HX)?\b")  # Ryzen 7040 and 8040, with the first XDNA
HOW = "onnxruntime-genai of Ryzen AI, with the providers that the folder's configuration names"


def find(system: System, asked: Asked) -> Ready:
    """The NPU, its driver and the runtime; Absent where one of them is missing."""
    chip = _npu(system)
    if asked.python is None:
        why = f"the runtime lives in the environment of Ryzen AI {RYZEN_AI}"
        raise Absent(f"{why}; give its interpreter with --python")
    foreign = Foreign(asked.python)
    versions = foreign.versions()
    if not any("genai" in name for name in versions):
        raise Absent(f"{asked.python} has no onnxruntime-genai; give the interpreter of the Ryzen AI environment")
    part = Part("npu", PROVIDER, chip.name, chip.driver, notes=(HOW,))

    def command(bundle: Path, threads: int | None) -> list[str]:
        return foreign.command("genai", PROVIDER, bundle, threads)

    return Ready(part, versions, command)


def _npu(system: System) -> Chip:
    found = system.npus()
    if not found:
        raise Absent("no NPU: the system lists no compute accelerator")
    if system.name != "Windows":
        raise Absent(f"{found[0].name}: these flows of Ryzen AI run on Windows, and this is {system.name}")
    if FIRST.search(system.cpu()):
        raise Absent(f"{system.cpu()} has a first-generation XDNA, on which Ryzen AI runs no language models")
    if older(found[0].driver, DRIVER):
        raise Absent(f"the NPU's driver {found[0].driver} is older than {DRIVER}, which Ryzen AI {RYZEN_AI} asks for")
    return found[0]


FAMILY = Family("npu", "a Ryzen AI NPU", "npu", target_named("npu"), find, UNMADE)

if __name__ == "__main__":
    sys.exit(launch(FAMILY))
