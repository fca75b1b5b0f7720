"""The server as OpenAI's own client sees it, over a tiny bundle with real weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import served
import tiny
from rlkit.apps import serve
from rlkit.export.build import export_bundle
from rlkit.runtime.session import Session, open_bundle

MODEL = "bundle"
CONTEXT = 1024
TEXT = "the cat sat on the mat"
HELLO: list[Any] = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf", context=CONTEXT), root / "ckpt", tiny.W4W2)
    return export_bundle(checkpoint, root / MODEL, accuracy_level=0)


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return open_bundle(bundle)


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    pool = serve.make_pool([bundle], slots=2, queue=8, memory=None)
    with served.serving(pool, at_once=2) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with served.client_of(address) as found:
        yield found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "rlkit"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_chat_streamed_is_the_chat_not_streamed(client: openai.OpenAI, session: Session) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=12)
    prompt = session.encode(session.apply_template(HELLO))
    tokens = list(session.generate(prompt, 12))
    text = session.decode([token.id for token in tokens])
    said = whole.choices[0].message.content
    assert said is not None and text.startswith(said.rstrip("�"))
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), len(tokens))
    assert whole.choices[0].finish_reason == ("length" if len(tokens) == 12 else "stop")
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            temperature=0,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == said
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    last = chunks[-1]
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), len(tokens))
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == len(prompt) - 1  # the chat before left it in the cache


def test_timings_are_in_the_last_chunk(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5, seed=1, stream=True))
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    timings = [chunk.to_dict().get("timings") for chunk in chunks]
    assert timings[:-1] == [None] * (len(chunks) - 1)
    last: Any = timings[-1]
    assert last["prompt_seconds"] > 0 and last["first_token_seconds"] >= last["prompt_seconds"]
    assert last["new_tokens"] == 1 or last["tokens_per_s"] > 0
    assert 0 <= last["reused_tokens"] < last["prompt_tokens"]


def test_a_seed_repeats_a_reply_and_each_of_n_has_its_own(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> list[str | None]:
        reply = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=16, **options)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.message.content for choice in reply.choices]

    three = ask(seed=7, n=3)
    assert three == ask(seed=7, n=3)
    assert len(set(three)) == 3
    assert ask(seed=7) == three[:1]


def test_n_in_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, seed=3, n=3)
    texts, ends = ["", "", ""], 0
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, seed=3, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += choice.finish_reason is not None
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == 3


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_reply_and_are_left_out(client: openai.OpenAI, as_list: bool, stream: bool) -> None:
    def ask(**options: Any) -> str:
        made: Any = client.completions.create(
            model=MODEL, prompt=TEXT, max_tokens=20, temperature=0, stream=stream, **options
        )
        chunks = list(made) if stream else [made]
        assert chunks[-1].choices[0].finish_reason == ("stop" if options else "length")
        return "".join(chunk.choices[0].text for chunk in chunks)

    text = ask()
    stop = text[3:6]
    assert ask(stop=["not there", stop] if as_list else stop) == text[: text.index(stop)]


def test_logprobs_of_a_chat_are_the_models(client: openai.OpenAI, session: Session) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    assert reply.choices[0].logprobs is not None
    listed = reply.choices[0].logprobs.content
    assert listed is not None
    prompt = session.encode(session.apply_template(HELLO))
    tokens = [token.id for token in session.generate(prompt, 6)]
    assert [entry.token for entry in listed] == [session.decode([token]) for token in tokens]
    expected = log_softmax(session.logits(np.array([prompt + tokens]))[0])
    for entry, token, row in zip(listed, tokens, expected[len(prompt) - 1 :], strict=False):
        assert entry.logprob == pytest.approx(row[token], abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(sorted(row)[-3:][::-1], abs=1e-3)
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    streamed: list[str] = []
    for chunk in client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=6, logprobs=True, stream=True
    ):
        found = chunk.choices[0].logprobs
        streamed += [entry.token for entry in (found.content if found is not None else None) or ()]
    assert streamed == [entry.token for entry in listed]


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("kind", ["text", "texts", "ids", "rows"])
def test_a_harness_scores_prompts_by_echo(client: openai.OpenAI, session: Session, kind: str, max_tokens: int) -> None:
    """What lm-eval's local-completions does with the logprobs of an echoed prompt."""
    texts = [TEXT, "what is the capital of France?"] if kind in ("texts", "rows") else [TEXT]
    rows = [session.encode(text) for text in texts]
    prompts: Any = {"text": texts[0], "texts": texts, "ids": rows[0], "rows": rows}[kind]
    reply = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=max_tokens, temperature=0, logprobs=1, echo=True, seed=1234
    )
    assert [choice.index for choice in reply.choices] == list(range(len(rows)))
    for choice, row, text in zip(reply.choices, rows, texts, strict=True):
        found = choice.logprobs
        assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs
        assert len(found.tokens) == len(row) + max_tokens
        assert choice.text.startswith(text)
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        expected = log_softmax(session.logits(np.array([row]))[0])
        for place in range(1, len(row)):
            value = found.token_logprobs[place]
            assert value == pytest.approx(expected[place - 1, row[place]], abs=1e-3)
            best = max(found.top_logprobs[place].values())
            assert (value == best) == (row[place] == expected[place - 1].argmax())
        assert found.text_offset == [len("".join(found.tokens[:place])) for place in range(len(found.tokens))]


