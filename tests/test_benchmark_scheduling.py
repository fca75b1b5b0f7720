"""The benchmark of scheduling: every suite on little work, what its figures mean, and a missed bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from rlkit.apps.benchmarks import scheduling
from rlkit.profiles.scheduling.policies import FIVE, POLICIES


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def run(tmp_path: Path, suites: str, scenarios: str = "xrbench-vr-gaming,xrbench-outdoor-a") -> dict[str, Any]:
    sizes = {"seeds": 2, "simulations": 1, "cases": 3, "workers": 1}
    try:
        scheduling.main(suites, "hx370", scenarios, **sizes, output=tmp_path / "b.json", json=False)  # type: ignore[arg-type]
    except typer.Exit as left:
        assert left.exit_code == 1
    found: dict[str, Any] = json.loads((tmp_path / "b.json").read_text())
    return found


def test_policies_are_compared_case_by_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "policies")["policies"]
    vr, outdoor = found["rows"]
    assert vr["scenario"] == "xrbench-vr-gaming" and set(vr["rates"]) == set(POLICIES)
    least = min(vr["rates"][name] for name in FIVE)
    most = max(vr["rates"][name] for name in FIVE)
    assert vr["spread"] == pytest.approx((most - least) / most)
    assert vr["points_above"] == pytest.approx(100 * (vr["rates"]["lookahead"] - least))
    assert outdoor["ratio"] is None and outdoor["spread"] == 0.0  # nothing is violated there
    assert all(0 <= row["unavoidable"] <= min(row["rates"].values()) + 1e-9 for row in found["rows"])
    assert found["spread"] == vr["spread"]  # outdoors there is nothing to spread
    assert found["means"]["fcfs"] == pytest.approx((vr["rates"]["fcfs"] + outdoor["rates"]["fcfs"]) / 2)
    out = capsys.readouterr().out
    assert "the paper's 41.7 %" in out and out.count(", met") + out.count(", NOT MET") == 2


def test_no_policy_is_better_than_the_oracle(tmp_path: Path) -> None:
    small, short = run(tmp_path, "oracle")["oracle"]["rows"]
    assert small["count"] == small["proven"] == 3 and short["count"] == 2
    for row in (small, short):
        assert all(row["oracle"] <= count <= row["targets"] for count in row["violations"].values())


def test_speed_counts_events_and_simulations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "ROUNDS", 1)
    monkeypatch.setattr(scheduling, "_prepared", lambda _name, device, real=scheduling._prepared: real(SHORT, device))
    found = run(tmp_path, "speed")["speed"]
    assert [row["policy"] for row in found["rows"]] == [*FIVE, "lookahead"]
    assert all(row["events_per_s"] == pytest.approx(row["events"] / row["seconds"]) for row in found["rows"])
    assert found["many"]["simulations"] == 1 and found["many"]["bar"] == pytest.approx(0.06)
    assert len(found["bars"]) == 2


SHORT = "xrbench-vr-gaming"


def test_a_missed_bar_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "POINTS_BAR", -200.0)
    with pytest.raises(typer.Exit) as left:
        scheduling.main("policies", "hx370", "xrbench-outdoor-a", 1, 1, 1, 1, None, json=True)
    assert left.value.exit_code == 1
    with pytest.raises(typer.BadParameter, match="no suite 'fast'"):
        scheduling.main("fast")
