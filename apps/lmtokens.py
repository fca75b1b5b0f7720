"""Text to ids as lm-evaluation-harness's class for Hugging Face models has them, from a bundle's own tokenizer files.

A context and its continuation are encoded together and cut where the context alone ends, after the context's trailing
whitespace has gone over to the continuation. No beginning-of-sequence token is added unless the tokenizer adds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlkit.recover.source import read_json

Ids = list[int]


class Tokens:
    """The tokenizer of a bundle, through the library that Hugging Face's own classes are made of.

    `add_bos` None does what the tokenizer does, True and False overrule it. `prefix` is the id before a text that has
    nothing before it; None means the tokenizer's BOS, where it has none its EOS, else `stop`. Raises ValueError where
    the tokenizer is none or the prefix is no id of it.
    """

    def __init__(self, folder: Path, stop: int, *, add_bos: bool | None = None, prefix: int | None = None) -> None:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is no tokenizer ({error}); export the bundle again") from error
        self._tokenizer.no_truncation()  # settings of whoever saved it; no reader of models obeys them
        self._tokenizer.no_padding()
        beside = folder / "tokenizer_config.json"
        self._config: dict[str, Any] = read_json(beside) if beside.is_file() else {}
        self._folder, self._add_bos = folder, add_bos
        self.bos = self._named("bos_token")
        eos = self._named("eos_token")
        self.eos = stop if eos is None else eos
        self.prefix = prefix if prefix is not None else self.eos if self.bos is None else self.bos
        self._opening = self._text_of(self.prefix)
        if add_bos and self.bos is None:
            raise ValueError(f"add_bos_token=True, but the tokenizer of {folder} has no BOS; leave it out")

    @property
    def name(self) -> str:
        """Names this tokenizer and its chat template, for caches of what was made with them."""
        parts = [(self._folder / "tokenizer.json").read_bytes(), self.chat_template.encode()]
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
        return f"{self._folder.resolve().name}-{digest}"

    @property
    def chat_template(self) -> str:
        """The bundle's chat template, empty where it has none."""
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        written = self._config.get("chat_template")
        return written if isinstance(written, str) else ""

    def encode(self, text: str, special: bool | None = None) -> Ids:
        """Text to ids; `special` None adds what the tokenizer adds, unless the text begins with the prefix already."""
        if special is None:
            special = not text.startswith(self._opening) and self._add_bos is not False
            forced = special and self._add_bos is True
        else:
            forced = False
        ids: Ids = self._tokenizer.encode(text, add_special_tokens=special).ids
        if forced and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def special_id(self, text: str) -> int | None:
        """The id of a special token by its text; None for other text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return next((token for token, known in added.items() if known.special and known.content == text), None)

    def pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """A context and what follows it as ids; there is always a context.

        The continuation is empty only where its text is: one that melts into the context's last token, so that nothing
        of it is left behind the cut, is encoded by itself.
        """
        if not context:
            ids = self.encode(continuation, special=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] and ids[1:] else ([self.prefix], ids)
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        before = self.encode(bare)
        after = self.encode(bare + continuation)[len(before) :]
        if not after and continuation:
            after = self.encode(continuation, special=False)
        return before or [self.prefix], after

    def windows(self, text: str, length: int) -> Iterator[tuple[Ids, Ids]]:
        """A text in parts that fit a model of `length` tokens: (context, part), each token in one part.

        The first part comes after the prefix alone, the last one has as much before it as fits.
        """
        ids = self.encode(text)
        yield from windows(ids, self.prefix, length)

    def _named(self, key: str) -> int | None:
        """The id of a token that tokenizer_config.json names."""
        written = self._config.get(key)
        content = written.get("content") if isinstance(written, dict) else written
        return None if not isinstance(content, str) else self._tokenizer.token_to_id(content)

    def _text_of(self, token: int) -> str:
        if not 0 <= token < self._tokenizer.get_vocab_size():
            raise ValueError(f"prefix_token_id={token} is no id of the tokenizer of {self._folder}; leave it out")
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


def windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[Ids, Ids]]:
    """Parts of ids (T,) of at most `length`, each with the ids before it: together at most `length` + 1."""
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        yield list(ids[max(end - length - 1, 0) : start]) or [prefix], list(ids[start:end])
