"""Stored forecasts beside stored measurements: what matches, what is off, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import configs
from measured import entry, result
from rlkit.profiles import stored
from rlkit.profiles.account import Model
from rlkit.profiles.architecture import Architecture, of_config
from rlkit.profiles.bench import Case, Kind, Measurement, Series
from rlkit.profiles.benchfile import Entry, Result
from rlkit.profiles.forecast import Workload, forecast_model
from rlkit.profiles.places import of_rates
from rlkit.profiles.rates import Peaks
from rlkit.profiles.stored import Pairs, compare_files, pairs_of, read_told
from rlkit.profiles.sweeps import Prepared, sweep
from rlkit.recover import recipe
from rlkit.recover.atomic import write_json

SMOL = of_config(configs.SMOLLM2_135M)
PLACE = of_rates(Peaks(40e9, 200e9, 1e-6))


def told(architecture: Architecture = SMOL, name: str = "w4", **work: Any) -> dict[str, Any]:
    workload = Workload(**{"prompt_tokens": 64, "new_tokens": 2, **work})
    made = forecast_model(Model(architecture, recipe.load(name), PLACE), workload)
    return {"reference": "x", "architecture": architecture.to_json(), **made.to_json()}


def pairs(table: dict[str, Any], measured: Result | None = None) -> Pairs:
    return pairs_of(tuple(read_told(table, "f.json")), measured or result())


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def write(first: dict[str, Any], second: dict[str, Any]) -> tuple[Path, Path]:
        write_json(tmp_path / "f.json", first)
        write_json(tmp_path / "m.json", second)
        return tmp_path / "f.json", tmp_path / "m.json"

    return write


def test_prompts_and_tokens_at_the_same_depth_match(files: Callable[..., tuple[Path, Path]]) -> None:
    table = told()
    paths = files(table, result().to_json())
    found = compare_files(*paths)
    assert found == compare_files(*reversed(paths))
    ttft, tpot = found.pairs
    assert (ttft.test, ttft.name, ttft.measured_seconds) == ("pp64", "ttft", 0.75)
    assert (tpot.test, tpot.name, tpot.measured_seconds) == ("tg2 @ d64", "tpot", pytest.approx(0.0175))
    assert ttft.forecast_seconds == {name: table[name]["ttft_seconds"] for name in ("roofline", "life", "baseline")}
    assert tpot.errors["life"] == pytest.approx(table["life"]["tpot_seconds"] / 0.0175 - 1)
    assert found.label == "uncalibrated" and "the forecast is of peaks" in found.notes[-1] and len(found.notes) == 1


def test_what_is_not_the_same_work_does_not_match() -> None:
    assert [pair.name for pair in pairs(told(chunk=16)).pairs] == ["tpot"]
    assert [pair.name for pair in pairs(told(chunk=64)).pairs] == ["ttft", "tpot"]
    longer = pairs(told(new_tokens=128))
    assert len(longer.pairs) == 2 and "128 new tokens are forecast and 2 were measured" in longer.notes[0]
    for work in ({"prompt_tokens": 65}, {"batch": 2}):
        with pytest.raises(ValueError, match=r"the forecast is of .* measured were pp64, tg2 @ d64 of w4; run `rlkit"):
            pairs(told(**work))


def test_a_token_without_depth_is_one_after_a_prompt_of_one() -> None:
    series = Series(Case(Kind.DECODE, 4), ((0.01, 0.01, 0.01, 0.01),), 50_000_000)
    found = pairs(told(prompt_tokens=1, new_tokens=4), result(_with(series)))
    assert [(pair.test, pair.name) for pair in found.pairs] == [("tg4", "tpot")]


def _with(series: Series) -> Entry:
    kept = entry("a")
    return replace(kept, measurement=Measurement("a", (series,), 2))


def test_recipes_choose_among_several_bundles() -> None:
    two = result(entry("a"), replace(entry("b", factor=2.0), recipe="w8"))
    assert {pair.bundle for pair in pairs(told(name="w8"), two).pairs} == {"b"}
    other = pairs(told(name="w8"))
    assert "the forecast is of w8, what was measured is w4" in other.notes
    with pytest.raises(ValueError, match="the forecast is of 64 prompt tokens as w4w2-gateup"):
        pairs(told(name="w4w2-gateup"), two)


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM of 4\.02 billion, measured was LlamaForCausalLM of 0\.13"):
        pairs(told(of_config(configs.QWEN3_4B)))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM of 6\.74 billion"):
        pairs(told(of_config(configs.LLAMA2_7B)))


def test_a_sweep_holds_many_forecasts() -> None:
    model = Prepared(Model(SMOL, recipe.load("w4"), PLACE))
    found = sweep({"w4": model}, Workload(512, 2), contexts=(32, 64, 9000))
    (ttft, tpot) = pairs(json.loads(json.dumps(found.to_json()))).pairs
    assert ttft.forecast_seconds == {
        "roofline": found.points[1].ttft_seconds,
        "life": found.points[1].life_ttft_seconds,
    }
    assert tpot.name == "tpot"
    nothing = sweep({"w4": model}, Workload(512, 2), contexts=(9000,))
    with pytest.raises(ValueError, match="no point with numbers"):
        pairs(nothing.to_json())


def test_a_generator_that_is_made_is_said() -> None:
    table = told()
    table["prefill"]["operators"].append({"name": "beside the model", "seconds": 0.013})
    assert any("13.0 ms for making a generator" in note for note in pairs(table).notes)


def test_files_of_other_kinds_and_versions_are_one_line(files: Callable[..., tuple[Path, Path]]) -> None:
    good, bench = told(), result().to_json()
    for first, second, why in (
        (good, good, "are no result of rlkit bench; name a forecast and a result"),
        (bench, bench, "are two results of rlkit bench"),
        ({**good, "schema_version": 7}, bench, "f.json has schema_version 7, this rlkit reads 1; make it with"),
        (good, {**bench, "schema_version": 1}, "m.json has schema_version 1, this rlkit reads 2; measure again"),
        ({"schema_version": 1, "columns": 3}, bench, "f.json is no sweep"),
        ({"schema_version": 1}, bench, "f.json is no forecast"),
        ({**good, "kind": "compare"}, bench, "f.json is no forecast"),
        ({key: good[key] for key in good if key != "life"}, bench, "f.json is no complete forecast .'life'."),
        ({**good, "architecture": {}}, bench, "f.json is no complete forecast"),
        ({**good, "workload": 3}, bench, "f.json is no complete forecast"),
    ):
        with pytest.raises(ValueError, match=why) as caught:
            compare_files(*files(first, second))
        assert "\n" not in str(caught.value)
    paths = files(good, bench)
    with pytest.raises(ValueError, match="name a forecast and a result"):
        compare_files(paths[1], paths[1])
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        compare_files(paths[0], paths[0].with_name("absent.json"))


def test_it_is_drawn_and_written() -> None:
    found = pairs(told())
    drawn = stored.table(found)
    assert drawn.columns[4:6] == ("roofline, ms", "roofline, error") and len(drawn.rows) == 2
    assert drawn.rows[0][:4] == ("a", "pp64", "TTFT", "750")
    lines = stored.to_csv(found).splitlines()
    assert len(lines) == 1 + 2 * 3 and lines[1].startswith("a,w4,pp64,ttft,0.75,roofline,")
    table = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (table["schema_version"], table["kind"]) == (1, "compare-stored")
    assert table["pairs"][0]["errors"]["life"] == pytest.approx(found.pairs[0].errors["life"])
