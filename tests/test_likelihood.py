"""Continuations judged with memory and in batches are judged as whole rows are, for models of many families."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch

import families
import tiny
from rlkit.recover.likelihood import Continuation, Likelihood, Outcome, Pair, Part, alike, asks_of
from rlkit.recover.prefixes import LEVELS, Ask, Node, common, tree
from rlkit.recover.torchscorer import placed, replies, replies_together, spread, torch_scorer


def items(count: int = 6, *, shots: int = 40, seed: int = 0) -> list[Pair]:
    """Pairs like those of a task: examples before every question, four choices of some tokens, two that begin alike."""
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, tiny.VOCAB) for _ in range(length)]

    head, found = ids(shots), []
    for _ in range(count):
        context = head + ids(rng.randrange(1, 30))
        same = ids(5)
        choices = [ids(1), ids(1), same + ids(rng.randrange(1, 9)), same + ids(rng.randrange(1, 9)), same[:3]]
        found += [(context, choice) for choice in choices]
    return [*found, (ids(1), ids(4)), (ids(90), ids(1)), found[0]]


def whole(model: Any, pairs: Sequence[Pair]) -> list[Continuation]:
    """The plain way: every row by itself, in one pass, all its logits."""
    found = []
    for context, continuation in pairs:
        row = torch.tensor([[*context, *continuation[:-1]]])
        with torch.no_grad():
            logits = model(row).logits.float().log_softmax(-1)[0, len(context) - 1 :]
        wanted = torch.tensor(list(continuation))
        chosen = logits[torch.arange(len(wanted)), wanted]
        found.append(Continuation(float(chosen.sum()), len(wanted), bool((logits.argmax(-1) == wanted).all())))
    return found


def assert_same(found: Sequence[Continuation], expected: Sequence[Continuation], atol: float = 1e-4) -> None:
    assert [(one.tokens, one.cut) for one in found] == [(one.tokens, one.cut) for one in expected]
    np.testing.assert_allclose([one.logprob for one in found], [one.logprob for one in expected], atol=atol)
    assert [one.greedy for one in found] == [one.greedy for one in expected]


class Counting:
    """A reader whose logits depend on every id before; it counts what it reads. Memories are the ids themselves."""

    context_length, max_ids = 64, 100
    switch: int | None = None

    def __init__(self) -> None:
        self.read_ids = 0

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[int, Outcome]]:
        for number, part in reversed(list(enumerate(parts))):
            before = part.past or ()
            assert len(before) == part.past_length
            assert self.switch is None or not before or len(before) + len(part.ids) <= self.switch
            row = (*before, *part.ids.tolist())
            self.read_ids += len(part.ids)
            logits = [self.logits(row[: len(before) + position + 1]) for position in part.positions]
            yield number, Outcome(np.array(logits, np.float32).reshape(-1, 20), row if part.keep else None)

    @staticmethod
    def logits(row: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(row).standard_normal(20).astype(np.float32)

    def cut(self, past: tuple[int, ...], length: int) -> tuple[int, ...]:
        return past[:length]


def plainly(pair: Pair) -> Continuation:
    """What the counting reader says of a pair, by the formula."""
    context, continuation = pair
    row = [*context, *continuation]
    logprobs, greedy = 0.0, True
    for at in range(len(context), len(row)):
        logits = Counting.logits(tuple(row[:at])).astype(np.float64)
        logprobs += logits[row[at]] - np.log(np.exp(logits).sum())
        greedy &= int(logits.argmax()) == row[at]
    return Continuation(float(logprobs), len(continuation), bool(greedy))


def random_pairs(rng: random.Random) -> list[Pair]:
    """Pairs of few different ids, so that many begin alike in many ways."""
    return [
        (
            [rng.randrange(2) for _ in range(rng.randrange(1, 40))],
            [rng.randrange(2) for _ in range(rng.randrange(1, 6))],
        )
        for _ in range(rng.randrange(1, 30))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_any_pairs_are_judged_as_by_themselves(seed: int) -> None:
    rng, reader = random.Random(seed), Counting()
    reader.switch = 20 if seed % 2 else None
    scorer = Likelihood(reader)
    for _ in range(4):  # later calls use what earlier ones left
        pairs = random_pairs(rng)
        pairs += [(pairs[0][0] * 2, [3]), (pairs[0][0] * 2, [4, 3])]
        pairs = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= 64]
        assert_same(scorer.score(pairs), [plainly(pair) for pair in pairs], 1e-5)


def nodes(roots: Sequence[Node]) -> Iterator[Node]:
    for node in roots:
        yield node
        yield from nodes(node.children)


def test_what_rows_share_is_one_node() -> None:
    context = tuple(range(20))
    rows = [((*context, 17, 18), (17, 18, 1)), (context, (3,)), ((*context, 17, 19), (17, 19, 2))]
    asks = [Ask(row, 19, tokens, place) for place, (row, tokens) in enumerate(rows)]
    (root,) = tree(asks)
    assert root.ids == (*context, 17)
    assert {(read.position, read.token, read.ask, read.number) for read in root.reads} == {
        (19, 17, 0, 0),
        (19, 3, 1, 0),
        (19, 17, 2, 0),
        (20, 18, 0, 1),
        (20, 19, 2, 1),
    }
    assert [child.ids for child in root.children] == [(18,), (19,)]


def test_short_beginnings_are_not_worth_a_pass() -> None:
    asks = [Ask((1, 2, 3, 10 + n, 50 + n), 3, (50 + n, 7), n) for n in range(50)]
    assert [len(node.ids) for node in tree(asks)] == [5] * 50
    asks = [Ask((1, 2, 3, 4, *[10 + n] * 5), 7, (10 + n, 7), n) for n in range(2)]
    assert [len(node.ids) for node in tree(asks)] == [9, 9]


def test_every_token_is_judged_once() -> None:
    asks = asks_of(items(), 256)
    told = [(read.ask, read.number) for node in nodes(tree(asks)) for read in node.reads]
    assert sorted(told) == [(n, k) for n, ask in enumerate(asks) for k in range(len(ask.tokens))]


def test_choices_of_one_token_cost_their_context_once() -> None:
    reader = Counting()
    Likelihood(reader).score([(list(range(30)), [n]) for n in range(4)])
    assert reader.read_ids == 30


def test_a_prompt_that_many_calls_share_is_read_once() -> None:
    reader, head = Counting(), [1] * 40
    scorer = Likelihood(reader)
    for n in range(5):
        scorer.score([([*head, 2 + n, 3, 3, 3], [5, 6, n]), ([*head, 2 + n, 3, 3, 3], [6, 7, n])])
    assert reader.read_ids == 40 + 5 * (4 + 2 + 2)
    forgetful = Counting()
    assert Likelihood(forgetful, kept=0).score([([*head, 9], [1, 2])] * 2)[0].tokens == 2
    assert forgetful.read_ids == 42


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.recover.likelihood.KEPT_IDS", 39)
    reader = Counting()
    scorer = Likelihood(reader)
    for _ in range(2):
        scorer.score([([1] * 40, [2, 3]), ([1] * 40, [4, 5])])
    assert reader.read_ids == 2 * 42


def test_rows_that_share_ever_more_are_no_deep_tree() -> None:
    rows = [(*range(4 * n), 1000 + n, *range(20)) for n in range(1, 400)]
    roots = tree([Ask((*row, 7), len(row), (7,), n) for n, row in enumerate(rows)])

    def depth(some: Sequence[Node]) -> int:
        return 1 + max((depth(node.children) for node in some if node.children), default=0)

    assert 2 < depth(roots) <= LEVELS + 1
    assert sum(len(node.reads) for node in nodes(roots)) == len(rows)


def test_an_item_longer_than_the_context_loses_its_beginning() -> None:
    long = [n % 7 for n in range(80)]
    (found,) = Likelihood(Counting()).score([(long, [3, 4, 5])])
    assert found.cut == 80 + 2 - 64
    assert found.logprob == pytest.approx(plainly((long[18:], [3, 4, 5])).logprob, abs=1e-5)


@pytest.mark.parametrize(
    ("pair", "match"),
    [
        (([], [1]), "pair 1 has no token in its context"),
        (([1], []), "pair 1 has no token in its continuation"),
        (([1], [2] * 65), "pair 1 has 65 tokens to judge, more than the context of 64"),
    ],
)
def test_pairs_that_cannot_be_judged_are_named(pair: Pair, match: str) -> None:
    reader = Counting()
    with pytest.raises(ValueError, match=match):
        Likelihood(reader).score([([1], [2]), pair])
    assert reader.read_ids == 0


def test_nothing_is_asked_of_no_pairs() -> None:
    assert Likelihood(Counting()).score([]) == []


def test_common_beginnings() -> None:
    assert [common((), (1,)), common((1, 2), (1, 2, 3)), common((1, 2), (1, 3)), common((2,), (1,))] == [0, 2, 1, 0]


def test_an_ask_that_does_not_fit_its_row_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens from position 1 do not fit a row of 4"):
        Ask((1, 2, 3, 4), 1, (3, 4), 0)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_torch_model_is_judged_as_whole_rows_are(name: str) -> None:
    model = families.model(name)
    pairs = items()
    assert_same(torch_scorer(model).score(pairs), whole(model, pairs))


def test_long_rows_are_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = families.model("qwen3"), [*items(2), ([7] * 3, list(range(3, 103)))]
    monkeypatch.setattr("rlkit.recover.torchscorer.CPU_IDS", 16)
    assert_same(torch_scorer(model).score(pairs), whole(model, pairs))


def test_a_shorter_context_may_be_told() -> None:
    model, pairs = families.model("llama"), items()
    found = torch_scorer(model, context_length=32).score(pairs)
    kept = [(context[-(33 - len(continuation)) :], continuation) for context, continuation in pairs]
    assert [one.cut for one in found] == [len(pair[0]) - len(short[0]) for pair, short in zip(pairs, kept, strict=True)]
    np.testing.assert_allclose([one.logprob for one in found], [one.logprob for one in whole(model, kept)], atol=1e-4)


def test_a_model_is_put_on_a_device_in_a_type() -> None:
    model = placed(families.model("llama"), "cpu", "bfloat16")
    assert next(model.parameters()).dtype is torch.bfloat16
    assert next(placed(families.model("llama"), "auto").parameters()).dtype is torch.float32
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used"):
        placed(model, "nowhere")
    with pytest.raises(ValueError, match="dtype 'int8' is no type of weights"):
        placed(model, "cpu", "int8")


def test_rows_of_about_one_length_are_read_together() -> None:
    def cost(groups: list[list[int]], lengths: list[int], pass_ids: int) -> int:
        return sum(pass_ids + len(group) * max(lengths[number] for number in group) for group in groups)

    rng = random.Random(0)
    for _ in range(40):
        lengths, pass_ids = [rng.randint(1, 12) for _ in range(rng.randint(1, 8))], rng.choice([0, 3, 10])
        found = alike(lengths, pass_ids)
        assert sorted(number for group in found for number in group) == list(range(len(lengths)))
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        ways = (
            [order[start:end] for start, end in pairwise([0, *cuts, len(order)])]
            for size in range(len(order))
            for cuts in combinations(range(1, len(order)), size)
        )
        assert cost(found, lengths, pass_ids) == min(cost(way, lengths, pass_ids) for way in ways)
    assert alike([], 3) == []
    assert [sorted(group) for group in alike([5, 30, 5, 9], 3)] == [[1], [3], [0, 2]]


@pytest.mark.parametrize("name", ["gemma3", "phi3-long"])
def test_replies_together_are_those_one_by_one(name: str) -> None:
    rng, model = random.Random(0), families.model(name)
    prompts = [[rng.randrange(3, 400) for _ in range(length)] for length in (40, 7, 23, 23, 1)]
    most = [12, 20, 5, 12, 12]
    alone = {number: replies(model)(prompt, most[number]) for number, prompt in enumerate(prompts)}
    assert dict(replies_together(model, 3)(prompts, most)) == alone
    model.generation_config.eos_token_id = alone[1][4]  # now replies end where this one comes up
    ended = {number: ids[: ids.index(alone[1][4])] if alone[1][4] in ids else ids for number, ids in alone.items()}
    assert len(ended[1]) <= 4 and dict(replies_together(model)(prompts, most)) == ended


def test_processes_take_devices_of_a_kind_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spread("cpu", 1) == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [spread("cuda", number) for number in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert spread("cuda:1", 2) == "cuda:1"
