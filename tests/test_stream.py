"""Streams of an open bundle: their events, options of a request, caches that are kept, prompts that are scored."""

from __future__ import annotations

import json
import math
import shutil
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.export.build import export_bundle
from rlkit.runtime import scoring
from rlkit.runtime.request import (
    Event,
    Finished,
    Grammar,
    Guidance,
    Logprob,
    Prefilled,
    Reason,
    Request,
    Sampling,
    Token,
)
from rlkit.runtime.session import Session, open_bundle

PROMPT = tuple(range(20, 60))
LONG = tuple(int(token) for token in np.random.default_rng(3).integers(3, tiny.VOCAB, 150))
GREEDY = Request(PROMPT, 8, ignore_stop=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Session:
    return open_bundle(bundle, threads=1)


@pytest.fixture
def session(opened: Session) -> Session:
    """The session without anything in its caches."""
    opened.keep_caches(4)
    return opened


def ids_of(events: list[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token | Finished))


def end_of(events: list[Event]) -> Finished:
    (end,) = [event for event in events if isinstance(event, Finished)]
    assert events[-1] is end
    return end


def prefills(events: list[Event]) -> list[Prefilled]:
    return [event for event in events if isinstance(event, Prefilled)]


def test_a_stream_is_prefill_tokens_and_the_end(session: Session) -> None:
    events = list(session.stream(GREEDY))
    assert [type(event) for event in events] == [Prefilled, *[Token] * 8, Finished]
    (prefilled,) = prefills(events)
    assert (prefilled.done, prefilled.total, prefilled.reused, prefilled.logprobs) == (40, 40, 0, ())
    assert end_of(events) == Finished(Reason.LENGTH, "", None, 40, 8, 0)
    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.index for token in tokens] == list(range(8))
    assert tokens[0].seconds > prefilled.seconds > 0
    assert ids_of(events) == [token.id for token in session.generate(PROMPT, 8, ignore_stop=True)]


@pytest.mark.parametrize("chunk", [1, 7, 16, 39, 40, 1000])
def test_chunks_of_the_prompt_change_nothing(chunk: int, session: Session) -> None:
    expected = ids_of(list(session.stream(GREEDY)))
    session.keep_caches(0)
    events = list(session.stream(GREEDY, chunk_tokens=lambda: chunk))
    assert ids_of(events) == expected
    done = [event.done for event in prefills(events)]
    assert done == [*range(chunk, 40, chunk), 40]


def test_the_size_of_chunks_may_change_on_the_way(session: Session) -> None:
    sizes = iter((10, 1, 100))
    events = list(session.stream(GREEDY, chunk_tokens=lambda: next(sizes)))
    assert [event.done for event in prefills(events)] == [10, 11, 40]


def test_nothing_is_computed_before_the_first_event(session: Session) -> None:
    session.stream(GREEDY).close()
    assert session._caches.nbytes == 0
    stream = session.stream(GREEDY)
    next(stream)
    assert session._caches.nbytes > 0
    stream.close()


def test_streams_in_turn_do_not_mix(session: Session) -> None:
    requests = [GREEDY, replace(GREEDY, prompt_ids=LONG), replace(GREEDY, sampling=Sampling(1.0, seed=1))]
    alone = [ids_of(list(session.stream(request))) for request in requests]
    session.keep_caches(0)
    streams = [session.stream(request, chunk_tokens=lambda: 13) for request in requests]
    together: list[list[int]] = [[] for _ in streams]
    for _ in range(40):
        for tokens, stream in zip(together, streams, strict=True):
            tokens += [event.id for event in islice(stream, 1) if isinstance(event, Token)]
    assert together == alone


