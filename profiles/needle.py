"""Needles in haystacks: how well a model finds a number that was said once, far back in a long text.

    case = make(Wanted(length=4096, depths=(0.5,)), encode, decode)
    found = by_likelihood(case, scorer)       # or by_generation(case, generate, decode)

The text is made of sentences of a small grammar, all different and without digits, drawn by a seed. Needles are put
between sentences; depth 0 is the beginning, 1 the end, right before the question. Lengths are exact in tokens: the
text's first sentence is cut at its beginning. Several needles have a question each behind the same text, so that a
scorer reads it once; a passkey is said twice in one needle, the easiest kind.

By likelihood a needle is found if its number is likelier than DECOYS others, those of the other needles first; by
generation, if the first number of the reply is the right one.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from rlkit.profiles.taskscore import Scorer

Encode = Callable[[str], list[int]]
"""Text to ids, without special tokens."""

Decode = Callable[[Sequence[int]], str]
Generate = Callable[[list[int], int], list[int]]
"""Prompt ids and the most new tokens -> new ids."""

DECOYS = 9
REPLY_TOKENS = 24
KEY = (10_000, 99_999)
STYLES = ("needle", "passkey")

TIMES = (
    "in the morning", "before noon", "late at night", "after the rain", "on market day", "that winter",
    "in early spring", "when the bells rang", "towards evening", "at low tide", "during the harvest",
    "on the way home", "after supper", "before the frost", "on a quiet afternoon", "when the fog lifted",
    "at first light", "in the heat of summer",
)  # fmt: skip
PEOPLE = (
    "the baker", "an old sailor", "the schoolteacher", "a travelling clockmaker", "the miller's daughter",
    "two brothers", "the doctor", "a young painter", "the ferryman", "the gardener", "a retired judge",
    "the blacksmith", "three students", "the librarian", "a shepherd", "the postman", "a singer from the coast",
    "the carpenter", "my aunt", "the new tenant", "a botanist", "the fisherman", "our neighbour", "the organist",
    "a woman with a grey dog", "the night watchman",
)  # fmt: skip
DEEDS = (
    "repaired", "carried", "painted", "forgot", "found", "described", "borrowed", "hid", "admired", "sold", "drew",
    "polished", "searched for", "wrapped", "counted", "lost sight of", "wrote about", "asked after", "praised",
    "returned", "unpacked", "dreamed of", "complained about", "gave away", "waited for", "measured", "remembered",
    "traded",
)  # fmt: skip
QUALITIES = (
    "a broken", "a small", "the heavy", "an unfinished", "the blue", "a wooden", "the last", "an expensive",
    "a plain", "the oldest", "a dusty", "the missing", "a borrowed", "the narrow", "a beautiful", "the wrong",
    "an empty", "a warm",
)  # fmt: skip
THINGS = (
    "lantern", "bicycle", "violin", "basket of pears", "map of the valley", "kettle", "letter", "rowing boat", "coat",
    "chess set", "telescope", "loaf of bread", "ladder", "portrait", "wheelbarrow", "umbrella", "clock", "saddle",
    "bundle of reeds", "glass jar", "travel diary", "bridge", "fence", "sewing machine", "wool blanket",
    "weather vane",
)  # fmt: skip
WHERE = (
    "behind the church", "near the harbour", "in the attic", "beside the canal", "under the chestnut trees",
    "at the inn", "across the square", "on the hill", "in the greenhouse", "by the old mill", "along the river",
    "outside the station", "in the kitchen", "at the edge of the forest", "below the cliffs",
    "in the back of the shop", "next to the well",
)  # fmt: skip
TAILS = (
    "and nobody minded", "though the road was long", "because the wind had turned", "and the children laughed",
    "while the kettle boiled", "without saying why", "as people there often do",
    "and went on talking about the weather", "but the gate was already closed", "and that was the end of it",
    "so the others had to wait", "for the second time", "as if it were a holiday", "and the dog followed",
    "until the lamps were lit", "which surprised everyone",
)  # fmt: skip
SHAPES = (
    "{time}, {who} {did} {which} {thing} {where}, {tail}.",
    "{who} {did} {which} {thing} {where} {time}, {tail}.",
    "{where}, {time}, {who} {did} {which} {thing}.",
    "{who} {did} {which} {thing} and, {time}, {also} {other} {where}.",
)
OWNERS = (
    "Marlow", "Tessaly", "Orwick", "Hadrian's Gate", "Pellworm", "Quintrell", "Ysolde", "Brackenfell", "Dunmere",
    "Fairholt", "Greywater", "Lindisholm", "Nettlecombe", "Rookhaven", "Silverley", "Thornbury", "Umberfield",
    "Vantry", "Wexcombe",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """A case: `length` tokens of text and question together, and at which depth (0 to 1) each needle lies.

    Where several needles' questions differ in length, it is the longest that makes up `length`.
    """

    length: int
    depths: tuple[float, ...] = (0.5,)
    style: str = "needle"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style {self.style!r} is no kind of needle; use {', '.join(STYLES)}")
        most = 1 if self.style == "passkey" else len(OWNERS)
        if not 1 <= len(self.depths) <= most:
            raise ValueError(
                f"{len(self.depths)} depths for style {self.style!r}; give 1 to {most}, one for each needle"
            )
        for depth in self.depths:
            if not (math.isfinite(depth) and 0 <= depth <= 1):
                raise ValueError(f"depth {depth} is no place in a text; give a share of it, 0 to 1")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked behind the text, the number it asks for, and others that are wrong.

    The needle is the text's ids `start` to `end`; `depth` is where it came to lie, between two sentences.
    """

    ids: tuple[int, ...]
    answer: str
    decoys: tuple[str, ...]
    start: int
    end: int
    depth: float


