"""Files of devices: the user's, this machine's, saved and read back; what is refused, with file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.profiles import device, devicefile
from rlkit.profiles.device import Device, Efficiency, Memory, Sample, Unit, Value

BUILT_IN = device.built_in()
QUOTED = 'basis = "measured", source = "own run", date = "2026-11-22" }'
PLAIN = f"""
schema_version = 1
[laptop]
title = "A laptop"
[laptop.cpu]
bandwidth = {{ value = 50, unit = "GB/s", {QUOTED}
[laptop.cpu.peaks]
fp32 = {{ value = 400, unit = "GFLOP/s", {QUOTED}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def measured(value: float, unit: str, **more: Any) -> Value:
    return Value(value, unit, "own run", "2026-11-22", "measured", **more)


def here() -> Device:
    samples = (Sample(1, 4, 32, 10**6, 10**6, 2.5e-5), Sample(512, 4, 32, 10**9, 10**6, 0.01))
    unit = Unit(
        "cpu",
        title='a "CPU" \\ 2 cores',
        peaks={"fp32": measured(1.25e11, "FLOP/s"), "int8-vnni": measured(5e11, "OP/s", note="n")},
        defaults={"int8": "int8-vnni"},
        bandwidth=measured(2.3456789012345e10, "B/s"),
        dispatch=measured(0.0, "s"),
        efficiency={"linear": Efficiency(0.6, 1.2, samples), "norm": Efficiency(memory=0.3)},
    )
    memory = Memory("installed", None, (measured(8e9, "B"),))
    return Device("here", "this machine", {"cpu": unit}, (memory,), calibrated=True, installed_nbytes=8_123_456_789)


@pytest.mark.parametrize("found", [*BUILT_IN.values(), here()], ids=lambda found: found.name)
def test_saved_devices_are_read_back_equal(found: Device, tmp_path: Path) -> None:
    device.save(found, tmp_path / "new" / "device.toml")
    assert devicefile.read(tmp_path / "new" / "device.toml")[0] == {found.name: found}


@given(st.floats(1e6, 1e15), st.text(min_size=1, max_size=30).filter(str.isprintable).filter(str.strip))
def test_any_number_and_any_line_of_text_survive(value: float, text: str) -> None:
    unit = Unit("cpu", text, bandwidth=Value(value, "B/s", text, "2026", "quoted", text))
    found = Device("d", text, {"cpu": unit}, aliases=(text,))
    assert devicefile.parse(devicefile.to_toml(found))[0]["d"] == found


def test_this_machine_is_found_once_it_is_measured() -> None:
    assert "here" not in device.load()
    device.save(here(), device.here_path())
    found, unit = device.find("here")
    assert found == here() and unit.calibrated and unit.dispatch_seconds == 0.0
    assert unit.efficiency["linear"].samples[1].tokens == 512
    assert list(device.load()) == [*BUILT_IN, "here"]


@pytest.mark.parametrize(
    "text",
    [
        "schema_version = 2",
        "{ damaged",
        PLAIN,
        PLAIN.replace("laptop", "here").replace("title", 'aliases = ["h100"]\ntitle'),
    ],
)
def test_a_damaged_measurement_names_its_file_and_the_remedy(text: str) -> None:
    device.here_path().parent.mkdir(parents=True)
    device.here_path().write_text(text)
    with pytest.raises(ValueError, match=r"here\.toml.*run `rlkit calibrate` again, or delete that file"):
        device.load()


def test_a_user_starts_from_a_known_device(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f"""
schema_version = 1
date = "2026-10"
[sources]
run = "my own run"
[mine]
title = "My laptop"
like = "hx370"
[mine.igpu]
bandwidth = {{ value = 81.5, unit = "GB/s", basis = "measured", source = "run" }}
[mine.igpu.peaks]
fp16 = "fp16-valu"
[mine.gpu.peaks]
fp32 = {{ value = 9, unit = "TFLOPS", {QUOTED}
""")
    mine = device.load(tmp_path / "mine.toml")["mine"]
    assert mine.aliases == () and list(mine.units) == ["cpu", "igpu", "npu", "gpu"]
    assert mine.units["igpu"].reads == Value(81.5e9, "B/s", "my own run", "2026-10", "measured")
    assert mine.units["igpu"].peak_name("fp16") == "fp16-valu"
    assert mine.units["cpu"].peaks == BUILT_IN["hx370"].units["cpu"].peaks
    assert mine.memories == BUILT_IN["hx370"].memories
    assert device.find("MINE:gpu", device.load(tmp_path / "mine.toml"))[1].peak("fp32").value == 9e12


def test_a_user_may_start_from_this_machine_and_from_own_devices(tmp_path: Path) -> None:
    device.save(here(), device.here_path())
    (tmp_path / "mine.toml").write_text(
        'schema_version = 1\n[b]\ntitle = "B"\nlike = "a"\n[a]\ntitle = "A"\nlike = "here"\n'
    )
    loaded = device.load(tmp_path / "mine.toml")
    assert loaded["b"].units["cpu"].efficiency == here().units["cpu"].efficiency
    assert loaded["b"].title == "B" and not loaded["b"].calibrated


VALUE = f'bandwidth = {{ value = 50, unit = "GB/s", {QUOTED}'
BROKEN = {
    "no TOML": ("[laptop", "is not valid TOML"),
    "an endless number": (f"schema_version = {'1' * 5000}", "is not valid TOML"),
    "depth": (f"schema_version = 1\n[{'.'.join('a' * 3000)}]", "nested too deeply"),
    "depth of lists": (f"schema_version = 1\na = {'[' * 3000}", "nested too deeply|not valid TOML"),
    "a chain": (
        "schema_version = 1\n" + "".join(f'[a{i}]\nlike = "a{i + 1}"\n' for i in range(3000)) + "[a3000]",
        "nested too deeply",
    ),
    "sources": (PLAIN.replace("[laptop]", "sources = 3\n[laptop]", 1), "sources = 3 is no table of texts"),
    "a source": (PLAIN.replace("[laptop]", "sources.a = 3\n[laptop]", 1), r"sources\.a = 3 is no line of text"),
    "head date": (PLAIN.replace("[laptop]", "date = 2026\n[laptop]", 1), "date = 2026 is no line of text"),
    "no version": (PLAIN.replace("schema_version = 1", ""), "schema_version is missing; this rlkit reads version 1"),
    "another version": (PLAIN.replace("version = 1", "version = 2"), "schema_version = 2; this rlkit reads"),
    "version true": (PLAIN.replace("version = 1", "version = true"), "schema_version = True"),
    "unknown head": (PLAIN.replace("[laptop]", "colour = 1\n[laptop]", 1), "colour unknown key"),
    "unknown device key": (PLAIN.replace("title", "titel", 1), r"laptop\.titel is an unknown key; known here: title"),
    "unknown unit": (PLAIN.replace("laptop.cpu", "laptop.tpu"), r"laptop\.tpu is an unknown key"),
    "unknown unit key": (PLAIN.replace("bandwidth", "bandwith"), r"laptop\.cpu\.bandwith is an unknown key"),
    "unknown value key": (PLAIN.replace("date =", "day ="), r"laptop\.cpu\.bandwidth\.day is an unknown key"),
    "no title": (PLAIN.replace('title = "A laptop"', ""), "laptop: title is missing"),
    "title a number": (PLAIN.replace('"A laptop"', "3"), r"laptop\.title = 3 is no line of text"),
    "no unit at all": ('schema_version = 1\n[laptop]\ntitle = "x"', "laptop: no unit; give it one of cpu"),
    "unit no table": ('schema_version = 1\n[laptop]\ntitle = "x"\ncpu = 3', r"laptop\.cpu = 3 is no table"),
    "value no table": (
        PLAIN.replace(VALUE, "bandwidth = 50e9"),
        r"laptop\.cpu\.bandwidth = 50000000000\.0 is no table",
    ),
    "negative": (
        PLAIN.replace("value = 50,", "value = -50,"),
        r"laptop\.cpu\.bandwidth: value = -5e\+10 B/s is negative",
    ),
    "absurd": (
        PLAIN.replace("value = 50,", "value = 5e9,"),
        r"cpu\.bandwidth: value = 5e\+18 B/s is outside 1e\+06 to",
    ),
    "zero": (PLAIN.replace("value = 400,", "value = 0,"), r"cpu\.peaks\.fp32: value = 0 FLOP/s is outside"),
    "endless": (PLAIN.replace("value = 50,", f"value = 1{'0' * 400},"), r"cpu\.bandwidth\.value = .* is no number"),
    "NaN": (PLAIN.replace("value = 50,", "value = nan,"), r"cpu\.bandwidth: value = nan is no finite number"),
    "infinite": (PLAIN.replace("value = 50,", "value = inf,"), r"cpu\.bandwidth\.value = inf is no number"),
    "true": (PLAIN.replace("value = 50,", "value = true,"), r"cpu\.bandwidth\.value = True is no number"),
    "text": (PLAIN.replace("value = 50,", 'value = "50",'), r"cpu\.bandwidth\.value = '50' is no number"),
    "no source": (PLAIN.replace('source = "own run", ', ""), r"cpu\.bandwidth\.source is missing"),
    "empty source": (PLAIN.replace("own run", " "), r"cpu\.bandwidth: source is empty"),
    "no date": (PLAIN.replace(', date = "2026-11-22"', ""), r"cpu\.bandwidth\.date is missing"),
    "no such date": (PLAIN.replace("2026-11-22", "2026-13"), r"cpu\.bandwidth: date = '2026-13' is none"),
    "date no text": (PLAIN.replace('"2026-11-22"', "2026-11-22"), r"cpu\.bandwidth\.date = .* is no line of text"),
    "basis": (PLAIN.replace('"measured"', '"guessed"'), r"cpu\.bandwidth: basis = 'guessed' is not known"),
    "unit of another kind": (PLAIN.replace('"GB/s"', '"GB"'), r"laptop\.cpu: bandwidth is in B, not B/s"),
    "no unit known": (PLAIN.replace('"GB/s"', '"furlong"'), r"cpu\.bandwidth\.unit = 'furlong' is not known"),
    "OP/s of floats": (PLAIN.replace('"GFLOP/s"', '"TOPS"'), r"peaks\.fp32 is in OP/s, not FLOP/s"),
    "no data type": (PLAIN.replace("fp32 =", "fp31 ="), r"peaks\.fp31 is of no known data type; start it with fp32"),
    "ambiguous": (
        PLAIN.replace("fp32 =", "fp32-dual ="),
        r'peaks\.fp32-dual alone does not say .* add fp32 = "fp32-dual"',
    ),
    "no such default": (PLAIN + 'fp16 = "fp16-wmma"', r"peaks\.fp16 = 'fp16-wmma' names no variant of it"),
    "default of a number": (PLAIN + 'int8 = "fp32"', r"peaks\.int8 = 'fp32' names no variant of it"),
    "like nobody": (
        PLAIN.replace("title", 'like = "hx3"\ntitle'),
        r"laptop\.like = 'hx3' is no device here; known are",
    ),
    "like a number": (PLAIN.replace("title", "like = 3\ntitle"), r"laptop\.like = 3 is no device here"),
    "like itself": (PLAIN.replace("title", 'like = "laptop"\ntitle'), r"goes in a circle: laptop -> laptop"),
    "aliases": (PLAIN.replace("title", 'aliases = "x"\ntitle'), r"laptop\.aliases = 'x' is no list of names"),
    "name": (PLAIN.replace("[laptop", '["My Laptop"'), "'My Laptop' is no name of a device"),
    "built-in name": (PLAIN.replace("laptop", "hx370"), "the name hx370 is that of hx370; choose another"),
    "built-in alias": (PLAIN.replace("title", 'aliases = ["Strix Halo"]\ntitle'), "strixhalo is that of max395"),
    "name of this machine": (PLAIN.replace("laptop", "here"), "the name here is that of this machine"),
    "calibrated": (PLAIN.replace("title", "calibrated = 1\ntitle"), r"laptop\.calibrated is true or false"),
    "installed": (
        PLAIN.replace("title", "installed_nbytes = -1\ntitle"),
        r"laptop\.installed_nbytes = -1 is no number",
    ),
    "memory": (PLAIN + '[laptop.memory]\nkind = "x"', r"laptop\.memory = .* is no list of tables"),
    "no kind": (PLAIN + "[[laptop.memory]]\n", r"laptop\.memory\[0\]: kind = '' names no memory"),
    "twice": (PLAIN + 2 * '[[laptop.memory]]\nkind = "x"\n', "laptop: memory: a kind is given twice"),
    "class": (PLAIN + "[laptop.cpu.efficiency.magic]\ncompute = 0.5", r"laptop\.cpu: efficiency\.magic is no class"),
    "share": (PLAIN + "[laptop.cpu.efficiency.linear]\ncompute = 0", r"efficiency\.linear: compute = 0 is no share"),
    "share NaN": (
        PLAIN + "[laptop.cpu.efficiency.linear]\nmemory = nan",
        r"efficiency\.linear: memory = nan is no share",
    ),
    "sample": (
        PLAIN + "[laptop.cpu.efficiency.linear]\nsamples = [{ tokens = 1 }]",
        r"efficiency\.linear\.samples\[0\] lacks bits, group",
    ),
    "seconds": (
        PLAIN + "[laptop.cpu.efficiency.norm]\nsamples = "
        "[{ tokens = 1, bits = 0, group = 0, flops = 1, nbytes = 1, seconds = 0 }]",
        r"efficiency\.norm\.samples\[0\]: seconds = 0 is no duration",
    ),
    "count": (
        PLAIN + "[laptop.cpu.efficiency.norm]\nsamples = "
        "[{ tokens = 1.5, bits = 0, group = 0, flops = 1, nbytes = 1, seconds = 1 }]",
        r"samples\[0\]: .* has a count that is none",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_line_with_file_and_key(case: str, tmp_path: Path) -> None:
    text, message = BROKEN[case]
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        device.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_the_plain_file_of_those_cases_is_sound(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(PLAIN)
    assert device.load(tmp_path / "mine.toml")["laptop"].units["cpu"].peak("fp16").value == 400e9


def test_a_circle_of_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'schema_version = 1\n[a]\nlike = "b"\ntitle = "A"\n[b]\nlike = "a"\ntitle = "B"\n'
    )
    with pytest.raises(ValueError, match=r"a\.like goes in a circle: a -> b -> a; break it"):
        device.load(tmp_path / "mine.toml")


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.toml"):
        device.load(tmp_path / "absent.toml")
    with pytest.raises(FileNotFoundError):
        device.load(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.toml is not UTF-8 text"):
        device.load(tmp_path / "bytes.toml")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(devicefile.MOST_NBYTES + 1)
    with pytest.raises(ValueError, match="too large for a file of devices"):
        device.load(tmp_path / "large.toml")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Value(1.0, "GB/s", "s", "2026", "measured"), "no base unit"),
        (lambda: measured(True, "s"), "no finite number"),
        (lambda: Value(1.0, "s", "a\nb", "2026", "measured"), "source = .* is no line of text"),
        (lambda: Unit("tpu"), "unit 'tpu' is not known"),
        (lambda: Unit("cpu", dispatch=measured(1.0, "W")), "dispatch is in W, not s"),
        (lambda: Device("x", "a\tb", {"cpu": Unit("cpu")}), "title = .* is no line of text"),
        (lambda: Device("x", "x", {"cpu": Unit("npu")}), "do not go by their own names"),
    ],
)
def test_values_made_in_code_are_checked_alike(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
