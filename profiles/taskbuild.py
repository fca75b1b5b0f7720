"""Items of benchmarks that come as tables, not as requests (MMLU, COPA), and as messages that ask for a reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from rlkit.profiles.arrow import read_rows
from rlkit.profiles.taskitem import Item

Members = dict[str, bytes]
"""Files of the wheel by name, in order."""

LETTERS = "ABCDEFGHIJ"
NOTHING_ASKED = "Answer:"
EXAMPLES = 5
SOLVE = 'Solve this problem step by step. End with a line "The answer is N." where N is the number.'
CHOOSE = 'Answer this multiple choice question about {}. Reply with "The answer is X." where X is the right letter.'


def mmlu(members: Members) -> Iterator[Item]:
    """Every question with its choices as continuations."""
    for number, row in _numbered(members):
        choices = tuple(f" {choice}" for choice in row["choices"])
        context = f"Question: {row['question'].strip()}\nAnswer:"
        yield Item(number, context, choices, row["answer"], NOTHING_ASKED, answer=LETTERS[row["answer"]])


def mmlu_letters(members: Members) -> Iterator[Item]:
    """Every question with lettered choices, after five of its subject (Hendrycks et al. 2021): the letter follows."""
    examples: dict[str, list[dict[str, Any]]] = {}
    for name, data in members.items():
        if "/dev/" in name:
            for row in read_rows(data):
                examples.setdefault(row["subject"], []).append(row)
    for number, row in _numbered({name: data for name, data in members.items() if "/dev/" not in name}):
        subject = row["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        shown = examples.get(row["subject"], [])[:EXAMPLES]
        worked = "".join(f"{_lettered(one)} {LETTERS[one['answer']]}\n\n" for one in shown)
        letters = tuple(f" {letter}" for letter in LETTERS[: len(row["choices"])])
        answer = LETTERS[row["answer"]]
        yield Item(number, head + worked + _lettered(row), letters, row["answer"], answer=answer)


def _lettered(row: dict[str, Any], end: Sequence[str] = ("Answer:",)) -> str:
    lines = [row["question"].strip(), *(f"{LETTERS[at]}. {choice}" for at, choice in enumerate(row["choices"]))]
    return "\n".join([*lines, *end])


def mmlu_asked(members: Members) -> Iterator[Item]:
    """Every question with lettered choices as a message, without examples."""
    for number, row in _numbered(members):
        message = f"{CHOOSE.format(row['subject'].replace('_', ' '))}\n\n{_lettered(row, ())}"
        choices = tuple(f" {letter}" for letter in LETTERS[: len(row["choices"])])
        yield Item(number, message, choices, row["answer"], answer=LETTERS[row["answer"]])


def gsm8k_asked(items: Iterable[Item]) -> Iterator[Item]:
    """Every problem as a message: what stands between the last "Question:" and "Answer:", without the examples."""
    for item in items:
        problem = item.context.rpartition("Question:")[2].rpartition("Answer:")[0].strip()
        yield replace(item, context=f"{SOLVE}\n\n{problem}")


def copa(members: Members) -> Iterator[Item]:
    """A premise without its full stop, because or therefore, and two ways to go on."""
    for number, row in _numbered(members):
        link = "because" if row["question"] == "cause" else "therefore"
        choices = tuple(f" {_small(row[name])}" for name in ("choice1", "choice2"))
        yield Item(number, f"{row['premise'].strip()[:-1]} {link}", choices, row["label"], link)


def _small(text: str) -> str:
    return text[:1].lower() + text[1:]


def _numbered(members: Members) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with an id: the subject, where they have one, and their number in it."""
    for data in members.values():
        rows: Sequence[dict[str, Any]] = read_rows(data)
        for number, row in enumerate(rows):
            subject = row.get("subject")
            yield f"{subject}/{number}" if subject else str(number), row


BUILDERS: dict[str, Callable[[Members], Iterator[Item]]] = {
    "mmlu": mmlu,
    "mmlu-mc": mmlu_letters,
    "mmlu-gen": mmlu_asked,
    "copa": copa,
}
REWORDED: dict[str, Callable[[Iterable[Item]], Iterator[Item]]] = {"gsm8k-gen": gsm8k_asked}
"""What makes items of tables, and of the items of request files, by name."""
