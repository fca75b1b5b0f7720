"""The export benchmark: what it measures in processes of their own, and how its bars are judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from rlkit.apps.benchmarks import export
from rlkit.apps.benchmarks.export import Run, compared, show
from rlkit.recover.standin import QWEN3_06B, W4W2_G128, byte_tokenizer, write_packed, write_random

TINY = replace(QWEN3_06B, layers=2, hidden=128, ffn=256, heads=4, kv_heads=2, vocab=512, max_context=128)


def runs(mine: tuple[float, int, int], stock: tuple[float, int]) -> list[Run]:
    """A turn of both: seconds, peak, and of ours bytes where 1,000 were planned."""
    return [Run("rlkit", *mine, planned_nbytes=1000), Run("stock", *stock, nbytes=1000)]


@pytest.mark.parametrize(
    ("mine", "met"),
    [
        ((10.0, 60, 1000), True),
        ((10.0, 60, 1019), True),
        ((10.1, 60, 1000), False),
        ((10.0, 61, 1000), False),
        ((10.0, 60, 1021), False),
        ((10.0, 60, 979), False),
    ],
)
def test_the_bars(mine: tuple[float, int, int], met: bool) -> None:
    assert compared("tiny", runs(mine, (10.0, 100)))["met"] is met


def test_medians_of_seconds_and_the_largest_peaks_count() -> None:
    turns = [*runs((1.0, 10, 1000), (2.0, 100)), *runs((9.0, 50, 1000), (4.0, 90)), *runs((2.0, 20, 1000), (30.0, 80))]
    found = compared("tiny", turns)
    assert found["seconds_ratio"] == 2.0 / 4.0 and found["peak_ratio"] == 50 / 100 and found["off_plan"] == 0
    assert len(found["runs"]) == 6


def test_a_bundle_without_a_plan_is_no_pass() -> None:
    unplanned = [replace(run, planned_nbytes=None) for run in runs((1.0, 1, 1), (1.0, 1))]
    with pytest.raises(ValueError, match="states no plan"):
        compared("tiny", unplanned)


def test_an_export_is_measured_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random(TINY, byte_tokenizer(), tmp_path / "float-tiny")
    found = export.floating(tmp_path, "tiny", "w4")
    (run,) = found["runs"]
    assert run["seconds"] > 0 and 50e6 < run["peak_nbytes"] < 5e9 and run["nbytes"] > 50_000
    assert found["float_nbytes"] == (tmp_path / "float-tiny" / "model.safetensors").stat().st_size
    assert found["limit_nbytes"] == int(1.5 * found["float_nbytes"]) + 2**30
    assert not (tmp_path / "work").exists()
    show({"float": found})
    out = capsys.readouterr().out
    assert "float: tiny" in out and "off its plan" in out and ("bars met" in out or "BARS NOT MET" in out)


def test_a_failed_export_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"rlkit failed with exit code 1: .*; run it alone to see more") as told:
        export.timed("rlkit", ["no.such.module"], tmp_path / "work")
    assert "\n" not in str(told.value)


def test_suites_there_are_none_of(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no suite 'nothing'"):
        export.main(tmp_path, suites="packed,nothing")


@pytest.mark.slow
def test_both_exporters_take_turns_on_a_packed_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_packed(TINY, W4W2_G128, tmp_path / "packed-tiny")
    export.main(tmp_path, shape="tiny", suites="packed", repeats=1)
    found = json.loads((tmp_path / "export.json").read_text())["packed"]
    assert [run["who"] for run in found["runs"]] == ["rlkit", "stock"]
    mine, stock = (run["nbytes"] for run in found["runs"])
    assert mine > 10_000 and stock > 10_000
    assert f"time {found['seconds_ratio']:.2f} of the stock builder's" in capsys.readouterr().out