def test_stop_strings_are_never_shown(session: Session) -> None:
    request = replace(GREEDY, max_new_tokens=40, sampling=Sampling(1.0, seed=4))
    text = text_of(list(session.stream(request)))
    stop = text[len(text) // 2 :][:4]
    assert len(stop) == 4
    events = list(session.stream(replace(request, ignore_stop=False, stop=("never there", stop))))
    assert text_of(events) == text[: text.index(stop)]
    end = end_of(events)
    assert (end.reason, end.stop, end.text) == (Reason.STOP, stop, "")
    assert end.new_tokens == len(ids_of(events)) < 40
    assert stop not in "".join(event.text for event in events if isinstance(event, Token))


def test_held_back_text_comes_at_the_end(session: Session) -> None:
    text = text_of(list(session.stream(GREEDY)))
    events = list(session.stream(replace(GREEDY, ignore_stop=False, stop=(text[-2:] + "never",))))
    assert text_of(events) == text
    assert end_of(events).text == text[-2:]


def test_stop_tokens_end_and_are_not_told(session: Session) -> None:
    free = ids_of(list(session.stream(GREEDY)))
    events = list(session.stream(replace(GREEDY, ignore_stop=False, stop_ids=(free[4],))))
    assert ids_of(events) == free[: free.index(free[4])]
    assert end_of(events).reason is Reason.STOP
    assert end_of(events).stop is None


def test_characters_are_whole_however_tokens_cut_them(session: Session) -> None:
    """Every token here is a byte; the bias makes the model write one character of three bytes again and again."""
    ids = session.encode("€")
    assert len(ids) == 3
    chosen = [replace(GREEDY, max_new_tokens=1, sampling=Sampling(bias={token: 100.0})) for token in ids]
    prompt, texts = PROMPT, []
    stream = session._tokenizer.create_stream()
    for request in chosen:
        (token,) = ids_of(list(session.stream(replace(request, prompt_ids=prompt))))
        prompt = (*prompt, token)
        texts.append(str(stream.decode(token)))
    assert texts == ["", "", "€"]
    assert prompt[-3:] == tuple(ids)


def test_random_bytes_never_break_a_stream(session: Session) -> None:
    for seed in range(6):
        request = Request(PROMPT, 60, Sampling(100.0, top_k=0, seed=seed), ignore_stop=True)
        events = list(session.stream(request))
        assert len(ids_of(events)) == 60
        text_of(events).encode()


def test_seeds_repeat_whatever_was_before(session: Session) -> None:
    request = replace(GREEDY, sampling=Sampling(1.0, top_k=0, top_p=0.95, seed=2**40))
    first = ids_of(list(session.stream(request)))
    list(session.stream(replace(GREEDY, prompt_ids=LONG)))
    assert ids_of(list(session.stream(request))) == first
    others = {tuple(ids_of(list(session.stream(replace(request, sampling=Sampling(1.0, seed=n)))))) for n in range(5)}
    assert len(others) == 5


def test_penalties_and_bias_reach_the_choice(session: Session) -> None:
    free = ids_of(list(session.stream(GREEDY)))
    banned = replace(GREEDY, sampling=Sampling(bias={free[0]: -100.0}))
    assert free[0] not in ids_of(list(session.stream(banned)))
    forced = replace(GREEDY, sampling=Sampling(bias={77: 100.0}))
    assert ids_of(list(session.stream(forced))) == [77] * 8
    varied = replace(GREEDY, max_new_tokens=60, sampling=Sampling(presence_penalty=2.0, frequency_penalty=2.0))
    plain = replace(varied, sampling=Sampling())
    assert len({*ids_of(list(session.stream(varied)))}) > len({*ids_of(list(session.stream(plain)))})
    fresh = replace(varied, sampling=Sampling(repetition_penalty=100.0))
    assert not {*ids_of(list(session.stream(fresh)))[:20]} & {*PROMPT}


def test_logprobs_are_those_of_the_model(session: Session) -> None:
    events = list(session.stream(replace(GREEDY, logprobs=3, sampling=Sampling(1.0, seed=1, bias={9: 5.0}))))
    tokens = [event for event in events if isinstance(event, Token)]
    logits = session.logits(np.array([[*PROMPT, *ids_of(events)]]))[0, len(PROMPT) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob is not None
        assert token.logprob.id == token.id
        assert math.isclose(token.logprob.value, row[token.id], abs_tol=1e-3)
        assert [each for each, _ in token.logprob.top] == np.argsort(-row)[:3].tolist()
    assert all(event.logprob is None for event in session.stream(GREEDY) if isinstance(event, Token))


def test_prompts_are_scored(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = session.score(LONG, top=2)
    logits = session.logits(np.array([LONG]))[0, :-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert [one.id for one in whole] == list(LONG[1:])
    np.testing.assert_allclose([one.value for one in whole], expected[range(149), LONG[1:]], atol=1e-3)
    assert [one.top[0][0] for one in whole] == expected.argmax(axis=1).tolist()
    monkeypatch.setattr(scoring, "SCORE_TOKENS", 20)
    pieces = session.score(LONG)
    np.testing.assert_allclose([one.value for one in pieces], [one.value for one in whole], atol=1e-4)
    assert {one.top for one in pieces} == {()}
    assert session.score([5]) == []


def test_a_prompt_may_be_scored_and_nothing_generated(session: Session) -> None:
    events = list(session.stream(Request(PROMPT, 0, prompt_logprobs=0)))
    *pieces, last, end = events
    assert all(isinstance(event, Prefilled) and event.logprobs == () for event in pieces)
    assert isinstance(last, Prefilled)
    assert [type(one) for one in last.logprobs] == [Logprob] * 39
    assert end == Finished(Reason.LENGTH, prompt_tokens=40)
    full = Request((5,) * session.context_length, 0, prompt_logprobs=0)
    assert end_of(list(session.stream(full))).prompt_tokens == session.context_length


def test_a_prompt_is_scored_and_goes_on(session: Session) -> None:
    events = list(session.stream(replace(GREEDY, prompt_logprobs=1), chunk_tokens=lambda: 25))
    assert ids_of(events) == ids_of(list(session.stream(GREEDY)))
    told = [event.logprobs for event in prefills(events)]
    assert [len(some) for some in told] == [0, 0, 39]
    assert told[-1] == tuple(session.score(PROMPT, 1))


COLOUR = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "legs": {"type": "integer", "maximum": 9}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, seed=3), Sampling(1.0, top_k=1, seed=3)])
def test_a_reply_follows_a_schema(sampling: Sampling, session: Session) -> None:
    schema = Guidance(Grammar.JSON_SCHEMA, json.dumps(COLOUR))
    request = Request(PROMPT, 200, sampling, guidance=schema, logprobs=1)
    events = list(session.stream(request))
    reply = json.loads(text_of(events))
    assert sorted(reply) == ["legs", "name"]
    assert end_of(events).reason is Reason.STOP
    assert text_of(events) == json.dumps(reply, ensure_ascii=False)
    assert ids_of(list(session.stream(request))) == ids_of(events)
    chunked = session.stream(request, chunk_tokens=lambda: 11)
    assert ids_of(list(chunked)) == ids_of(events)


def test_a_schema_may_say_its_own_spacing(session: Session) -> None:
    own = {**COLOUR, "x-guidance": {"whitespace_flexible": False}}
    events = list(session.stream(Request(PROMPT, 200, guidance=Guidance(Grammar.JSON_SCHEMA, json.dumps(own)))))
    assert text_of(events) == json.dumps(json.loads(text_of(events)), separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(
    ("kind", "text", "replies"),
    [(Grammar.REGEX, "(yes|no)", {"yes", "no"}), (Grammar.LARK, 'start: "a" | "bc"', {"a", "bc"})],
)
def test_other_grammars(kind: Grammar, text: str, replies: set[str], session: Session) -> None:
    found = set()
    for seed in range(12):
        request = Request(PROMPT, 20, Sampling(2.0, top_k=0, seed=seed), guidance=Guidance(kind, text))
        events = list(session.stream(replace(request, ignore_stop=True)))  # its end is the reply's all the same
        assert end_of(events).reason is Reason.STOP
        found.add(text_of(events))
    assert found == replies


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Grammar.JSON_SCHEMA, "{"),
        (Grammar.JSON_SCHEMA, "[1]"),
        (Grammar.JSON_SCHEMA, '{"type": "nothing"}'),
        (Grammar.JSON_SCHEMA, "[" * 100_000),
        (Grammar.REGEX, "(["),
        (Grammar.LARK, "start: absent"),
    ],
)
def test_a_grammar_that_is_none_is_refused_at_once_in_one_line(kind: Grammar, text: str, session: Session) -> None:
    with pytest.raises(ValueError, match=f"the {kind.value} cannot be followed: .*; correct it") as caught:
        session.stream(Request(PROMPT, 5, guidance=Guidance(kind, text)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_a_grammar_is_text(text: str) -> None:
    with pytest.raises(ValueError, match="the regex is empty or holds a NUL"):
        Guidance(Grammar.REGEX, text)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request((tiny.VOCAB,), 5), r"outside 0\.\.511"),
        (Request((-1,), 5), r"outside 0\.\.511"),
        (Request((5,) * 256, 1), "the prompt has 256 tokens, but the context holds 256"),
        (Request((5,) * 257, 0, prompt_logprobs=0), "the prompt has 257 tokens"),
        (Request((5,), 1, Sampling(bias={tiny.VOCAB: 1.0})), r"biased token is outside 0\.\.511"),
        (Request((5,), 1, adapter="poem"), "has no adapter 'poem'"),
    ],
)
def test_what_cannot_run_is_refused_at_once(request_: Request, says: str, session: Session) -> None:
    with pytest.raises(ValueError, match=says):
        session.stream(request_)


