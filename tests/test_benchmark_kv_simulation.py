"""The benchmark of simulated KV caches: every suite on a tiny model, its bars, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import tiny
from rlkit.apps.benchmarks import kv_simulation
from rlkit.recover import kvtrial
from rlkit.recover.kvformat import parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("kv-simulation") / "hf", head_dim=64)


def run(folder: Path, out: Path, suites: str) -> dict[str, Any]:
    sizes = {"context": 256, "rounds": 2, "tokens": 64, "prompt": 128, "threads": 1}
    kv_simulation.main(out, suites, str(folder), None, **sizes, json=False)  # type: ignore[arg-type]
    found: dict[str, Any] = json.loads((out / "kv_simulation.json").read_text())
    return found


def test_bytes_and_values_meet_their_bars(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(folder, tmp_path, "bytes,equal")
    assert all(row["nbytes"] == row["formula"] > 0 for row in found["bytes"]["rows"])
    assert all(row["differ"] == 0 and row["values"] > 0 for row in found["equal"]["rows"])
    assert capsys.readouterr().out.count(": met") == 2


def test_chunks_change_only_the_order_of_sums(folder: Path, tmp_path: Path) -> None:
    found = run(folder, tmp_path, "chunks")["chunks"]
    part, whole = found["rows"]
    assert (part["chunk"], whole["chunk"], part["f64_differ"]) == (64, 128, 0) and found["met"]
    assert part["numbers"] == 2 * 2 * 2 * 64 * 128
    assert part["f64_logits"] < 1e-12 and part["f32_logits"] < 1e-3
    assert part["peak"] < whole["peak"]
    assert all(row["peak"] == pytest.approx(row["formula"], rel=0.02) for row in found["rows"])


def test_simulated_caches_cost_what_the_runtimes_do(folder: Path, tmp_path: Path) -> None:
    found = run(folder, tmp_path, "runtime")["runtime"]
    assert [row["kv"] for row in found["rows"]] == ["int8", "int4"]
    for row in found["rows"]:
        assert row["simulated"]["kl_mean"] > found["float"]["kl_mean"]
        assert row["apart"] < 0.1 * row["runtime"]["kl_mean"]
    assert found["met"]


def test_a_value_that_differs_is_a_failure(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = kv_simulation.plain
    monkeypatch.setattr(kv_simulation, "plain", lambda *told: np.nextafter(rounded(*told), np.float32(9)))
    with pytest.raises(typer.Exit) as stopped:
        run(folder, tmp_path, "equal")
    assert stopped.value.exit_code == 1


def test_attention_is_timed_in_turns() -> None:
    schemes = [parse("k16v16"), None, parse("k4v4")]
    rounds = list(kvtrial.attention_rounds(schemes, kvtrial.Shape(2, 4, 2, 64), 80, 3))
    assert [len(seconds) for seconds in rounds] == [3, 3, 3]
    assert min(min(seconds) for seconds in rounds) > 0


def test_nonsense_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no suite 'speed'; use bytes"):
        run(folder, tmp_path, "speed")
    numbers = np.zeros((1, 4, 64), np.float32)
    with pytest.raises(ValueError, match="int8 needs scales"):
        kvtrial.kept(parse("int8"), numbers, numbers, 4)