def test_echo_in_a_stream(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": [TEXT, "two bits"], "max_tokens": 4, "temperature": 0}
    whole = client.completions.create(**options, echo=True, logprobs=0)
    texts = ["", ""]
    tokens: list[list[str]] = [[], []]
    offsets: list[list[int]] = [[], []]
    for chunk in client.completions.create(**options, echo=True, logprobs=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens or []
                offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts == [choice.text for choice in whole.choices]
    for choice, own, places in zip(whole.choices, tokens, offsets, strict=True):
        assert choice.logprobs is not None
        assert (own, places) == (choice.logprobs.tokens, choice.logprobs.text_offset)
    plain = client.completions.create(**options, echo=True)
    assert [choice.text for choice in plain.choices] == texts


def test_sampling_options_reach_the_sampler(client: openai.OpenAI, session: Session) -> None:
    word = session.encode(" dog")[0]
    biased = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=3, logit_bias={str(word): 100})
    assert biased.choices[0].text == " dog" * 3
    options: dict[str, Any] = {"model": MODEL, "prompt": TEXT, "max_tokens": 12, "seed": 1}
    narrow = client.completions.create(**options, top_p=1e-6)
    assert narrow.choices[0].text == client.completions.create(**{**options, "temperature": 0}).choices[0].text
    penalized = client.completions.create(
        **{**options, "temperature": 0}, frequency_penalty=2, presence_penalty=2, logit_bias={str(word): 6}
    )
    assert penalized.choices[0].text.count(" dog") < 12


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=120,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    found = json.loads(reply.choices[0].message.content or "")
    assert set(found) == {"ok", "n"} and isinstance(found["ok"], bool) and 0 <= found["n"] <= 99
    spelled: Any = {"type": "regex", "regex": "(cat|dog){3}"}
    text = client.completions.create(
        model=MODEL, prompt=TEXT, max_tokens=30, seed=1, extra_body={"response_format": spelled}
    )
    assert re.fullmatch("(cat|dog){3}", text.choices[0].text)
    begun = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=20, seed=1, response_format={"type": "json_object"}
    )
    assert (begun.choices[0].message.content or "").lstrip().startswith("{")


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} of a day",
            "parameters": {
                "type": "object",
                "properties": {"day": {"$ref": "#/$defs/day"}},
                "required": ["day"],
                "additionalProperties": False,
                "$defs": {"day": {"type": "string", "enum": ["monday", "friday"]}},
            },
        },
    }
    for name in ("weather", "menu")
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names", "end"),
    [
        ("required", {"weather", "menu"}, "tool_calls"),
        ({"type": "function", "function": {"name": "menu"}}, {"menu"}, "stop"),
    ],
)
def test_a_call_can_be_demanded(client: openai.OpenAI, choice: Any, names: set[str], end: str, stream: bool) -> None:
    made: Any = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=TOOLS, tool_choice=choice, max_tokens=150, seed=2, stream=stream
    )
    if stream:
        chunks = list(made)
        parts = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert {part.index for part in parts} == {0}
        assert parts[0].id.startswith("call_") and parts[0].type == "function"
        assert len(parts) > 2  # arguments come in pieces
        name, arguments = parts[0].function.name, "".join(part.function.arguments for part in parts)
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        (call,) = made.choices[0].message.tool_calls
        name, arguments, reason = call.function.name, call.function.arguments, made.choices[0].finish_reason
        assert made.choices[0].message.content is None
    assert name in names
    assert json.loads(arguments)["day"] in ("monday", "friday")
    assert reason == end


