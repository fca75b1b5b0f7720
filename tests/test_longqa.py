"""Two-hop questions: exact lengths, facts said once and apart, nothing in a question but a name, and who answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

import tiny
from rlkit.profiles import longqa
from rlkit.profiles.longqa import PEOPLE, Document, Wanted, make
from rlkit.profiles.needle import by_likelihood
from rlkit.recover.likelihood import Continuation, Pair

TOKENIZER = tiny.tokenizer()


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids)))


class Reader:
    """Joins two facts; `hops` 1 knows only which numbers were said, so it finds the last of them likeliest."""

    def __init__(self, hops: int) -> None:
        self.hops = hops

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        return [self.one(decode(context), decode(rest).strip()) for context, rest in pairs]

    def one(self, context: str, number: str) -> Continuation:
        person = context.rsplit("the town where ", 1)[1].removesuffix(" lives is")
        town = context.split(f"{person} lives in the town of ")[1].split(".")[0]
        right = f"the town of {town} is {number}." in context
        logprob = float(right) if self.hops == 2 else context.rfind(number) / len(context)
        return Continuation(logprob, 1, greedy=right)


@pytest.fixture(scope="module")
def document() -> Document:
    return make(Wanted(2000, seed=3), encode, start=[1])


@pytest.mark.parametrize("length", [1200, 1201, 1999])
def test_lengths_are_exact(length: int) -> None:
    document = make(Wanted(length), encode, start=[1])
    assert max(len(document.prompt(question)) for question in document.questions) == length
    assert document.ids[0] == 1


def test_facts_are_said_once_and_scattered(document: Document) -> None:
    text = decode(document.ids)
    assert text.count(" lives in the town of ") == PEOPLE == text.count("The secret number of the town of ")
    for question, (start, end, depth) in zip(document.questions, document.towns, strict=True):
        town = decode(document.ids[question.start : question.end]).split("the town of ")[1].rstrip(".")
        said = decode(document.ids[start:end])
        assert town in said and said.endswith(f" is {question.answer}.") and text.count(question.answer) == 1
        assert town not in decode(question.ids) and question.answer not in decode(question.ids)
        assert all(text.count(decoy) == 1 for decoy in question.decoys) and len(set(question.decoys)) == PEOPLE - 1
        assert 0 <= depth <= 1
    depths = [place[2] for place in document.towns] + [question.depth for question in document.questions]
    assert min(depths) < 0.2 and max(depths) > 0.8
    order = [a.start < b[0] for a, b in zip(document.questions, document.towns, strict=True)]
    assert len(set(order)) == 2  # either fact may come first


def test_seeds_draw_other_documents(document: Document) -> None:
    assert make(Wanted(2000, seed=3), encode, start=[1]).ids == document.ids
    others = [make(Wanted(1200, questions=2, seed=seed), encode) for seed in range(3)]
    assert all(a.ids != b.ids for a, b in itertools.combinations(others, 2))
    assert all(len(one.questions) == len(one.towns) == 2 for one in others)


def test_two_hops_are_needed(document: Document) -> None:
    assert by_likelihood(document, Reader(2)).share == 1.0
    assert by_likelihood(document, Reader(1)).share == 1 / PEOPLE


def test_bad_wishes_are_one_line() -> None:
    with pytest.raises(ValueError, match="100 tokens do not hold the facts and a question, which take"):
        make(Wanted(100), encode)
    for count in (0, PEOPLE + 1):
        with pytest.raises(ValueError, match=f"{count} questions about {PEOPLE} people"):
            Wanted(2000, questions=count)
    assert len(set(longqa.NAMES)) == len(longqa.NAMES) >= PEOPLE


def test_single_questions_ask_for_the_town() -> None:
    document = make(Wanted(1200, questions=4, seed=5, single=2), encode)
    text = decode(document.ids)
    for number, question in enumerate(document.questions):
        asked = decode(question.ids)
        person = asked.split("Where does " if number < 2 else "the town where ")[1].split(" live")[0]
        town = text.split(f"{person} lives in the town of ")[1].split(".")[0]
        assert (question.answer == town) == (number < 2) and town not in asked
        assert question.answer not in question.decoys and len(set(question.decoys)) == PEOPLE - 1
        said = " lives in the town of {}." if number < 2 else " is {}."
        assert all(text.count(said.format(each)) == 1 for each in (question.answer, *question.decoys))
    with pytest.raises(ValueError, match="5 of 4 questions"):
        Wanted(1200, questions=4, single=5)
