"""Questions over long documents whose answers are one or two facts away: who lives where, what is kept in that place.

    document = make(Wanted(length=4096), encode)
    found = needle.by_likelihood(document, scorer)

A document is made of needle.py's sentences, all different and without digits. Scattered in it, in places drawn by a
seed, are two facts for each of PEOPLE: the town that a person lives in, and a number that belongs to the town. A
question names a person and asks for the number of their town, so the town that joins the facts is nowhere in it. All
other towns' numbers are in the document too and are what the right one has to be likelier than: to remember that a
number was said is not enough. Chance is 1 in PEOPLE.

Small models do not join facts. `single` of the questions ask for the town itself, where all towns are what the right
one has to be likelier than: one fact, but only the name before it tells it from the others.

Lengths are exact in tokens, the document's beginning is cut, and all questions follow the same document, so that a
scorer reads it once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlkit.profiles import needle
from rlkit.profiles.needle import KEY, OWNERS, Encode, Question, hay_of, hidden

PEOPLE = 1 + needle.DECOYS
NAMES = (
    "Adelina", "Bertram", "Cordelia", "Desmond", "Eleanor", "Ferdinand", "Gwendolyn", "Humphrey", "Isadora", "Jasper",
    "Katarina", "Leopold", "Mirabel", "Nicodemus", "Ottilie", "Percival",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """A document of `length` tokens, the longest question included, and how many of its people are asked about.

    The first `single` questions take one fact, the others two.
    """

    length: int
    questions: int = PEOPLE
    seed: int = 0
    single: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.questions <= PEOPLE:
            raise ValueError(f"{self.questions} questions about {PEOPLE} people; ask for 1 to {PEOPLE}")
        if not 0 <= self.single <= self.questions:
            raise ValueError(f"{self.single} of {self.questions} questions cannot be single; use 0 to {self.questions}")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and what is asked of it. A question's `start`, `end` and `depth` are those of its fact about the person;
    `towns` are where the numbers were said, question by question.
    """

    wanted: Wanted
    ids: tuple[int, ...]
    questions: tuple[Question, ...]
    towns: tuple[tuple[int, int, float], ...]
    encode: Encode

    def prompt(self, question: Question) -> list[int]:
        """The ids of the text and a question."""
        return [*self.ids, *question.ids]

    def options(self, question: Question) -> list[list[int]]:
        """The ids of the answer, then of the other towns or their numbers."""
        return [self.encode(f" {said}") for said in (question.answer, *question.decoys)]


def make(wanted: Wanted, encode: Encode, start: Sequence[int] = ()) -> Document:
    """A document of exactly `wanted.length` tokens; `start` are ids before all else, BOS for one, and count.

    Raises ValueError if the facts and a question alone are longer.
    """
    rng = random.Random(f"long-qa {wanted.seed}")
    people, towns = rng.sample(NAMES, PEOPLE), rng.sample(OWNERS, PEOPLE)
    numbers = [str(number) for number in rng.sample(range(*KEY), PEOPLE)]
    facts = [encode(f" {fact}") for fact in _facts(people, towns, numbers)]
    asked = [
        encode(f"\n\n{_single(person) if number < wanted.single else _question(person)}")
        for number, person in enumerate(people[: wanted.questions])
    ]
    room = wanted.length - len(start) - sum(map(len, facts)) - max(map(len, asked))
    if room < 0:
        why = f"{wanted.length} tokens do not hold the facts and a question, which take {wanted.length - room}"
        raise ValueError(f"{why}; ask for a longer document")
    depths = [rng.random() for _ in facts]
    ids, places = hidden(hay_of(room, encode, wanted.seed), facts, depths, list(start))
    questions = []
    for number, (begin, end, depth) in enumerate(places[: wanted.questions]):
        answers = towns if number < wanted.single else numbers
        wrong = tuple(other for other in answers if other != answers[number])
        questions.append(Question(tuple(asked[number]), answers[number], wrong, begin, end, depth))
    said = places[PEOPLE : PEOPLE + wanted.questions]
    return Document(wanted, tuple(ids), tuple(questions), tuple(said), encode)


def _facts(people: Sequence[str], towns: Sequence[str], numbers: Sequence[str]) -> Iterator[str]:
    """Where everyone lives, then every town's number."""
    for person, town in zip(people, towns, strict=True):
        yield f"{person} lives in the town of {town}."
    for town, number in zip(towns, numbers, strict=True):
        yield f"The secret number of the town of {town} is {number}."


def _question(person: str) -> str:
    where = f"the town where {person} lives is"
    return f"What is the secret number of the town where {person} lives? The secret number of {where}"


def _single(person: str) -> str:
    return f"Where does {person} live? {person} lives in the town of"