def test_a_conversation_is_not_computed_again(session: Session) -> None:
    first = list(session.stream(GREEDY))
    longer = (*PROMPT, *ids_of(first), 7, 8, 9)
    again = list(session.stream(replace(GREEDY, prompt_ids=longer)))
    assert end_of(again).reused_tokens == len(PROMPT) + 7  # the last token of a reply is never computed
    assert {event.reused for event in prefills(again)} == {len(PROMPT) + 7}
    session.keep_caches(0)
    alone = list(session.stream(replace(GREEDY, prompt_ids=longer)))
    assert end_of(alone).reused_tokens == 0
    assert ids_of(again) == ids_of(alone)


def test_rewinding_gives_what_a_new_cache_gives(session: Session) -> None:
    """Prompts that share beginnings of every length with those before, in one cache, in any order."""
    rng = np.random.default_rng(5)
    prompts = [(*LONG[:count], *map(int, rng.integers(3, tiny.VOCAB, 9))) for count in (100, 60, 149, 120, 100, 80, 3)]
    reused = []
    for number, prompt in enumerate(prompts):
        request = Request(prompt, 6, Sampling(0.8, seed=number, repetition_penalty=1.2), ignore_stop=True)
        events = list(session.stream(request))
        fresh = open_bundle(session.folder, threads=1)
        assert ids_of(events) == ids_of(list(fresh.stream(request)))
        fresh.close()
        reused.append(end_of(events).reused_tokens)
    assert reused[1] == 60
    assert sum(count > 50 for count in reused) >= 4


