"""Text to ids for the harness: trailing spaces, special tokens, the first token, and texts in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

import tiny
from rlkit.apps.lmtokens import Tokens, windows

BOS, EOS = 1, 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def adding(tmp_path: Path) -> Path:
    """A tokenizer that begins every text with its BOS, and that somebody saved with a limit."""
    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)]
    )
    made.backend_tokenizer.enable_truncation(4)
    made.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    written = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))


def plain(text: str) -> list[int]:
    """Ids without any special token added."""
    return [int(token) for token in tiny.tokenizer().encode(text)]


def test_spaces_at_the_end_of_a_context_go_to_the_continuation(folder: Path) -> None:
    tokens = Tokens(folder, EOS)
    assert tokens.pair("the cat sat ", "on") == tokens.pair("the cat sat", " on")
    assert tokens.pair("the cat sat", " on") == (plain("the cat sat"), plain(" on"))
    assert tokens.pair("the cat\n ", "sat") == (plain("the cat"), plain("the cat\n sat")[len(plain("the cat")) :])


def test_both_are_encoded_together_and_cut_where_the_context_ends(folder: Path) -> None:
    tokens = Tokens(folder, EOS)
    before, after = tokens.pair("the d", "og sat on")
    assert before == plain("the d")
    assert after == plain("the dog sat on")[len(before) :] != plain("og sat on")


def test_a_continuation_that_melts_into_its_context_is_encoded_alone(folder: Path) -> None:
    tokens = Tokens(folder, EOS)
    assert len(plain("the weathe")) == len(plain("the weather"))
    assert tokens.pair("the weathe", "r") == (plain("the weathe"), plain("r"))


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("", "the cat", ([BOS], "the cat")),
        ("  ", "the cat", ([BOS], "  the cat")),
        ("", "<|im_start|>the", ([BOS], "the")),
        ("the", "", ("the", "")),
        ("", "", ([BOS], "")),
    ],
)
def test_there_is_always_a_context(folder: Path, context: str, continuation: str, expected: tuple[Any, str]) -> None:
    before, after = expected
    known = plain(before) if isinstance(before, str) else before
    assert Tokens(folder, EOS).pair(context, continuation) == (known, plain(after))


def test_the_first_token_alone_is_judged_after_itself(folder: Path) -> None:
    assert Tokens(folder, EOS).pair("", "<|im_start|>") == ([BOS], [BOS])


def test_a_first_token_is_added_where_the_tokenizer_does(adding: Path) -> None:
    tokens = Tokens(adding, EOS)
    assert tokens.encode("the cat sat on the mat") == [BOS, *plain("the cat sat on the mat")]
    assert tokens.encode("<|im_start|>the") == [BOS, *plain("the")]
    assert tokens.pair("the cat", " sat") == ([BOS, *plain("the cat")], plain(" sat"))
    assert tokens.pair("", "the cat") == ([BOS], plain("the cat"))
    assert Tokens(adding, EOS, add_bos=False).encode("the") == plain("the")


def test_a_first_token_is_added_where_asked_for(folder: Path) -> None:
    tokens = Tokens(folder, EOS, add_bos=True)
    assert tokens.encode("the cat") == [BOS, *plain("the cat")]
    assert tokens.encode("<|im_start|>the") == [BOS, *plain("the")]
    assert tokens.encode("the", special=False) == plain("the")


def test_without_a_first_token_texts_come_after_the_last_one(folder: Path) -> None:
    rewrite(folder, bos_token=None)
    assert (Tokens(folder, 0).prefix, Tokens(folder, 0).bos) == (EOS, None)
    rewrite(folder, eos_token=None)
    assert Tokens(folder, 0).prefix == 0
    assert Tokens(folder, 0, prefix=7).prefix == 7
    with pytest.raises(ValueError, match=r"add_bos_token=True, but the tokenizer .* has no BOS; leave it out"):
        Tokens(folder, 0, add_bos=True)


def test_special_tokens_may_be_named_at_length(folder: Path) -> None:
    rewrite(folder, bos_token={"content": "<|endoftext|>", "special": True})
    tokens = Tokens(folder, EOS)
    assert tokens.prefix == 0
    assert tokens.special_id("<|im_end|>") == EOS
    assert tokens.special_id("the") is None
    assert tokens.decode([*plain("the cat"), EOS, BOS]) == "the cat"


def test_the_name_changes_with_tokenizer_and_template(folder: Path) -> None:
    before = Tokens(folder, EOS)
    assert before.chat_template == tiny.CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    after = Tokens(folder, EOS)
    assert after.chat_template == "{{ messages }}"
    assert before.name == after.name  # read when asked for
    (folder / "chat_template.jinja").unlink()
    assert Tokens(folder, EOS).chat_template == ""
    assert Tokens(folder, EOS).name.startswith(folder.name)


def test_damaged_files_and_wrong_ids_are_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match="prefix_token_id=512 is no id of the tokenizer"):
        Tokens(folder, EOS, prefix=512)
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer .*; export the bundle again") as caught:
        Tokens(folder, EOS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "length", "parts"),
    [
        (0, 4, []),
        (3, 4, [([9], [0, 1, 2])]),
        (4, 4, [([9], [0, 1, 2, 3])]),
        (6, 4, [([9], [0, 1, 2, 3]), ([1, 2, 3], [4, 5])]),
        (9, 4, [([9], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([4, 5, 6, 7], [8])]),
    ],
)
def test_parts_hold_each_token_once_and_as_much_before_it_as_fits(
    count: int, length: int, parts: list[tuple[list[int], list[int]]]
) -> None:
    assert list(windows(range(count), 9, length)) == parts
