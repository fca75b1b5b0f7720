"""The device scripts on a fake machine: what is measured, kept, skipped and said; and one run for real."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import runs
import tiny
from rlkit.apps.benchmarks.devices import common, cpu, items, npu, promises, webgpu
from rlkit.apps.benchmarks.devices.command import launch
from rlkit.export.build import export_bundle
from rlkit.export.targets import target_named
from rlkit.profiles import device, here, standard
from rlkit.profiles.bundle import read_size
from rlkit.profiles.devicerun import RANDOM, Run, read_run
from rlkit.recover.atomic import write_json
from worlds import WORDS, World, asked, reasons


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
