"""Answers in replies: numbers and letters by the stated rules, and replies that hold none."""

from __future__ import annotations

import pytest

from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.taskreply import Said, answer, judge_reply
from rlkit.profiles.taskscore import NO_GOLD


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She sells 9 eggs for $2 each. The answer is 18.", "18"),
        ("The answer is 18. That is 3 times 6.", "18"),
        ("The answer is 3. No: the answer is **1,234.50** dollars", "1234.5"),
        ("So the answer is 20 - 12 = 8.", "8"),
        ("The answer is 8 = eight.", "8"),
        ("9 * 2 = 18\n#### 18", "18"),
        ("**Final answer:**\n\n$-4", "-4"),
        (r"Thus it is \(\boxed{72.0}\), as 3 < 4.", "72"),
        ("First 16-3, which leaves 13 eggs", "13"),
        ("it is 16-3", "3"),
        ("half of it, .50", "0.5"),
        ("zero: -0.00", "0"),
        ("one of 1,2,3", "3"),
        ("about 12,345,678.90, it seems", "12345678.9"),
        ("The answer is not known", None),
        ("The answer is unknown, though 5 are there", "5"),
        ("<think>the answer is 4</think>The answer is 5.", "5"),
        ("<think>the answer is 4", None),
        ("", None),
    ],
)
def test_numbers(text: str, found: str | None) -> None:
    assert answer(text, Rule.NUMBER) == found


def test_the_last_number_of_a_reply_that_was_cut_is_no_answer() -> None:
    assert answer("First 16 - 3 = 13, then 13", Rule.NUMBER, ended=False) is None
    assert answer("The answer is 13, since", Rule.NUMBER, ended=False) == "13"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is B.", "B"),
        ("The correct answer is: **(C)** 6. Option A is too small.", "C"),
        ("Answer: A, no. Answer: D", "D"),
        ("B", "B"),
        ("B. 4", "B"),
        ("(c) is wrong, it is (D)", "D"),
        ("**A**", "A"),
        (r"$\boxed{\text{C}}$", "C"),
        ("I would choose option C", "C"),
        ("A. 2\nB. 4\nC. 6", None),
        ("A. 2\nB. 4\n\nThe answer is B.", "B"),
        ("B. 4\n\nB is right, as 2 + 2 = 4", "B"),
        ("Both A. and B. are possible", None),
        ("A field extension is a set", None),
        ("The answer is E.", None),
        ("The answer is X.", None),
        ("4", None),
        ("<think>B", None),
    ],
)
def test_letters(text: str, found: str | None) -> None:
    assert answer(text, Rule.LETTER, choices=4) == found


def test_verdicts() -> None:
    sums, letters = Item("0", "2 + 2?", (" so 4.",), 0, answer="4"), Item("1", "Q", (" A", " B"), 1, answer="B")
    assert judge_reply(sums, Said("0", "The answer is 4.0", 5, True), Rule.NUMBER)[0].correct == 1.0
    assert judge_reply(letters, Said("1", "A.", 2, True), Rule.LETTER)[0].correct == 0.0
    verdict, found = judge_reply(sums, Said("0", "I do not know", 4, True), Rule.NUMBER)
    assert (verdict.correct, found) == (0.0, False)  # wrong, and to be counted
    unknown = Item("2", "Q", (" A", " B"))
    assert judge_reply(unknown, Said("2", "A.", 2, True), Rule.LETTER)[0].why == NO_GOLD
