"""The evaluation loop with models made in a test: verdicts, kept items, interruptions, contexts that are too short."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks
from benchmarks import Answer, Speaker
from rlkit.profiles import taskask
from rlkit.profiles.evaluation import Store, Subject, calibration, evaluate, sized, together
from rlkit.profiles.taskask import NO_START, TOO_LONG, Tokens
from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.taskreply import Said
from rlkit.profiles.taskscore import EMPTY, NO_GOLD
from rlkit.recover.progress import Progress

SUMS = [Item(str(n), f"{n} + {n} =", tuple(f" {n + n + more}" for more in range(4)), 0, "Answer:") for n in range(100)]


def knowing(known: Callable[[int], bool]) -> Callable[[str, str], float]:
    """Right about some sums, elsewhere for the last choice."""

    def says(context: str, choice: str) -> float:
        if not context[:1].isdigit():
            return -3.0
        number = int(context.split()[0])
        right = number + number == int(choice)
        if known(number):
            return -0.5 if right else -2.0
        return -0.6 if int(choice) == number + number + 3 else -2.0

    return says


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(taskask, "CHUNK_CHARACTERS", 640)  # 32 sums
    return Store(tmp_path / "eval")


def test_verdicts_of_a_model(store: Store) -> None:
    speaker = Speaker(knowing(lambda number: number < 60))
    (result,) = evaluate([benchmarks.task(SUMS)], speaker.subject(), store)
    assert result.scores == (1.0,) * 60 + (0.0,) * 40
    assert result.interval().value == 0.6
    assert (result.total, result.reused, result.cut, result.ties, result.left_out) == (100, 0, 0, 0, {})
    assert result.chance == 0.25
    assert speaker.asked[:1] != [] and len(speaker.asked) == 400
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["spec"]["rule"] == "raw"


def test_pairs_of_an_item_come_together_and_the_longest_items_first(store: Store) -> None:
    speaker = Speaker(knowing(lambda _number: True))
    evaluate([benchmarks.task([SUMS[3], SUMS[77]])], speaker.subject(), store)
    assert [context for context, _ in speaker.asked] == ["77 + 77 ="] * 4 + ["3 + 3 ="] * 4


def test_items_that_begin_alike_come_one_after_the_other(store: Store) -> None:
    shown = ["one example. " * 8, "another one. " * 8]
    items = [Item(str(n), f"{shown[n % 2]}{'x' * (n // 2)}", (" a", " b"), 0) for n in range(12)]
    speaker = Speaker(lambda _context, _choice: -1.0)
    evaluate([benchmarks.task(items)], speaker.subject(), store)
    firsts = [context[0] for context, _ in speaker.asked]
    assert firsts in (["o"] * 12 + ["a"] * 12, ["a"] * 12 + ["o"] * 12)
    lengths = [len(context) for context, _ in speaker.asked]
    assert lengths[:12] == sorted(lengths[:12], reverse=True)


def test_a_second_run_opens_nothing(store: Store) -> None:
    task = benchmarks.task(SUMS)
    first = evaluate([task], Speaker(knowing(lambda _n: True)).subject(), store)[0]
    again = Speaker(lambda _context, _choice: 0.0)
    second = evaluate([task], again.subject(), store)[0]
    assert again.opened == 0 and again.asked == []
    assert second.scores == first.scores and second.reused == 100


def test_another_identity_and_other_data_are_computed_anew(store: Store) -> None:
    task = benchmarks.task(SUMS)
    evaluate([task], Speaker(knowing(lambda _n: True)).subject(), store)
    other = Speaker(knowing(lambda _n: False))
    assert evaluate([task], other.subject(identity="other weights"), store)[0].interval().value == 0.0
    changed = Speaker(knowing(lambda _n: True))
    evaluate([replace(task, sha256="f" * 64)], changed.subject(), store)
    assert len(other.asked) == len(changed.asked) == 400


def test_an_interrupted_run_goes_on(store: Store) -> None:
    task, says = benchmarks.task(SUMS), knowing(lambda number: number % 3 == 0)
    stopped = Speaker(says, stop_after=200)
    with pytest.raises(KeyboardInterrupt):
        evaluate([task], stopped.subject(), store)
    done = len(stopped.asked) // 4
    assert 0 < done < 100
    rest = Speaker(says)
    (result,) = evaluate([task], rest.subject(), store)
    assert (result.reused, len(rest.asked)) == (done, 4 * (100 - done))
    assert result.scores == evaluate([task], Speaker(says).subject(identity="at once"), store)[0].scores


def test_a_torn_line_is_scored_again_and_hurts_no_other(store: Store) -> None:
    task, speaker = benchmarks.task(SUMS[:10]), Speaker(knowing(lambda _n: True))
    subject = speaker.subject()
    evaluate([task], subject, store)
    path = store.path(subject, task)
    path.write_bytes(path.read_bytes()[:-20])
    for wanted in (9, 10):
        (result,) = evaluate([task], subject, store)
        assert result.reused == wanted and result.scores == (1.0,) * 10
    assert len(speaker.asked) == 44


@pytest.mark.parametrize("line", ["[]", '{"id": "3"}', "null", '{"id": "3", "logprobs": 3, "cut": 0}', "\x00\xff"])
def test_lines_that_are_no_figures_are_ignored(store: Store, line: str) -> None:
    task, speaker = benchmarks.task(SUMS[:5]), Speaker(knowing(lambda _n: True))
    path = store.path(speaker.subject(), task)
    path.parent.mkdir(parents=True)
    path.write_text(line)
    (result,) = evaluate([task], speaker.subject(), store)
    assert result.reused == 0 and result.scores == (1.0,) * 5


def test_a_larger_sample_computes_only_what_is_new(store: Store) -> None:
    task, speaker = benchmarks.task(SUMS), Speaker(knowing(lambda _n: True))
    evaluate([task.sample(20)], speaker.subject(), store)
    (result,) = evaluate([task.sample(50)], speaker.subject(), store)
    assert (result.reused, len(result.ids), result.total, len(speaker.asked)) == (20, 50, 100, 200)


def test_choices_without_their_question_are_asked_where_the_rule_needs_them(store: Store) -> None:
    speaker = Speaker(lambda context, choice: -1.0 - int(choice) % 10 - (5.0 if context == "Answer:" else 0.0))
    raw, plain = benchmarks.task(SUMS[:10]), benchmarks.task(SUMS[:10], rule=Rule.UNCONDITIONAL)
    evaluate([raw], speaker.subject(), store)
    assert len(speaker.asked) == 40
    (result,) = evaluate([plain], speaker.subject(), store)
    assert len(speaker.asked) == 120 and result.reused == 0
    assert result.ties == 10  # every choice gains the same 5
    assert evaluate([raw], speaker.subject(), store)[0].reused == 10


def test_an_item_without_such_a_context_is_left_out(store: Store) -> None:
    task = benchmarks.task([replace(SUMS[1], unconditional=None), SUMS[2]], rule=Rule.UNCONDITIONAL)
    (result,) = evaluate([task], Speaker(lambda _context, choice: -float(choice)).subject(), store)
    assert result.scores[0] is None and sum(result.left_out.values()) == 1
    assert "which the rule needs" in next(iter(result.left_out))


def test_items_that_cannot_be_scored_are_counted_with_their_reason(store: Store) -> None:
    items = [
        Item("fine", "Q?", (" a", " b"), 1),
        Item("no gold", "Q?", (" a", " b"), None),
        Item("empty", "Q?", ("", " b"), 1),
        Item("blank", "Q?", (" ", " b"), 1),
        Item("long", "Q?", (" a", " " + "b" * 80), 1),
    ]
    speaker = Speaker(lambda _context, choice: -1.0 if "b" in choice else -2.0)
    (result,) = evaluate([benchmarks.task(items)], speaker.subject(limit=50), store)
    assert result.scores == (1.0, None, None, None, None)
    assert result.left_out == {NO_GOLD: 1, EMPTY: 2, TOO_LONG: 1}
    assert result.interval().value == 1.0  # of those that count, never a silent zero


def test_nothing_left_is_no_zero(store: Store) -> None:
    (result,) = evaluate([benchmarks.task([Item("0", "Q?", ("", " b"), 1)])], Speaker(lambda *_: -1.0).subject(), store)
    assert result.interval().value is None and "left out" in result.interval().why


def test_a_context_that_does_not_fit_loses_its_beginning(store: Store) -> None:
    items = [Item("0", "x" * 30 + " so", (" it is", " no"), 0), Item("1", "so", (" it is", " no"), 0)]
    speaker = Speaker(lambda _context, choice: -float(len(choice)))
    (result,) = evaluate([benchmarks.task(items)], speaker.subject(limit=20), store)
    assert result.cut == 1
    first = dict(reversed(pair) for pair in speaker.asked[:2])
    assert first == {" it is": "x" * 12 + " so", " no": "x" * 15 + " so"}  # the last token needs no room
    assert evaluate([benchmarks.task(items)], Speaker(lambda *_: 0.0).subject(limit=20), store)[0].cut == 1


@pytest.mark.parametrize(("start", "scores"), [(1, (1.0,)), (None, (None,))])
def test_an_empty_context_needs_a_token_to_begin_with(store: Store, start: int | None, scores: Any) -> None:
    speaker = Speaker(lambda _context, choice: -1.0 if choice == "b" else -2.0)
    (result,) = evaluate([benchmarks.task([Item("0", "", ("a", "b"), 1)])], speaker.subject(start=start), store)
    assert result.scores == scores
    assert result.left_out == ({} if start else {NO_START: 1})
    assert [context for context, _ in speaker.asked] == (["\x01", "\x01"] if start else [])


def test_blanks_at_a_contexts_end_go_to_what_follows() -> None:
    tokens = Tokens(lambda text: [ord(char) for char in text], 100, 1)
    context, following = tokens.pair("so he \n", "said")
    assert ("".join(map(chr, context)), "".join(map(chr, following))) == ("so he", " \nsaid")


def test_ids_are_cut_where_the_context_ends() -> None:
    """A tokenizer that joins a letter with the one after it, and adds a first token."""
    ids = {"": 0, "ab": 1, "a": 2, "b": 3, "c": 4, "bc": 5}

    def encode(text: str) -> list[int]:
        found, at = [9], 0
        while at < len(text):
            size = 2 if text[at : at + 2] in ids else 1
            found.append(ids[text[at : at + size]])
            at += size
        return found

    tokens = Tokens(encode, 100, 9)
    assert tokens.pair("c", "ab") == ([9, 4], [1])
    assert tokens.pair("", "ab") == ([9], [1])  # what the tokenizer adds is not asked
    assert tokens.pair("a", "b") == ([9, 2], [9, 3])  # it melted into the context's last token: by itself


def test_a_context_of_one_token_predicts_nothing() -> None:
    with pytest.raises(ValueError, match="predicts nothing"):
        Tokens(lambda _text: [], 1)


def test_an_empty_context_is_counted(store: Store) -> None:
    items = [Item("0", "", ("a", "b"), 1), Item("1", "Q", ("a", "b"), 1), Item("2", "", ("", "b"), 1)]
    (result,) = evaluate([benchmarks.task(items)], Speaker(lambda *_: -1.0).subject(), store)
    assert result.bare == 1 and result.left_out == {EMPTY: 1}


@pytest.mark.parametrize(("right", "low"), [(100, 0.963), (0, 0.0)])
def test_where_all_come_out_alike_the_interval_is_wilsons(store: Store, right: int, low: float) -> None:
    (result,) = evaluate([benchmarks.task(SUMS)], Speaker(knowing(lambda n: n < right)).subject(), store)
    assert result.interval() == result.wilson
    assert result.interval().low == pytest.approx(low, abs=1e-3) and result.interval().half_width > 0.01  # type: ignore[operator]


def test_wilson_stands_beside_the_bootstrap(store: Store) -> None:
    (result,) = evaluate([benchmarks.task(SUMS)], Speaker(knowing(lambda n: n < 60)).subject(), store)
    assert result.wilson is not None and result.wilson != result.interval()
    assert result.wilson.value == result.interval().value == 0.6
    assert result.to_json()["wilson"]["low"] == pytest.approx(0.502, abs=1e-3)
    bits = benchmarks.task([Item("0", "Q", (" abcd",), 0)], "bits", Rule.BITS)
    assert evaluate([bits], Speaker(lambda *_: -1.0).subject(), store)[0].to_json()["wilson"] is None


def test_choices_share_the_ids_of_their_context(store: Store) -> None:
    encoded: list[str] = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return [ord(char) for char in text]

    subject = Subject("one", "one", lambda: (Speaker(lambda *_: -1.0), Tokens(encode, 100, 1)))
    evaluate([benchmarks.task(SUMS[:3])], subject, store)
    assert len(encoded) == 3 * 5  # a context and four choices behind it


def test_bits_per_byte_count_with_their_sign_turned(store: Store) -> None:
    task = benchmarks.task([Item("0", "Q", (" abcd",), 0), Item("1", "R", (" ab",), 0)], rule=Rule.BITS)
    (result,) = evaluate([task], Speaker(lambda *_: -4 * float(np.log(2))).subject(), store)
    assert result.bits_per_byte == pytest.approx((1.0, 2.0))
    assert result.scores == pytest.approx((-1.0, -2.0))
    assert result.chance is None


def test_progress_ends_at_its_total_and_says_how_many_items(store: Store) -> None:
    events: list[Progress] = []
    evaluate([benchmarks.task(SUMS)], Speaker(knowing(lambda _n: True)).subject(), store, events.append)
    assert len(events) > 3 and (events[0].note, events[-1].note) == ("0/100 items", "100 items")
    assert all(one.done <= other.done for one, other in pairwise(events))
    assert events[-1].done == events[-1].total and {event.stage for event in events} == {"speaker: made"}


def test_a_scorer_that_answers_too_little_is_refused(store: Store) -> None:
    class Short:
        def score(self, pairs: Sequence[Any]) -> list[Answer]:
            return [Answer(-1.0, 1, True)] * (len(pairs) - 1)

    subject = Subject("short", "short", lambda: (Short(), Tokens(lambda text: [ord(c) for c in text], 100, 1)))
    with pytest.raises(ValueError, match="answered 39 of 40 pairs"):
        evaluate([benchmarks.task(SUMS[:10])], subject, store)


def test_figures_that_are_no_numbers_are_refused_and_not_kept(store: Store) -> None:
    with pytest.raises(ValueError, match=r"no number for item \d"):
        evaluate([benchmarks.task(SUMS[:10])], Speaker(lambda *_: float("nan")).subject(), store)
    assert evaluate([benchmarks.task(SUMS[:10])], Speaker(lambda *_: -1.0).subject(), store)[0].reused == 0


def test_the_same_items_side_by_side(store: Store) -> None:
    task = benchmarks.task([*SUMS[:10], Item("none", "Q?", ("", " b"), 1)])
    names = {"one": 6, "two": 3}
    found = [
        evaluate([task], Speaker(knowing(lambda n, most=most: n < most)).subject(name), store)[0]  # type: ignore[misc]
        for name, most in names.items()
    ]
    scores = together(found)
    assert scores.shape == (10, 2) and scores.sum(axis=0).tolist() == [6.0, 3.0]
    part = evaluate([task.sample(5)], Speaker(knowing(lambda _n: True)).subject("three"), store)[0]
    assert together([found[0], part]).shape == (sum(i != "none" for i in part.ids), 2)
    with pytest.raises(ValueError, match="not of the same items"):
        together([found[0], replace(found[1], sha256="0" * 64)])


def test_a_sample_is_sized_by_all_models_and_goes_on_from_the_first_items(store: Store) -> None:
    items = [Item(str(n), f"{n} + {n} =", tuple(f" {n + n + more}" for more in range(4)), 0) for n in range(2000)]
    task = benchmarks.task(items)
    sure, torn = Speaker(knowing(lambda number: number % 10 > 0)), Speaker(knowing(lambda number: number % 2 > 0))
    subjects = [sure.subject("sure"), torn.subject("torn")]
    first = calibration(task, subjects, store)
    assert first == task.sample(100)
    pilots = [evaluate([first], subject, store)[0] for subject in subjects]
    alone, other, both = (sized(task, some, 0.04) for some in (pilots[:1], pilots[1:], pilots))
    assert 200 <= alone[1].limit < other[1].limit <= both[1].limit == len(both[0].items) < 2000
    assert both[1].known == 100
    (result,) = evaluate([both[0]], subjects[1], store)
    half = result.interval().half_width
    assert result.reused == 100 and half is not None and half < 0.045


def test_a_sample_is_sized_by_all_that_every_model_has(store: Store) -> None:
    items = [Item(str(n), f"{n} + {n} =", (f" {n + n}", " 0"), 0) for n in range(600)]
    task, subjects = benchmarks.task(items), [Speaker(lambda *_: -1.0).subject(name) for name in ("one", "two")]
    evaluate([task.sample(400)], subjects[0], store)
    assert len(calibration(task, subjects, store).items) == 100
    evaluate([task.sample(250)], subjects[1], store)
    assert calibration(task, subjects, store) == task.sample(200)
    assert calibration(task, subjects[:1], store) == task.sample(400)
    assert calibration(task, subjects, store, seed=1) == task.sample(100, seed=1)


def test_bits_per_byte_and_tasks_without_results_stay_whole(store: Store) -> None:
    bits = benchmarks.task([Item(str(n), "Q", (" ab",), 0) for n in range(200)], "bits", Rule.BITS)
    empty = benchmarks.task([Item(str(n), "Q", ("", " a"), 0) for n in range(200)], "empty")
    for task in (bits, empty):
        results = evaluate([task.sample(100)], Speaker(lambda *_: -1.0).subject(), store)
        assert len(sized(task, results, 0.03)[0].items) == 200


ASKED = [Item(str(n), f"{n} + {n}?", (f" {n + n}",), 0, answer=str(n + n)) for n in range(12)]


def told(text: str) -> str:
    """Right about even numbers, wrong about those above 9, without an answer about 1, without an end about 3."""
    number = int(text.split()[0])
    if number in (1, 3):
        return "I do not know" if number == 1 else f"{number}, {number} " * 9
    return f"The answer is {number + number + (number > 9)}."


def test_replies_are_searched_for_their_answer(store: Store) -> None:
    task = benchmarks.task(ASKED, rule=Rule.NUMBER)
    task = replace(task, spec=replace(task.spec, most=30))
    speaker = Speaker(lambda *_: -1.0, replied=told)
    (result,) = evaluate([task], speaker.subject(), store)
    assert result.scores == (1.0, 0.0, 1.0, 0.0, *(1.0,) * 6, 0.0, 0.0)
    assert (result.unanswered, result.unfinished, result.left_out, result.chance) == (2, 1, {}, None)
    assert result.interval().value == pytest.approx(8 / 12) and result.wilson is not None
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["unanswered"] == 2
    again = Speaker(lambda *_: -1.0)
    assert evaluate([task], again.subject(), store)[0] == replace(result, reused=12, seconds=pytest.approx(0, abs=99))
    assert again.asked == [] and again.opened == 0
    assert evaluate([task], replace(again.subject(), manner="another template"), store)[0].reused == 0


def test_replies_are_kept_one_by_one(store: Store) -> None:
    task = benchmarks.task(ASKED, rule=Rule.NUMBER)
    task = replace(task, spec=replace(task.spec, most=30))
    with pytest.raises(KeyboardInterrupt):
        evaluate([task], Speaker(lambda *_: -1.0, stop_after=5, replied=told).subject(), store)
    rest = Speaker(lambda *_: -1.0, replied=told)
    (result,) = evaluate([task], rest.subject(), store)
    assert (result.reused, len(rest.asked)) == (5, 7)


def test_a_model_that_skips_messages_is_refused(store: Store) -> None:
    class Absent(Speaker):
        def replies(self, texts: Mapping[str, str], most: int) -> Iterator[Said]:
            yield from list(super().replies(texts, most))[1:]

    with pytest.raises(ValueError, match="all but 1 of 12 messages"):
        evaluate([benchmarks.task(ASKED, rule=Rule.NUMBER)], Absent(lambda *_: -1.0, replied=told).subject(), store)


def test_what_cannot_be_asked_is_left_out_and_never_wrong(store: Store) -> None:
    task = benchmarks.task([*ASKED[:2], replace(ASKED[2], answer="")], rule=Rule.NUMBER)
    (result,) = evaluate(
        [task], Speaker(lambda *_: -1.0, replied=lambda text: "" if "0" in text else "3").subject(), store
    )
    assert result.scores == (None, 0.0, None)
    assert result.left_out == {"nothing to say": 1, NO_GOLD: 1}
    (result,) = evaluate([task], replace(Speaker(lambda *_: -1.0).subject("mute"), talk=None), store)
    assert result.interval().value is None and result.left_out == {"a model that cannot be talked to": 3}


def test_names_of_tasks_stay_inside_the_folder(store: Store) -> None:
    task = benchmarks.task(SUMS[:2], "../../evil/name")
    subject = Speaker(knowing(lambda _n: True)).subject(identity="../../../up")
    evaluate([task], subject, store)
    assert store.path(subject, task).resolve().is_relative_to(store.folder.resolve())
