"""GPUs and NPUs as the system shows them, whether or not a runtime can use them; never raises."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys/class")
VENDORS = {"0x1002": "AMD", "0x1022": "AMD", "0x10de": "NVIDIA", "0x8086": "Intel", "0x17cb": "Qualcomm"}
WINDOWS_CLASSES = {
    "gpu": "{4d36e968-e325-11ce-bfc1-08002be10318}",  # display adapters
    "npu": "{f01a9d53-3ff6-48d2-9f97-c8a7004be10c}",  # compute accelerators
}
WINDOWS_KEY = r"SYSTEM\CurrentControlSet\Control\Class"


@dataclass(frozen=True, slots=True)
class Hardware:
    """A GPU or NPU of this machine; memory where the system tells, its own or shared."""

    kind: str  # gpu or npu
    vendor: str
    title: str
    memory_nbytes: int | None = None


def hardware() -> tuple[Hardware, ...]:
    """Every GPU and NPU that the system shows."""
    system = platform.system()
    ask = {"Linux": linux, "Windows": windows, "Darwin": _apple}.get(system)
    found: list[Hardware] = []
    with contextlib.suppress(OSError, ValueError):
        found = list(ask()) if ask is not None else []
    return tuple(found)


def vulkan() -> bool | None:
    """Whether Linux has Vulkan's loader; None on other systems."""
    if platform.system() != "Linux":
        return None
    try:
        ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return False
    return True


def linux(root: Path = SYS) -> Iterator[Hardware]:
    """From /sys, names of NVIDIA's from its own tool."""
    named = list(_nvidia())
    yield from named
    for card in sorted(root.glob("drm/card[0-9]*")):
        device = card / "device"
        vendor = _word(device / "vendor")
        if "-" in card.name or vendor not in VENDORS or (named and VENDORS[vendor] == "NVIDIA"):
            continue  # card0-HDMI-1 is a plug; virtual displays have no vendor that computes
        memory = _word(device / "mem_info_vram_total")
        title = f"{VENDORS[vendor]} {_word(device / 'device')}"
        yield Hardware("gpu", VENDORS[vendor], title, int(memory) if memory.isdigit() else None)
    for accel in sorted(root.glob("accel/accel[0-9]*")):
        vendor = VENDORS.get(_word(accel / "device" / "vendor"), "unknown")
        yield Hardware("npu", vendor, _word(accel / "device" / "vbnv") or f"{vendor} NPU")


def _nvidia() -> Iterator[Hardware]:
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, _, memory = line.rpartition(",")
        if name:
            yield Hardware("gpu", "NVIDIA", name.strip(), _mebibytes(memory))


def _mebibytes(text: str) -> int | None:
    return int(text) * 2**20 if text.strip().isdigit() else None


def windows() -> Iterator[Hardware]:
    """From the registry: what device manager lists under display adapters and neural processors."""
    if sys.platform != "win32":
        return
    import winreg

    for kind, group in WINDOWS_CLASSES.items():
        for number in range(16):
            path = rf"{WINDOWS_KEY}\{group}\{number:04}"
            with contextlib.suppress(OSError), winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
                title = str(winreg.QueryValueEx(key, "DriverDesc")[0])
                vendor = str(winreg.QueryValueEx(key, "ProviderName")[0])
                if "basic" not in title.lower() and "remote" not in title.lower():
                    yield Hardware(kind, vendor, title)


def _apple() -> Iterator[Hardware]:
    if platform.machine() == "arm64":
        yield Hardware("gpu", "Apple", "Apple GPU")
        yield Hardware("npu", "Apple", "Apple Neural Engine")


def _word(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
