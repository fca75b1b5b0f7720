"""An evaluation as tables and as a page: groups, differences and recovery over the same items, what is undefined."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

import benchmarks
from rlkit.profiles import evalreport
from rlkit.profiles.divergence import Divergence
from rlkit.profiles.evalpage import to_html
from rlkit.profiles.evalreport import Evaluation, ModelResult, share, spread
from rlkit.profiles.evaluation import TaskResult
from rlkit.profiles.intervals import Interval
from rlkit.profiles.taskitem import Rule
from rlkit.profiles.tasks import Group

COUNT = 400


def result(
    name: str, right: Sequence[float | None] | int, group: Group = Group.REGULAR, rule: Rule = Rule.RAW, **more: Any
) -> TaskResult:
    """Results on COUNT items; a number means that so many of the first are right."""
    scores = [float(at < right) for at in range(COUNT)] if isinstance(right, int) else list(right)
    spec = benchmarks.spec(name, rule, group, len(scores))
    ids = tuple(map(str, range(len(scores))))
    chance = None if rule is Rule.BITS else 0.25
    return TaskResult(spec, "0" * 64, len(scores), chance, ids, tuple(scores), (1.0,) * len(scores), **more)


def model(name: str, *tasks: TaskResult, **more: Any) -> ModelResult:
    return ModelResult(name, {"form": "made"}, tasks, **more)


def bits(*values: float) -> TaskResult:
    return result("sums", [-value for value in values] * 100, Group.MORE, Rule.BITS)


@pytest.fixture
def found() -> Evaluation:
    def tasks(one: int, two: int, far: int) -> tuple[TaskResult, ...]:
        return result("one", one), result("two", two), result("far", far, Group.OOD), bits(1.0 - far / 1000, 1.2)

    return Evaluation(
        (
            model("full", *tasks(300, 280, 200)),
            model("w2", *tasks(200, 180, 200)),
            model("healed", *tasks(290, 240, 210)),
        ),
        "full",
        "w2",
        {"one": "400 of 900 items, for ± 4.0 points"},
        "a text",
        ("made in a test",),
    )


def cells(table: evalreport.Table, first: str) -> tuple[str, ...]:
    return next(row[1:] for row in table.rows if row[0] == first)


def test_groups_follow_their_tasks_with_a_mean(found: Evaluation) -> None:
    assert [title for title, _ in found.lines()] == ["One", "Two", "mean, in distribution", "Far", "Sums"]
    table = evalreport.scores(found)
    assert table.columns == ("task", "items", "chance", "full", "w2", "healed")
    assert cells(table, "One")[:2] == ("400", "25")
    assert [float(cell.split(" ±")[0]) for cell in cells(table, "One")[2:]] == [75.0, 50.0, 72.5]
    assert cells(table, "mean, in distribution")[2].startswith("72.5 ± ")
    assert re.fullmatch(r"1\.000 ± 0\.02\d bits/byte", cells(table, "Sums")[2])


def test_differences_are_paired(found: Evaluation) -> None:
    table = evalreport.differences(found)
    assert table.columns == ("task", "w2", "healed")
    assert cells(table, "One")[1].startswith("-2.5 ± 1.")  # 10 of 400 items differ: far narrower than two intervals
    assert cells(table, "Far") == ("+0.0 ± 0.0", cells(table, "Far")[1])


def test_recovery_with_what_is_undefined(found: Evaluation) -> None:
    table = evalreport.recoveries(found)
    assert table.columns == ("task", "lost", "healed")
    assert re.fullmatch(r"90 % \(8\d to 9\d\)", cells(table, "One")[1])
    assert cells(table, "Two")[1].startswith("60 % (")
    assert cells(table, "mean, in distribution")[1].startswith("75 % (")
    assert cells(table, "Far")[1] == "full and quantized score the same"
    assert evalreport.FORMULA in table.note


def test_findings_count_the_tasks_that_came_back(found: Evaluation) -> None:
    first, sized = evalreport.findings(found)
    assert first.startswith("healed gets back 80 % or more of what quantization lost on 1 of 4 tasks; on 2 nothing")
    assert sized == "one: 400 of 900 items, for ± 4.0 points"


def test_bits_per_byte_recover_downwards() -> None:
    models = [model("full", bits(1.0)), model("w2", bits(2.0)), model("healed", bits(1.25))]
    found = Evaluation(tuple(models), "full", "w2")
    assert found.recovery(("sums",), "healed").value == pytest.approx(0.75)
    assert cells(evalreport.recoveries(found), "Sums") == ("+1.000 ± 0.000 bits/byte", "75 % (75 to 75)")
    assert cells(evalreport.scores(found), "Sums")[2] == "1.000 ± 0.000 bits/byte"
    assert "less is better" in evalreport.scores(found).note


def test_only_items_that_count_for_all_are_compared() -> None:
    gaps: list[float | None] = [None] * 100 + [1.0] * 300
    found = Evaluation((model("full", result("one", 200)), model("other", result("one", gaps))), "full")
    assert found.mean(("one",), "other").value == 1.0
    assert found.difference(("one",), "other").value == pytest.approx(1 - 100 / 300)
    none = Evaluation((model("full", result("one", [None] * COUNT)), model("other", result("one", 3))), "full")
    assert none.difference(("one",), "other").value is None
    assert cells(evalreport.scores(none), "One")[2] == ""


def test_one_model_alone_has_scores_only() -> None:
    found = Evaluation((model("alone", result("one", 200)),))
    assert [table.title for table in evalreport.tables(found)] == ["Accuracy"]
    assert evalreport.findings(found) == ()
    assert found.to_json()["lines"][0]["recovery"] == {}


def test_what_happened_to_items_is_told() -> None:
    odd = result("one", 200, left_out={"an empty continuation": 3}, cut=7, ties=1)
    found = Evaluation((model("alone", odd),))
    ((_model, _task, said),) = evalreport.items(found).rows
    assert (
        said
        == "3 left out: an empty continuation; 7 cut from the left to fit the context; 1 ties, the first choice taken"
    )


def test_divergence_or_why_there_is_none(found: Evaluation) -> None:
    measured = Divergence(0.1234, 0.01, 0.05, 1.0, 0.876, 20.0, 23.5, 4000)
    first, second, third = found.models
    found = replace(
        found, models=(first, replace(second, divergence=measured), replace(third, why="another vocabulary"))
    )
    rows = evalreport.divergences(found).rows
    assert rows == (
        ("w2", "0.1234 ± 0.0100", "87.6 %", "23.50", "20.00"),
        ("healed", "another vocabulary", "", "", ""),
    )


def test_json_holds_every_items_result(found: Evaluation) -> None:
    table = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert table["schema_version"] == 1 and table["formula"] == evalreport.FORMULA
    assert len(table["models"][2]["tasks"][0]["scores"]) == COUNT
    assert table["lines"][0]["recovery"]["healed"]["value"] == pytest.approx(0.9)
    assert table["lines"][0]["score"]["w2"]["value"] == 0.5


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"full": "nobody"}, "no model 'nobody'"),
        ({"quantized": "nobody"}, "no model 'nobody'"),
        ({"models": ()}, "at least one"),
        ({"models": (model("a", result("one", 1)), model("a", result("one", 1)))}, "a name of its own"),
        ({"models": (model("full", result("one", 1)), model("w2", result("two", 1)))}, "the same tasks"),
    ],
)
def test_models_that_do_not_belong_together(found: Evaluation, change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        replace(found, **change)


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.5, 0.4, 0.7), "50 % (40 to 70)"),
        (Interval(-0.1, -0.4, 0.2), "-10 % (-40 to 20)"),
        (Interval(0.5, why="no interval: x"), "50 % (no interval)"),
        (
            Interval(None, why="undefined: full and quantized score the same on these items"),
            "full and quantized score the same",
        ),
    ],
)
def test_shares_in_words(interval: Interval, text: str) -> None:
    assert share(interval) == text


def test_spreads_in_words() -> None:
    assert spread(Interval(0.5, 0.48, 0.52), Rule.RAW) == "50.0 ± 2.0"
    assert spread(Interval(0.5), Rule.RAW) == "50.0"
    assert spread(Interval(None, why="x"), Rule.RAW) == ""


class Outline(HTMLParser):
    """Checks that tags are closed in order; counts them."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, _attributes: Any) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, _attributes: Any) -> None:
        self.seen.append(tag)


def test_the_page_is_whole_and_needs_nothing(found: Evaluation) -> None:
    page = to_html(found)
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert page == to_html(found)
    assert outline.seen.count("svg") == 4 + 1 + 3  # a panel for every task, recovery, the legend
    assert "<script" not in page and "http" not in page and "<link" not in page
    assert "gets back 80 %" in page and evalreport.FORMULA in page and "made in a test" in page


def test_names_cannot_leave_their_place() -> None:
    evil = '<script>alert("x")</script>'
    page = to_html(Evaluation((model(evil, result("one", 200)),), about=(evil,)))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_a_page_of_nothing_to_score() -> None:
    page = to_html(Evaluation((model("alone", result("one", [None] * 5)),)))
    assert "nothing to score" in page
