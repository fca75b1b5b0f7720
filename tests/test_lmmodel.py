"""A bundle as the harness asks of it: numbers as computed by hand, requests that do not fit, replies, chat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from rlkit.apps.lmeval import lm_class
from rlkit.apps.lmmodel import Model, open_model
from rlkit.export.build import export_bundle
from rlkit.runtime.request import Request, Sampling, Token
from rlkit.runtime.session import Session, open_bundle

CONTEXT = "the cat sat on the mat and looked"
LONG = " ".join(tiny.SENTENCES * 8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", tiny.W4W2)
    return export_bundle(checkpoint, root / "bundle", accuracy_level=0, adapters="files")


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return open_bundle(bundle)


@pytest.fixture
def model(bundle: Path, session: Session) -> Model:
    made = open_model(str(bundle))
    made.__dict__["session"] = session  # as if opened before
    return made


def ordered(found: Iterable[tuple[int, Any]]) -> list[Any]:
    known = dict(found)
    assert sorted(known) == list(range(len(known)))
    return [known[place] for place in sorted(known)]


def by_hand(session: Session, ids: list[int], count: int, adapter: str | None = None) -> tuple[float, bool]:
    """Logprob of the last `count` of ids, and whether each was the likeliest."""
    logits = session.logits(np.array([ids[:-1]]), adapter)[0, -count:].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(logprobs[np.arange(count), ids[-count:]].sum()), bool((logits.argmax(-1) == ids[-count:]).all())


def test_loglikelihoods_are_those_of_whole_rows(model: Model, session: Session) -> None:
    pairs = [(CONTEXT, f" {word}") for word in ("at the dog", "at", "mat", "weather and the capital")]
    pairs += [("two bits ", "are enough"), ("", "the capital"), (CONTEXT, " at")]
    found = ordered(model.loglikelihoods(pairs))
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        whole = session.encode(context + continuation)
        count = len(whole) - len(session.encode(context.rstrip()))
        expected, likeliest = by_hand(session, whole if context else [1, *whole], count)
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest
    assert model.counts.truncated == 0


def test_what_the_bundle_would_write_is_greedy(model: Model, session: Session) -> None:
    ((text, other),) = [
        (session.decode([likeliest]), session.decode([likeliest + 1]))
        for likeliest in [next(iter(session.generate(session.encode(CONTEXT), 1, ignore_stop=True))).id]
    ]
    (_, greedy), (_, less) = ordered(model.loglikelihoods([(CONTEXT, text), (CONTEXT, other)]))
    assert greedy and not less


def test_an_adapter_is_scored_with(bundle: Path, session: Session) -> None:
    (name,) = session.adapters
    adapted = open_model(str(bundle), adapter=name)
    plain = open_model(str(bundle))
    pairs = [(CONTEXT, " at the dog"), (CONTEXT, " weather")]
    ids = [session.encode("".join(pair)) for pair in pairs]
    skip = len(session.encode(CONTEXT))
    for found, row in zip(ordered(adapted.loglikelihoods(pairs)), ids, strict=True):
        assert found[0] == pytest.approx(by_hand(session, row, len(row) - skip, name)[0], abs=1e-4)
    assert ordered(plain.loglikelihoods(pairs)) != ordered(adapted.loglikelihoods(pairs))


def test_rolling_is_the_whole_texts_logprob(model: Model, session: Session) -> None:
    texts = list(tiny.SENTENCES)
    for text, found in zip(texts, ordered(model.rolling(texts)), strict=True):
        ids = [1, *session.encode(text)]
        assert found == pytest.approx(by_hand(session, ids, len(ids) - 1)[0], abs=1e-4)


def test_texts_longer_than_the_context_are_judged_in_parts(bundle: Path, session: Session) -> None:
    model = open_model(str(bundle), max_length=20)
    ids = session.encode(LONG)[:50]
    text = session.decode(ids)
    ids = session.encode(text)
    (found,) = ordered(model.rolling([text]))
    first = by_hand(session, [1, *ids[:20]], 20)[0]
    second = by_hand(session, ids[19:40], 20)[0]
    rest = len(ids) - 40
    assert found == pytest.approx(first + second + by_hand(session, ids[-21:], rest)[0], abs=1e-4)


def test_long_contexts_lose_their_beginning_and_are_counted(model: Model, session: Session) -> None:
    (found,) = ordered(model.loglikelihoods([(LONG, " at the dog")]))
    ids = session.encode(f"{LONG} at the dog")
    assert len(ids) > session.context_length + 1
    count = len(ids) - len(session.encode(LONG))
    assert found[0] == pytest.approx(by_hand(session, ids[-session.context_length - 1 :], count)[0], abs=1e-4)
    assert (model.counts.truncated, model.facts()["truncated"]) == (1, 1)


def test_a_continuation_longer_than_the_context_is_judged_whole(bundle: Path, session: Session) -> None:
    model = open_model(str(bundle), max_length=8)
    ((logprob, greedy),) = ordered(model.loglikelihoods([("the cat", " sat on the mat and looked at the dog")]))
    before, after = model.tokens.pair("the cat", " sat on the mat and looked at the dog")
    assert 8 < len(after) <= 16
    first = by_hand(session, [before[-1], *after[:8]], 8)[0]
    assert logprob == pytest.approx(first + by_hand(session, after[-9:], len(after) - 8)[0], abs=1e-4)
    assert not greedy
    assert (model.counts.windowed, model.counts.truncated) == (1, 0)


def test_nothing_is_never_the_likeliest_answer(model: Model) -> None:
    found = ordered(model.loglikelihoods([(CONTEXT, ""), (CONTEXT, " at"), ("", "")]))
    assert found[0] == found[2] == (-float("inf"), False)
    assert -1e3 < found[1][0] < 0
    assert ordered(model.rolling(["", "the cat"]))[0] == 0.0
    assert model.counts.empty == 3


def reply(session: Session, prompt: str, count: int) -> str:
    ids = [token.id for token in session.generate(session.encode(prompt), count)]
    return tiny.tokenizer().decode(ids, skip_special_tokens=True)


def test_replies_are_greedy_and_end_at_the_first_of_their_stops(model: Model, session: Session) -> None:
    whole = reply(session, CONTEXT, 24)
    stop = whole[len(whole) // 2 :][:3]
    asked = [
        (CONTEXT, {"max_gen_toks": 24}),
        (CONTEXT, {"max_gen_toks": 24, "until": [stop, ""]}),
        (CONTEXT, {"max_new_tokens": 24, "until": stop, "do_sample": False, "temperature": 0.9, "num_beams": 1}),
        ("two bits", {"max_gen_toks": 8, "until": None}),
    ]
    found = ordered(model.generate(asked))
    assert found == [whole, whole.split(stop)[0], whole.split(stop)[0], reply(session, "two bits", 8)]


class Recorded:
    """A session that writes down what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def stream(self, request: Request) -> Iterable[Token]:
        self.asked.append(request)
        return [Token(9, "x", 0.1, 0)]


