"""Sweeps: every combination once, the same numbers as single forecasts, back from JSON as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest

import configs
from rlkit.profiles import sweeps
from rlkit.profiles.account import KEPT, Model
from rlkit.profiles.architecture import of_config
from rlkit.profiles.forecast import Peaks, Workload, forecast
from rlkit.profiles.places import Place, of_rates
from rlkit.profiles.rates import Spent
from rlkit.profiles.step import Operator
from rlkit.profiles.sweeps import Prepared, Sweep, axes_of, chunks_of, contexts_of, sweep
from rlkit.recover import recipe

QWEN3 = of_config(configs.QWEN3_4B)
PLACE = of_rates(Peaks(40e9, 1e12))
WORK = Workload(512, 64)


def prepared(*names: str, place: Place = PLACE) -> dict[str, Prepared]:
    return {name: Prepared(Model(QWEN3, recipe.load(name), place)) for name in names}


def test_every_combination_is_a_point() -> None:
    found = sweep(prepared("w4", "w8"), WORK, contexts=(128, 256, 512), chunks=(64, None))
    assert found.axes == ("contexts", "chunks", "recipes") and len(found.points) == 12
    assert len({(point.recipe, point.context, point.chunk) for point in found.points}) == 12
    assert {len(column) for column in found.columns().values()} == {12}
    assert list(found.curves("contexts")) == [
        f"{name}, {chunk}" for name in ("w4", "w8") for chunk in ("chunks of 64", "whole prompts")
    ]
    assert found.names()[11] == "w8, 512 tokens, whole prompts"


def test_a_point_is_what_a_single_forecast_says() -> None:
    point = sweep(prepared("w4w2-gateup"), WORK, contexts=(300, 5000), chunks=(256,)).points[1]
    made = forecast(QWEN3, recipe.load("w4w2-gateup"), PLACE, replace(WORK, prompt_tokens=5000, chunk=256))
    assert (point.ttft_seconds, point.tpot_seconds) == (made.roofline.ttft_seconds, made.roofline.tpot_seconds)
    assert (point.life_ttft_seconds, point.life_tpot_seconds) == (made.life.ttft_seconds, made.life.tpot_seconds)
    assert (point.tokens_per_s, point.memory_nbytes) == (made.tokens_per_s, made.memory.nbytes)


def test_what_has_no_room_says_so_and_the_others_go_on() -> None:
    small = replace(PLACE, name="box:cpu", memory_nbytes=4 * 10**9)
    found = sweep(prepared("w4", "w8", place=small), WORK, contexts=(128, 50_000))
    ended = {(point.recipe, point.context): point.refused for point in found.points}
    assert ended["w4", 128] == "" and "does not fit" in ended["w8", 128]
    assert "exceed the model's context" in ended["w4", 50_000]
    assert list(found.curves("contexts")) == ["w4"] and found.points[1].tpot_seconds is None


def test_it_comes_back_from_json() -> None:
    found = sweep(prepared("w4"), WORK, contexts=(128, 99_999))
    table = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert Sweep.from_json(table) == found
    with pytest.raises(ValueError, match=r"^s\.json has schema_version 2, this rlkit reads 1; make it again"):
        Sweep.from_json({**table, "schema_version": 2}, "s.json")
    for damage in ({"columns": {}}, {"columns": {**table["columns"], "context": [1]}}, {"columns": 7}):
        with pytest.raises(ValueError, match=r"^s\.json is no sweep"):
            Sweep.from_json({**table, **damage}, "s.json")


def test_axes_and_their_values() -> None:
    assert axes_of("contexts, recipes,contexts") == ("contexts", "recipes")
    with pytest.raises(ValueError, match="no sweep over 'depths'; use contexts, chunks, recipes"):
        axes_of("contexts,depths")
    model = next(iter(prepared("w4").values())).decode
    assert contexts_of(model, 64) == (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    assert contexts_of(model, 40_900) == (60,)
    assert chunks_of(100) == (16, 32, 64, None) and chunks_of(16) == (None,)


def test_nothing_and_too_much_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to sweep over"):
        sweep({}, WORK)
    with pytest.raises(ValueError, match="points are more than 100,000"):
        sweep(prepared("w4"), WORK, contexts=range(1, 1001), chunks=range(1, 1001))


class Counting(Peaks):
    """Peaks that count how often they are asked."""

    asked = 0

    def spent(self, op: Operator) -> Spent:
        Counting.asked += 1
        return super().spent(op)


def test_points_share_what_does_not_depend_on_the_context() -> None:
    """What a thousand points cost is bounded by what is counted, not by a clock."""
    models = prepared("w4", place=of_rates(Counting(40e9, 1e12)))
    sweep(models, WORK, contexts=(1024,))
    Counting.asked = 0
    found = sweep(models, WORK, contexts=range(2000, 2200), chunks=(100,))
    assert len(found.points) == 200 and not any(point.refused for point in found.points)
    assert Counting.asked < 200 * 40
    Counting.asked = 0
    sweep(models, replace(WORK, prompt_tokens=32_000), chunks=[16, 16, 16, 16])
    assert Counting.asked < 4 * 40 + 80  # 2,000 passes each


def test_a_sweep_names_its_places_and_how_far_to_trust_them() -> None:
    found = sweep(prepared("w4"), WORK)
    assert (found.axes, found.label, found.decode_place) == (("recipes",), "uncalibrated", "given rates")
    assert found.prefill_place == found.decode_place and found.batch == 1 and found.new_tokens == 64
    assert sweeps.AXES == ("contexts", "chunks", "recipes")


def test_what_is_made_once_is_kept_for_a_while() -> None:
    model, made = next(iter(prepared("w4").values())).decode, list[int]()

    def make(value: int) -> int:
        made.append(value)
        return value

    assert [model.once(("number", value), partial(make, value)) for value in (1, 2, 1)] == [1, 2, 1]
    assert made == [1, 2]
    for value in range(KEPT):
        model.once(("other", value), lambda: None)
    assert model.once(("number", 1), lambda: make(3)) == 3
