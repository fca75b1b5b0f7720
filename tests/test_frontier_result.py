"""Results: what is chosen and saved, their JSON, what the runtime makes of them, and results of other models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import browsing
import tiny
from rlkit.profiles.frontier import page, render, result
from rlkit.profiles.frontier.identity import Identity, identity_of
from rlkit.profiles.frontier.result import Budget, FrontierResult, KvSettings, settings_of
from rlkit.profiles.frontier.search import Evaluated, Found
from rlkit.profiles.frontier.space import Point
from rlkit.profiles.needs import Memory
from rlkit.recover import source

CONTEXT = 512
NAMES = ["needle", "needle", "long-qa", "long-qa"]


def evaluated(kv: str, nbytes: int, *scores: float, weights: str = "float", **more: Any) -> Evaluated:
    chunk = None if kv == "k16v16" else 64
    point = Point(weights, kv, chunk, CONTEXT)
    return Evaluated(point, Memory(nbytes // 2, nbytes // 4, nbytes - nbytes // 2 - nbytes // 4), **more, scores=scores)


POINTS = (
    evaluated("k16v16", 1000, 1, 1, 1, 0, kl=0.0),
    evaluated("k8v8", 700, 1, 1, 1, 0, kl=0.001),
    evaluated("k8v4", 600, 1, 0, 1, 0, kl=0.01, ttft_seconds=1.5, tpot_seconds=0.02),
    evaluated("k4v4", 650, 0, 0, 1, 0, kl=0.5, weights="w4"),
    evaluated("k2v2", 400, 0, kl=2.0, why="left out after 1 items"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("result") / "hf")


@pytest.fixture(scope="module")
def made(folder: Path) -> FrontierResult:
    rows = tuple(result.rows_of(Found(POINTS, 17.0, 20.0), {CONTEXT: NAMES}))
    budget = Budget()
    chosen = tuple(result.choose(rows, budget))
    return FrontierResult(identity_of(source.resolve(folder)), rows, chosen, budget, 17.0, 20.0, {"seed": 0}, ("how",))


def test_rows_stand_against_their_reference(made: FrontierResult) -> None:
    first, second, third, fourth, fifth = made.at(CONTEXT)
    assert (first.saved, first.loss) == (0.0, 0.0) and second.saved == pytest.approx(0.3) and second.loss == 0.0
    assert third.loss == pytest.approx(1 / 3) and third.tasks == {"needle": 0.5, "long-qa": 0.5}
    assert [row.on_frontier for row in made.rows] == [False, True, True, False, False]
    assert [row.point.kv for row in made.frontier(CONTEXT)] == ["k8v4", "k8v8"]
    assert fourth.tasks["needle"] == 0.0 and not fifth.complete


def test_what_is_chosen_fits_the_budget(made: FrontierResult) -> None:
    def kv(budget: Budget) -> list[str]:
        return [one.point.kv for one in result.choose(made.rows, budget)]

    assert kv(Budget()) == ["k8v8"] and kv(Budget(max_loss=0.4)) == ["k8v4"]
    assert kv(Budget(max_bytes=650)) == ["k8v4"] and kv(Budget(max_bytes=10_000)) == ["k8v8"]
    assert kv(Budget(max_bytes=400)) == []  # smaller only what was not measured to the end
    for wrong in ({"max_bytes": 0}, {"max_loss": 1.5}, {"max_loss": float("nan")}):
        with pytest.raises(ValueError, match=r"hold no model|is no share"):
            Budget(**wrong)


def test_without_any_accuracy_there_is_no_loss() -> None:
    rows = tuple(result.rows_of(Found((evaluated("k16v16", 1000, 0, 0, 0, 0),), 4, 4), {CONTEXT: NAMES}))
    assert rows[0].loss is None and rows[0].on_frontier and not list(result.choose(rows, Budget()))
    assert [one.point.kv for one in result.choose(rows, Budget(max_bytes=1000))] == ["k16v16"]
    told = next(render.findings(FrontierResult(Identity("m", {}), rows, (), Budget(), 4, 4)))
    assert "nothing is chosen, as the reference is never right" in told


@pytest.mark.parametrize(
    ("kv", "runs", "noted"),
    [
        ("k16v16", "float", False),
        ("k8v8", "int8", True),
        ("k8v4:smooth", "int8", True),
        ("k4v4:smooth", "int4", True),
        ("kivi2", "int4", True),
        ("k16v4", "float", True),
        ("float", "float", False),
        ("int8", "int8", False),
    ],
)
def test_what_the_runtime_makes_of_a_cache(kv: str, runs: str, noted: bool) -> None:
    settings = settings_of(Point("w4", kv, 64, CONTEXT))
    assert settings.kv == runs and bool(settings.note) == noted and settings.chunk == 64
    assert settings.caches == (None if runs == "float" else runs)
    assert KvSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_a_cache_that_the_runtime_lacks_is_said_in_one_line_with_its_bytes() -> None:
    found = (evaluated("k16v16", 1000, 1, 1, 1, 0), evaluated("k4v2", 400, 1, 1, 1, 0))  # caches of 250 and 100 bytes

    def note(found: tuple[Evaluated, ...], budget: Budget) -> str:
        (settings,) = result.choose(tuple(result.rows_of(Found(found, 2, 2), {CONTEXT: NAMES})), budget)
        return settings.note

    assert note(found, Budget()) == (
        "measured with k4v2; the runtime has no such cache, int4 is the next wider one; "
        "to choose among what it has, search with --kv k8v8:smooth,k4v4:smooth"
    )
    wider = (found[0], evaluated("k8v2", 400, 1, 1, 1, 0))
    assert "int8 is the next wider one; on the CPU its cache takes 125 bytes, 25 more than counted;" in note(
        wider, Budget()
    )
    assert "25 more than counted, over the budget;" in note(wider, Budget(max_bytes=410))
    assert "over the budget" not in note(wider, Budget(max_bytes=425))
    assert note(found[:1], Budget()) == "on the CPU its cache takes 500 bytes, 250 more than counted"


def test_json_and_back(made: FrontierResult, tmp_path: Path) -> None:
    result.save(made, tmp_path / "kv.json")
    assert result.read(tmp_path / "kv.json") == made
    table = json.loads((tmp_path / "kv.json").read_text())
    assert table["points"][2]["nbytes"] == 600 and table["points"][2]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "sweep"}, "is no result of `rlkit kv`; make one with: rlkit kv MODEL -o"),
        ({"schema_version": 2}, "has schema_version 2, this rlkit reads 1"),
        ({"points": [{}]}, "is damaged"),
        ({"chosen": [{"kv": "int3", "chunk": 1, "note": "", "point": {}}]}, "is damaged"),
        ({"model": 3}, "is damaged"),
    ],
)
def test_files_that_are_none(change: dict[str, Any], says: str, made: FrontierResult, tmp_path: Path) -> None:
    (tmp_path / "kv.json").write_text(json.dumps(made.to_json() | change))
    with pytest.raises(ValueError, match=says):
        result.read(tmp_path / "kv.json")
    with pytest.raises(FileNotFoundError, match="there is no result"):
        result.read(tmp_path / "absent.json")


def test_settings_for_a_model_and_what_is_made_of_it(made: FrontierResult, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv.json"
    result.save(made, file)
    assert result.read_settings(file, source.resolve(folder)).kv == "int8"
    checkpoint = tiny.checkpoint(folder, tmp_path / "ckpt")
    assert result.read_settings(file, source.resolve(checkpoint)) == made.chosen[0]
    with pytest.raises(ValueError, match=r"chose nothing at a context of 64 \(there is: 512\)"):
        result.read_settings(file, source.resolve(folder), 64)


def test_results_of_other_models_are_refused(made: FrontierResult, tmp_path: Path) -> None:
    file = tmp_path / "kv.json"
    result.save(made, file)
    wider = tiny.llama(tmp_path / "wider", intermediate_size=320)
    with pytest.raises(
        ValueError, match=r"kv.json is of another model, .*hf \(ffn is 256 there and 320 here\); measure"
    ):
        result.read_settings(file, source.resolve(wider))
    trained = tiny.llama(tmp_path / "trained", seed=5)  # differs in nothing but its weights
    with pytest.raises(ValueError, match=r"of another model, .* \(the weights are others\)"):
        result.read_settings(file, source.resolve(trained))
    words = json.loads((tmp_path / "trained" / "tokenizer.json").read_text())
    words["model"]["vocab"] = {word: 511 - number for word, number in words["model"]["vocab"].items()}
    (tmp_path / "trained" / "tokenizer.json").write_text(json.dumps(words))
    assert made.model.differs(identity_of(source.resolve(tmp_path / "trained"))) == "the vocabulary is another"
    assert Identity("x", {}).differs(made.model) == ""


def test_tables_and_sentences(made: FrontierResult) -> None:
    best, every = next(render.tables(made)), next(render.tables(made, whole=True))
    assert [row[1] for row in best.rows] == ["k16v16", "k8v8", "k8v4"] and len(every.rows) == 5
    assert all(len(row) == len(every.columns) for row in every.rows)
    assert every.rows[4][6] == "0.0, left out after 1 items"
    (short, tasks), columns = render.narrow(made), ("weights", "kv", "chunk")
    assert short.columns == render.COLUMNS and [row[:9] for row in best.rows] == list(short.rows)
    assert tasks.columns == (*columns, "needle", "long-qa", "TTFT", "ms per token")
    assert tasks.rows[2] == ("float", "k8v4", "64", "50.0", "50.0", "1.50 s", "20.0")
    assert [render.share(value) for value in (-1e-17, -0.0004, -0.002, 0.25)] == ["0.0%", "0.0%", "-0.2%", "25.0%"]
    said = list(render.findings(made))
    assert "float k8v8, chunks of 64: 700 B, 30.0% saved, 0.0% of the accuracy lost; runtime: kv int8" in said[0]
    assert said[1] == "measured: 17 items of the 20 of the whole grid (85%)"
    assert [render.size(n) for n in (999, 1234, 56_789, 1.5e9, 2.5e11)] == [
        "999 B",
        "1.23 kB",
        "56.8 kB",
        "1.50 GB",
        "250 GB",
    ]


def test_the_page_has_every_point_and_nothing_from_elsewhere(made: FrontierResult) -> None:
    text = page.to_html(made)
    assert text == page.to_html(made)
    assert (
        text.count('data-metric="accuracy"') == text.count('data-metric="kl"') == text.count('data-metric="tpot"') == 1
    )
    for point in POINTS:
        assert text.count(f'data-point="{point.point.key}"') >= 1
    assert "http" not in text.replace("http-equiv", "") and "<link" not in text and "src=" not in text


def test_every_plot_has_the_frontier_of_its_own_figure(made: FrontierResult) -> None:
    text = page.to_html(made)
    lines = [len(line.split()) for line in re.findall(r'<polyline class="line c6" points="([^"]*)"', text)]
    assert lines == [2, 4, 1]  # accuracy; KL, which what was left out early has too; ms per token
    kl = text[text.index('data-metric="kl"') :]
    assert 'class="point part best"' in kl[: kl.index("</figure>")]


@pytest.mark.slow
def test_hidden_points_have_no_place_on_the_line(made: FrontierResult, tmp_path: Path) -> None:
    file = tmp_path / "kv.html"
    file.write_text(page.to_html(made))
    with browsing.browsing() as browser, browsing.visiting(browser, file.as_uri()) as seen:
        shown = seen.locator("figure:not([hidden])")
        assert len((shown.locator(".line").get_attribute("points") or "").split()) == 2
        seen.get_by_label("k8v8", exact=True).uncheck()
        assert len((shown.locator(".line").get_attribute("points") or "").split()) == 2  # the reference instead
        seen.get_by_label("k16v16", exact=True).uncheck()
        assert len((shown.locator(".line").get_attribute("points") or "").split()) == 1
        assert shown.locator(".best").count() == 1
        seen.get_by_role("radio", name="KL, nats per token").check()
        assert len((shown.locator(".line").get_attribute("points") or "").split()) == 2
        shown.locator(".point.part.best").hover()
        assert seen.locator("#told").inner_text().startswith("float k2v2, chunks of 64; ")


def test_a_page_is_safe_for_any_name(made: FrontierResult) -> None:
    nasty = '"><script>alert(1)</script>'
    rows = tuple(result.rows_of(Found((evaluated("k16v16", 10, 1, 1, 1, 1, weights=nasty),), 1, 1), {CONTEXT: NAMES}))
    text = page.to_html(FrontierResult(Identity(nasty, {}), rows, (), Budget(), 1, 1, about=(nasty,)))
    assert "<script>alert" not in text and text.count("<script>") == 1
