"""The processor's features and the system's GPUs, as different systems tell them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlkit.runtime import gpus, processor
from rlkit.runtime.gpus import Hardware

X64_INFO = "processor\t: 0\nmodel name\t: AMD Ryzen AI 9\nflags\t\t: fpu avx2 fma avx_vnni\n\nprocessor\t: 1\n"
ARM_INFO = "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd asimddp i8mm\n"


def told(tmp_path: Path, text: str, architecture: str) -> dict[str, bool | None]:
    (tmp_path / "cpuinfo").write_text(text)
    return processor.features(architecture, tmp_path / "cpuinfo")


def test_linux_tells_flags(tmp_path: Path) -> None:
    assert told(tmp_path, X64_INFO, "x86_64") == {
        "avx2": True,
        "fma": True,
        "avx512": False,
        "avx_vnni": True,
        "avx512_vnni": False,
        "bf16": False,
    }
    assert told(tmp_path, ARM_INFO, "aarch64") == {"dotprod": True, "i8mm": True, "bf16": False}
    assert told(tmp_path, X64_INFO, "riscv64") == {}


def test_elsewhere_numpy_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.platform, "system", lambda: "Windows")
    for found, missing, expected in (
        (["AVX2"], ["AVX512_SKX", "AVX512_CLX"], {"avx2": True, "fma": None, "avx512": False, "avx512_vnni": False}),
        (["X86_V4", "AVX512_ICL"], [], {"avx2": None, "avx512": True, "avx512_vnni": True}),
    ):  # fmt: skip
        monkeypatch.setattr(processor, "_numpy_features", lambda f=found, m=missing: (frozenset(f), frozenset(m)))
        told_ = processor.features("AMD64", tmp_path / "none")
        assert expected.items() <= told_.items() and told_["avx_vnni"] is None  # numpy has no name for it


def test_macos_tells_by_sysctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"hw.optional.arm.FEAT_DotProd": "1", "hw.optional.arm.FEAT_I8MM": "0"}

    def run(words: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        answer = answers.get(words[-1])
        return subprocess.CompletedProcess(words, 0 if answer else 1, f"{answer}\n", "")

    monkeypatch.setattr(processor.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(processor.subprocess, "run", run)
    assert processor.features("arm64", tmp_path / "none") == {"dotprod": True, "i8mm": False, "bf16": None}
    answers["machdep.cpu.brand_string"] = "Apple M4"
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert processor.cpu_name() == "Apple M4"


def test_this_processor() -> None:
    here = processor.here()
    assert here.name and set(here.features.values()) <= {True, False, None}
    found, missing = processor._numpy_features()
    assert not found & missing


def device(folder: Path, **files: str) -> None:
    (folder / "device").mkdir(parents=True)
    for name, text in files.items():
        (folder / "device" / name).write_text(f"{text}\n")


@pytest.fixture
def without_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_words: object, **_options: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(gpus.subprocess, "run", missing)


@pytest.mark.usefixtures("without_nvidia")
def test_linux_shows_gpus_and_npus(tmp_path: Path) -> None:
    device(tmp_path / "drm" / "card0", vendor="0x1002", device="0x150e", mem_info_vram_total="536870912")
    device(tmp_path / "drm" / "card1", vendor="0x1af4", device="0x1050")  # a virtual display
    device(tmp_path / "drm" / "card2", vendor="0x8086", device="0x64a0")
    device(tmp_path / "drm" / "card0-HDMI-1", vendor="0x1002")
    device(tmp_path / "accel" / "accel0", vendor="0x1022", vbnv="RyzenAI-npu4")
    assert list(gpus.linux(tmp_path)) == [
        Hardware("gpu", "AMD", "AMD 0x150e", 2**29),
        Hardware("gpu", "Intel", "Intel 0x64a0", None),
        Hardware("npu", "AMD", "RyzenAI-npu4"),
    ]
    assert list(gpus.linux(tmp_path / "nothing")) == []


def test_nvidia_is_named_by_its_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "NVIDIA H100 80GB HBM3, 81559\nGeForce, the other, [N/A]\n"
    monkeypatch.setattr(gpus.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 0, said, ""))
    device(tmp_path / "drm" / "card0", vendor="0x10de", device="0x2330")
    assert list(gpus.linux(tmp_path)) == [
        Hardware("gpu", "NVIDIA", "NVIDIA H100 80GB HBM3", 81559 * 2**20),
        Hardware("gpu", "NVIDIA", "GeForce, the other", None),
    ]


def test_apple_chips_have_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(gpus.platform, "machine", lambda: "arm64")
    assert [part.kind for part in gpus.hardware()] == ["gpu", "npu"] and gpus.vulkan() is None


def test_windows_is_asked_on_windows_only() -> None:
    assert list(gpus.windows()) == [] or sys.platform == "win32"
    assert gpus.hardware() is not None
