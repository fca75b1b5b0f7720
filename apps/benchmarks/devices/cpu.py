"""The standard set on this machine's CPU.

    rlkit calibrate
    python -m rlkit.apps.benchmarks.devices.cpu -o cpu.json
    python -m rlkit.apps.benchmarks.devices.cpu -o cpu.json --bundles out/bundles

Each model runs in onnxruntime-genai, in a process of its own (`profiles/worker.py`).
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

from rlkit.apps.benchmarks.devices.command import launch
from rlkit.apps.benchmarks.devices.common import Asked, Family, Ready
from rlkit.apps.benchmarks.devices.present import System
from rlkit.export.targets import target_named
from rlkit.profiles import worker
from rlkit.profiles.benchfile import PACKAGES
from rlkit.profiles.devicerun import Part
from rlkit.runtime.processor import features


def find(system: System, asked: Asked) -> Ready:
    """A CPU is always there."""
    if asked.python is not None:
        raise ValueError("--python is for other runtimes; the CPU is measured with this interpreter's, leave it out")
    has = ", ".join(name for name, there in features(platform.machine()).items() if there)
    part = Part("cpu", "CPUExecutionProvider", system.cpu(), notes=(f"instructions: {has}",) if has else ())
    return Ready(part, {name: version(name) for name in PACKAGES}, _command)


def _command(bundle: Path, threads: int | None) -> list[str]:
    return worker.command(bundle, "cpu", threads)


FAMILY = Family("cpu", "this machine's CPU", "cpu", target_named("cpu"), find)

if __name__ == "__main__":
    sys.exit(launch(FAMILY))
