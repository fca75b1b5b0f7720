"""Every execution provider that can run a bundle: what carries it, what it needs, whether it is here, and the fix.

Ready means: a device that the runtime offers and that genai can open. Everything else has its reason and the command
that changes it. Works on a `Surroundings` value alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rlkit.runtime.gpus import Hardware
from rlkit.runtime.surroundings import Surroundings

RUNTIMES = {  # wheels that hold the Python package onnxruntime: one of them at a time
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "cuda",
    "onnxruntime-directml": "dml",
    "onnxruntime-webgpu": "webgpu",
    "onnxruntime-openvino": "openvino",
    "onnxruntime-windowsml": "Windows ML",
    "onnxruntime-rocm": "rocm",
    "onnxruntime-migraphx": "migraphx",
    "onnxruntime-trt-rtx": "TensorRT RTX",
}
GENAIS = {  # likewise onnxruntime_genai, and the runtime each is made for
    "onnxruntime-genai": "onnxruntime",
    "onnxruntime-genai-cuda": "onnxruntime-gpu",
    "onnxruntime-genai-directml": "onnxruntime-directml",
    "onnxruntime-genai-winml": "onnxruntime-windowsml",
    "onnxruntime-genai-directml-ryzenai": "onnxruntime-directml",
}


class State(StrEnum):
    """What stands between a provider and its use."""

    READY = "ready"
    NO_DEVICE = "installed, no device"
    NOT_INSTALLED = "not installed"
    CLASH = "clash"
    BROKEN = "installed, does not load"
    ELSEWHERE = "not on this system"


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider by the name that --device takes; `genai` is the name that genai's configuration takes."""

    name: str
    genai: str
    eps: tuple[str, ...]  # the runtime's names
    kinds: tuple[str, ...]
    title: str
    wheels: tuple[str, ...]  # any of these carries it
    systems: tuple[str, ...]  # (system, or system architecture) where there is one
    fix: str  # for a system that can have it
    needs: str  # hardware and drivers in words, for the case of no device
    vendors: tuple[str, ...] = ()  # of hardware it can use; none: any


