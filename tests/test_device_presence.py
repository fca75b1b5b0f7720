"""What device scripts find on a machine: GPUs, NPUs, drivers and runtimes, on systems that are described."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from rlkit.apps.benchmarks.devices import common, directml, foreign, npu, present, webgpu
from rlkit.apps.benchmarks.devices.command import launch
from rlkit.apps.benchmarks.devices.present import Chip
from rlkit.export.build import export_bundle
from rlkit.profiles.devicerun import read_run
from worlds import WORDS, World, absent, asked, reasons, windows


@pytest.fixture(autouse=True)
def no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("devices")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


@pytest.fixture
def world(bundle: Path) -> World:
    return World(bundle)


def test_without_a_device_everything_is_skipped_with_the_reason(world: World, tmp_path: Path) -> None:
    assert absent(webgpu.FAMILY, world, tmp_path / "webgpu.json").startswith("no GPU")
    assert absent(directml.FAMILY, world, tmp_path / "dml.json") == "DirectML is a part of Windows, and this is Linux"
    assert absent(npu.FAMILY, world, tmp_path / "npu.json").startswith("no NPU")


def test_software_drivers_are_no_gpus(bundle: Path, tmp_path: Path) -> None:
    world = World(bundle, vulkan=lambda: ["llvmpipe (LLVM 15)", "SwiftShader Device (Subzero)"])
    assert absent(webgpu.FAMILY, world, tmp_path / "webgpu.json").startswith("no GPU")
    basic = windows(bundle, gpus='{"Name":"Microsoft Basic Display Adapter","DriverVersion":"10.0"}')
    assert absent(directml.FAMILY, basic, tmp_path / "dml.json").startswith("no GPU")


@pytest.mark.parametrize(
    ("npus", "processor", "words", "why"),
    [
        ("", "AMD Ryzen AI 9 HX 370", (), "no NPU"),
        ("not json", "AMD Ryzen AI 9 HX 370", (), "no NPU"),
        ('{"Name":"NPU","DriverVersion":"32.0.203.999"}', "AMD Ryzen 7 7840U w/ Radeon", (), "first-generation XDNA"),
        (
            '{"Name":"NPU","DriverVersion":"32.0.203.240"}',
            "AMD Ryzen AI 9",
            (),
            "32.0.203.240 is older than 32.0.203.280",
        ),
        ('{"Name":"NPU","DriverVersion":"32.0.204.1"}', "AMD Ryzen AI 9", (), "give its interpreter with --python"),
        ('{"Name":"NPU"}', "AMD Ryzen AI 9", ("--python", "no/such/python"), "does not run"),
    ],
)
def test_an_npu_needs_its_driver_and_its_environment(
    npus: str, processor: str, words: tuple[str, ...], why: str, bundle: Path, tmp_path: Path
) -> None:
    world = windows(bundle, npus=npus, cpu_name=processor)
    assert why in absent(npu.FAMILY, world, tmp_path / "npu.json", *words)


def test_an_npu_on_linux_is_seen_but_not_used(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "sys/class/accel/accel0/device"
    place.mkdir(parents=True)
    (place / "uevent").write_text("DRIVER=amdxdna\nPCI_ID=1022:17F0\n")
    world = World(bundle, root=tmp_path)
    why = absent(npu.FAMILY, world, tmp_path / "npu.json")
    assert why == "accelerator of amdxdna: these flows of Ryzen AI run on Windows, and this is Linux"


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What other environments say they have."""
    facts = {"versions": {"onnxruntime-x": "1.0", "onnxruntime-genai-x": "0.14"}, "providers": ["CPUExecutionProvider"]}
    monkeypatch.setattr(foreign.Foreign, "facts", lambda _self: facts)
    return facts


def test_a_gpu_by_webgpu_is_measured_in_another_environment(
    bundle: Path, tmp_path: Path, runtimes: dict[str, Any]
) -> None:
    world, out = World(bundle, vulkan=lambda: ["AMD Radeon 890M (RADV)"]), tmp_path / "webgpu.json"
    words = ("--python", sys.executable)
    assert "has no WebGpuExecutionProvider" in absent(webgpu.FAMILY, world, out, *words)
    runtimes["providers"].append("WebGpuExecutionProvider")
    assert reasons(world, webgpu.FAMILY, out, *words) == []
    found = read_run(out)
    assert len(found.rows) == 6 and not found.part.software
    assert found.part.name == "AMD Radeon 890M (RADV)" and found.versions["onnxruntime-x"] == "1.0"
    assert world.commands[0][3:6] == ["onnx", "webgpu", "0"] and world.variables[0] == {}
    assert read_run(out).rows[1].series.nbytes_per_token  # its cache is of float16


