"""Which device a bundle runs on: what was asked for, or an error with the reason and the fix; auto says why."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

import around
from rlkit.runtime import devices, surroundings
from rlkit.runtime.devices import choose, seen
from rlkit.runtime.surroundings import Plugin, Seen


def test_the_processor_is_always_there_and_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "look", lambda: pytest.fail("looked around"))
    for asked in ("cpu", "CPU ", "auto"):
        choice = choose(asked, "cpu")
        assert (choice.device.name, choice.device.kind, choice.device.provider) == ("cpu", "cpu", "cpu")
        assert choice.device.memory_nbytes and choice.why
    assert "made for webgpu" in choose("cpu", "webgpu").why


def test_choosing_the_processor_imports_no_runtime() -> None:
    program = (
        "import sys; from rlkit.runtime.devices import choose; choose('auto', 'cpu');"
        "assert not {'onnxruntime', 'onnxruntime_genai', 'torch', 'onnx'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_auto_takes_the_gpu_for_a_bundle_that_is_made_for_it() -> None:
    choice = choose("auto", "webgpu", around.with_webgpu(around.WINDOWS))
    assert (choice.device.provider, choice.device.kind) == ("webgpu", "gpu")
    assert choice.device.memory_nbytes == 2**33  # as the system knows of its only GPU of that vendor
    assert choice.why == "AMD Radeon 890M by webgpu: the best here for a bundle made for webgpu"


def test_auto_falls_to_the_processor_and_says_what_was_missing() -> None:
    choice = choose("auto", "webgpu", around.WINDOWS)
    assert choice.device.name == "cpu"
    assert choice.why == "the processor, as webgpu is not installed (for AMD Radeon 890M)"
    choice = choose("auto", "npu", around.LINUX)
    assert "ryzenai is not installed" in choice.why and "vitisai is not on this system" in choice.why


def test_a_missing_npu_is_an_error_with_the_reason_and_the_fix() -> None:
    with pytest.raises(ValueError, match=r"no npu to run on: ryzenai is not installed \(for NPU Comp.*Ryzen AI 1\.8"):
        choose("npu", "npu", around.WINDOWS)
    with pytest.raises(ValueError, match=r"a bundle made for cpu does not run on npu; .* --target npu"):
        choose("npu", "cpu", around.WINDOWS)


def test_a_missing_gpu_is_an_error_with_the_command() -> None:
    with pytest.raises(ValueError, match=r"no webgpu to run on: .*; pip install onnxruntime-ep-webgpu$"):
        choose("webgpu", "webgpu", around.LINUX)
    with pytest.raises(ValueError, match=r"no gpu to run on: webgpu is not installed .*rlkit doctor"):
        choose("gpu", "webgpu", around.LINUX)


def test_what_is_nearest_to_use_is_named_first() -> None:
    there = around.with_webgpu(around.LINUX, device=False)
    with pytest.raises(ValueError, match=r"webgpu is installed, no device .*no gpu was found.*libvulkan1"):
        choose("gpu", "webgpu", there)
    broken = around.with_webgpu(around.LINUX, device=False, problem="libvulkan.so.1: cannot open shared object file")
    with pytest.raises(ValueError, match=r"does not load .*libvulkan.so.1.*; apt install libvulkan1"):
        choose("webgpu", "webgpu", broken)


def test_another_provider_runs_a_bundle_only_where_it_is_asked_for() -> None:
    there = around.with_webgpu(around.WINDOWS)
    assert choose("auto", "cpu", there).device.name == "cpu"
    choice = choose("gpu", "cpu", there)
    assert choice.device.name == "webgpu" and "meant for cpu" in choice.why
    with pytest.raises(ValueError, match=r"does not run on qnn; export it again with --target npu"):
        choose("qnn", "webgpu", there)


def test_a_gpu_that_genai_was_not_built_for_is_a_clash() -> None:
    gpu = Seen("CUDAExecutionProvider", "gpu", "NVIDIA", "GeForce RTX 5090")
    there = replace(around.LINUX, seen=(around.PROCESSOR, gpu))
    with pytest.raises(ValueError, match=r"built without cuda\); pip uninstall -y onnxruntime-genai && pip install on"):
        choose("cuda", "cpu", there)
    assert choose("cuda", "cpu", replace(there, genai=frozenset(["cuda"]))).device.kind == "gpu"


def test_a_built_in_provider_that_lists_no_devices_has_those_of_the_system() -> None:
    there = replace(
        around.LINUX, providers=("CUDAExecutionProvider", "CPUExecutionProvider"), genai=frozenset(["cuda"])
    )
    with pytest.raises(ValueError, match="no cuda to run on: cuda is installed, no device"):
        choose("cuda", "cpu", there)
    with pytest.raises(ValueError, match="no cuda to run on: cuda is installed, no device"):
        choose("cuda", "cpu", replace(there, hardware=(around.RADEON,)))
    device = choose("cuda", "cpu", replace(there, hardware=(around.GEFORCE, around.GEFORCE))).device
    assert (device.name, device.title, device.memory_nbytes, device.source) == (
        "cuda",
        "GeForce RTX 5090",
        2**35,
        "the system",
    )


def test_an_npu_of_a_provider_with_several_kinds_is_found_by_kind() -> None:
    parts = (Seen("OpenVINOExecutionProvider", kind, "Intel", f"Intel {kind}") for kind in ("cpu", "gpu", "npu"))
    there = replace(around.LINUX, seen=(around.PROCESSOR, *parts))
    assert choose("npu", "somebody's", there).device.title == "Intel npu"
    assert [device.name for device in seen(there)] == ["cpu", "openvino", "openvino:1", "openvino:2"]


@pytest.mark.parametrize("asked", ["", "tpu", "gpu0", "../cpu", "webgpu:1"])
def test_unknown_devices_are_refused(asked: str) -> None:
    with pytest.raises(ValueError, match=r"does not exist; use auto, cpu, gpu, npu, webgpu"):
        choose(asked, "cpu", around.LINUX)


@pytest.mark.parametrize(
    "where", [around.LINUX, around.WINDOWS, around.WINDOWS_ARM, around.MAC, around.STRANGE], ids=lambda one: one.system
)
def test_any_machine_can_be_asked(where: surroundings.Surroundings) -> None:
    for target in (*devices.RUNS_ON, "unknown"):
        assert choose("auto", target, where).device.name == "cpu"
    for asked in ("gpu", "npu", "cuda", "dml", "webgpu"):
        with pytest.raises(ValueError, match=r"no .* to run on|does not run on"):
            choose(asked, "webgpu", where)


def test_the_catalog_of_windows_says_what_is_not_fetched_yet() -> None:
    fetched = Plugin("windowsml", "1.8", "VitisAIExecutionProvider", "not on this machine yet (NotPresent)")
    there = replace(around.with_packages(around.WINDOWS, windowsml="2.5.96"), plugins=(fetched,))
    with pytest.raises(ValueError, match=r"vitisai is installed, does not load \(windowsml 1.8: not on this machine"):
        choose("vitisai", "npu", there)
    ready = replace(there, seen=(Seen("VitisAIExecutionProvider", "npu", "AMD", "XDNA 2"),))
    assert choose("auto", "npu", ready).device.provider == "VitisAI"


def test_this_machine_can_be_looked_at() -> None:
    found = surroundings.look()
    assert found.problems == () and found.packages["onnxruntime"].startswith("1.31")
    assert "CPUExecutionProvider" in found.providers
    assert seen(found)[0].name == "cpu"
    assert seen(replace(found, problems=("onnxruntime_genai cannot be imported: x",))) == ()
