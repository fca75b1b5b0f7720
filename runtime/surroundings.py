"""What is around: packages, execution providers and devices as the runtime sees them, hardware as the system does.

`look` asks for everything once and never raises; what decides on it (`providers`, `devices`, `doctor`) works on the
value, so that any machine can be described.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from rlkit.runtime import gpus

PLUGIN = "onnxruntime-ep-"  # how wheels with a provider as a plug-in are named
OTHER_PLUGINS = ("onnxruntime-qnn",)
KINDS = ("cpu", "gpu", "npu")
GENAI_FLAGS = ("cuda", "dml", "webgpu", "qnn", "openvino")
PACKAGES = re.compile(
    r"onnxruntime|windowsml$|optimum|transformers$|torch$|numpy$|onnx$|onnx-ir$|safetensors$|model-generate$|rlkit-edge$"
)


@dataclass(frozen=True, slots=True)
class Seen:
    """One device that an execution provider offers."""

    ep: str
    kind: str  # one of KINDS
    vendor: str
    title: str
    memory_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Plugin:
    """A provider from a wheel or from Windows' catalog, and why it could not be registered, if so."""

    package: str
    version: str
    ep: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything that decides where a model can run. `packages` holds names and versions of what may matter."""

    system: str  # Linux, Windows, Darwin, as platform.system() has it
    architecture: str
    packages: dict[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ()  # built into the installed onnxruntime
    seen: tuple[Seen, ...] = ()
    genai: frozenset[str] = frozenset()  # what the installed genai was built with, of GENAI_FLAGS
    plugins: tuple[Plugin, ...] = ()
    hardware: tuple[gpus.Hardware, ...] = ()
    vulkan: bool | None = None  # whether its loader is there, on Linux
    problems: tuple[str, ...] = ()  # what could not be asked, and why

    def installed(self, *names: str) -> tuple[str, ...]:
        """Those of the packages that are installed."""
        return tuple(name for name in names if name in self.packages)


def look() -> Surroundings:
    """Ask the system, the package manager and the runtime. Imports onnxruntime and genai, nothing heavier."""
    problems: list[str] = []
    packages = _packages()
    ort = _import("onnxruntime", problems)
    og = _import("onnxruntime_genai", problems)
    found: dict[str, Any] = {}
    if ort is not None:
        with contextlib.suppress(Exception):
            ort.disable_telemetry_events()  # nothing about this machine leaves it
        found["plugins"] = tuple(_plugins(packages, ort, og))
        found["providers"] = tuple(_asked(ort.get_available_providers, problems) or ())
        found["seen"] = tuple(_devices(ort, problems))
    if og is not None:
        flags = {name: getattr(og, f"is_{name}_available", None) for name in GENAI_FLAGS}
        found["genai"] = frozenset(name for name, ask in flags.items() if ask is not None and _asked(ask, problems))
    found |= {"hardware": gpus.hardware(), "vulkan": gpus.vulkan(), "problems": tuple(problems)}
    return Surroundings(platform.system(), platform.machine(), packages, **found)


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        with contextlib.suppress(Exception):  # a half-removed package has no name
            name = re.sub(r"[-_.]+", "-", str(distribution.metadata["Name"])).lower()
            if PACKAGES.match(name):
                found.setdefault(name, distribution.version)
    return dict(sorted(found.items()))


def _import(name: str, problems: list[str]) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a clash shows in many ways: ImportError, AttributeError, OSError of a library
        problems.append(f"{name} cannot be imported: {first_line(error)}")
        return None


def _asked(ask: Any, problems: list[str]) -> Any:
    try:
        return ask()
    except Exception as error:
        problems.append(f"{getattr(ask, '__name__', 'a question')} failed: {first_line(error)}")
        return None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _devices(ort: Any, problems: list[str]) -> Iterator[Seen]:
    for device in _asked(getattr(ort, "get_ep_devices", tuple), problems) or ():
        with contextlib.suppress(Exception):  # one that cannot be described is none to offer
            hardware = device.device
            kind = str(hardware.type).rpartition(".")[2].lower()
            facts = {**dict(hardware.metadata), **dict(device.ep_metadata)}
            title = next((facts[key] for key in ("Description", "description", "name") if facts.get(key)), "")
            yield Seen(device.ep_name, kind, str(hardware.vendor), str(title))


def _plugins(packages: dict[str, str], ort: Any, og: Any) -> Iterator[Plugin]:
    for package, version in packages.items():
        if (package.startswith(PLUGIN) or package in OTHER_PLUGINS) and version != "0.0.0":
            yield _registered_wheel(package, version, ort, og)
    if "windowsml" in packages:
        yield from _catalog(packages["windowsml"], ort, og)


def _registered_wheel(package: str, version: str, ort: Any, og: Any) -> Plugin:
    """Register what a plug-in wheel holds; those of ONNX Runtime's own scheme say where their library is."""
    short = package.removeprefix(PLUGIN)
    try:
        module = importlib.import_module(package.replace("-", "_"))
        ep = str(module.get_ep_name()) if hasattr(module, "get_ep_name") else short
        _register(short, str(module.get_library_path()), ort, og)
    except Exception as error:
        return Plugin(package, version, short, first_line(error))
    return Plugin(package, version, ep)


def _catalog(version: str, ort: Any, og: Any) -> Iterator[Plugin]:
    """Windows ML's catalog: what the system has ready is registered; nothing is downloaded."""
    try:
        catalog = importlib.import_module("windowsml").EpCatalog()
        offered = list(catalog.find_all_providers())
    except Exception as error:
        yield Plugin("windowsml", version, "catalog", first_line(error))
        return
    for provider in offered:
        problem: str | None = None
        try:
            library = str(provider.library_path or "")
            if library:
                _register(provider.name, library, ort, og)
            else:
                problem = f"not on this machine yet ({provider.ready_state})"
        except Exception as error:
            problem = first_line(error)
        yield Plugin("windowsml", str(provider.version), str(provider.name), problem)


def _register(name: str, library: str, ort: Any, og: Any) -> None:
    """In both libraries, as each may keep its own list; a second registration of the same name is none."""
    for owner in (ort, og):
        register = getattr(owner, "register_execution_provider_library", None)
        if register is not None:
            try:
                register(name, library)
            except Exception as error:
                if "already" not in str(error).lower():
                    raise
