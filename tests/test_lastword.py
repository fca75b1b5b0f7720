"""Last words: which tokens count, and what is right."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from rlkit.profiles.lastword import Passage, accuracy, read_passages

encode = tiny.tokenizer().encode
TEXTS = [("the cat sat on the", " mat"), ("a small model can still say", " something"), ("two bits are", " enough")]


def write(path: Path, lines: list[Any]) -> Path:
    data = "\n".join(json.dumps(line) for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def requests() -> list[Any]:
    return [{"request": {"context": context, "continuation": word}} for context, word in TEXTS]


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz"])
def test_the_target_is_the_last_word(name: str, tmp_path: Path) -> None:
    found = read_passages(write(tmp_path / name, requests()), encode, count=10)
    decode = tiny.tokenizer().decode
    assert sorted(decode(passage.ids[-passage.target :]) for passage in found) == sorted(word for _, word in TEXTS)
    assert len(read_passages(tmp_path / name, encode, count=2)) == 2


def test_a_word_that_merges_with_its_context_still_has_a_target() -> None:
    merged = {"ab": [7], "a": [5]}
    from rlkit.profiles.lastword import _passage

    assert _passage("a", "b", lambda text: merged[text]) == Passage((7,), 1)


def saying(tokens: dict[tuple[int, ...], int]) -> Any:
    """A model whose first choice after each known prefix is given; 0 elsewhere."""

    def logits(ids: np.ndarray) -> np.ndarray:
        found = np.zeros((*ids.shape, 16), dtype=np.float32)
        for row, line in enumerate(ids):
            for at in range(len(line)):
                found[row, at, tokens.get(tuple(line[: at + 1].tolist()), 0)] = 1
        return found

    return logits


def test_every_token_of_the_word_must_be_said() -> None:
    passages = [Passage((1, 2, 3, 4), 2), Passage((1, 2, 5), 1), Passage((9, 8, 7, 6, 5), 1)]
    assert accuracy(saying({(1, 2): 3, (1, 2, 3): 4, (9, 8, 7, 6): 5}), passages) == pytest.approx(2 / 3)
    assert accuracy(saying({(1, 2): 3}), passages) == 0
    assert accuracy(saying({(1, 2): 5}), passages) == pytest.approx(1 / 3)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2 is no request"):
        read_passages(write(tmp_path / "x.jsonl", [*requests()[:1], {"text": "no request"}]), encode, count=1)
    with pytest.raises(ValueError, match="no passages"):
        accuracy(saying({}), [])
