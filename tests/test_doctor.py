"""What the doctor says of machines that are not here: providers, kernels, packages that clash, memory, bundles."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import around
import tiny
from rlkit.apps import doctor as command
from rlkit.export.build import export_bundle
from rlkit.runtime import clashes, doctor, doctorbundle, processor, tuned
from rlkit.runtime.doctor import Diagnosis, examine
from rlkit.runtime.findings import Finding, Level
from rlkit.runtime.processor import Processor
from rlkit.runtime.providers import PROVIDERS
from rlkit.runtime.surroundings import Plugin, Surroundings

ZEN5 = Processor("AMD EPYC", "x86_64", dict.fromkeys(processor.X64_FEATURES, True))
SNAPDRAGON = Processor("Snapdragon X", "ARM64", {"dotprod": True, "i8mm": True, "bf16": None})
WANTED = {"onnxruntime": ">=1.31,<1.32", "onnxruntime-genai": ">=0.18,<0.19", "transformers": "<6,>=5.23"}
HERE = doctor.Machine(
    system="Linux 6.1 x86_64",
    python="3.12.1",
    processor=ZEN5,
    processors=16,
    allowed=tuple(range(16)),
    per_core=8,
    quota=None,
    threads=8,
    memory_nbytes=32 * 10**9,
    available_nbytes=20 * 10**9,
    swap_nbytes=0,
    limit_nbytes=None,
    huge_pages="madvise",
    cache="/cache",
    disk_nbytes=10**11,
    writable=True,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(tuned.OVERRIDE, raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4W2), root / "bundle")


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def of(found: Diagnosis, name: str) -> Finding:
    """The finding of this name, which must be there."""
    return next(finding for finding in found.findings if finding.name == name)


def levels(findings: tuple[Finding, ...]) -> dict[str, Level]:
    return {finding.name: finding.level for finding in findings if finding.level is not Level.OK}


def test_a_plain_machine_is_fine() -> None:
    found = examine(around=around.LINUX, machine=HERE)
    assert found.level is Level.NOTE  # providers that are not installed
    assert set(levels(found.findings)) == {
        finding.name for finding in found.findings if finding.area == "providers"
    } - {"cpu"}
    assert [device.name for device in found.devices] == ["cpu"]
    assert of(found, "webgpu").fix == "pip install onnxruntime-ep-webgpu"
    assert "not on this system" in of(found, "dml").text


def test_every_provider_is_listed_with_its_state_and_fix_on_every_system() -> None:
    for where in (around.LINUX, around.WINDOWS, around.WINDOWS_ARM, around.MAC, around.STRANGE, Surroundings("", "")):
        found = examine(around=where, machine=HERE)
        names = [finding.name for finding in found.findings if finding.area == "providers"]
        assert sorted(names) == sorted(PROVIDERS)
        assert all(one.fix for one in found.standings if one.state.value == "not installed")
        json.dumps(found.to_json(), allow_nan=False)


def test_without_a_runtime_nothing_runs() -> None:
    problem = "onnxruntime cannot be imported: libonnxruntime.so: no such file"
    found = examine(around=replace(around.LINUX, problems=(problem,), providers=(), seen=()), machine=HERE)
    assert found.level is Level.ERROR and found.devices == ()
    assert of(found, "cpu").level is Level.ERROR and "--force-reinstall" in str(of(found, "cpu").fix)
    bare = examine(around=Surroundings("Linux", "x86_64"), machine=HERE)
    assert of(bare, "onnxruntime").fix == "pip install onnxruntime"
    assert of(bare, "onnxruntime_genai").level is Level.ERROR


def test_plug_ins_show_what_stands_in_their_way() -> None:
    ready = examine(around=around.with_webgpu(around.WINDOWS), machine=HERE)
    assert of(ready, "webgpu").level is Level.OK and [device.name for device in ready.devices] == ["cpu", "webgpu"]
    without = of(examine(around=around.with_webgpu(around.LINUX, device=False), machine=HERE), "webgpu")
    assert without.level is Level.NOTE and "no device" in without.text and "libvulkan1" in str(without.fix)
    bare = replace(around.with_webgpu(around.LINUX, device=False), vulkan=False)
    assert "libvulkan.so.1 is missing" in of(examine(around=bare, machine=HERE), "webgpu").text
    broken = around.with_webgpu(around.LINUX, device=False, problem="libvulkan.so.1: cannot open shared object file")
    found = of(examine(around=broken, machine=HERE), "webgpu")
    assert found.level is Level.WARNING and found.fix == "apt install libvulkan1 mesa-vulkan-drivers"


def packages(around_: Surroundings, **versions: str) -> dict[str, Finding]:
    found = clashes.clashes(around.with_packages(around_, **versions), WANTED)
    return {finding.name: finding for finding in found}


def test_packages_that_are_right_say_nothing() -> None:
    assert packages(around.LINUX, transformers="5.23.0", torch="2.13.0") == {}
    assert (
        packages(Surroundings("Linux", "x86_64", {}), onnxruntime_gpu="1.31.1", onnxruntime_genai_cuda="0.18.0") == {}
    )


def test_two_runtimes_write_over_each_other() -> None:
    for other in ("onnxruntime_gpu", "onnxruntime_directml", "onnxruntime_webgpu"):
        (found,) = packages(around.LINUX, **{other: "1.24.4"}).values()
        name = other.replace("_", "-")
        assert found.level is Level.WARNING and f"onnxruntime 1.31.1 and {name} 1.24.4 write over each" in found.text
        assert str(found.fix).startswith(f"pip uninstall -y onnxruntime {name} && pip install onnxruntime ")
    (found,) = packages(around.LINUX, onnxruntime_genai_cuda="0.18.0").values()
    assert "the Python package onnxruntime_genai" in found.text


def test_a_genai_made_for_another_runtime_is_found() -> None:
    bare = Surroundings("Windows", "AMD64", {"onnxruntime": "1.31.1"})
    found = packages(bare, onnxruntime_genai_winml="0.18.0")["onnxruntime-genai-winml"]
    assert "is made for onnxruntime-windowsml, but onnxruntime is installed" in found.text


def test_names_that_are_no_good() -> None:
    found = packages(
        around.WINDOWS,
        onnxruntime_winml="1.0",
        optimum_onnx="0.1.0",
        model_generate="0.0.3",
        onnxruntime_ep_amdgpu="0.0.0",
    )
    assert found["onnxruntime-winml"].level is Level.ERROR and "malware" in found["onnxruntime-winml"].text
    assert "transformers below 4.58" in found["optimum-onnx"].text
    assert "is old" in found["model-generate"].text
    assert found["onnxruntime-ep-amdgpu"].level is Level.NOTE


def test_directml_that_cannot_be_installed() -> None:
    bare = Surroundings("Windows", "AMD64", {"onnxruntime-directml": "1.24.4"})
    found = packages(bare, onnxruntime_genai_directml="0.14.1")
    assert "onnxruntime-genai-directml==0.13.1" in str(found["onnxruntime-genai-directml"].fix)
    assert packages(bare, onnxruntime_genai_directml="0.13.1") == {}


def test_versions_outside_of_the_range() -> None:
    found = packages(around.LINUX, onnxruntime="1.32.0", transformers="4.57.6")
    assert found["onnxruntime"].level is Level.ERROR and found["transformers"].level is Level.WARNING
    assert found["onnxruntime"].fix == 'pip install "onnxruntime>=1.31,<1.32"'


@pytest.mark.parametrize(
    ("version", "versions", "inside"),
    [
        ("1.31.1", ">=1.31,<1.32", True),
        ("1.31", "<1.32,>=1.31", True),
        ("1.32.0", "<1.32", False),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13", "==2.13.0", True),
        ("2.14.0rc1", "==2.13.0", False),
        ("0.18.0", ">0.18", False),
        ("0.18.0", "<=0.18", True),
        ("5.1", "~=5.1", True),
        ("odd", ">=1", False),
    ],
)
def test_ranges(version: str, versions: str, inside: bool) -> None:
    assert clashes.within(version, versions) is inside


def test_our_own_requirements_are_read() -> None:
    found = clashes.requirements()
    assert clashes.within("1.31.1", found["onnxruntime"]) and not clashes.within("1.32", found["onnxruntime"])
    assert "transformers" in found and "typer" not in found


def kernels(found: Processor) -> tuple[Level, str]:
    finding = doctor.kernels(found)
    return finding.level, finding.text


def test_what_features_mean_for_kernels() -> None:
    assert kernels(ZEN5) == (Level.OK, "2-, 4- and 8-bit weights run as int8 dot products (avx512_vnni)")
    off = dict.fromkeys(processor.X64_FEATURES, False)
    assert kernels(replace(ZEN5, features={**off, "avx2": True, "avx_vnni": True}))[1].endswith("(avx_vnni)")
    assert "run in AVX2; prompts are slower" in kernels(replace(ZEN5, features={**off, "avx2": True}))[1]
    assert kernels(replace(ZEN5, features=off))[0] is Level.WARNING
    assert "2-bit ones cannot" in kernels(SNAPDRAGON)[1]
    old = kernels(replace(SNAPDRAGON, features={"dotprod": False}))
    assert old[0] is Level.WARNING and "unpacked at every step" in old[1]
    assert kernels(Processor("?", "riscv64", {}))[0] is Level.WARNING
    untold = kernels(replace(ZEN5, features=dict.fromkeys(processor.X64_FEATURES)))
    assert untold[0] is Level.OK  # what is not known is no fault


def machine(**changes: Any) -> Diagnosis:
    return examine(around=around.LINUX, machine=replace(HERE, **changes))


def test_little_memory_disk_and_processors_are_warnings() -> None:
    assert levels(machine(available_nbytes=10**9).findings)["memory"] is Level.WARNING
    assert levels(machine(limit_nbytes=10**9).findings)["memory"] is Level.WARNING
    assert "may use 1.0 GB" in of(machine(limit_nbytes=10**9), "memory").text
    assert "RLKIT_CACHE" in str(of(machine(disk_nbytes=10**9), "cache").fix)
    assert "cannot be written" in of(machine(writable=False), "cache").text
    assert of(machine(disk_nbytes=None), "cache").level is Level.OK
    assert levels(machine(quota=0.5).findings)["cores"] is Level.WARNING
    assert "a quota of 2.5" in of(machine(quota=2.5), "cores").text
    assert of(machine(python="3.10.4"), "python").level is Level.ERROR
    assert "hugetlb" in of(machine(), "huge pages").text
    assert "huge pages" not in {finding.name for finding in machine(huge_pages=None).findings}


def test_the_doctor_imports_nothing_heavy() -> None:
    program = (
        "import sys; from rlkit.apps.doctor import doctor; doctor(json=True);"
        "assert not {'torch', 'transformers', 'onnx', 'onnx_ir', 'matplotlib', 'fastapi'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema_version"] == 1


def test_exit_codes_follow_severity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def found_in(where: Surroundings) -> list[int]:
        monkeypatch.setattr(command, "examine", lambda bundle: examine(bundle, around=where, machine=HERE))
        codes = []
        for strict in (False, True):
            try:
                command.doctor(strict=strict)
                codes.append(0)
            except typer.Exit as left:
                codes.append(left.exit_code)
        return codes

    assert found_in(around.LINUX) == [0, 0]
    assert "rlkit can run here" in capsys.readouterr().out
    assert found_in(around.with_packages(around.LINUX, optimum_onnx="0.1.0")) == [0, 1]
    text = capsys.readouterr().out
    assert (
        "WARN optimum-onnx" in text
        and "       > keep optimum-onnx in" in text
        and text.endswith("rlkit can run here; 1 warning\n")
    )
    assert found_in(Surroundings("Linux", "x86_64")) == [1, 1]
    assert "keep rlkit from running" in capsys.readouterr().out


def test_this_machine() -> None:
    found = examine()
    assert found.level is not Level.ERROR and found.devices[0].name == "cpu"
    assert json.loads(json.dumps(found.to_json()))["machine"]["threads"] >= 1


def bundle_levels(bundle: Path, where: Surroundings = around.LINUX, **changes: Any) -> dict[str, Finding]:
    found = examine(bundle, around=where, machine=replace(HERE, **changes))
    return {finding.name: finding for finding in found.findings if finding.area == doctorbundle.AREA}


def test_a_bundle_that_runs(bundle: Path) -> None:
    found = bundle_levels(bundle)
    assert {name: finding.level for name, finding in found.items()} == {
        "device": Level.OK,
        "kernels": Level.OK,
        "memory": Level.OK,
        "tuned": Level.NOTE,
    }
    assert "4 x 2-bit x int8 activations" in found["kernels"].text
    assert "cache 0 MB for 256 tokens" in found["memory"].text  # 2 * 2 layers * 2 heads * 32 * 4 bytes * 256
    tuned.save(bundle, tuned.Tuned(3, {"session.intra_op.allow_spinning": "0"}, {"A": "b"}, {"date": "2026-11-22"}))
    found = bundle_levels(bundle)
    assert found["tuned"].text == "tuned on 2026-11-22: 3 threads, session.intra_op.allow_spinning=0"
    assert found["tuned"].fix == "A=b rlkit run ..."


def test_the_size_of_a_cache() -> None:
    decoder = {"num_key_value_heads": 8, "num_hidden_layers": 36, "head_size": 128}
    config = {"model": {"decoder": decoder, "context_length": 40960}, "search": {"max_length": 1000}}
    assert doctorbundle.cache_of(config) == (1000, 2 * 36 * 8 * 128 * 4 * 1000)
    assert doctorbundle.cache_of({"model": {"decoder": {}, "context_length": 4}}) == (0, 0)


def test_bundles_that_cannot_run(bundle: Path, tmp_path: Path) -> None:
    assert bundle_levels(bundle, available_nbytes=10**8)["memory"].level is Level.ERROR
    assert bundle_levels(bundle, available_nbytes=160 * 10**6)["memory"].level is Level.WARNING
    old = replace(ZEN5, features={"avx2": False})
    assert bundle_levels(bundle, processor=old)["kernels"].level is Level.WARNING
    missing = bundle_levels(tmp_path / "nowhere")[str(tmp_path / "nowhere")]
    assert missing.level is Level.ERROR and "no bundle folder" in missing.text
    (bundle / "genai_config.json").write_text("{")
    assert bundle_levels(bundle)[str(bundle)].level is Level.ERROR


def change(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / "rlkit.json").read_text())
    (bundle / "rlkit.json").write_text(json.dumps({**manifest, **changes}))


def test_bundles_of_other_targets_and_makers(bundle: Path) -> None:
    change(bundle, target="webgpu")
    assert "webgpu is not installed" in bundle_levels(bundle)["device"].text
    assert "takes webgpu" in bundle_levels(bundle, around.with_webgpu(around.WINDOWS))["device"].text
    change(bundle, versions={"onnxruntime": "1.99.0"})
    assert "older 1.31.1 is installed" in bundle_levels(bundle)["onnxruntime"].text
    (bundle / "rlkit.json").unlink()
    found = bundle_levels(bundle)
    assert found["kernels"].fix == f"rlkit lint {bundle}" and "unknown" in found["device"].text


def test_a_damaged_file_of_settings_is_a_warning(bundle: Path) -> None:
    tuned.save(bundle, tuned.Tuned(3)).write_text("{}")
    found = bundle_levels(bundle)["tuned"]
    assert found.level is Level.WARNING and "--forget" in found.text


def test_a_catalog_that_fails_names_its_reason() -> None:
    where = replace(around.WINDOWS, plugins=(Plugin("windowsml", "2.5.96", "catalog", "needs Windows 11 24H2"),))
    assert "needs Windows 11 24H2" in of(examine(around=where, machine=HERE), "vitisai").text
