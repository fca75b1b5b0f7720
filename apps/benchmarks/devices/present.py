"""What the system says of graphics and neural processors: names and drivers, without any runtime.

Windows is asked through its management interface (PowerShell's Get-CimInstance), Linux through Vulkan and /sys. A
software driver is no device: it computes on the CPU.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.runtime import onnxjobs
from rlkit.runtime.processor import cpu_name

SOFTWARE = re.compile(r"swiftshader|llvmpipe|lavapipe|basic render|basic display|remote display", re.IGNORECASE)
SECONDS = 60.0  # PowerShell may take long to start
_SHELL = ("powershell", "-NoProfile", "-NonInteractive", "-Command")
_UTF8 = "[Console]::OutputEncoding = [Text.Encoding]::UTF8; "
GPUS = "Get-CimInstance Win32_VideoController | Select-Object Name, DriverVersion | ConvertTo-Json -Compress"
NPUS = (
    "Get-CimInstance Win32_PnPSignedDriver -Filter \"DeviceClass='COMPUTEACCELERATOR'\" | "
    "Select-Object @{n='Name';e={$_.DeviceName}}, DriverVersion | ConvertTo-Json -Compress"
)


@dataclass(frozen=True, slots=True)
class Chip:
    """A processor and its driver, as the system names them; the driver may be unknown ("")."""

    name: str
    driver: str = ""

    @property
    def software(self) -> bool:
        """Whether it only looks like a device."""
        return bool(SOFTWARE.search(self.name))


def ask(words: Sequence[str]) -> str:
    """What a command prints; OSError where it cannot be run or fails."""
    try:
        how: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "timeout": SECONDS}
        done = subprocess.run(words, capture_output=True, check=True, **how)
    except subprocess.SubprocessError as error:
        raise OSError(f"{words[0]} failed: {error}") from error
    return str(done.stdout)


def _vulkan() -> list[str]:
    return [str(device["name"]) for device in onnxjobs.vulkan_drivers()]


@dataclass(frozen=True, slots=True)
class System:
    """The machine as it is asked; tests give other answers."""

    name: str = platform.system()  # Windows, Linux, Darwin
    ask: Callable[[Sequence[str]], str] = ask
    vulkan: Callable[[], list[str]] = _vulkan
    cpu: Callable[[], str] = cpu_name
    root: Path = Path("/")

    def gpus(self) -> list[Chip]:
        """Graphics processors, software drivers left out."""
        found = self._windows(GPUS) if self.name == "Windows" else [Chip(name) for name in self.vulkan()]
        return [chip for chip in found if not chip.software]

    def npus(self) -> list[Chip]:
        """Neural processors."""
        if self.name == "Windows":
            return self._windows(NPUS)
        events = sorted(self.root.glob("sys/class/accel/accel*/device/uevent"))
        found = [re.search(r"^DRIVER=(.+)$", event.read_text(), re.MULTILINE) for event in events]
        return [Chip(f"accelerator of {match[1]}", match[1]) for match in found if match]

    def _windows(self, query: str) -> list[Chip]:
        try:
            said = self.ask([*_SHELL, _UTF8 + query]).strip()
            rows: Any = json.loads(said) if said else []
        except (OSError, ValueError):
            return []  # nothing is known, so nothing is there
        rows = rows if isinstance(rows, list) else [rows]  # a single one comes without its list
        return [Chip(str(row["Name"]), str(row.get("DriverVersion") or "")) for row in rows if row.get("Name")]


def older(driver: str, least: str) -> bool:
    """Whether one version of a driver comes before another; an unknown one does not."""
    mine, needed = ([int(part) for part in re.findall(r"\d+", text)] for text in (driver, least))
    return bool(mine) and mine < needed