def asked_of(model: Model, settings: Mapping[str, Any], prompt: str = CONTEXT) -> Request:
    recorded = Recorded()
    model.__dict__["session"] = recorded
    list(model.generate([(prompt, settings)]))
    return recorded.asked[0]


def test_settings_of_a_task_become_a_request(model: Model) -> None:
    request = asked_of(
        model, {"until": ["<|im_end|>", "\n\n", "Q:"], "max_gen_toks": 5, "do_sample": True, "top_p": 0.5}
    )
    assert (request.stop, request.stop_ids, request.max_new_tokens) == (("\n\n", "Q:"), (2,), 5)
    assert replace(request.sampling, seed=None) == Sampling(temperature=1.0, top_p=0.5)
    assert asked_of(model, {"max_gen_toks": 5, "temperature": 0.3}).sampling.temperature == 0.3
    assert asked_of(model, {"max_gen_toks": 5, "do_sample": False, "temperature": 0.3}).sampling.temperature == 0
    many = asked_of(model, {"max_gen_toks": 5, "until": [f"stop{number}" for number in range(30)]})
    assert len(many.stop) == 16


def test_seeds_come_from_the_harness_seed(model: Model) -> None:
    seeds = []
    for _ in range(2):
        np.random.seed(7)
        seeds.append([asked_of(model, {"max_gen_toks": 5}).sampling.seed for _ in range(2)])
    assert seeds[0] == seeds[1] and seeds[0][0] != seeds[0][1]


