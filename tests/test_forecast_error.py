"""The benchmark of forecasts: errors against kept measurements, and a real bundle measured once."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkit.apps.benchmarks import forecast_error
from rlkit.apps.benchmarks.devices.items import plain
from rlkit.profiles import places, standard
from rlkit.profiles.rates import Peaks
from rlkit.recover import recipe as recipes
from rlkit.recover.atomic import write_json
from rlkit.recover.progress import silent
from rlkit.recover.source import ModelShape

TINY = ModelShape("LlamaForCausalLM", 2, 128, 256, 4, 2, 32, 512, True, 1024, False)
PLACE = places.of_rates(Peaks(20e9, 100e9))


def test_errors_are_relative_to_what_was_measured(tmp_path: Path) -> None:
    series = [{"kind": "tpot", "depth": 0, "seconds": 1e-3}, {"kind": "ttft", "depth": 0, "seconds": 1.0}]
    write_json(tmp_path / "measured" / "qwen3-0.6b-w4.json", {"series": series})
    rows = forecast_error._rows("qwen3-0.6b", "w4", PLACE, [0], 1, tmp_path, silent)
    assert [row["kind"] for row in rows] == ["tpot", "ttft"]
    for row in rows:
        assert row["error"] == pytest.approx(row["forecast_seconds"] / row["measured_seconds"] - 1)
        assert row["error"] >= row["baseline_error"]  # the baseline counts less work
    found = forecast_error.summary(rows)
    assert found["tpot_error"] == {"median": abs(rows[0]["error"]), "worst": abs(rows[0]["error"]), "rows": 1}


def test_random_codes_have_no_corrections() -> None:
    assert all(not rule.scheme.adapter_rank for rule in plain("w4w2-gateup").rules)
    assert [rule.match for rule in plain("w4").rules] == [r.match for r in recipes.load("w4").rules]


def test_an_unknown_shape_is_one_line() -> None:
    with pytest.raises(ValueError, match="no shape 'huge'; use smollm2-135m"):
        forecast_error.shape_named("huge")


def test_a_bundle_is_measured_at_every_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(standard.MODELS, "tiny", TINY)
    rows = forecast_error._rows("tiny", "w4", PLACE, [0, 64], 1, tmp_path, silent)
    assert [(row["kind"], row["depth"]) for row in rows] == [("ttft", 0), ("tpot", 0), ("tpot", 64)]
    assert all(row["measured_seconds"] > 0 for row in rows)
    assert (tmp_path / "measured" / "tiny-w4.json").is_file() and not (tmp_path / "tiny-w4").exists()
