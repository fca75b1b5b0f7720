"""What points are asked: every task in any beginning, lengths that fit, scores, and digests that tell items apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

import tiny
from rlkit.profiles.frontier import items
from rlkit.profiles.frontier.items import Asked, Reading, of_context
from rlkit.profiles.frontier.search import UNIT
from rlkit.profiles.taskitem import Item, Rule
from rlkit.profiles.tasks import Group, Spec, Task
from rlkit.recover.likelihood import Continuation, Pair

TOKENIZER = tiny.tokenizer()
READING = Reading(
    lambda text: [1, *TOKENIZER.encode(text, add_special_tokens=False)],
    lambda text: list(TOKENIZER.encode(text, add_special_tokens=False)),
    1,
)
CONTEXT = 1500


def task(name: str, rule: Rule, made: Sequence[Item]) -> Task:
    return Task(Spec(name, name, "", Group.MORE, "", "", rule, len(made)), tuple(made), "sum")


LAMBADA = task("lambada", Rule.GREEDY, [Item(str(n), f"the cat number {n} sat on the", (" mat",), 0) for n in range(6)])
GSM8K = task("gsm8k", Rule.BITS, [Item("0", "two bits are", (" enough",), 0), Item("1", "a", ("",), 0)])
LOADED = {"lambada": LAMBADA, "gsm8k": GSM8K}


class Sure:
    """Gives the first continuation of an item `first` and all others -5."""

    def __init__(self, first: float) -> None:
        self.first = first

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        return [
            Continuation(self.first if not n or pairs[n - 1][0] != context else -5.0, len(rest), greedy=self.first > -1)
            for n, (context, rest) in enumerate(pairs)
        ]


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    return of_context(("needle", "long-qa", "lambada", "gsm8k"), CONTEXT, 6, READING, LOADED)


def test_tasks_take_turns_and_groups_share_a_text(asked: list[Asked]) -> None:
    assert Counter(item.task for item in asked) == {"needle": 8, "long-qa": 8, "lambada": 6, "gsm8k": 1}
    assert {item.task for item in asked[: 3 * UNIT + 1]} == {"needle", "long-qa", "lambada", "gsm8k"}
    for start in range(0, 2 * UNIT, UNIT):
        group = asked[start : start + UNIT]
        prompts = [item.pairs[0][0] for item in group]
        assert len({tuple(prompt[:1000]) for prompt in prompts}) == 1 and len({item.id for item in group}) == UNIT
        for item in group:
            assert max(len(context) + len(rest) for context, rest in item.pairs) <= CONTEXT + 8
            assert item.pairs[0][0][0] == 1 and len(item.pairs) == 10
    read = items.tokens_read(asked[:UNIT])
    assert CONTEXT < read < 2 * CONTEXT < items.tokens_read(asked[: 2 * UNIT])


def test_scores_are_what_the_rules_say(asked: list[Asked]) -> None:
    assert items.scores(asked[: 2 * UNIT], Sure(-0.5)) == (1.0,) * (2 * UNIT)
    assert items.scores(asked[: 2 * UNIT], Sure(-9.0)) == (0.0,) * (2 * UNIT)
    words, sums = ([item for item in asked if item.task == name] for name in ("lambada", "gsm8k"))
    assert items.scores(words[:1], Sure(-0.5)) == (1.0,) and items.scores(words[:1], Sure(-2.0)) == (0.0,)
    (said,) = items.scores(sums, Sure(-0.5))
    assert said == pytest.approx(2.718281828 ** (-0.5 / len("enough")))  # the probability per byte


def test_the_same_seed_asks_the_same(asked: list[Asked]) -> None:
    again = of_context(("needle", "long-qa", "lambada", "gsm8k"), CONTEXT, 6, READING, LOADED)
    assert items.digest(again) == items.digest(asked)
    digests = {items.digest(asked[:4]), items.digest(asked[4:8]), items.digest(asked[:8])}
    digests.add(items.digest(of_context(("needle",), CONTEXT, 4, READING, {}, seed=1)))
    digests.add(items.digest(of_context(("needle",), CONTEXT + 1, 4, READING, {})))
    assert len(digests) == 5
    assert items.digest(of_context(("needle",), CONTEXT, 4, READING, {})) == items.digest(asked[:4])


def test_a_context_that_holds_no_text_is_told() -> None:
    with pytest.raises(ValueError, match="do not hold the facts and a question"):
        of_context(("long-qa",), 200, 4, READING, {})
