"""The device scripts on a fake machine: what is measured, kept, skipped and said; and one run for real."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from rlkit.apps.benchmarks.devices import common, cpu, directml, foreign, items, npu, present, promises, webgpu
from rlkit.apps.benchmarks.devices.command import launch
from rlkit.apps.benchmarks.devices.common import Asked, Family, Tools
from rlkit.apps.benchmarks.devices.present import Chip, System
from rlkit.export.build import export_bundle
from rlkit.export.targets import Target, target_named
from rlkit.profiles import device, here, standard
from rlkit.profiles.bundle import read_size
from rlkit.profiles.devicerun import RANDOM, Run, read_run
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import Tell

WORDS = ("--models", "smollm2-135m", "--recipes", "w8,w4", "--contexts", "0,64", "--prompt", "8", "--generate", "2")
GPU_JSON = '[{"Name":"AMD Radeon(TM) 890M","DriverVersion":"32.0.1"},{"Name":"Microsoft Basic Render Driver"}]'


@pytest.fixture(autouse=True)
def no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


class Process:
    """A worker: each token takes 10 ms; it ends with an error at the given work, or as a key is pressed."""

    threads, provider = 3, "cpu"

    def __init__(self, world: World, name: str) -> None:
        self._world, self._name = world, name

    def generate(self, work: Any) -> Iterator[float]:
        self._world.asked.append((self._name, len(work.fill), work.new_tokens))
        stop = self._world.stop_at(self._name, len(work.fill), work.new_tokens)
        if stop is not None:
            raise stop
        yield from [0.01] * work.new_tokens

    def peak_nbytes(self) -> int:
        return 300_000_000


class World:
    """A machine with fake processes; remembers what it was asked."""

    def __init__(self, bundle: Path, **system: Any) -> None:
        self.bundle, self.asked, self.commands, self.clock = bundle, [], [], 0
        self.variables: list[Mapping[str, str]] = []
        self.stop_at: Callable[[str, int, int], BaseException | None] = lambda *_work: None
        facts: dict[str, Any] = {
            "name": "Linux",
            "ask": self._no_shell,
            "vulkan": list,
            "cpu": lambda: "Test CPU",
            **system,
        }
        self.tools = Tools(
            system=System(**facts),
            host=lambda: runs.SERVER,
            free_nbytes=lambda: 4 * 10**9,
            no_builder=str,
            bundle=self._bundle,
            start=self._start,
            now=self._now,
        )

    @staticmethod
    def _no_shell(_words: Sequence[str]) -> str:
        raise OSError("no shell here")

    @contextlib.contextmanager
    def _bundle(self, item: items.Item, _target: Target, _asked: Asked, _tell: Tell) -> Iterator[Path]:
        yield item.bundle or self.bundle

    @contextlib.contextmanager
    def _start(self, name: str, command: list[str], variables: Mapping[str, str]) -> Iterator[Process]:
        self.commands.append(command)
        self.variables.append(variables)
        yield Process(self, name)

    def _now(self) -> str:
        self.clock += 1
        return f"2026-11-22T10:00:{self.clock:02}Z"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("devices")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


@pytest.fixture
def world(bundle: Path) -> World:
    return World(bundle)


def measured(out: Path) -> list[tuple[str, str]]:
    return [(row.recipe, row.series.test.name) for row in read_run(out).rows]


def test_the_standard_set_is_measured(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cpu.json"
    assert launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools) == 0
    tests = ["pp8", "tg2", "tg2 @ d64"]
    assert measured(out) == [(recipe, test) for recipe in ("w8", "w4") for test in tests]
    found = read_run(out)
    decode = found.rows[1]
    assert (decode.model, decode.weights, decode.threads, decode.forecast) == ("smollm2-135m", RANDOM, 3, None)
    assert decode.seconds == pytest.approx(0.01) and len(decode.series.rounds) == standard.FULL.repeats
    assert decode.series.nbytes_per_token and decode.series.peak_nbytes == 300_000_000
    assert (found.part.family, found.host, found.part.provider) == ("cpu", runs.SERVER, "CPUExecutionProvider")
    assert set(found.versions) == {"rlkit-edge", "onnxruntime", "onnxruntime-genai"}
    assert len(world.commands) == 2  # one process for each bundle
    shown = capsys.readouterr()
    assert "100.0 ± 0.0" in shown.out and "no forecast: " in shown.out and "rlkit report" in shown.err


def test_a_second_run_measures_what_is_missing(world: World, tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"

    def press(name: str, fill: int, _new: int) -> BaseException | None:
        return KeyboardInterrupt() if name.endswith("w4") and fill else None

    world.stop_at = press
    assert launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools) == 130
    assert len(measured(out)) == 5
    world.stop_at, world.asked = (lambda *_work: None), []
    assert launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools) == 0
    assert len(measured(out)) == 6
    assert {(name, fill) for name, fill, _new in world.asked} == {("smollm2-135m w4", 64)}
    world.asked = []
    assert launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools) == 0
    assert world.asked == []
    assert launch(cpu.FAMILY, [*WORDS, "--repeats", "4", "--threads", "2", "-o", str(out)], world.tools) == 0
    assert len(measured(out)) == 6 and len(read_run(out).rows[0].series.rounds) == 4
    world.asked = []
    assert launch(cpu.FAMILY, [*WORDS, "--no-resume", "-o", str(out)], world.tools) == 0
    assert len(world.asked) == 6 * 4 and len(read_run(out).rows[0].series.rounds) == 3


def test_other_versions_are_measured_beside(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "cpu.json"
    launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools)
    monkeypatch.setattr(cpu, "version", lambda _name: "99")
    launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools)
    found = read_run(out)
    assert len(found.rows) == 12 and found.versions["onnxruntime"] == "99"


def test_what_fails_is_skipped_with_its_reason_and_the_rest_goes_on(world: World, tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"

    def fail(name: str, fill: int, _new: int) -> BaseException | None:
        return ChildProcessError("the process\nended") if name.endswith("w8") and fill else None

    world.stop_at = fail
    assert launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools) == 0
    assert len(measured(out)) == 5
    assert [(skip.what, skip.reason) for skip in read_run(out).skips] == [
        ("smollm2-135m, w8, tg2 @ d64", "the process ended")
    ]
    world.stop_at = lambda *_work: None
    assert launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools) == 0
    assert len(measured(out)) == 6 and read_run(out).skips == ()


def reasons(world: World, family: Family, out: Path, *words: str) -> list[tuple[str, str]]:
    assert launch(family, [*WORDS, "-o", str(out), *words], world.tools) == 0
    return [(skip.what, skip.reason) for skip in read_run(out).skips]


def test_what_cannot_run_is_skipped_beforehand(world: World, tmp_path: Path) -> None:
    world.tools = replace(world.tools, free_nbytes=lambda: 10**8)
    (first, second) = reasons(world, cpu.FAMILY, tmp_path / "memory.json", "--prompt", "0", "--contexts", "0")
    assert first[0] == "smollm2-135m, w8" and "not enough memory: about 0.3 GB with a cache of 3" in first[1]
    assert "0.1 GB are free" in second[1] and world.asked == []
    world.tools = replace(world.tools, free_nbytes=lambda: 10**10, no_builder=lambda: "no torch to build it with")
    assert reasons(world, cpu.FAMILY, tmp_path / "torch.json")[0][1] == "no torch to build it with"
    world.tools = replace(world.tools, no_builder=str)
    deep = reasons(world, cpu.FAMILY, tmp_path / "deep.json", "--contexts", "0,9000")
    assert [what for what, _why in deep] == [f"smollm2-135m, {recipe}, tg2 @ d9000" for recipe in ("w8", "w4")]
    assert "9003 tokens exceed the model's context of 8192" in deep[0][1]


def test_bits_without_a_kernel_are_skipped() -> None:
    (w8, w4, w2) = items.stand_ins(["qwen3-0.6b"], ["w8", "w4", "w4w2-gateup"])
    npu_target, dml = target_named("npu"), target_named("igpu", "dml")
    assert "npu has no kernel for 8 bits; use 4" in items.no_kernel(w8, npu_target)
    assert [items.no_kernel(item, npu_target) for item in (w4, w2)] == ["", ""]  # 2 bits in fields of 4
    assert [items.no_kernel(item, dml) for item in (w8, w4, w2)] == ["", "", ""]
    assert w2.recipe is not None and not any(rule.scheme.adapter_rank for rule in w2.recipe.rules)


def test_given_bundles_take_the_place_of_random_weights(bundle: Path, world: World, tmp_path: Path) -> None:
    out, words = tmp_path / "cpu.json", ["--contexts", "0,64,300", "--prompt", "8", "--generate", "2"]
    assert launch(cpu.FAMILY, [*words, "--bundles", str(bundle.parent), "-o", str(out)], world.tools) == 0
    found = read_run(out)
    shape = read_size(bundle).shape
    name = standard.model_name(shape.architecture, shape.parameters)
    assert {(row.model, row.recipe, row.weights) for row in found.rows} == {(name, "w4", "bundle")}
    assert name.startswith("Llama ") and len(found.rows) == 3
    assert [skip.what.split(", ")[-1] for skip in found.skips] == ["tg2 @ d300"]
    assert str(bundle) in world.commands[0]
    gpu = replace(webgpu.FAMILY, find=cpu.find)
    assert launch(gpu, [*words, "--bundles", str(bundle), "-o", str(tmp_path / "gpu.json")], world.tools) == 0
    (skip,) = read_run(tmp_path / "gpu.json").skips
    assert "made for cpu; export it with --target igpu (webgpu)" in skip.reason


def test_bundles_of_one_name_and_folders_without_any_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are both"):
        items.given([bundle, bundle])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no bundle and holds none"):
        items.given([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="no folder"):
        items.given([tmp_path / "absent"])
    (tmp_path / "bare").mkdir()
    write_json(tmp_path / "bare" / "genai_config.json", {})
    with pytest.raises(ValueError, match=r"has no rlkit\.json"):
        items.given([tmp_path / "bare"])


def test_a_finished_npu_folder_is_known_by_the_folder_it_was_made_from(tmp_path: Path) -> None:
    for name in ("w4", "w4-hybrid", "w4-token-fusion"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "w4" / "rlkit.json", {})
    for name in ("w4", "w4-hybrid", "w4-token-fusion"):
        assert items.manifest_folder(tmp_path / name) == tmp_path / "w4"


def test_files_of_other_machines_and_families_are_not_gone_on_with(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cpu.json"
    launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools)
    before = out.read_bytes()
    cases = [
        (cpu.FAMILY, replace(world.tools, host=lambda: runs.LAPTOP), "of another machine"),
        (npu.FAMILY, world.tools, "of another device family"),
        (cpu.FAMILY, replace(world.tools, system=replace(world.tools.system, cpu=lambda: "Other")), "here is Other"),
    ]
    for family, tools, why in cases:
        capsys.readouterr()
        assert launch(family, [*WORDS, "-o", str(out)], tools) == 2
        error = capsys.readouterr().err
        assert why in error and "choose another -o" in error and error.count("\n") == 1
    write_json(out, {**json.loads(before), "schema_version": 5})
    assert launch(cpu.FAMILY, [*WORDS, "-o", str(out)], world.tools) == 2
    assert "schema_version 5, this rlkit reads 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "name it with -o FILE.json"),
        (("-o", "x.json", "--models", "huge"), "no shape 'huge'; use smollm2-135m"),
        (("-o", "x.json", "--recipes", "w3"), "w3"),
        (("-o", "x.json", "--contexts", "0;9"), "--contexts '0;9' is no list of numbers"),
        (("-o", "x.json", "--contexts", "-4"), "-4"),
        (("-o", "x.json", "--software"), "--software is for webgpu, not for cpu"),
        (("-o", "x.json", "somewhere"), "give bundle folders after --bundles"),
        (("-o", "x.json", "--bundles", "nowhere"), "no folder nowhere"),
        (("-o", "x.json", "--python", "python"), "leave it out"),
        (("-o", "x.json", "--device", "nosuch"), "no device 'nosuch"),
        (("-o", "x.json", "--repeats", "0"), "repeats"),
        (("-o", "x.json", "--wrong"), "--wrong"),
    ],
)
def test_absurd_words_are_one_line_and_code_2(
    words: tuple[str, ...],
    why: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch(cpu.FAMILY, list(words), world.tools) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
    assert list(tmp_path.glob("*.json")) == []


def test_several_folders_may_follow_bundles(bundle: Path, world: World, tmp_path: Path) -> None:
    words = ["--contexts", "0", "--prompt", "0", "--generate", "2", "-o", str(tmp_path / "x.json"), "--bundles"]
    assert launch(cpu.FAMILY, [*words, str(bundle), str(bundle)], world.tools) == 2
    assert launch(cpu.FAMILY, [*words, str(bundle)], world.tools) == 0


def test_a_dry_run_says_what_would_be_done(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--contexts", "0,9000", "--device", "hx370", "--dry-run", "-o", str(tmp_path / "x.json")]
    assert launch(cpu.FAMILY, words, world.tools) == 0
    text = capsys.readouterr().out
    assert "will be measured" in text and "forecasts of hx370:cpu, uncalibrated" in text
    assert world.asked == [] and not (tmp_path / "x.json").exists()
    assert launch(cpu.FAMILY, [*words, "--json"], world.tools) == 0
    tests = json.loads(capsys.readouterr().out)["tests"]
    assert [test["state"] for test in tests] == ["measure", "measure", "skip"] * 2
    assert all(test["needs_nbytes"] > 10**8 for test in tests) and tests[0]["forecast_seconds"] > 0
    assert launch(npu.FAMILY, [*WORDS, "--dry-run", "--json"], world.tools) == 0
    assert json.loads(capsys.readouterr().out)["skips"][0]["reason"].startswith("no NPU")


def test_json_alone_is_printed(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(cpu.FAMILY, [*WORDS, "-o", str(tmp_path / "x.json"), "--json"], world.tools) == 0
    shown = capsys.readouterr()
    assert Run.from_json(json.loads(shown.out)) == read_run(tmp_path / "x.json") and shown.err == ""


def test_forecasts_stand_beside(world: World, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    words = [*WORDS, "--device", "hx370", "-o", str(out)]
    assert launch(cpu.FAMILY, words, world.tools) == 0
    rows = read_run(out).rows
    assert all(row.forecast is not None and row.forecast.place == "hx370:cpu" for row in rows)
    first = rows[1]
    assert first.forecast is not None and first.error == pytest.approx(first.forecast.seconds / 0.01 - 1)


def test_a_device_is_recognized_by_its_processor() -> None:
    known = device.built_in()
    named = {
        "AMD Ryzen AI 9 HX 370 w/ Radeon 890M": "hx370",
        "AMD RYZEN AI MAX+ 395 w/ Radeon 8060S": "max395",
        "AMD Ryzen 7 7840U w/ Radeon  780M Graphics": "7840u",
        "AMD Ryzen 7 7840HS with Radeon 780M Graphics": "7840hs",
        "AMD EPYC 9V74 80-Core Processor": None,
        "": None,
    }
    assert {cpu_name: promises.recognized(cpu_name, known) for cpu_name in named} == named
    made = promises.forecaster("igpu", "AMD Ryzen AI 9 HX 370 w/ Radeon 890M")
    assert made.place is not None and made.place.name == "hx370:igpu"
    assert "is no known device; run `rlkit calibrate`" in promises.forecaster("cpu", "AMD EPYC").said
    assert "name it with --device" in promises.forecaster("npu", "AMD EPYC").said


def test_forecasts_know_how_a_target_stores_models() -> None:
    test = runs.DECODE
    (w4, w2) = items.stand_ins(["qwen3-4b"], ["w4", "w4w2-gateup"])
    gains = {}
    for provider in ("webgpu", "dml"):
        made = promises.forecaster("igpu", "", "hx370", target_named("igpu", provider))
        slow, quick = made.of(w4, test), made.of(w2, test)
        assert slow is not None and quick is not None
        gains[provider] = slow.seconds / quick.seconds - 1
    assert gains["webgpu"] > 0.1 and abs(gains["dml"]) < 0.05  # 2-bit codes are stored in 4-bit fields there


def test_an_outdated_calibration_is_no_reason_not_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def outdated() -> None:
        raise ValueError("this calibration has schema_version 0; calibrate again")

    monkeypatch.setattr(here, "load_table", outdated)
    assert promises.forecaster("cpu", "AMD EPYC").said.endswith("calibrate again")


# --- What is there ---------------------------------------------------------------------------------------------------


def absent(family: Family, world: World, out: Path, *words: str) -> str:
    """The only reason in the result."""
    ((what, why),) = reasons(world, family, out, *words)
    assert what == "everything" and read_run(out).rows == () and world.asked == []
    return why


def windows(bundle: Path, gpus: str = GPU_JSON, npus: str = "", cpu_name: str = "AMD Ryzen AI 9 HX 370") -> World:
    def ask(words: Sequence[str]) -> str:
        assert words[0] == "powershell"
        return npus if "COMPUTEACCELERATOR" in words[-1] else gpus

    return World(bundle, name="Windows", ask=ask, cpu=lambda: cpu_name)


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


def asked(out: Path, **about: Any) -> Asked:
    return Asked(out, ("smollm2-135m",), ("w4",), standard.tests_of((0,), 8, 2), 3, **about)


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


# --- For real --------------------------------------------------------------------------------------------------------


def test_random_weights_are_made_measured_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole path on a tiny shape, with a real bundle and a real process."""
    from test_forecast_error import TINY

    monkeypatch.setitem(standard.MODELS, "tiny", TINY)
    out = tmp_path / "cpu.json"
    words = ["--models", "tiny", "--recipes", "w4", "--contexts", "0,16", "--prompt", "8", "--generate", "4"]
    more = ["--repeats", "1", "--threads", "1", "--device", "hx370", "-o", str(out)]
    assert launch(cpu.FAMILY, [*words, *more], None) == 0
    found = read_run(out)
    assert [row.series.test.name for row in found.rows] == ["pp8", "tg4", "tg4 @ d16"]
    assert all(row.threads == 1 and row.forecast is not None for row in found.rows)
    assert not (tmp_path / "cpu-work").exists()
    assert "tiny" in capsys.readouterr().out


def test_bundles_that_are_kept_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlkit.recover import standin
    from rlkit.recover.progress import silent
    from test_forecast_error import TINY

    monkeypatch.setitem(standard.MODELS, "tiny", TINY)
    (item,) = items.stand_ins(["tiny"], ["w4"])
    target, wanted = target_named("igpu", None, "float32"), replace(asked(tmp_path / "x.json"), keep=True)
    with common.made_bundle(item, target, wanted, silent) as made:
        assert json.loads((made / "rlkit.json").read_text())["target"] == "webgpu"
    monkeypatch.setattr(standin, "write_packed", lambda *_words: pytest.fail("it was made again"))
    with common.made_bundle(item, target, wanted, silent) as again:
        assert again == made
    with common.made_bundle(item, target, replace(wanted, keep=False), silent) as last:
        assert last == made
    assert not wanted.work.exists()