def test_a_gpu_by_directml_is_measured_in_another_environment(
    bundle: Path, tmp_path: Path, runtimes: dict[str, Any]
) -> None:
    world, out = windows(bundle), tmp_path / "dml.json"
    runtimes["providers"].append("DmlExecutionProvider")
    assert reasons(world, directml.FAMILY, out, "--python", sys.executable) == []
    found = read_run(out)
    assert (found.part.name, found.part.driver, len(found.rows)) == ("AMD Radeon(TM) 890M", "32.0.1", 6)
    assert world.commands[0][3:6] == ["onnx", "dml", "0"]
    made = common.prepare(directml.FAMILY, asked(out, python=Path(sys.executable)), world.tools)
    assert made.target.widened == {2: 4} and made.target.provider == "dml"


def test_an_npu_asks_for_finished_folders(bundle: Path, tmp_path: Path, runtimes: dict[str, Any]) -> None:
    world, out = (
        windows(bundle, npus='{"Name":"NPU Compute Accelerator","DriverVersion":"32.0.203.300"}'),
        tmp_path / "n.json",
    )
    skips = reasons(world, npu.FAMILY, out, "--python", sys.executable)
    assert [what for what, _why in skips] == ["smollm2-135m, w8", "smollm2-135m, w4"]
    assert "no kernel for 8 bits" in skips[0][1] and "model_generate has to finish each" in skips[1][1]
    assert runtimes["versions"] and read_run(out).part.driver == "32.0.203.300"
    command = npu.FAMILY.find(world.tools.system, asked(out, python=Path("py"))).command(bundle, None)
    assert command[3:6] == ["genai", "RyzenAI", "0"] and command[-1] == str(bundle.absolute())


def test_a_software_driver_is_labelled(
    bundle: Path, tmp_path: Path, runtimes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    runtimes["providers"].append("WebGpuExecutionProvider")
    monkeypatch.setattr(webgpu.webgpu_parity, "vulkan", lambda _driver: {"VK_ICD_FILENAMES": "x.json"})
    world, out = World(bundle), tmp_path / "soft.json"
    assert launch(webgpu.FAMILY, ["--software", "--python", "py", "-o", str(out)], world.tools) == 0
    found = read_run(out)
    assert found.part.software and "say nothing of any GPU" in found.part.notes[1]
    assert found.rows[0].series.test.name == "pp16" and world.variables[0] == {"VK_ICD_FILENAMES": "x.json"}
    assert all(row.forecast is None for row in found.rows) and "computes on the CPU" in capsys.readouterr().out
    made = common.prepare(webgpu.FAMILY, asked(out, python=Path("py"), software=True), world.tools)
    assert made.target.dtype == "float32" and made.family.target.dtype == "float16"


def test_without_a_software_driver_the_reason_is_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webgpu.webgpu_parity, "SOFTWARE_DRIVERS", (tmp_path / "absent.json",))
    assert "no Vulkan driver at" in absent(webgpu.FAMILY, world, tmp_path / "x.json", "--software")


def test_an_environment_is_made_once_and_not_by_a_dry_run(
    bundle: Path, tmp_path: Path, runtimes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str]] = []

    def environment(folder: Path, runtime: str) -> Path:
        made.append((folder.name, runtime))
        return folder / "bin/python"

    monkeypatch.setattr(foreign.webgpu_parity, "environment", environment)
    runtimes["providers"].append("DmlExecutionProvider")
    world = windows(bundle)
    assert launch(directml.FAMILY, [*WORDS, "-o", str(tmp_path / "dml.json"), "--dry-run"], world.tools) == 0
    assert made == []
    assert launch(directml.FAMILY, [*WORDS, "-o", str(tmp_path / "dml.json")], world.tools) == 0
    assert made == [("dml-env", "onnxruntime-directml==1.24.4")]

    def offline(_folder: Path, runtime: str) -> Path:
        raise foreign.webgpu_parity.Unavailable(f"no environment with {runtime}: no network")

    monkeypatch.setattr(foreign.webgpu_parity, "environment", offline)
    why = absent(directml.FAMILY, windows(bundle), tmp_path / "off.json")
    assert "no network; give an interpreter that has it with --python" in why


def test_drivers_are_compared_by_their_numbers() -> None:
    assert present.older("32.0.203.240", "32.0.203.280") and present.older("31.9", "32.0.203.280")
    assert not present.older("32.0.1000.1", "32.0.203.280") and not present.older("", "32")
    assert Chip("Microsoft Remote Display Adapter").software and not Chip("AMD Radeon(TM) 890M").software


def test_commands_that_fail_are_errors_of_the_system() -> None:
    assert present.ask([sys.executable, "-c", "print('é')"]).strip() == "é"
    with pytest.raises(OSError, match="failed"):
        present.ask([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(OSError):
        present.ask(["no-such-command-anywhere"])