_PLAIN = "pip uninstall -y onnxruntime onnxruntime-genai && pip install"
_OWN = "in an environment of its own: python -m venv other && other/bin/pip install"
VULKAN = "apt install libvulkan1 mesa-vulkan-drivers"
RYZEN = "https://ryzenai.docs.amd.com/en/latest/inst.html"

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            "cpu",
            "cpu",
            ("CPUExecutionProvider",),
            ("cpu",),
            "the processor",
            ("onnxruntime",),
            ("Linux", "Windows", "Darwin"),
            "pip install --force-reinstall 'onnxruntime>=1.31,<1.32' 'onnxruntime-genai>=0.18,<0.19'",
            "any processor",
        ),
        Provider(
            "webgpu",
            "webgpu",
            ("WebGpuExecutionProvider",),
            ("gpu",),
            "WebGPU: any GPU, by Vulkan, Direct3D 12 or Metal; the one with 2-bit kernels",
            ("onnxruntime-ep-webgpu", "onnxruntime-webgpu"),
            ("Windows AMD64", "Windows ARM64", "Linux x86_64", "Darwin arm64"),
            "pip install onnxruntime-ep-webgpu",
            f"a GPU with its driver; on Linux also Vulkan's loader: {VULKAN}",
        ),
        Provider(
            "cuda",
            "cuda",
            ("CUDAExecutionProvider",),
            ("gpu",),
            "NVIDIA CUDA",
            ("onnxruntime-gpu",),
            ("Linux x86_64", "Linux aarch64", "Windows AMD64"),
            f"{_PLAIN} onnxruntime-gpu onnxruntime-genai-cuda",
            "an NVIDIA GPU with its driver (nvidia-smi must list it), CUDA and cuDNN: pip install"
            " 'onnxruntime-gpu[cuda,cudnn]'",
            ("NVIDIA",),
        ),
        Provider(
            "nvtensorrtrtx",
            "NvTensorRtRtx",
            ("NvTensorRTRTXExecutionProvider", "NvTensorRtRtxExecutionProvider"),
            ("gpu",),
            "NVIDIA TensorRT for RTX",
            ("onnxruntime-ep-nv-tensorrt-rtx-cu12", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-trt-rtx"),
            ("Linux x86_64", "Windows AMD64"),
            "pip install onnxruntime-ep-nv-tensorrt-rtx",
            "an NVIDIA RTX GPU with its driver (nvidia-smi must list it)",
            ("NVIDIA",),
        ),
        Provider(
            "dml",
            "dml",
            ("DmlExecutionProvider",),
            ("gpu",),
            "DirectML (sustained engineering only; prefer webgpu)",
            ("onnxruntime-directml", "onnxruntime-genai-directml"),
            ("Windows",),
            f"{_OWN} onnxruntime-genai-directml==0.13.1 onnxruntime-directml==1.24.4; or prefer webgpu:"
            " pip install onnxruntime-ep-webgpu",
            "a GPU with a Direct3D 12 driver",
        ),
        Provider(
            "openvino",
            "OpenVINO",
            ("OpenVINOExecutionProvider",),
            ("gpu", "npu", "cpu"),
            "Intel OpenVINO",
            ("onnxruntime-ep-openvino", "onnxruntime-openvino"),
            ("Linux x86_64", "Windows AMD64"),
            "pip install onnxruntime-ep-openvino",
            "an Intel GPU or NPU with its driver",
            ("Intel",),
        ),
        Provider(
            "qnn",
            "QNN",
            ("QNNExecutionProvider",),
            ("npu",),
            "Qualcomm Hexagon",
            ("onnxruntime-qnn",),
            ("Windows ARM64", "Windows AMD64"),
            "pip install onnxruntime-qnn",
            "a Snapdragon with a Hexagon NPU and its driver",
            ("Qualcomm",),
        ),
        Provider(
            "vitisai",
            "VitisAI",
            ("VitisAIExecutionProvider",),
            ("npu",),
            "AMD Vitis AI, from Windows ML's catalog",
            ("windowsml",),
            ("Windows",),
            "pip install windowsml onnxruntime-windowsml onnxruntime-genai-winml, then let Windows fetch the provider:"
            ' python -c "import windowsml; [p.ensure_ready() for p in windowsml.EpCatalog().find_all_providers()'
            " if p.name == 'VitisAIExecutionProvider']\"",
            "a Ryzen AI 300 or newer, Windows 11 24H2, NPU driver 32.0.203.280 or newer",
            ("AMD",),
        ),
        Provider(
            "ryzenai",
            "RyzenAI",
            ("RyzenAILightExecutionProvider",),
            ("npu",),
            "AMD Ryzen AI software",
            ("onnxruntime-genai-directml-ryzenai",),
            ("Windows", "Linux x86_64"),
            f"install Ryzen AI 1.8 ({RYZEN}) and use its environment; not the packages of that name on the public"
            " index, which are old",
            "a Ryzen AI 300 or newer (XDNA 2; the 7040 and 8040 cannot run language models), NPU driver 32.0.203.280"
            " or newer",
            ("AMD",),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Standing:
    """A provider here: its state, why, and the fix where there is one."""

    provider: Provider
    state: State
    why: str
    fix: str | None = None


def standings(around: Surroundings) -> tuple[Standing, ...]:
    """Every provider of the table, ready ones first, then in the table's order."""
    found = [standing(provider, around) for provider in PROVIDERS.values()]
    return tuple(sorted(found, key=lambda one: one.state is not State.READY))


def standing(provider: Provider, around: Surroundings) -> Standing:
    """What stands between this provider and its use."""
    devices = [seen for seen in around.seen if seen.ep in provider.eps]
    built_in = any(ep in around.providers for ep in provider.eps)
    if devices or (built_in and provider.name == "cpu"):
        return _offered(provider, around, [seen.title or seen.vendor for seen in devices])
    if not _exists_here(provider, around):
        return Standing(provider, State.ELSEWHERE, f"there is none for {around.system} {around.architecture}")
    broken = _broken(provider, around)
    if broken is not None:
        return broken
    if built_in and fitting(provider, around):  # not every built-in provider lists its devices
        return _offered(provider, around, [part.title for part in fitting(provider, around)])
    if built_in or _registered(provider, around):
        return _without_device(provider, around)
    return _absent(provider, around)


def _offered(provider: Provider, around: Surroundings, titles: list[str]) -> Standing:
    """The runtime has devices for it: genai must be able to open them as well."""
    names = ", ".join(dict.fromkeys(title for title in titles if title)) or provider.title
    if provider.name in ("cuda", "dml") and provider.name not in around.genai:
        wheel = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}[provider.name]
        why = f"onnxruntime offers {names}, but the installed genai was built without {provider.name}"
        return Standing(provider, State.CLASH, why, f"pip uninstall -y onnxruntime-genai && pip install {wheel}")
    if not _genais(around):
        why = f"onnxruntime offers {names}, but onnxruntime-genai is missing or does not load"
        return Standing(provider, State.NOT_INSTALLED, why, PROVIDERS["cpu"].fix)
    return Standing(provider, State.READY, names)


def _genais(around: Surroundings) -> bool:
    loads = not any(problem.startswith("onnxruntime_genai ") for problem in around.problems)
    return loads and bool(around.installed(*GENAIS))


def _exists_here(provider: Provider, around: Surroundings) -> bool:
    return any(place in (around.system, f"{around.system} {around.architecture}") for place in provider.systems)


def _broken(provider: Provider, around: Surroundings) -> Standing | None:
    for plugin in around.plugins:
        if plugin.problem and (plugin.package in provider.wheels or plugin.ep in provider.eps):
            mine = plugin.package != "windowsml" or plugin.ep in (*provider.eps, "catalog")
            if mine:
                why = f"{plugin.package} {plugin.version}: {plugin.problem}"
                return Standing(provider, State.BROKEN, why, _load_fix(provider, plugin.problem))
    if provider.name == "cpu" and around.problems:
        return Standing(provider, State.BROKEN, "; ".join(around.problems), provider.fix)
    return None


def _load_fix(provider: Provider, problem: str) -> str:
    if "libvulkan" in problem:
        return VULKAN
    return provider.fix


def _registered(provider: Provider, around: Surroundings) -> bool:
    return any(plugin.ep in provider.eps or plugin.package in provider.wheels for plugin in around.plugins)


def _without_device(provider: Provider, around: Surroundings) -> Standing:
    shown = ", ".join(part.title for part in fitting(provider, around))
    why = (
        f"the system shows {shown}, but the runtime does not"
        if shown
        else f"no {' or '.join(provider.kinds)} was found"
    )
    if provider.name == "webgpu" and around.vulkan is False:
        return Standing(provider, State.NO_DEVICE, f"{why}; libvulkan.so.1 is missing", VULKAN)
    return Standing(provider, State.NO_DEVICE, why, f"needs {provider.needs}")


def _absent(provider: Provider, around: Surroundings) -> Standing:
    others = [name for name in around.installed(*provider.wheels) if name in RUNTIMES]
    if others:  # its wheel is there, but another one's files lie over it
        why = f"{others[0]} is installed, but another onnxruntime took its place"
        rivals = " ".join(around.installed(*RUNTIMES))
        return Standing(provider, State.CLASH, why, f"pip uninstall -y {rivals} && pip install {others[0]}")
    shown = ", ".join(part.title for part in fitting(provider, around))
    why = f"for {shown}" if shown else f"needs {provider.needs}"
    return Standing(provider, State.NOT_INSTALLED, why, provider.fix)


def fitting(provider: Provider, around: Surroundings) -> list[Hardware]:
    """The hardware of this machine that the provider could use."""
    return [
        part
        for part in around.hardware
        if part.kind in provider.kinds
        and (not provider.vendors or any(vendor.lower() in part.vendor.lower() for vendor in provider.vendors))
        and not (part.vendor == "Apple" and part.kind == "npu")
    ]