@dataclass(frozen=True, slots=True)
class Case:
    """A text and what is asked of it; `options` gives ids of an answer, with the blank before it."""

    wanted: Wanted
    ids: tuple[int, ...]
    questions: tuple[Question, ...]
    encode: Encode

    def prompt(self, question: Question) -> list[int]:
        """The ids of the text and a question."""
        return [*self.ids, *question.ids]

    def options(self, question: Question) -> list[list[int]]:
        """The ids of the answer, then of the decoys."""
        return [self.encode(f" {number}") for number in (question.answer, *question.decoys)]


class Asking(Protocol):
    """A text and questions about it, a `Case` or another: what `by_likelihood` needs."""

    @property
    def questions(self) -> tuple[Question, ...]:
        """What is asked, each with DECOYS wrong answers."""

    def prompt(self, question: Question) -> list[int]:
        """The ids of the text and a question."""

    def options(self, question: Question) -> list[list[int]]:
        """The ids of the answer, then of the decoys."""


@dataclass(frozen=True, slots=True)
class Found:
    """Whether each needle was found; by likelihood, each answer's log-probability, by generation the replies."""

    found: tuple[bool, ...]
    logprobs: tuple[float, ...] = ()
    replies: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of the needles that were found."""
        return sum(self.found) / len(self.found)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"share": self.share, "found": self.found, "logprobs": self.logprobs, "replies": self.replies}


def make(wanted: Wanted, encode: Encode, start: Sequence[int] = ()) -> Case:
    """A case of exactly `wanted.length` tokens; `start` are ids before all else, BOS for one, and count.

    Raises ValueError if needles and questions alone are longer.
    """
    rng = random.Random(f"needle {wanted.seed}")
    owners = rng.sample(OWNERS, len(wanted.depths))
    keys = [str(key) for key in rng.sample(range(*KEY), len(owners) + DECOYS)]
    said = [_said(wanted.style, owner, key) for owner, key in zip(owners, keys, strict=False)]
    needles = [encode(f" {needle}") for needle, _question in said]
    asked = [encode(f"\n\n{question}") for _needle, question in said]
    room = wanted.length - len(start) - sum(map(len, needles)) - max(map(len, asked))
    if room < 0:
        why = f"{wanted.length} tokens do not hold the needles and their questions, which take {wanted.length - room}"
        raise ValueError(f"{why}; ask for a longer text or fewer needles")
    hay = hay_of(room, encode, wanted.seed)
    ids, places = hidden(hay, needles, wanted.depths, list(start))
    questions = []
    for number, (begin, end, depth) in enumerate(places):
        wrong = [key for key in keys if key != keys[number]][:DECOYS]
        questions.append(Question(tuple(asked[number]), keys[number], tuple(wrong), begin, end, depth))
    return Case(wanted, tuple(ids), tuple(questions), encode)


def _said(style: str, owner: str, key: str) -> tuple[str, str]:
    """A needle and its question, which ends where the number follows."""
    if style == "passkey":
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        return needle, "What is the pass key? The pass key is"
    what = f"he secret number of {owner} is"
    return f"T{what} {key}.", f"What is the secret number of {owner}? T{what}"


def hidden(
    hay: Sequence[Sequence[int]], needles: Sequence[Sequence[int]], depths: Sequence[float], ids: list[int]
) -> tuple[list[int], list[tuple[int, int, float]]]:
    """`ids`, then the hay with the needles in it; of each needle begin, end, and the share of the hay before it.

    `depths` says where each needle belongs, as a share of the hay; it comes to lie between two sentences.
    """
    ends = [0, *accumulate(map(len, hay))]  # where needles may lie, in tokens of hay
    at = [_nearest(ends, depth * ends[-1]) for depth in depths]
    places: dict[int, tuple[int, int, float]] = {}
    for number in range(len(hay) + 1):
        for needle in sorted((n for n, place in enumerate(at) if place == number), key=lambda n: depths[n]):
            share = ends[number] / ends[-1] if ends[-1] else depths[needle]
            places[needle] = (len(ids), len(ids) + len(needles[needle]), share)
            ids += needles[needle]
        ids += hay[number] if number < len(hay) else ()
    return ids, [places[needle] for needle in range(len(needles))]


def _nearest(ends: Sequence[int], wanted: float) -> int:
    """The number of the end nearest to a place."""
    right = min(bisect_left(ends, wanted), len(ends) - 1)
    left = max(right - 1, 0)
    return left if wanted - ends[left] < ends[right] - wanted else right


def hay_of(count: int, encode: Encode, seed: int) -> list[list[int]]:
    """Sentences of exactly `count` ids; the first has lost its beginning, and those before it are gone."""
    found: list[list[int]] = []
    total = 0
    lines = sentences(seed)
    while total < count:
        ids = encode(f" {next(lines)}")
        found.append(ids)
        total += len(ids)
    excess = total - count
    while found and excess >= len(found[0]):  # the last may be longer than the first
        excess -= len(found.pop(0))
    return [found[0][excess:], *found[1:]] if found else []


def sentences(seed: int = 0) -> Iterator[str]:
    """Sentences without digits, all different, as many as one likes, the same for the same seed."""
    rng = random.Random(f"hay {seed}")
    told: set[str] = set()
    while True:
        line = rng.choice(SHAPES).format(
            time=rng.choice(TIMES),
            who=rng.choice(PEOPLE),
            did=rng.choice(DEEDS),
            which=rng.choice(QUALITIES),
            thing=rng.choice(THINGS),
            where=rng.choice(WHERE),
            tail=rng.choice(TAILS),
            also=rng.choice(DEEDS),
            other=f"{rng.choice(QUALITIES)} {rng.choice(THINGS)}",
        )
        if line not in told:
            told.add(line)
            yield line[0].upper() + line[1:]


def by_likelihood(case: Asking, scorer: Scorer) -> Found:
    """Which needles' numbers are likelier than all decoys."""
    pairs = [(case.prompt(question), ids) for question in case.questions for ids in case.options(question)]
    logprobs = [said.logprob for said in scorer.score(pairs)]
    each = 1 + DECOYS
    rows = [logprobs[start : start + each] for start in range(0, len(logprobs), each)]
    return Found(tuple(row[0] > max(row[1:]) for row in rows), logprobs=tuple(row[0] for row in rows))


def by_generation(case: Case, generate: Generate, decode: Decode) -> Found:
    """Which needles' numbers are the first number of the model's reply."""
    replies = [decode(generate(case.prompt(question), REPLY_TOKENS)) for question in case.questions]
    numbers = [re.search(r"\d+", reply) for reply in replies]
    right = (
        number is not None and number[0] == question.answer
        for number, question in zip(numbers, case.questions, strict=True)
    )
    return Found(tuple(right), replies=tuple(replies))
