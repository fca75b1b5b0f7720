"""What the processor can do that decides which kernels the runtime takes, as far as the system tells."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

X64 = ("x86_64", "amd64")
ARM64 = ("aarch64", "arm64")
CPUINFO = Path("/proc/cpuinfo")

# Ours -> Linux's flags, numpy's names, macOS's names. AVX-VNNI has no name in numpy.
FEATURES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "avx2": (("avx2",), ("AVX2", "X86_V3"), ("hw.optional.avx2_0",)),
    "fma": (("fma",), ("FMA3", "X86_V3"), ("hw.optional.fma",)),
    "avx512": (("avx512bw",), ("AVX512_SKX", "X86_V4"), ("hw.optional.avx512bw",)),
    "avx_vnni": (("avx_vnni",), (), ()),
    "avx512_vnni": (("avx512_vnni",), ("AVX512_CLX", "AVX512_ICL", "AVX512_SPR"), ("hw.optional.avx512vnni",)),
    "bf16": (
        ("avx512_bf16", "amx_bf16", "bf16"),
        ("AVX512_SPR", "AVX512_BF16"),
        ("hw.optional.arm.FEAT_BF16",),
    ),
    "dotprod": (("asimddp",), ("ASIMDDP",), ("hw.optional.arm.FEAT_DotProd",)),
    "i8mm": (("i8mm",), ("ASIMDI8MM", "I8MM"), ("hw.optional.arm.FEAT_I8MM",)),
}
X64_FEATURES = ("avx2", "fma", "avx512", "avx_vnni", "avx512_vnni", "bf16")
ARM64_FEATURES = ("dotprod", "i8mm", "bf16")


@dataclass(frozen=True, slots=True)
class Processor:
    """Its name, architecture, and features: True or False, None where the system does not tell."""

    name: str
    architecture: str  # as platform.machine() has it
    features: dict[str, bool | None]

    @property
    def is_x64(self) -> bool:
        """Whether it is an x86 of 64 bits."""
        return self.architecture.lower() in X64

    @property
    def is_arm64(self) -> bool:
        """Whether it is an ARM of 64 bits."""
        return self.architecture.lower() in ARM64


def here() -> Processor:
    """This machine's; never raises."""
    architecture = platform.machine() or "unknown"
    return Processor(cpu_name(), architecture, features(architecture))


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        named = _sysctl(["machdep.cpu.brand_string"]).get("machdep.cpu.brand_string")
        if named:
            return named
    if sys.platform == "win32":  # platform.processor() knows family and stepping only
        import winreg

        place = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with contextlib.suppress(OSError), winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, place) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def features(architecture: str, cpuinfo: Path = CPUINFO) -> dict[str, bool | None]:
    """Every feature that this architecture may have."""
    low = architecture.lower()
    wanted = X64_FEATURES if low in X64 else ARM64_FEATURES if low in ARM64 else ()
    flags = _linux_flags(cpuinfo)
    if flags:
        return {name: any(flag in flags for flag in FEATURES[name][0]) for name in wanted}
    if platform.system() == "Darwin":
        told = _sysctl([key for name in wanted for key in FEATURES[name][2]])
        return {name: _either(told.get(key) for key in FEATURES[name][2]) for name in wanted}
    found, missing = _numpy_features()
    return {name: _by_numpy(FEATURES[name][1], found, missing) for name in wanted}


def _linux_flags(cpuinfo: Path) -> frozenset[str]:
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("flags", "features"):
                return frozenset(value.split())
    return frozenset()


def _sysctl(keys: Iterable[str]) -> dict[str, str]:
    found = {}
    for key in keys:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5)
            if done.returncode == 0:
                found[key] = done.stdout.strip()
    return found


def _either(values: Iterable[str | None]) -> bool | None:
    told = [value for value in values if value is not None]
    return any(value == "1" for value in told) if told else None


def _numpy_features() -> tuple[frozenset[str], frozenset[str]]:
    """What numpy found here and what it looked for in vain."""
    import numpy as np

    try:
        simd = np.show_config(mode="dicts")["SIMD Extensions"]
    except (KeyError, TypeError, ImportError):  # built without, or another numpy
        return frozenset(), frozenset()
    return frozenset([*simd.get("baseline", ()), *simd.get("found", ())]), frozenset(simd.get("not found", ()))


def _by_numpy(names: tuple[str, ...], found: frozenset[str], missing: frozenset[str]) -> bool | None:
    if found.intersection(names):
        return True
    return False if missing.intersection(names) else None