def test_a_cancelled_stream_leaves_a_sound_cache(session: Session) -> None:
    expected = ids_of(list(session.stream(replace(GREEDY, prompt_ids=LONG))))
    session.keep_caches(4)
    stream = session.stream(replace(GREEDY, prompt_ids=LONG), chunk_tokens=lambda: 50)
    assert [event.done for event in islice(stream, 2) if isinstance(event, Prefilled)] == [50, 100]
    stream.close()
    events = list(session.stream(replace(GREEDY, prompt_ids=LONG)))
    assert end_of(events).reused_tokens == 100
    assert ids_of(events) == expected


def test_what_measures_meets_no_kept_cache(session: Session) -> None:
    list(session.stream(GREEDY))
    generator = session.generator(60)
    assert generator.get_sequence(0).tolist() == []
    generator.append_tokens(np.array([PROMPT], np.int32))
    assert generator.get_sequence(0).tolist() == list(PROMPT)


def test_generators_of_grammars_share_no_cache(session: Session) -> None:
    list(session.stream(GREEDY))
    guided = replace(GREEDY, ignore_stop=False, guidance=Guidance(Grammar.REGEX, "no"))
    events = list(session.stream(guided))
    assert text_of(events) == "no"
    assert end_of(events).reused_tokens == 0


def test_bytes_are_those_of_files_and_caches(bundle: Path) -> None:
    session = open_bundle(bundle, threads=1)
    files = sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert session.nbytes == files
    list(session.stream(GREEDY))
    assert session.cache_token_nbytes == 2 * 2 * 2 * 32 * 4  # K and V, layers, heads, head size, float32
    assert session.nbytes == files + 256 * session.cache_token_nbytes
    session.score(PROMPT)
    assert session.nbytes == 2 * files + 256 * session.cache_token_nbytes
    session.keep_caches(0)
    assert session.nbytes == 2 * files
    assert session.name == "bundle"


def test_closing_gives_everything_back(bundle: Path) -> None:
    session = open_bundle(bundle, threads=1)
    list(session.stream(GREEDY))
    session.close()
    session.close()
    with pytest.raises(ValueError, match="is closed; open it again"):
        session.stream(GREEDY)
    with pytest.raises(ValueError, match="is closed"):
        session.encode("a")
    with pytest.raises(ValueError, match="is closed"):
        session.logits(np.array([[5]]))


def test_a_stream_outlives_its_session(bundle: Path) -> None:
    session = open_bundle(bundle, threads=1)
    expected = ids_of(list(session.stream(GREEDY)))
    stream = session.stream(GREEDY)
    begun = [next(stream), next(stream)]
    session.close()
    assert ids_of([*begun, *stream]) == expected


def test_tools_reach_the_template(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "b")
    template = "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}" + tiny.CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    session = open_bundle(folder, threads=1)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    said = [{"role": "user", "content": "hi"}]
    assert session.apply_template(said, tools).startswith("[weather]<|im_start|>user\nhi")
    assert session.apply_template(said).startswith("<|im_start|>user")
    with pytest.raises(ValueError, match="no chat template that takes these messages"):
        session.apply_template([{"role": "user", "content": object.__doc__ or "", "nested": {1: 2}}], [{"bad": 1}])


def test_other_threads_run_while_the_model_computes(session: Session) -> None:
    """A pass over the prompt leaves the interpreter to others: they get to count within it."""
    counted, counting = [0], threading.Event()

    def count() -> None:
        while not counting.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    generator = session.generator(256)
    ids, before = np.full(250, 5, np.int32), counted[0]
    for _ in range(20):
        generator.append_tokens(ids)
        generator.rewind_to(0)
    counting.set()
    thread.join()
    assert counted[0] > before
