"""The command compare: a tiny bundle measured and forecast, every format, charts, stored files, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from measured import result
from rlkit.apps import cli
from rlkit.apps import compare as command
from rlkit.export.build import export_bundle
from rlkit.profiles import device as devices
from rlkit.profiles import efficiency, here
from rlkit.profiles.hardware import Device, Memory, Unit, Value
from rlkit.profiles.machine import Machine
from rlkit.recover.atomic import write_json
from test_compare_stored import told
from test_efficiency import PEAKS, TABLE

SMALL = ("--prompt", "8", "--depth", "0,16", "--steps", "2", "--threads", "1")
MACHINE = Machine("Some CPU", "Linux", 2, 1, 2**34, 20e9, 0.0, 100e9, 0.0, "2026-11-22")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration of this machine is seen, and no peaks are measured."""
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "measure_machine", lambda: MACHINE)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4W2, adapter_rank=32)
    return export_bundle(checkpoint, root / "bundle")


def calibrated() -> None:
    """Leave a calibration of this machine, with two threads."""

    def value(number: float, unit: str) -> Value:
        return Value(number, unit, "rlkit calibrate", "2026-11-22", "measured")

    bandwidth = value(PEAKS.bytes_per_s, "B/s")
    unit = Unit(
        "cpu",
        title="Some CPU",
        peaks={"fp32": value(PEAKS.flops_per_s, "FLOP/s")},
        bandwidth=bandwidth,
        dispatch=value(PEAKS.dispatch_seconds, "s"),
    )
    device = Device(
        devices.HERE,
        title="This machine",
        units={"cpu": unit},
        memories=(Memory("installed", bandwidth),),
        calibrated=True,
    )
    devices.save(device, devices.here_path())
    efficiency.save(TABLE, here.table_path(devices.here_path()))


def compared(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.run(["compare", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_bundle_is_compared_with_peaks_of_this_machine(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, chart = tmp_path / "out.json", tmp_path / "gaps.html"
    found = compared(capsys, str(bundle), *SMALL, "-o", str(out), "--plot", str(chart))
    assert json.loads(out.read_text()) == found
    assert (found["label"], found["threads"], found["recipe"]) == ("uncalibrated", 1, "w4w2-gateup")
    assert [step["title"] for step in found["compared"]] == ["prompt of 8", "token after 0", "token after 16"]
    for step in found["compared"]:
        rows = {(row["name"], row["bits"]): row for row in step["rows"]}
        for key in (
            ("qkv_proj", 4),
            ("gate_proj", 2),
            ("up_proj", 2),
            ("adapters", 0),
            ("lm_head", 4),
            ("attention", 0),
        ):
            assert rows[key]["forecast_seconds"] > 0 and rows[key]["measured_seconds"] >= 0, key
        assert {"starts", "beside the model"} <= {row["name"] for row in step["rows"]}
        whole = sum(row["measured_seconds"] or 0 for row in step["rows"])
        assert whole == pytest.approx(step["measured_seconds"]) and step["genai_seconds"] > 0
    assert any("the largest gap is" in line for line in found["findings"])
    assert "rlkit calibrate" in found["findings"][-1]
    page = chart.read_text()
    assert page.count("<svg") == 1 and "qkv_proj" in page and "bytes/bandwidth" in page


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        ("table", ("GFLOP/s", "the largest gap is", "prompt of 8", "Times in ms")),
        ("md", ("| class | operator |", "the largest gap is")),
        ("csv", ("prompt_tokens,past_tokens,class",)),
    ],
)
def test_a_calibrated_machine_is_the_default_and_threads_are_compared(
    form: str, parts: tuple[str, ...], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated()
    words = ["compare", str(bundle), "--prompt", "8", "--depth", "4", "--steps", "1", "--threads", "1"]
    assert cli.run([*words, "--format", form]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in parts)
    assert form == "csv" or ("here:cpu" in text and "calibrated with 2 threads, and the bundle ran with 1" in text)


def test_a_prompt_may_be_left_out(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, str(bundle), "--prompt", "0", "--depth", "3", "--steps", "1", "--device", "hx370:cpu")
    assert [step["title"] for step in found["compared"]] == ["token after 3"] and found["place"] == "hx370:cpu"


def test_stored_files_are_compared_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = str(tmp_path / "f.json"), str(tmp_path / "m.json")
    write_json(Path(paths[0]), told())
    write_json(Path(paths[1]), result().to_json())
    found = compared(capsys, *paths, "-o", str(tmp_path / "out.json"))
    assert [pair["name"] for pair in found["pairs"]] == ["ttft", "tpot"]
    assert json.loads((tmp_path / "out.json").read_text()) == found
    for form, part in (("table", "TTFT"), ("md", "| bundle | test |"), ("csv", "bundle,recipe,test")):
        assert cli.run(["compare", *paths, "--format", form]) == 0
        assert part in capsys.readouterr().out
    assert cli.run(["compare", *paths, "-o", str(tmp_path / "out.json")]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert cli.run(["compare", *paths, "--plot", str(tmp_path / "p.png")]) == 2
    assert "no operators to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "no rlkit bundle"),
        (("a", "b", "c"), "3 paths are given; name one bundle"),
        (("absent.json", "other.json"), "absent.json"),
        (("nowhere", "--depth", "x"), "--depth 'x' is no list of numbers"),
        (("nowhere", "--depth", "-1"), "neither may be negative"),
        (("nowhere", "--prompt", "-1"), "neither may be negative"),
        (("nowhere", "--steps", "0"), "--steps 0 measures nothing"),
        (("nowhere", "--plot", "x.bmp"), "x.bmp is no name of a chart"),
    ],
)
def test_absurd_comparisons_are_one_line_and_code_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "nonesuch"), "nonesuch"),
        (("--device", "hx370:igpu"), "hx370:igpu cannot be measured here, the CPU can; name hx370:cpu"),
        (("--device", "hx370:toaster"), "has no unit"),
        (("--depth", "250", "--steps", "9"), "tokens exceed the context"),
        (("--prompt", "999"), "tokens exceed the context"),
    ],
)
def test_what_a_bundle_cannot_be_asked_is_one_line(
    words: tuple[str, ...], message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", str(bundle), "--json", *SMALL[:4], *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", "--help"]) == 0
    assert "Example: rlkit compare" in capsys.readouterr().out