def test_prompts_too_long_lose_their_beginning(model: Model) -> None:
    request = asked_of(model, {"max_gen_toks": 56}, LONG)
    assert list(request.prompt_ids) == model.tokens.encode(LONG)[-200:]
    assert model.counts.truncated == 1
    assert asked_of(model, {"max_gen_toks": 5}, "").prompt_ids == (1,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_gen_toks": 256}, "256 tokens to generate leave none of 256 for the prompt; ask for fewer"),
        ({"num_beams": 4, "max_gen_toks": 5}, "generation settings num_beams=4 are not offered; use until"),
        ({"temperature": -1.0, "max_gen_toks": 5}, "temperature = -1.0 is outside"),
    ],
)
def test_settings_that_are_none(model: Model, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(model.generate([(CONTEXT, settings)]))


def test_chats_are_rendered_by_the_bundle(model: Model) -> None:
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
    expected = tiny.tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert model.template(messages) == expected
    begun = [*messages, {"role": "assistant", "content": "Well, "}]
    assert model.template(begun, opened=False) == f"{expected}Well, "


def test_templates_without_a_system_message_get_the_others(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    class Strict:
        def apply_template(self, messages: list[dict[str, str]]) -> str:
            if messages[0]["role"] == "system":
                raise ValueError("no system message here")
            return messages[0]["content"]

    model.__dict__["session"] = Strict()
    system = {"role": "system", "content": "short"}
    assert model.template([system, {"role": "user", "content": "hi"}]) == "hi"
    assert "takes no system message" in caplog.text
    with pytest.raises(ValueError, match="no system message here"):
        model.template([system])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frob": 1}, "model_args frob are unknown to rlkit; there are bundle, adapter"),
        ({"pretrained": "x"}, "model_args name 2 bundles"),
        ({"bundle": None}, "model_args name 0 bundles; write --model_args bundle=FOLDER"),
        ({"adapter": "x"}, "has no adapter 'x'; use "),
        ({"device": "toaster"}, "device 'toaster' does not exist"),
        ({"kv": "int3"}, "kv 'int3' is no kind of cache"),
        ({"threads": 0}, "threads = 0 cannot run anything"),
        ({"max_length": 257}, r"max_length=257 is outside 2\.\.256"),
        ({"max_length": 1}, "max_length=1 is outside"),
        ({"prefix_token_id": -1}, "prefix_token_id=-1 is no id"),
    ],
)
def test_model_args_that_are_none(bundle: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_model(**{"bundle": str(bundle), **arguments})


def test_what_is_needed_is_opened_when_it_is_needed(bundle: Path) -> None:
    model = open_model(pretrained=str(bundle))
    assert not {"session", "scorer"} & set(model.__dict__)
    list(model.loglikelihoods([(CONTEXT, " at")]))
    assert "session" not in model.__dict__


def test_the_harness_class_keeps_order_and_what_it_has(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = lm_class().create_from_arg_string(f"bundle={bundle},threads=1", {"batch_size": "auto", "device": "cuda:0"})
    kept: list[tuple[str, Any, Any]] = []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *told: kept.append(told)))
    pairs = [("the dog", " sat"), ("the cat", " sat on the mat"), (LONG, ""), (LONG, " dog")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert found == ordered(lm.model.loglikelihoods(pairs))
    assert sorted(kept) == sorted(("loglikelihood", pair, value) for pair, value in zip(pairs, found, strict=True))
    assert "1 requests were longer than the context" in caplog.text
    assert "1 requests had nothing to judge" in caplog.text
    texts = [SimpleNamespace(args=(text,)) for text in ("the mat", "the cat")]
    assert lm.loglikelihood_rolling(texts, disable_tqdm=True) == ordered(lm.model.rolling(["the mat", "the cat"]))
    generate = [SimpleNamespace(args=("the cat", {"max_gen_toks": 4, "until": ["\n"]}))]
    assert lm.generate_until(generate, disable_tqdm=True) == [reply(lm.model.session, "the cat", 4)]
    assert lm.chat_template(True) == tiny.CHAT_TEMPLATE and lm.chat_template(False) is None
    assert lm.apply_chat_template([{"role": "user", "content": "hi"}]).endswith("assistant\n")
    assert lm.tokenizer_name == lm.model.tokens.name
    assert lm.get_model_info()["rlkit"]["truncated"] == 2


def test_a_device_is_the_one_asked_for(bundle: Path) -> None:
    make = lm_class().create_from_arg_obj
    assert make({"bundle": str(bundle)}, {"device": None}).model.opening.device == "cpu"
    assert make({"bundle": str(bundle), "device": "cpu"}, {"device": "toaster"}).model.opening.device == "cpu"
    with pytest.raises(ValueError, match="device 'toaster' does not exist"):
        make({"bundle": str(bundle)}, {"device": "toaster"})
