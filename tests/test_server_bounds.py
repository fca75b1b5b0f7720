"""What the server refuses, with the right status and in OpenAI's shape, and that it is there afterwards."""

from __future__ import annotations

import contextlib
import json
import socket
import string
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import served
from rlkit.apps.server import bodies, chat, completions
from rlkit.apps.server.asking import Target
from rlkit.apps.server.pool import Served
from rlkit.apps.server.refusals import Refusal
from rlkit.apps.server.schemas import ChatBody, CompletionBody, parse
from rlkit.apps.server.settings import Settings
from rlkit.runtime.request import Request
from served import Scripted

ASK: list[Any] = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    return Scripted(served.folder_of(tmp_path_factory.mktemp("bundles"), "m"))


@pytest.fixture(scope="module")
def address(session: Scripted) -> Iterator[str]:
    bounds = Settings(body_nbytes=100_000, header_nbytes=8192, depth=20)
    with served.serving(served.pool_of(session), bounds) as found:
        yield found


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer that has the shape it must have."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "/tmp" not in error["message"]
    return error


BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "not JSON"),
    "cut": (b'{"messages": [', 400, "line 1, column 15"),
    "a list": (b"[]", 400, "a JSON list"),
    "binary": (bytes(range(256)), 400, "not UTF-8"),
    "utf-16": ('{"prompt": "x"}'.encode("utf-16"), 400, "not UTF-8"),
    "deep": (b'{"a":' * 15_000, 400, "deeper than 20"),
    "a little deep": (b'{"prompt":' + b"[" * 21 + b"]" * 21 + b"}", 400, "deeper than 20"),
    "NaN": (b'{"prompt": "x", "temperature": NaN}', 400, "NaN"),
    "infinity": (b'{"prompt": "x", "temperature": 1e999}', 400, "temperature"),
    "huge integer": (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "cannot|can be read|Exceeds"),
    "NUL": (b'{"prompt": "a\\u0000b"}', 400, "NUL"),
    "half a pair": (b'{"prompt": "\\ud800"}', 400, "surrogate"),
    "too big": (b'{"prompt": "' + b"x" * 200_000 + b'"}', 413, "100000 bytes"),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_none(address: str, path: str, case: str) -> None:
    body, status, words = BODIES[case]
    if path == CHAT:
        body = body.replace(b'"prompt": "x"', b'"messages": [{"role": "user", "content": "x"}]')
    error = refused(httpx.post(address + path, content=body), status)
    assert any(word in error["message"] for word in words.split("|"))
    assert httpx.get(f"{address}/health").status_code == 200


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -3}, "top_k"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"hello": 1}}, "logit_bias"),
    ({"logit_bias": {"256": 1}}, "logit_bias"),
    ({"logit_bias": {"7": 101}}, ""),
    ({"seed": -1}, "seed"),
    ({"seed": True}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"max_tokens": -5}, ""),
    ({"stop": ""}, ""),
    ({"stop": ["a"] * 17}, ""),
    ({"stop": 7}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "regex"}}, "response_format.regex"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"broken": 1}}}}, ""),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("field", "param"), FIELDS)
def test_fields_that_are_wrong_are_named(
    address: str, path: str, field: dict[str, Any], param: str, stream: bool
) -> None:
    body = {"messages": ASK, "prompt": "x", "stream": stream, **field}
    assert (refused(httpx.post(address + path, json=body), 400)["param"] or "").startswith(param)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "a"}}}, "tool_choice"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"functions": []}, "functions"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
    ],
)
def test_fields_of_a_chat(address: str, field: dict[str, Any], param: str) -> None:
    assert refused(httpx.post(address + CHAT, json={"messages": ASK, **field}), 400)["param"] == param


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": [2**40]}, "prompt.0"),
        ({"prompt": "x" * 1024}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_fields_of_a_completion(address: str, field: dict[str, Any], param: str) -> None:
    found = refused(httpx.post(address + COMPLETIONS, json={"prompt": "x", **field}), 400)["param"]
    assert (found or "").startswith(param.split(".")[0])


def test_a_prompt_beyond_the_context_has_openais_code(address: str) -> None:
    with served.client_of(address) as client, pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m", prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 1024 tokens" in str(caught.value)


def test_models_that_are_not_there(address: str) -> None:
    with served.client_of(address) as client:
        for name in ("gpt-4", "m:none", "m:../../x", "", "x" * 3000):
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model=name, messages=ASK)
            assert caught.value.code == "model_not_found" and len(str(caught.value)) < 500
    answer = httpx.post(address + CHAT, json={"messages": ASK})
    assert answer.json()["model"] == "m"  # none named: the first


