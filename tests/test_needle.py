"""Needles: exact lengths and depths, numbers that are said once, texts that do not repeat, and who finds them."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence

import pytest

import families
import tiny
from rlkit.profiles import needle
from rlkit.profiles.needle import Case, Wanted, by_generation, by_likelihood, hay_of, make, sentences
from rlkit.recover.likelihood import Continuation, Pair
from rlkit.recover.torchscorer import torch_scorer

TOKENIZER = tiny.tokenizer()


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids)))


def words(text: str) -> list[int]:
    """A tokenizer of whole words, the blank before them included: one id each, of any text."""
    return [zlib.crc32(word.encode()) for word in re.findall(r" ?[^ ]+", text)]


class Oracle:
    """Knows what was said: the likelier the continuation the later in the context it occurs."""

    def __init__(self, *, blind: bool = False) -> None:
        self.blind, self.asked = blind, 0

    def score(self, pairs: Sequence[Pair]) -> list[Continuation]:
        self.asked += len(pairs)
        return [self.one(decode(context), decode(rest)) for context, rest in pairs]

    def one(self, context: str, answer: str) -> Continuation:
        before = context.rsplit("The", 1)[1]  # how the question ends: " secret number of Marlow is"
        said = not self.blind and f"The{before}{answer}" in context
        return Continuation(-1.0 if said else -9.0, 1, greedy=said)


def test_hay_is_exact_where_the_last_sentence_is_longer_than_the_first() -> None:
    for count in range(300):
        hay = hay_of(count, words, seed=count % 7)
        assert sum(map(len, hay)) == count and all(hay)


@pytest.mark.parametrize("length", [400, 401, 402, 777, 2048])
@pytest.mark.parametrize("style", needle.STYLES)
def test_lengths_are_exact(length: int, style: str) -> None:
    case = make(Wanted(length, style=style), encode, start=[1])
    (question,) = case.questions
    assert len(case.prompt(question)) == length
    assert case.ids[0] == 1
    assert (
        len(make(Wanted(length, style=style), words).prompt(make(Wanted(length, style=style), words).questions[0]))
        == length
    )


def test_the_longest_of_several_questions_makes_up_the_length() -> None:
    case = make(Wanted(3000, (0.1, 0.5, 0.9)), encode)
    assert max(len(case.prompt(question)) for question in case.questions) == 3000


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 0.5, 0.77, 1.0])
def test_depths(depth: float) -> None:
    case = make(Wanted(4000, (depth,)), encode)
    (question,) = case.questions
    hay = len(case.ids) - (question.end - question.start)
    assert question.depth == question.start / hay
    longest = max(len(encode(f" {line}")) for line in itertools.islice(sentences(), 60))
    assert abs(question.start - depth * hay) <= longest / 2 + 1
    assert decode(case.ids[question.start : question.end]).startswith(" The secret number of")
    assert (question.start == 0) is (depth == 0.0)
    assert (question.end == len(case.ids)) is (depth == 1.0)


def test_needles_lie_in_the_order_of_their_depths() -> None:
    depths = (0.9, 0.1, 0.5, 0.5, 0.0, 1.0)
    case = make(Wanted(3000, depths), encode)
    starts = [question.start for question in case.questions]
    assert sorted(range(6), key=lambda n: starts[n]) == [4, 1, 2, 3, 0, 5]
    whole = [case.ids[question.start : question.end] for question in case.questions]
    assert all(question.answer in decode(ids) for question, ids in zip(case.questions, whole, strict=True))


@pytest.mark.parametrize(("style", "times"), [("needle", 1), ("passkey", 2)])
def test_numbers_are_said_in_their_needle_only(style: str, times: int) -> None:
    depths = (0.2, 0.8) if style == "needle" else (0.4,)
    for seed in range(5):
        case = make(Wanted(1500, depths, style, seed), encode)
        text = decode(case.ids)
        answers = [question.answer for question in case.questions]
        assert sorted(re.findall(r"\d+", text)) == sorted(answers * times)
        assert len(set(answers)) == len(answers)
        for question in case.questions:
            assert len(set(question.decoys)) == needle.DECOYS
            assert question.answer not in question.decoys
            assert set(answers) - {question.answer} <= set(question.decoys)
            assert question.answer not in decode(question.ids)


def test_seeds_decide() -> None:
    def made(seed: int) -> Case:
        return make(Wanted(900, seed=seed), encode)

    assert made(1) == made(1)
    assert made(1).ids != made(2).ids
    assert made(1).questions[0].answer != made(2).questions[0].answer


def test_text_does_not_repeat_and_holds_no_needle() -> None:
    lines = list(itertools.islice(sentences(3), 5000))
    assert len(set(lines)) == 5000
    assert not re.search(r"\d|secret|pass key|" + "|".join(needle.OWNERS), " ".join(lines))
    assert all(line[0].isupper() and line.endswith(".") for line in lines)
    starts = [" ".join(line.split()[:6]) for line in lines]
    assert len(set(starts)) > 3000


@pytest.mark.parametrize("style", needle.STYLES)
def test_who_knows_finds_and_who_guesses_does_not(style: str) -> None:
    depths = (0.1, 0.6) if style == "needle" else (0.6,)
    case = make(Wanted(1200, depths, style), encode)
    seeing, blind = Oracle(), Oracle(blind=True)
    found = by_likelihood(case, seeing)
    assert (found.share, found.logprobs) == (1.0, (-1.0,) * len(depths))
    assert seeing.asked == len(depths) * (1 + needle.DECOYS)
    assert by_likelihood(case, blind).share == 0.0
    assert found.to_json()["share"] == 1.0


def test_replies_are_read() -> None:
    case = make(Wanted(1200, (0.1, 0.6)), encode)
    right = case.questions[0].answer
    found = by_generation(case, lambda _ids, most: encode(f" {right}. And 5.")[:most], decode)
    assert (found.found, found.share) == ((True, False), 0.5)
    assert by_generation(case, lambda _ids, _most: [], decode).share == 0.0
    late = by_generation(case, lambda _ids, _most: encode(f" 5, no, {right}"), decode)
    assert late.found == (False, False)


def test_a_model_reads_the_text_once() -> None:
    case = make(Wanted(250, (0.5,), "passkey"), encode)
    found = by_likelihood(case, torch_scorer(families.model("llama")))
    assert len(found.logprobs) == 1
    assert found.logprobs[0] < 0


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ({"length": 10}, "10 tokens do not hold the needles"),
        ({"length": 900, "depths": (1.5,)}, "depth 1.5 is no place"),
        ({"length": 900, "depths": (float("nan"),)}, "depth nan is no place"),
        ({"length": 900, "depths": ()}, "0 depths for style 'needle'"),
        ({"length": 900, "depths": (0.1, 0.2), "style": "passkey"}, "give 1 to 1"),
        ({"length": 900, "style": "haystack"}, "style 'haystack' is no kind"),
    ],
)
def test_what_cannot_be_made(wanted: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(Wanted(**wanted), encode)  # type: ignore[arg-type]


def test_a_text_of_nothing_but_the_needle() -> None:
    case = make(Wanted(1000, (0.3,)), encode)
    least = 1000 - (len(case.ids) - (case.questions[0].end - case.questions[0].start))
    (question,) = make(Wanted(least, (0.3,)), encode).questions
    assert (question.start, question.depth) == (0, 0.3)
