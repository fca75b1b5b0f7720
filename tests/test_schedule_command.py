"""The command schedule: tables, JSON, page and trace, sweeps, and what it refuses in one line."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlkit.apps import cli, schedulerun
from rlkit.profiles.scheduling.gantt import window
from rlkit.profiles.scheduling.policies import FIVE, POLICIES

SHORT = ("schedule", "xrbench-vr-gaming", "--device", "hx370", "--seeds", "2")
TALK = """
schema_version = 1
title = "Talk & <b>see</b>"
duration_ms = 2000
[streams.faces]
model = "centerface"
rate = 30
[requests.talk]
model = "qwen3-0.6b"
prompt_tokens = 100
output_tokens = 5
ttft_ms = 200
tpot_ms = 50
arrivals = { process = "periodic", interval_ms = 500 }
"""


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def talk(tmp_path: Path) -> str:
    (tmp_path / "talk.toml").write_text(TALK)
    return "talk.toml"


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.run([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_holds_every_policy_and_the_spread(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, *SHORT, "-o", "kept.json")
    assert [one["policy"] for one in found["policies"]] == list(POLICIES)
    assert found["duration_s"] == 0.7 and found["seeds"] == [0, 1] and found["units"] == ["cpu", "igpu", "npu"]
    rates = {one["policy"]: one["rate"] for one in found["policies"]}
    five = [rates[name] for name in FIVE]
    assert found["spread"]["five"]["relative"] == pytest.approx((max(five) - min(five)) / max(five))
    assert found["paper_spread"] == 0.417 and json.loads(Path("kept.json").read_text()) == found
    assert _json(capsys, *SHORT) == found  # from what was kept, and deterministic


def test_the_table_names_what_it_shows(talk: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["schedule", talk, "--device", "max395", "--policies", "fcfs,lookahead", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "violated, %" in out and "TTFT, s" in out and "Busy: cpu/igpu/npu" in out and "XRBench" in out
    assert "no violations under fcfs, lookahead" in out and "41.7 %" in out and "Requests" in out
    assert (
        len(re.findall(r"^ *(?:fcfs|lookahead) ", out, re.MULTILINE)) == 4
    )  # both in two tables, beside the requests'


class Page(html.parser.HTMLParser):
    """What a page refers to, and how many of which elements it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.count: dict[str, int] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_else_and_escapes(talk: str) -> None:
    words = ["schedule", talk, "--device", "hx370", "--policies", "edf,hetero-eft", "--seeds", "1", "--html", "p.html"]
    assert cli.run(words) == 0
    text = Path("p.html").read_text()
    page = Page(text)
    assert page.links == [] and "http" not in text.split("<script")[0].replace("arXiv", "")
    assert "Talk &amp; &lt;b&gt;see&lt;/b&gt;" in text and "<b>" not in text
    assert page.count["figure"] == 2 and page.count["rect"] > 100 and '"streams": ["faces", "talk"]' in text
    assert "prefers-color-scheme: dark" in text and "$" not in text.replace("${", "")
    assert cli.run(words) == 2  # it is there
    assert cli.run([*words, "--force"]) == 0 and Path("p.html").read_text() == text


