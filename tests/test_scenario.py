"""Scenarios as files: what is read of them, and every fault as one line with file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkit.apps import scenariofiles
from rlkit.profiles.scheduling import scenario
from rlkit.profiles.scheduling.scenario import Overheads, Process
from rlkit.profiles.scheduling.workload import Late, Lengths

SHIPPED = Path(__file__).parent.parent / "apps" / "scenarios"
MS = 1_000_000
WHOLE = """
schema_version = 1
title = "A call"
duration_ms = 1000
[streams.voice]
model = "vad"
rate = 31.25
jitter_ms = 0.5
[streams.text]
model = "stt"
rate = 31.25
after = "voice"
probability = 0.5
deadline_ms = 200
late = "run"
units = ["cpu"]
[requests.summary]
model = "llm"
prompt_tokens = { low = 10, high = 900, median = 100, sigma = 0.5 }
output_tokens = 20
ttft_ms = 500
tpot_ms = 50
recipes = ["w4", "w4w2-gateup"]
qualities = [1.0, 0.9]
chunks = [256, 64]
[requests.summary.arrivals]
process = "poisson"
interval_ms = 300
"""


def test_everything_is_read() -> None:
    found = scenario.parse(WHOLE, "calls/call.toml")
    voice, text = found.streams
    (summary,) = found.requests
    assert (found.name, found.duration, found.overheads) == ("call", 1000 * MS, Overheads.SWITCH)
    assert (voice.interval, voice.deadline, voice.jitter, voice.count) == (32 * MS, 32 * MS, MS // 2, 31)
    assert (text.after, text.probability, text.deadline, text.late) == ("voice", 0.5, 200 * MS, Late.RUN)
    assert text.units == ("cpu",) and voice.units == () and voice.late is Late.DROP
    assert summary.prompt == Lengths(10, 900, 100, 0.5) and summary.output == Lengths(20, 20)
    assert (summary.ttft, summary.tpot, summary.chunks) == (500 * MS, 50 * MS, (256, 64))
    assert dict(zip(summary.recipes, summary.qualities, strict=True)) == {"w4": 1.0, "w4w2-gateup": 0.9}
    assert (summary.arrivals.process, summary.arrivals.interval) == (Process.POISSON, 300 * MS)
    assert found.used_models == ("vad", "stt", "llm")


def arrivals(text: str) -> str:
    return WHOLE.replace('process = "poisson"\ninterval_ms = 300', text)


def test_other_ways_to_arrive() -> None:
    burst = 'process = "bursty"\ninterval_ms = 300\nwithin_ms = 20\nburst = { low = 2, high = 4 }'
    (bursty,) = scenario.parse(arrivals(burst)).requests
    assert (bursty.arrivals.within, bursty.arrivals.burst) == (20 * MS, Lengths(2, 4))
    (turns,) = scenario.parse(arrivals('process = "turns"\ninterval_ms = 300\nsigma = 0.7')).requests
    assert (turns.arrivals.process, turns.arrivals.sigma) == (Process.TURNS, 0.7)
    (after,) = scenario.parse(arrivals('process = "after"\nstream = "text"\nprobability = 0.1')).requests
    assert (after.arrivals.stream, after.arrivals.probability) == ("text", 0.1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema_version = 1", "schema_version = 2", "schema_version = 2"),
        ("schema_version = 1\n", "", "schema_version is missing"),
        ("duration_ms = 1000", "duration_ms = -5", "duration_ms = -5 is negative"),
        ("jitter_ms = 0.5", "jitters = 1", "streams.voice.jitters is an unknown key; here are model, rate"),
        ("jitter_ms = 0.5", "jitter_ms = 40", "streams.voice.jitter_ms = 40 is more than the interval of 32 ms"),
        ("rate = 31.25\njitter", "rate = 0\njitter", "streams.voice.rate = 0 is zero"),
        ("rate = 31.25\njitter", "rate = -3\njitter", "streams.voice.rate = -3 is negative"),
        ("rate = 31.25\njitter", "rate = nan\njitter", "streams.voice.rate = nan is no number"),
        ("rate = 31.25\njitter", "rate = true\njitter", "streams.voice.rate = True is no number"),
        ("rate = 31.25\njitter", "rate = 0.5\njitter", "gives 0 frames within the duration"),
        ("rate = 31.25\nafter", "rate = 10\nafter", "streams.text.after = 'voice': frame n waits for frame n"),
        ('after = "voice"', 'after = "none"', "streams.text.after = 'none' is no stream of this scenario"),
        ('after = "voice"', 'after = "text"', "streams.text.after = 'text' closes a cycle: text after text"),
        ("jitter_ms = 0.5", 'after = "text"', "closes a cycle: voice after text after voice"),
        ("probability = 0.5", "probability = 0", "streams.text.probability = 0 is zero"),
        ('late = "run"', 'late = "maybe"', "streams.text.late = 'maybe' is not known; use drop, run"),
        ('units = ["cpu"]', "units = []", "streams.text.units = [] is no list of names"),
        ('model = "llm"\n', "", "requests.summary.model is missing"),
        ("output_tokens = 20", "output_tokens = 0", "requests.summary.output_tokens.low = 0 is zero"),
        ("output_tokens = 20", "", "requests.summary.output_tokens is missing"),
        ("low = 10, high = 900", "low = 10, high = 9", "requests.summary.prompt_tokens.high = 9 is out of range"),
        ("qualities = [1.0, 0.9]", "qualities = [1.0]", "requests.summary.qualities = [1.0] must be 2 numbers"),
        ("chunks = [256, 64]", "chunks = [0]", "requests.summary.chunks = [0] must be different numbers"),
        ("chunks = [256, 64]", "chunks = [64, 64]", "requests.summary.chunks = [64, 64] must be different numbers"),
        ("ttft_ms = 500", "ttft_ms = 0", "requests.summary.ttft_ms = 0 is zero"),
        ('process = "poisson"', 'process = "storm"', "requests.summary.arrivals.process = 'storm' is not known"),
        ("interval_ms = 300", "rate = 3", "requests.summary.arrivals.interval_ms is missing"),
        ("[requests.summary]", "[requests.voice]", "requests.voice has the name of a stream"),
        ("[streams.voice]", '[streams."a b"]', "streams.a b: is no name"),
        ("[streams.voice]", "[streams", "is not valid TOML"),
    ],
)
def test_a_fault_is_one_line_with_file_and_key(old: str, new: str, said: str) -> None:
    assert old in WHOLE
    text = WHOLE.replace(old, new, 1)
    if "requests.voice" in new:
        text = text.replace("[requests.summary.arrivals]", "[requests.voice.arrivals]")
    with pytest.raises(ValueError, match=r"^mine\.toml") as caught:
        scenario.parse(text, "mine.toml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no scenario"):
        scenario.read(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        scenario.read(path)
    with pytest.raises(ValueError, match="streams and requests are both missing"):
        scenario.parse('schema_version = 1\ntitle = "none"\nduration_ms = 1')


XRBENCH = {
    "vr-gaming": {"eyes": (60, 16, ""), "gaze": (60, 16, "eyes 1.0"), "hands": (45, 22, "")},
    "ar-gaming": {"hands": (45, 22, ""), "depth": (30, 33, ""), "planes": (15, 66, "")},
    "ar-assistant": {
        "keyword": (3, 333, ""),
        "speech": (3, 333, "keyword 0.5"),
        "segmentation": (10, 100, ""),
        "depth": (30, 33, ""),
        "planes": (15, 66, ""),
        "objects": (10, 100, ""),
    },
    "outdoor-a": {
        "keyword": (3, 333, ""),
        "speech": (3, 333, "keyword 0.2"),
        "segmentation": (10, 100, ""),
        "objects": (30, 33, ""),
    },
    "outdoor-b": {"keyword": (3, 333, ""), "speech": (3, 333, "keyword 0.2"), "objects": (30, 33, "")},
    "social-a": {
        "eyes": (60, 16, ""),
        "gaze": (60, 16, "eyes 1.0"),
        "refinement": (30, 33, ""),
        "hands": (30, 33, ""),
    },
    "social-b": {"eyes": (60, 16, ""), "gaze": (60, 16, "eyes 1.0"), "actions": (30, 33, "")},
}


@pytest.mark.parametrize("name", XRBENCH)
def test_xrbench_is_as_its_program_has_it(name: str) -> None:
    """Whole milliseconds, floor(700 / interval) frames, due at the next frame, jitter 0.01 ms, late ones dropped."""
    found = scenario.read(SHIPPED / f"xrbench-{name}.toml")
    assert {each.name for each in found.streams} == set(XRBENCH[name])
    for each in found.streams:
        _rate, interval, dependency = XRBENCH[name][each.name]
        said = f"{each.after} {each.probability}" if each.after else ""
        assert (each.interval, each.deadline, each.count) == (interval * MS, interval * MS, 700 // interval)
        assert (said, each.jitter, each.late) == (dependency, MS // 100, Late.DROP)
    assert (found.duration, found.overheads, found.requests) == (700 * MS, Overheads.NONE, ())


def test_shipped_scenarios_are_twelve() -> None:
    names = {path.stem for path in SHIPPED.glob("*.toml")}
    ours = {"video-conferencing", "gaming", "coding-beside-meeting", "laptop-call", "depth-robot"}
    assert names == ours | {f"xrbench-{name}" for name in XRBENCH}
    for name in ours:
        found = scenario.read(SHIPPED / f"{name}.toml")
        assert found.requests and found.streams and "our own" in found.about


def test_the_document_lists_them_and_its_example_is_one() -> None:
    text = (SHIPPED.parents[1] / "docs" / "scenarios.md").read_text(encoding="utf-8")
    listed = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert set(scenariofiles.names()) <= listed
    form = text.partition("## The form")[2].partition("\n## ")[0]
    lines = [line[4:] for line in form.splitlines() if line.startswith("    ") or not line]
    found = scenario.parse("\n".join(lines))
    assert [each.name for each in found.streams] == ["voice", "transcript"] and len(found.requests) == 1


def test_whole_milliseconds_need_whole_rates() -> None:
    text = WHOLE.replace("duration_ms = 1000", "duration_ms = 1000\nwhole_milliseconds = true")
    with pytest.raises(ValueError, match=r"streams.voice.rate = 31.25 gives no whole milliseconds"):
        scenario.parse(text)


def test_scenarios_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert scenariofiles.load("gaming").name == "gaming" and len(scenariofiles.names()) == 12
    path = tmp_path / "mine.toml"
    path.write_text(WHOLE)
    assert scenariofiles.load(str(path)).name == "mine"
    with pytest.raises(FileNotFoundError, match=r"no scenario 'gamin'; there is gaming.*, or give a \.toml file"):
        scenariofiles.load("gamin")
