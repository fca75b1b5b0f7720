"""Conversations: prompts by template, memory, and what is dropped when the context is full."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

import tiny
from rlkit.export.build import export_bundle
from rlkit.runtime.chat import Chat, Message, fit, prompt_ids, speed
from rlkit.runtime.session import Sampling, Session, Token, open_bundle


class Echo:
    """A model without weights: one id per character, and it answers `reply`."""

    def __init__(self, context_length: int = 200, reply: str = "yes!", adapters: tuple[str, ...] = ()) -> None:
        self.context_length = context_length
        self.reply = reply
        self.adapters = adapters
        self.adapted: list[str | None] = []
        self.prompts: list[str] = []
        self.sampled: list[tuple[float, int, float, int | None]] = []

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        return "".join(f"{message['role'][0]}:{message['content']}\n" for message in messages) + "a:"

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None,
        adapter: str | None,
    ) -> Generator[Token, None, None]:
        self.prompts.append("".join(chr(token) for token in prompt_ids))
        self.sampled.append((temperature, top_k, top_p, seed))
        self.adapted.append(adapter)
        for index, letter in enumerate(self.reply[:max_new_tokens]):
            yield Token(ord(letter), letter, 0.5 if index == 0 else 0.25, index)


def said(talk: Chat, text: str, **options: int) -> str:
    return "".join(token.text for token in talk.reply(text, **options))


def test_a_conversation_is_remembered() -> None:
    model = Echo()
    talk = Chat(model, system="be brief")
    assert said(talk, "one") == "yes!"
    assert said(talk, "two") == "yes!"
    assert model.prompts == ["s:be brief\nu:one\na:", "s:be brief\nu:one\na:yes!\nu:two\na:"]
    assert talk.messages[-1] == Message("assistant", "yes!")
    talk.clear()
    assert talk.messages == [Message("system", "be brief")]


def test_speed_of_the_last_reply() -> None:
    talk = Chat(Echo())
    said(talk, "one")
    assert talk.last_speed == speed(8, [0.5, 0.25, 0.25, 0.25])
    assert talk.last_speed is not None
    assert talk.last_speed.first_token_seconds == 0.5
    assert talk.last_speed.tokens_per_s == 4.0
    assert "4.0 tokens/s" in str(talk.last_speed)
    assert str(speed(3, [])) == "3 prompt tokens, 0 new"
    assert speed(3, [0.5]).tokens_per_s is None


def test_sampling_reaches_the_model() -> None:
    model = Echo()
    list(Chat(model).reply("x", sampling=Sampling(0.7, top_k=3, top_p=0.9, seed=4)))
    assert model.sampled == [(0.7, 3, 0.9, 4)]


def test_the_adapter_changes_between_replies_and_the_conversation_stays() -> None:
    model = Echo(adapters=("french", "poem"))
    talk = Chat(model, adapter="poem")
    said(talk, "one")
    talk.adapter = "french"
    said(talk, "two")
    with pytest.raises(ValueError, match="no adapter 'german' here; there are french, poem"):
        talk.adapter = "german"
    assert talk.adapter == "french"
    talk.adapter = None
    said(talk, "three")
    assert model.adapted == ["poem", "french", None]
    assert model.prompts[-1].startswith("u:one\na:yes!\nu:two\n")
    with pytest.raises(ValueError, match="no adapter 'poem' here; there are none"):
        Chat(Echo(), adapter="poem")


def test_a_stopped_reply_keeps_what_was_said() -> None:
    talk = Chat(Echo())
    tokens = talk.reply("one")
    assert next(tokens).text + next(tokens).text == "ye"
    tokens.close()
    assert talk.messages == [Message("user", "one"), Message("assistant", "ye")]


def test_the_oldest_exchange_goes_first() -> None:
    model = Echo(context_length=60)
    system, history = Message("system", "s"), []
    for index in range(4):
        history += [Message("user", f"question {index}"), Message("assistant", "answer")]
    messages = [system, *history, Message("user", "last")]
    kept, ids = fit(model, messages, reply_tokens=10)
    assert len(ids) <= 50
    assert kept == [system, *history[-2:], messages[-1]]
    assert ids == prompt_ids(model, kept)


def test_room_for_the_reply_is_at_most_a_quarter() -> None:
    model = Echo(context_length=40)
    kept, _ids = fit(model, [Message("user", "a" * 9), Message("assistant", "b"), Message("user", "c")], 1000)
    assert len(kept) == 3


def test_a_message_that_never_fits_is_refused_and_forgotten() -> None:
    talk = Chat(Echo(context_length=20))
    said(talk, "hi")
    before = list(talk.messages)
    with pytest.raises(ValueError, match="the message has 35 tokens with its template, but the context holds 20"):
        talk.reply("x" * 30)
    assert talk.messages == before


def test_roles_are_checked() -> None:
    with pytest.raises(ValueError, match="role 'robot'"):
        Message("robot", "beep")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    root = tmp_path_factory.mktemp("models")
    return open_bundle(export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle"))


MESSAGES = [
    Message("system", "be kind"),
    Message("user", 'say "hé" \\ \n now'),
    Message("assistant", "ok"),
    Message("user", "go"),
]


def test_the_template_is_the_models_own(session: Session, tmp_path: Path) -> None:
    expected = tiny.tokenizer().apply_chat_template(
        [m.to_json() for m in MESSAGES], tokenize=False, add_generation_prompt=True
    )
    assert session.apply_template([m.to_json() for m in MESSAGES]) == expected
    assert prompt_ids(session, MESSAGES) == tiny.tokenizer().encode(expected)


def test_a_real_conversation_stays_within_the_context(session: Session) -> None:
    talk = Chat(session)
    for _turn in range(6):
        list(talk.reply("the cat sat on the mat and looked at the dog " * 3, max_new_tokens=40))
    assert 2 <= len(talk.messages) < 12
    with pytest.raises(ValueError, match="the context holds 256"):
        talk.reply("weather " * 400)
