"""The result file of the benchmark: it survives JSON, refuses what it is not, and is rendered as tables."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from measured import entry, measurement, result
from rlkit.profiles import benchfile
from rlkit.profiles.bench import Plan, standard
from rlkit.profiles.benchfile import Result, read_result
from rlkit.recover.atomic import write_json
from shapes import SMOLLM2_135M


def test_it_survives_a_file(tmp_path: Path) -> None:
    original = result(entry("a"), entry("b", factor=2.0))
    write_json(tmp_path / "r.json", original.to_json())
    assert read_result(tmp_path / "r.json") == original
    assert original.to_json()["ratios"][1] == {"name": "b", "against": "a", "test": "tg2 @ d64", "time": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema_version 1, this rlkit reads 2; measure again"),
        ({"schema_version": 3}, "schema_version 3"),
        ({"kind": "report"}, "no result of rlkit bench"),
        ({"entries": []}, "holds no measurement"),
        ({"entries": [{}]}, "no complete result"),
        ({"entries": 5}, "no complete result"),
        ({"machine": {"cpu": "x"}}, "no complete result"),
        ({"machine": None}, "no complete result"),
    ],
)
def test_other_files_are_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Result.from_json({**result().to_json(), **change})
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_result(tmp_path / "absent.json")


def test_a_report_is_no_result() -> None:
    with pytest.raises(ValueError, match="no result of rlkit bench"):
        Result.from_json({"schema_version": 2, "bundles": []})


def test_rows_stand_as_llama_bench_prints_them() -> None:
    drawn = benchfile.table(result())
    prefill, decode = drawn.rows
    about = ("a", "w4", "50.0", "2.97", "cpu, 2 threads")
    assert prefill == (*about, "pp64", "96.0 ± 45.3", "750", "", "", "", "", "", "200")
    assert decode == (*about, "tg2 @ d64", "58.3 ± 11.8", "", "17.5", "20.0", "20.0", "50.0", "2.9", "210")
    assert len(drawn.columns) == len(prefill)
    bundles, speeds = benchfile.tables(result())
    assert bundles.rows == (about,) and [row[1:] for row in speeds.rows] == [row[5:] for row in drawn.rows]


def test_unknown_numbers_are_empty_cells() -> None:
    lone = result(entry("a", prefill=(0.5,)), repeats=1)
    table = lone.to_json()
    table["entries"][0]["measurement"]["series"][1] |= {"nbytes_per_token": None, "peak_nbytes": None}
    table["entries"][0]["measurement"]["threads"] = None
    row = benchfile.table(Result.from_json(table)).rows[1]
    assert row[4] == "cpu" and row[6] == "66.7" and row[-3:] == ("", "", "")
    assert ",,," in benchfile.to_csv(Result.from_json(table))


def test_csv_holds_plain_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(benchfile.to_csv(result(entry("=a,b"))))))
    assert [row["test"] for row in rows] == ["pp64", "tg2 @ d64"]
    assert rows[0]["name"] == "'=a,b"  # a spreadsheet would compute it
    assert float(rows[0]["ttft_seconds"]) == 0.75 and rows[0]["tpot_seconds"] == ""
    assert float(rows[1]["tokens_per_s"]) == pytest.approx(58.333, abs=1e-3) and rows[1]["depth"] == "64"


def test_what_ran_elsewhere_is_told() -> None:
    said = list(benchfile.notes(result(entry("a"), entry("b", target="webgpu"))))
    assert said[0] == "b was made for webgpu and ran on the CPU; --provider asks for another"
    assert "pp64: b takes 1.00 times the time of a" in said[1]
    assert list(benchfile.notes(result())) == []


def test_a_result_says_what_the_manifest_says(tmp_path: Path) -> None:
    tensor = {"kind": "gate_up", "bits": 2, "nbytes": 50_000_000}
    manifest = {"recipe": {"name": "w4"}, "target": "webgpu", "shape": SMOLLM2_135M.to_json(), "tensors": [tensor]}
    (tmp_path / "rlkit.json").write_text(json.dumps(manifest))
    found = benchfile.result_of([measurement("x")], [tmp_path], Plan(standard((64,), 2, (64,)), repeats=2))
    (kept,) = found.entries
    assert (kept.recipe, kept.target, kept.nbytes, kept.parameters) == ("w4", "webgpu", 50_000_000, 134_515_008)
    assert found.host.cores >= 1 and found.host.cpu and "rlkit-edge" in found.versions
    assert str(tmp_path) not in json.dumps(found.to_json())
