"""Conversations: prompts by template, memory, and what is dropped when the context is full."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from rlkit.export.build import export_bundle
from rlkit.runtime.chat import Chat, Manner, Message, Piece, Speed, fit, prompt_ids, speed
from rlkit.runtime.request import (
    Event,
    Grammar,
    Guidance,
    Logprob,
    Reason,
    Request,
    Sampling,
)
from rlkit.runtime.session import Session, open_bundle
from rooms import Echo


def said(talk: Chat, text: str, manner: Manner | None = None) -> str:
    return talk.answer(text, manner)


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
    assert talk.last is not None
    assert talk.last.speed == speed(8, [0.5, 0.25, 0.25, 0.25]) == Speed(8, 4, 0.5, 4.0)
    assert "4.0 tokens/s" in str(talk.last.speed)
    assert talk.context_tokens == 12
    said(talk, "two")
    assert talk.last.speed.reused_tokens == 8
    assert "(8 reused)" in str(talk.last.speed)
    assert str(speed(3, [])) == "3 prompt tokens, 0 new"
    assert speed(3, [0.5]).tokens_per_s is None


def test_the_manner_reaches_the_model() -> None:
    model = Echo()
    shape = Guidance(Grammar.REGEX, "y.*")
    sampling = Sampling(0.7, top_k=3, top_p=0.9, min_p=0.1, seed=4)
    list(Chat(model).reply("x", Manner(9, sampling, ("END",), shape, 2)))
    asked = model.requests[0]
    assert (asked.max_new_tokens, asked.sampling, asked.stop, asked.guidance) == (9, sampling, ("END",), shape)
    assert asked.logprobs == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"stop": ("",)}, "stop strings"),
        ({"logprobs": 21}, "logprobs = 21"),
    ],
)
def test_a_manner_that_no_request_takes_is_refused_at_once(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Manner(**changes)


def test_the_reply_is_kept_with_its_end_and_logprobs() -> None:
    talk = Chat(Echo())
    said(talk, "one", Manner(3, logprobs=1))
    assert talk.last is not None
    assert (talk.last.text, talk.last.reason) == ("yes", Reason.LENGTH)
    assert talk.last.logprobs[0] == Logprob(ord("y"), -0.5, ((ord("y"), -0.5),))
    said(talk, "two")
    assert talk.last.reason is Reason.STOP and talk.last.logprobs == ()


def test_another_reply_takes_the_place_of_the_last() -> None:
    model = Echo()
    talk = Chat(model)
    with pytest.raises(ValueError, match="nothing has been said yet"):
        talk.retry()
    said(talk, "one")
    model.reply = "no"
    for _again in range(2):
        list(talk.retry(Manner(sampling=Sampling(seed=7))))
    assert talk.messages == [Message("user", "one"), Message("assistant", "no")]
    assert model.prompts == ["u:one\na:"] * 3
    assert [(asked.sampling.temperature, asked.sampling.seed) for asked in model.requests[1:]] == [(0.7, 8), (0.7, 9)]
    said(talk, "two")
    list(talk.retry(Manner(sampling=Sampling(0.2))))
    assert model.requests[-1].sampling == Sampling(0.2)


def test_a_failed_retry_leaves_the_reply_there_is() -> None:
    class Failing(Echo):
        def _events(self, request: Request, reused: int) -> Generator[Event, None, None]:
            if len(self.requests) > 1:
                raise RuntimeError("no memory")
            yield from super()._events(request, reused)

    talk = Chat(Failing())
    said(talk, "one")
    before = talk.messages
    with pytest.raises(RuntimeError, match="no memory"):
        list(talk.retry())
    with pytest.raises(RuntimeError, match="no memory"):
        list(talk.reply("two"))
    assert talk.messages == before


def test_undo_forgets_the_last_exchange() -> None:
    talk = Chat(Echo(), system="s")
    said(talk, "one")
    said(talk, "two")
    assert talk.undo() == "two"
    assert [message.content for message in talk.messages] == ["s", "one", "yes!"]
    assert talk.undo() == "one"
    with pytest.raises(ValueError, match="nothing to undo"):
        talk.undo()
    assert talk.messages == [Message("system", "s")]


def test_thoughts_are_told_apart_and_not_sent_back() -> None:
    model = Echo(reply="<think>\nhm <b>\n</think>\n\nIt is so.")
    talk = Chat(model)
    pieces = [event for event in talk.reply("why") if isinstance(event, Piece)]
    assert "".join(piece.text for piece in pieces if piece.thought) == "\nhm <b>\n"
    assert "".join(piece.text for piece in pieces if not piece.thought) == "It is so."
    assert talk.messages[-1] == Message("assistant", "It is so.", "hm <b>")
    said(talk, "sure?")
    assert model.prompts[-1] == "u:why\na:It is so.\nu:sure?\na:"


def test_a_template_may_open_the_thought() -> None:
    class Thinker(Echo):
        def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
            return super().apply_template(messages) + "<think>\n"

    talk = Chat(Thinker(reply="hm</think>yes"))
    assert said(talk, "why") == "yes"
    assert talk.messages[-1].thought == "hm"
    stopped = talk.reply("again")
    assert [next(stopped) for _event in range(2)][1] == Piece("h", thought=True)
    stopped.close()
    assert talk.messages[-1] == Message("assistant", "", "h")


def test_another_model_goes_on() -> None:
    first, second = Echo(adapters=("poem",)), Echo(adapters=("prose",), reply="no")
    talk = Chat(first, system="s", adapter="poem")
    said(talk, "one")
    talk.use(second)
    assert talk.adapter is None and talk.adapters == ("prose",)
    assert said(talk, "two") == "no"
    assert second.prompts == ["s:s\nu:one\na:yes!\nu:two\na:"]


def test_the_system_message_changes() -> None:
    model = Echo()
    talk = Chat(model, system="old")
    said(talk, "one")
    talk.system = "new"
    said(talk, "two")
    talk.system = None
    said(talk, "three")
    assert [prompt.startswith(head) for prompt, head in zip(model.prompts, ("s:old", "s:new", "u:"), strict=True)]
    assert talk.messages[0].role == "user"


def test_a_conversation_is_restored() -> None:
    model = Echo()
    talk = Chat(model, system="old")
    talk.restore([Message("user", "one"), Message("assistant", "yes!", "hm")], "be brief")
    said(talk, "two")
    assert model.prompts == ["s:be brief\nu:one\na:yes!\nu:two\na:"]
    for turns, says in (
        ([Message("assistant", "hm")], "message 1 is of the assistant where one of the user belongs"),
        ([Message("user", "a"), Message("user", "b")], "message 2 is of the user"),
        ([Message("user", "a")], "the last message has no reply"),
    ):
        with pytest.raises(ValueError, match=says):
            talk.restore(turns, None)
    assert len(talk.messages) == 5


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
    model = Echo()
    talk = Chat(model)
    tokens = talk.reply("one")
    assert [next(tokens) for _event in range(3)][1:] == [Piece("y"), Piece("e")]
    tokens.close()
    assert talk.messages == [Message("user", "one"), Message("assistant", "ye")]
    assert talk.last is not None
    assert talk.last.reason is None
    assert model.closed == 1


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


def test_what_has_no_room_is_left_out_at_once_and_stays_remembered() -> None:
    model = Echo(context_length=100)
    talk = Chat(model, system="s")
    seen = []
    for turn in range(12):
        said(talk, f"question {turn}", Manner(10))
        assert talk.last is not None
        seen.append((len(model.requests[-1].prompt_ids), talk.last.left_out))
    assert max(size for size, _left in seen) <= 90
    assert len(talk.messages) == 25
    # Every time some have no room, a quarter of the context gets free: so they are the same for some turns.
    assert [left for _size, left in seen] == sorted(left for _size, left in seen)
    assert 1 < len({left for _size, left in seen if left}) < 9
    assert all(left % 2 == 0 for _size, left in seen)
    while len(talk.messages) > 3:
        talk.undo()
    said(talk, "last")
    assert model.prompts[-1] == "s:s\nu:question 0\na:yes!\nu:last\na:"


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
        list(talk.reply("the cat sat on the mat and looked at the dog " * 3, Manner(40)))
        assert talk.context_tokens <= 256
    assert talk.last is not None
    assert talk.last.left_out > 0
    assert len(talk.messages) == 12
    with pytest.raises(ValueError, match="the context holds 256"):
        talk.reply("weather " * 400)


def test_a_real_conversation_does_not_read_its_beginning_again(session: Session) -> None:
    talk = Chat(session)
    said(talk, "the cat sat on the mat", Manner(8))
    assert talk.last is not None
    before = talk.last.speed
    said(talk, "and the dog?", Manner(8))
    assert talk.last.speed.reused_tokens >= before.prompt_tokens - 1