def test_a_conversation_with_calls_is_understood(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "menu", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "soup"},
    ]
    reply = client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, max_tokens=4, tool_choice="none"
    )
    assert reply.usage is not None and reply.usage.completion_tokens <= 4


def test_health_metrics_and_stats(client: openai.OpenAI, address: str) -> None:
    client.completions.create(model=MODEL, prompt=TEXT, max_tokens=2)
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    answer = httpx.get(f"{address}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert re.fullmatch(r'[a-z_]+(\{([a-z]+="[^"]*",?)+\})?', name), name
            values[name] = float(value)
            assert math.isfinite(values[name])
    assert len(values) == answer.text.count("\n") - sum(line[0] == "#" for line in answer.text.splitlines())
    assert values['rlkit_engine_done_total{model="bundle"}'] >= 1
    assert values['rlkit_http_answers_total{path="/v1/completions",status="200"}'] >= 1
    assert values['rlkit_first_token_seconds_bucket{model="bundle",le="+Inf"}'] >= 1
    assert values['rlkit_engine_active{model="bundle"}'] == 0
    (row,) = httpx.get(f"{address}/rlkit/stats").json()["models"]
    assert row["model"] == MODEL and row["loaded"] and row["engine"]["tokens"] >= 2 and row["nbytes"] > 0


def test_the_profile_of_a_bundle(client: openai.OpenAI, address: str, bundle: Path) -> None:
    client.completions.create(model=MODEL, prompt=TEXT, max_tokens=4, temperature=0)
    found = httpx.get(f"{address}/rlkit/profile/{MODEL}").json()
    assert found["context_length"] == CONTEXT
    assert found["nbytes"] == sum(file.stat().st_size for file in bundle.glob("model.onnx*"))
    assert found["bundle"]["schema_version"] == 1 and "tensors" not in found["bundle"]
    assert str(bundle.parent) not in json.dumps(found)  # where things lie on this machine is nobody's business
    assert found["parameters"] > 0 and found["bits_per_weight"] > 0
    assert found["measured"]["replies"] >= 1 and found["measured"]["ttft_seconds"] > 0
    assert (found["forecast"] is None) == isinstance(found["forecast_missing"], str)
    assert httpx.get(f"{address}/rlkit/profile/other").status_code == 404


def test_the_page_is_served_and_loads_nothing_from_elsewhere(address: str) -> None:
    page = httpx.get(f"{address}/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    names = re.findall(r'(?:src|href)="(page/[\w.]+)"', page.text)
    assert names
    for name in names:
        assert httpx.get(f"{address}/{name}").status_code == 200
    for name in ("__init__.py", "..%2Fcli.py", "%2e%2e/cli.py", "nothing.js"):
        assert httpx.get(f"{address}/page/{name}").status_code == 404
