"""Scoring rules on items made by hand, where each rule takes another choice; ties, gaps and figures that are none."""

from __future__ import annotations

import math

import pytest

from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.taskscore import EMPTY, NO_GOLD, Scored, judge, measures, nbytes

# bytes without the blank: 2, 10, 12, 4.  tokens: 1, 2, 6, 2
ITEM = Item("0", "Q?", (" ab", " abcdefghij", " abcdefghijkl", " abcd"), 0, "Answer:")
SCORED = Scored("0", (-4.0, -7.0, -7.5, -6.0), (1, 2, 6, 2), (False,) * 4, (-4.5, -8.0, -8.0, -9.0))


@pytest.mark.parametrize(
    ("rule", "chosen", "best"),
    [
        (Rule.RAW, 0, -4.0),
        (Rule.PER_BYTE, 2, -7.5 / 12),
        (Rule.PER_TOKEN, 2, -7.5 / 6),
        (Rule.UNCONDITIONAL, 3, 3.0),
    ],
)
def test_what_each_rule_takes(rule: Rule, chosen: int, best: float) -> None:
    for gold in range(4):
        verdict = judge(Item("0", "Q?", ITEM.choices, gold, "Answer:"), SCORED, rule)
        assert (verdict.chosen, verdict.correct, verdict.tied) == (chosen, float(gold == chosen), False)
    assert measures(ITEM, SCORED, rule).max() == pytest.approx(best)


def test_four_rules_take_four_choices() -> None:
    item = Item("0", "Q?", (" a", " bcdefghijklmn", " cd", " de"), 0, "Answer:")
    scored = Scored("0", (-2.0, -6.0, -5.0, -4.0), (1, 2, 5, 1), (False,) * 4, (-2.1, -6.1, -5.1, -9.0))
    rules = (Rule.RAW, Rule.PER_BYTE, Rule.PER_TOKEN, Rule.UNCONDITIONAL)
    assert [judge(item, scored, rule).chosen for rule in rules] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "count"), [(" a", 1), ("a", 1), ("  a", 2), (" ü", 2), (" 日本", 6), ("\n", 1), (" ", 0)]
)
def test_bytes_are_those_of_utf8_without_one_blank(text: str, count: int) -> None:
    assert nbytes(text) == count


def test_bits_per_byte_are_those_of_the_right_choice() -> None:
    verdict = judge(
        Item("0", "Q?", (" ab", " ü"), 1), Scored("0", (-1.0, -4 * math.log(2)), (1, 1), (True, False)), Rule.RAW
    )
    assert verdict.bits_per_byte == pytest.approx(2.0)
    alone = judge(Item("0", "Q?", (" ab",), 0), Scored("0", (-3 * math.log(2),), (2,), (True,)), Rule.BITS)
    assert (alone.correct, alone.bits_per_byte) == (None, pytest.approx(1.5))


@pytest.mark.parametrize("greedy", [True, False])
def test_a_last_word_is_right_if_every_token_is_the_first_choice(greedy: bool) -> None:
    verdict = judge(Item("0", "so he said", (" no",), 0), Scored("0", (-0.5,), (1,), (greedy,)), Rule.GREEDY)
    assert verdict.correct == float(greedy)


def test_of_equal_choices_the_first_is_taken_and_the_tie_said() -> None:
    scored = Scored("0", (-3.0, -2.0, -2.0), (1, 1, 1), (False,) * 3)
    verdict = judge(Item("0", "Q?", (" a", " b", " c"), 2), scored, Rule.RAW)
    assert (verdict.chosen, verdict.correct, verdict.tied) == (1, 0.0, True)
    verdict = judge(
        Item("0", "Q?", (" a", " b", " c"), 0), Scored("0", (-1.0, -2.0, -2.0), (1,) * 3, (False,) * 3), Rule.RAW
    )
    assert not verdict.tied  # those that are equal are not the best


@pytest.mark.parametrize(
    ("item", "scored", "why"),
    [
        (Item("0", "Q?", (" a", " b"), None), Scored("0", (-1.0, -2.0), (1, 1), (True, False)), NO_GOLD),
        (Item("0", "Q?", ("", " b"), 1), Scored("0", (0.0, -2.0), (0, 1), (True, False)), EMPTY),
        (Item("0", "Q?", (" ", " b"), 0), Scored("0", (-0.1, -2.0), (1, 1), (True, False)), EMPTY),
    ],
)
def test_what_cannot_be_scored_is_left_out_and_not_wrong(item: Item, scored: Scored, why: str) -> None:
    verdict = judge(item, scored, Rule.RAW)
    assert (verdict.correct, verdict.bits_per_byte, verdict.why) == (None, None, why)


@pytest.mark.parametrize(
    ("scored", "rule", "word"),
    [
        (Scored("0", (-1.0,), (1,), (True,)), Rule.RAW, "2 choices and 1 figures"),
        (Scored("0", (-1.0, math.nan), (1, 1), (True, True)), Rule.RAW, "no number for item 0"),
        (Scored("0", (-1.0, -math.inf), (1, 1), (True, True)), Rule.RAW, "no number for item 0"),
        (Scored("0", (-1.0, -1.0), (1, 1), (True, True)), Rule.UNCONDITIONAL, "without its question"),
        (Scored("0", (-1.0, -1.0), (1, 1), (True, True), (-1.0, math.nan)), Rule.RAW, "no number"),
    ],
)
def test_figures_that_are_none_of_the_item(scored: Scored, rule: Rule, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        judge(Item("0", "Q?", (" a", " b"), 0), scored, rule)
