"""The benchmark of depth networks: what it makes and prints, on networks that hardly learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from rlkit.apps.benchmarks import depth
from rlkit.recover.depthfile import Kind


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny images, one scene, one cut of each kind."""
    for kind, cut in ((Kind.MONO, "widths:0.25"), (Kind.STEREO, "spn:0")):
        settings = replace(depth.DEFAULTS[kind], size=(32, 64), batch=1, pool=1)
        monkeypatch.setitem(depth.DEFAULTS, kind, settings)
        monkeypatch.setitem(depth.PUBLISHED, kind, (cut,))
        monkeypatch.setitem(depth.CUTS, kind, (cut,))


def run(out: Path, suite: str) -> int:
    try:
        depth.main(out, suite=suite, steps=1, count=1, seconds=0.05, threads=1, motorcycle=False, json=True)
    except typer.Exit as stop:
        return stop.exit_code
    return 0


@pytest.mark.usefixtures("small")
def test_suites_share_networks_and_hold_them_to_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(tmp_path, "mono,stereo")
    found = json.loads(capsys.readouterr().out)
    bars = [bar for name in ("mono", "stereo") for bar in found[name]["suites"][0]["bars"]]
    assert code == int(not all(bar["met"] for bar in bars))
    mono, stereo = ({row["name"]: row for row in found[name]["suites"][0]["rows"]} for name in ("mono", "stereo"))
    assert mono["full"]["parameters"] == 1_966_465 and stereo["full"]["parameters"] == 43_269
    assert stereo["spn:0"]["parameters"] == 34_629 and mono["full"]["latency"]
    assert (tmp_path / "mono" / "report.html").is_file() and list((tmp_path / "stereo" / "pictures").glob("*.png"))
    assert json.loads((tmp_path / "depth.json").read_text()) == found
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/networks/*/model.safetensors")}
    assert len(made) == 6
    run(tmp_path, "mono")
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_latencies_need_networks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no networks yet; run the suites mono and stereo first"):
        run(tmp_path, "latency")
    with pytest.raises(typer.BadParameter, match="no suite 'x'"):
        run(tmp_path, "x")