def test_the_trace_has_a_process_for_each_policy() -> None:
    assert cli.run([*SHORT, "--policies", "edf,fcfs", "--trace", "t.json"]) == 0
    events = json.loads(Path("t.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert [name.split(", ")[1] for name in names.values()] == ["edf", "fcfs"] and set(names) == {1, 2}
    starts = [event["id"] for event in events if event["ph"] == "s"]
    assert starts and len(set(starts)) == len(starts)
    assert {event["pid"] for event in events if event["ph"] == "X"} == {1, 2}


def test_the_charts_hold_the_first_seconds_only() -> None:
    asked = schedulerun.Asked(schedulerun.load("gaming", 6.0), ("edf",), 1, schedulerun.Where("hx370"))
    (run,) = schedulerun.runs(asked, 1.0)
    assert 1000 < window([run]) < 6000  # ms: so many steps, and no more
    assert window([]) == 10_000


def test_a_sweep_is_reported_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = (*SHORT, "--policies", "fcfs,edf", "--explore", "--assignments", "4", "--rounds", "0", "--rates", "1,1.5")
    found = _json(capsys, *sweep, "--html", "s.html")
    assert found["kind"] == "schedule-sweep" and len(found["points"]) == 4 * 2 * 2 and len(found["best"]) == 4
    assert Page(Path("s.html").read_text()).links == []
    assert cli.run(list(sweep)) == 0
    out = capsys.readouterr().out
    assert "best assignment" in out and "rate x 1.5" in out and "Spread between policies" in out


def test_a_dry_run_simulates_nothing(talk: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("schedule", talk, "--device", "hx370", "--explore", "--assignments", "6", "--dry-run")
    found = _json(capsys, *words)
    assert [row["stream"] for row in found["streams"]] == ["faces", "talk"] and found["assignments"][0] == "free"
    assert found["runs"] == 9 * 3 * len(found["assignments"]) and not (tmp_path / "cache").exists()
    assert cli.run(list(words)) == 0
    assert "TTFT 0.2 s, TPOT 50 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("gamin",), "no scenario 'gamin'; there is gaming"),
        (("nowhere.toml",), "no scenario nowhere.toml"),
        (("gaming",), "give --device, for example hx370"),
        (("gaming", "--device", "hx37"), "no device 'hx37'; did you mean hx370"),
        (("gaming", "--device", "hx370:igpu"), "leave the unit away"),
        (("gaming", "--device", "hx370", "--policies", "lokahead"), "did you mean lookahead"),
        (("gaming", "--device", "hx370", "--policies", ""), "no policy ''; use all, five"),
        (("gaming", "--device", "hx370", "--rates", "1,0"), "--rates '1,0' must be factors from 0.01 to 100"),
        (("gaming", "--device", "hx370", "--rates", "fast"), "--rates 'fast' must be"),
        (("gaming", "--device", "hx370", "--seeds", "0"), "--seeds 0 is outside 1 to 10,000"),
        (("gaming", "--device", "hx370", "--duration", "-1"), "a duration of -1 s"),
        (("gaming", "--device", "hx370", "--duration", "0.01"), "streams.pictures has 0 frames"),
        (("gaming", "--device", "hx370", "--workers", "0"), "--workers 0 is outside"),
        (("gaming", "--device", "hx370", "--ray", "http://x"), "Ray address 'http://x' must be auto"),
        (("gaming", "--device", "hx370", "--html", "p.png"), "p.png is no name of a page"),
        (("gaming", "--device", "hx370", "--rates", "1,2", "--trace", "t.json"), "--trace shows single runs"),
        (("gaming", "--device", "hx370", "--explore", "--assignments", "0"), "--assignments 0 is outside"),
        (("gaming", "--device", "hx370", "--units", "a=cpu:1"), "--units part the processor"),
        (("gaming", "--device", "hx370", "--profile", "x.json"), "--profile is of this machine and not of hx370"),
        (("gaming", "--profile", "x.json"), "no profile x.json"),
        (("gaming", "--device", "hx370", "--validate"), "--validate runs on this machine"),
        (("gaming", "--device", "hx370", "--bundle", "x"), "give --validate as well"),
        (("bad.toml", "--device", "hx370"), "bad.toml: streams.a.rate = -1.0 is negative"),
        (("loop.toml", "--device", "hx370"), "closes a cycle: a after b after a"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    head = 'schema_version = 1\ntitle = "t"\nduration_ms = 1000\n'
    stream = '[streams.{}]\nmodel = "yolov8n"\nrate = {}\n'
    Path("bad.toml").write_text(head + stream.format("a", -1.0))
    Path("loop.toml").write_text(head + "".join(stream.format(x, 5) + f'after = "{y}"\n' for x, y in ("ab", "ba")))
    assert cli.run(["schedule", *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and err.startswith("error: ")


def test_the_five_may_be_named_together() -> None:
    assert schedulerun.policies("five,lookahead") == (*FIVE, "lookahead")
    assert schedulerun.policies("EDF, edf") == ("edf",) and schedulerun.factors("1,2,1") == (1.0, 2.0)
