"""The command `rlkit devices`: a list for people, every number of one device with its source, JSON, the user's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlkit.apps.devices import devices
from rlkit.profiles import device
from test_devicefile import PLAIN, here


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def said(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> str:
    devices(*arguments, **options)
    return capsys.readouterr().out


def answer(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> Any:
    return json.loads(said(capsys, *arguments, json=True, **options))


def row(text: str, *words: str) -> list[str]:
    """The cells of the first line that starts with these words."""
    line = next(line for line in text.splitlines() if line.split()[: len(words)] == list(words))
    return line.split()[len(words) :]


def test_the_list_has_a_line_per_unit(capsys: pytest.CaptureFixture[str]) -> None:
    devices()
    found = capsys.readouterr()
    lines = found.out.splitlines()
    for name, known in device.built_in().items():
        start = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
        units = [line for line in lines[start:] if any(unit in line.split() for unit in device.UNITS)]
        assert [next(word for word in line.split() if word in device.UNITS) for line in units[: len(known.units)]] == [
            *known.units
        ]
    assert max(map(len, lines)) <= 120
    assert "what all units share" in found.err and "second-hand" in found.err


def test_the_list_says_what_is_shared_second_hand_and_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    krackan = text[text.index("ai7-350") : text.index("max395")]
    assert row(krackan[krackan.index("igpu") :], "igpu")[:5] == ["128*", "6.144?", "12.29?", "12.29?", "12.29?"]
    assert row(krackan[krackan.index("npu") :], "npu")[:6] == ["60?", "-", "-", "14.71", "38.05", "28"]
    assert "108.6 " in text and "108.6*" not in text


def test_one_device_shows_every_value_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(said(capsys, "max395").split())
    for words in ("212 GB/s measured 2026-11 github.com/lhl/strix-halo-testing", "59.39 TFLOP/s", "likwid load"):
        assert words in text
    found = device.built_in()["max395"]
    for unit in found.units.values():
        assert all(f"{unit.name} {peak} " in text for peak in unit.peaks)
    assert "also called ai-max-395" in text and "fp16 wmma" in text and "full efficiency (uncalibrated)" in text


def test_one_unit_shows_that_one_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "ai7-350@DDR5-5600:npu")
    assert "npu int8-gemm" in text and "igpu" not in text.replace("igpu and", "") and "63 us" in text
    assert "forecasts use 60 GB/s;" in text
    assert "89.6 GB/s of shared memory" in said(capsys, "ai7-350@DDR5-5600:igpu")


def test_json_is_complete_and_says_what_forecasts_use(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys)
    assert found["schema_version"] == 1
    assert [entry["name"] for entry in found["devices"]] == list(device.built_in())
    one = answer(capsys, "hx370@32GB:igpu")["device"]
    assert set(one["used"]) == {"igpu"} and "cpu" not in one
    assert one["used"]["igpu"] == {
        "bytes_per_s": 120e9,
        "dispatch_seconds": 0.0,
        "memory_nbytes": 32 * 10**9,
        "watts": None,
        "peaks": {"fp32": 11.8784e12, "fp16": 23.7568e12, "bf16": 23.7568e12, "int8": 23.7568e12, "int4": 47.5136e12},
        "calibrated": False,
    }
    assert one["igpu"]["peaks"]["fp16"] == "fp16-wmma"
    assert one["igpu"]["peaks"]["fp16-wmma"]["basis"] == "derived"


def test_a_file_of_own_devices_is_listed_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(PLAIN)
    assert row(said(capsys, file=tmp_path / "mine.toml"), "laptop")[:5] == ["A", "laptop", "cpu", "50", "0.4"]
    assert "own run" in said(capsys, "laptop", file=tmp_path / "mine.toml")
    with pytest.raises(ValueError, match="no device 'laptop'"):
        devices("laptop")


def test_this_machine_is_listed_as_calibrated(capsys: pytest.CaptureFixture[str]) -> None:
    device.save(here(), device.here_path())
    assert row(said(capsys), "here")[-2:] == ["-", "calibrated"]
    text = said(capsys, "here")
    assert "measured efficiencies" in text and "at most 8.123 GB" in text and "cpu dispatch" in text


def test_a_device_of_which_little_is_known_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bare.toml").write_text('schema_version = 1\n[bare]\ntitle = "Bare"\n[bare.npu]\n')
    assert row(said(capsys, file=tmp_path / "bare.toml"), "bare") == ["Bare", "npu", *"-------"]
    assert "no bandwidth" in said(capsys, "bare", file=tmp_path / "bare.toml")
    assert answer(capsys, "bare", file=tmp_path / "bare.toml")["device"]["used"]["npu"]["bytes_per_s"] is None


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean hx370"):
        devices("hx37")
    with pytest.raises(FileNotFoundError, match="no file"):
        devices(file=tmp_path / "absent.toml")
