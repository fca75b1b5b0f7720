"""Held-out text: reading its formats, choosing windows by seed, padding."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from rlkit.profiles.text import BUILTIN, Batch, batches, read_documents, windows


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_bytes("\ufeffein Wört\n\nzwei".encode())
    assert read_documents(path) == ["ein Wört\n\nzwei"]


def test_a_form_feed_ends_a_document(tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_text("one\n\f\ntwo\n\n \ftwo and a half\n\f\n\n\f")
    assert read_documents(path) == ["one", "two\n\n ", "two and a half"]


def test_the_built_in_text_is_varied_and_enough_for_any_tokenizer() -> None:
    documents = read_documents(BUILTIN)
    assert len(documents) == len(set(documents)) >= 15
    words = sum(len(document.split()) for document in documents)
    assert words >= 4000  # a token is a word at most, so every tokenizer finds its 4,000
    assert all(document.isascii() and document == document.strip("\n\f") for document in documents[:-1])
    assert 20_000 <= BUILTIN.stat().st_size <= 30_000
    together = " ".join(documents)
    assert all(mark in together for mark in ("def ", "while ", "12 x 12 = 144", "Dear ", '"You said', "1. "))
    assert sum(len(window) - 1 for window in windows(documents, letters, min_tokens=4000)) >= 4000


def test_json_lines_hold_text_or_requests(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "one"}),
        json.dumps({"request": {"context": "two and", "continuation": " three"}, "idx": 0}),
        "",
        json.dumps({"request": {"context": "alone\u2028"}}),
        json.dumps({"text": "  "}),
    ]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text("\n".join(lines))
    packed.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert read_documents(plain) == read_documents(packed) == ["one", "two and three", "alone\u2028"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.bin", b"x", "no text that can be read"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', "line 2 is not"),
        ("a.jsonl", b"{", "line 1 is not"),
        ("a.jsonl.gz", b"plain", "not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 50, mtime=0)[:-12], "not a complete gzip file"),
    ],
)
def test_bad_files_are_named_with_a_remedy(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_documents(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no text file .*none\.txt"):
        read_documents(tmp_path / "none.txt")


def test_windows_reach_the_asked_number_and_depend_on_the_seed_alone() -> None:
    documents = ["abcdefg", "hi", "j", "klmno"]
    chosen = windows(documents, letters, min_tokens=9, max_length=4, seed=1)
    assert chosen == windows(documents, letters, min_tokens=9, max_length=4, seed=1)
    assert sum(len(window) - 1 for window in chosen) >= 9
    assert all(2 <= len(window) <= 4 for window in chosen)
    drawn = {str(windows(documents, letters, min_tokens=1, max_length=4, seed=seed)) for seed in range(20)}
    assert len(drawn) > 1


def test_a_long_document_becomes_windows_without_a_lonely_last_token() -> None:
    assert windows(["abcdefg"], letters, min_tokens=4, max_length=3) == [letters("abc"), letters("def")]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="has 2 tokens to predict, fewer than 9"):
        windows(["abc", "d"], letters, min_tokens=9)
    with pytest.raises(ValueError, match="windows of 1"):
        windows(["abc"], letters, min_tokens=1, max_length=1)


def test_batches_are_sorted_padded_on_the_right_and_bounded() -> None:
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]
    made = batches(rows, max_ids=6, pad=0)
    assert [batch.ids.tolist() for batch in made] == [[[6, 7, 8, 9]], [[10, 11, 0], [1, 2, 3]], [[4, 5]]]
    assert [batch.lengths.tolist() for batch in made] == [[4], [2, 3], [2]]
    assert sum(batch.predicted for batch in made) == 3 + 3 + 1
    assert all(batch.ids.dtype == np.int64 for batch in made)


def test_lengths_must_fit_the_rows() -> None:
    with pytest.raises(ValueError, match="do not fit rows of 3 ids"):
        Batch(np.zeros((1, 3), np.int64), np.array([4]))
