"""Runs ONNX files as a list of jobs says, by whatever onnxruntime the interpreter has, rlkit there or not.

    python -I onnxjobs.py jobs.json

    jobs.json   {"threads": n, "jobs": [{"name", "model": path, "provider", "strict": bool, "runs": runs}, ...]}
    runs        [{"feeds": path, "out": path}, ...], files of named arrays: save_arrays, load_arrays

It answers with JSON lines: first {"onnxruntime", "providers", "vulkan": drivers}, then for each job {"name",
"placed": {op: providers that ran it}} or {"name", "error"}. A provider that cannot be had is
an error, never another provider's result; strict jobs fail if a single node would run on the CPU instead.

Nothing but numpy and onnxruntime is imported, so that one environment can try another's runtime.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CPU = "CPUExecutionProvider"
SILENT = 4  # what goes wrong is raised
_VULKAN_11 = (1 << 22) | (1 << 12)
_PROPERTIES_2, _SUBGROUP_PROPERTIES = 1000059001, 1000094000  # VkStructureType
_NAME = slice(36, 36 + 256)  # of VkPhysicalDeviceProperties2: header 16, five numbers 20, then the device's name


def save_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write named arrays; names may hold what file names may not."""
    columns = {str(index): array for index, array in enumerate(arrays.values())}
    np.savez(path, names=np.array(list(arrays), dtype=np.str_), allow_pickle=False, **columns)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read what save_arrays wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return {str(name): stored[str(index)] for index, name in enumerate(stored["names"])}


def vulkan_drivers() -> list[dict[str, Any]]:
    """The devices that Vulkan offers: name, and how many invocations share a subgroup. None without a Vulkan loader."""
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return []
    application = ctypes.create_string_buffer(struct.pack("=I4xQQIxxxxQII", 0, 0, 0, 0, 0, 0, _VULKAN_11), 48)
    asked = struct.pack("=I4xQI4xQI4xQI4xQ", 1, 0, 0, ctypes.addressof(application), 0, 0, 0, 0)
    instance = ctypes.c_void_p()
    if vulkan.vkCreateInstance(ctypes.create_string_buffer(asked, 64), None, ctypes.byref(instance)):
        return []
    count = ctypes.c_uint32()
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    devices = (ctypes.c_void_p * count.value)()
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
    found = [_driver(vulkan, device or 0) for device in devices]
    vulkan.vkDestroyInstance(instance, None)
    return found


def _driver(vulkan: Any, device: int) -> dict[str, Any]:
    subgroup = ctypes.create_string_buffer(struct.pack("=I4xQIIII", _SUBGROUP_PROPERTIES, 0, 0, 0, 0, 0), 32)
    properties = ctypes.create_string_buffer(2048)
    struct.pack_into("=I4xQ", properties, 0, _PROPERTIES_2, ctypes.addressof(subgroup))
    vulkan.vkGetPhysicalDeviceProperties2(ctypes.c_void_p(device), properties)
    name = properties.raw[_NAME].split(b"\0")[0].decode(errors="replace")
    return {"name": name, "subgroup": struct.unpack_from("=I", subgroup, 16)[0]}


def run_job(job: dict[str, Any], threads: int, scratch: str) -> dict[str, Any]:
    """Run one model on all its feeds; the answer says which provider ran which operator."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = SILENT
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # nodes as they are written
    options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "profile")
    if job.get("strict"):
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(job["model"], options, providers=[job["provider"]], enable_fallback=0)
    if session.get_providers()[0] != job["provider"]:
        raise RuntimeError(f"onnxruntime gave {session.get_providers()[0]} instead of {job['provider']}")
    names = [value.name for value in session.get_outputs()]
    for run in job["runs"]:
        save_arrays(
            Path(run["out"]), dict(zip(names, session.run(names, load_arrays(Path(run["feeds"]))), strict=True))
        )
    return {"name": job["name"], "placed": _placed(Path(session.end_profiling()))}


def _placed(profile: Path) -> dict[str, list[str]]:
    """Operator -> providers that ran it, from the runtime's own record."""
    found: dict[str, set[str]] = {}
    for event in json.loads(profile.read_text()):
        about = event.get("args", {})
        if event.get("cat") == "Node" and about.get("provider"):
            found.setdefault(about["op_name"], set()).add(about["provider"])
    profile.unlink()
    return {op: sorted(providers) for op, providers in sorted(found.items())}


def main(argv: list[str]) -> None:
    """Answer for every job of the file on the command line."""
    import onnxruntime as ort

    asked = json.loads(Path(argv[0]).read_text())
    vulkan = vulkan_drivers()
    facts = {"onnxruntime": ort.__version__, "providers": ort.get_available_providers(), "vulkan": vulkan}
    print(json.dumps(facts), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for job in asked["jobs"]:
            try:
                answer = run_job(job, asked["threads"], scratch)
            except Exception as error:  # of any kind the runtime has: the next job may fare better
                answer = {"name": job["name"], "error": str(error) or type(error).__name__}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