def test_what_is_not_offered_says_so(address: str) -> None:
    with served.client_of(address) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.embeddings.create(model="m", input="x")
        assert (caught.value.status_code, caught.value.code) == (501, "not_offered")
    assert "embeddings" in refused(httpx.post(f"{address}/v1/embeddings"), 501)["message"]
    refused(httpx.get(f"{address}/nothing/here"), 404)
    refused(httpx.get(address + CHAT), 405)
    refused(httpx.delete(f"{address}/v1/models/m"), 405)
    refused(httpx.get(f"{address}/docs"), 404)
    refused(httpx.get(f"{address}/openapi.json"), 404)


def test_long_headers(address: str) -> None:
    refused(httpx.get(f"{address}/health", headers={"x-long": "a" * 9000}), 431)
    refused(httpx.get(f"{address}/health", headers={"x-long": "a" * 200_000}), 431)
    with contextlib.suppress(httpx.TransportError):  # it may hang up before all of it is sent
        assert httpx.get(f"{address}/health", headers={"x-long": "a" * 1_000_000}).status_code == 400
    assert httpx.get(f"{address}/health").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:80"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:99"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:1", "host": "localhost:1"}, 200),
        ({"origin": "http://["}, 403),
    ],
)
def test_pages_of_others_are_kept_out(address: str, headers: dict[str, str], status: int) -> None:
    answer = httpx.post(address + CHAT, json={"messages": ASK}, headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers
    if status == 403:
        refused(answer, 403)


def test_pages_that_are_let_in(session: Scripted) -> None:
    chosen = Settings(cors=("https://good.example",), api_key="k")
    with served.serving(served.pool_of(session), chosen) as address:
        good, bad = {"origin": "https://good.example"}, {"origin": "https://bad.example"}
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        answer = httpx.options(address + CHAT, headers={**good, **asks})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert httpx.options(address + CHAT, headers={**bad, **asks}).status_code == 400
        denied = httpx.post(address + CHAT, json={"messages": ASK}, headers=good)
        assert denied.status_code == 401 and denied.headers["access-control-allow-origin"] == "https://good.example"
        assert httpx.get(f"{address}/v1/models", headers={**bad, "authorization": "Bearer k"}).status_code == 403


def test_the_key(session: Scripted) -> None:
    with served.serving(served.pool_of(session), Settings(api_key="s3cret")) as address:
        with served.client_of(address, "s3cret") as client:
            assert [model.id for model in client.models.list()] == ["m"]
        for key in ("S3cret", "s3cre", "s3cret0"):
            with served.client_of(address, key) as client, pytest.raises(openai.AuthenticationError) as caught:
                client.models.list()
            assert caught.value.code == "invalid_api_key"
        assert httpx.get(f"{address}/v1/models", headers={"authorization": b"Bearer \xe9"}).status_code == 401
        for path in ("/v1/models", "/metrics", "/rlkit/stats", "/rlkit/profile/m", "/nothing"):
            answer = httpx.get(address + path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "s3cret" not in refused(answer, 401)["message"]
        assert httpx.get(f"{address}/v1/models", headers={"authorization": "Basic s3cret"}).status_code == 401
        for path in ("/health", "/"):
            assert httpx.get(address + path).status_code == 200


def test_bytes_that_are_no_http(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    for sent in (b"\x16\x03\x01\x02\x00", b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=served.WAIT_SECONDS) as made:
            made.sendall(sent)
            made.shutdown(socket.SHUT_WR)
            assert made.recv(1000)[:12] in (b"HTTP/1.1 400", b"")
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=served.WAIT_SECONDS) as made:
        made.sendall(chunked)
        for _ in range(30):
            made.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
        assert made.recv(1000).startswith(b"HTTP/1.1 413")
    assert httpx.get(f"{address}/health").status_code == 200


KEYS = st.text(string.ascii_lowercase, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(string.ascii_lowercase, max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = st.sampled_from(sorted({*ChatBody.model_fields, *CompletionBody.model_fields}))


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
@settings(max_examples=300)
@given(fields=st.dictionaries(NAMES, JSON, max_size=5), sound=st.booleans())
def test_fuzz_fields(session: Scripted, kind: Any, fields: dict[str, Any], sound: bool) -> None:
    """Whatever the fields hold, a request is refused in words or becomes one that the runtime takes."""
    found = {"messages": ASK, "prompt": "x", **fields} if sound else fields
    planner: Any = chat.plan if kind is ChatBody else completions.plan
    target = Target("m", Served("m", session.folder, session, None, 256), None)
    try:
        body = bodies.parse_object(json.dumps(found).encode(), 20)
        plan = planner(parse(kind, body), target, Settings())
    except Refusal as refusal:
        assert refusal.status == 400 and json.loads(refusal.body())["error"]["message"] == refusal.message
    else:
        assert plan.requests and all(isinstance(request, Request) for request in plan.requests)


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789eE.-+ntrufalsNI\\ud8', max_size=60).map(str.encode))
def test_fuzz_bytes(body: bytes) -> None:
    try:
        assert isinstance(bodies.parse_object(body, 5), dict)
    except Refusal as refusal:
        assert refusal.status == 400
