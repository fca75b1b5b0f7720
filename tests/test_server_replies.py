"""What the server makes of replies that are written down: thoughts, calls, slots, queues, clients that leave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import served
from served import Scripted

ASK: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def until(true: Callable[[], bool]) -> None:
    """Wait for what must come true."""
    end = time.monotonic() + served.WAIT_SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def chat(client: openai.OpenAI, stream: bool, **options: Any) -> dict[str, Any]:
    """A reply's text, thought, calls and end, however it came."""
    made: Any = client.chat.completions.create(model="m", messages=ASK, stream=stream, **options)
    if not stream:
        message = made.choices[0].message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        thought = message.to_dict().get("reasoning_content", "")
        return {"text": message.content or "", "thought": thought, "calls": calls, "end": made.choices[0].finish_reason}
    found: dict[str, Any] = {"text": "", "thought": "", "calls": [], "end": None}
    for chunk in made:
        delta, end = chunk.choices[0].delta, chunk.choices[0].finish_reason
        found["text"] += delta.content or ""
        found["thought"] += delta.to_dict().get("reasoning_content", "")
        for call in delta.tool_calls or ():
            if call.function.name:
                found["calls"].append((call.function.name, ""))
            name, arguments = found["calls"][call.index]
            found["calls"][call.index] = (name, arguments + (call.function.arguments or ""))
        found["end"] = end or found["end"]
    return found


@pytest.fixture
def session(tmp_path: Path) -> Scripted:
    return Scripted(served.folder_of(tmp_path, "m"))


@pytest.fixture
def address(session: Scripted) -> Iterator[str]:
    with served.serving(served.pool_of(session, slots=1, queue=1), at_once=1) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with served.client_of(address) as found:
        yield found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["<thi", "nk>\nlet me", " see\n</th", "ink>\n\nIt is", " 4."], ("It is 4.", "let me see", [])),
        (["no <think> in", " a line"], ("no <think> in a line", "", [])),
        (["<think>never", " ends"], ("", "never ends", [])),
        (['<tool_call>{"name": "add", "argum', 'ents": {"a": 1}}</tool', "_call>"], ("", "", [("add", '{"a": 1}')])),
        (
            ["<think>hm</think>", "Sure.\n<tool_call>", '{"name": "add", "arguments": {}}', "</tool_call>"],
            ("Sure.", "hm", [("add", "{}")]),
        ),
        (['[{"name": "add", "arguments": {"b": [2]}}]'], ("", "", [("add", '{"b": [2]}')])),
        (['{"a": 1}'], ('{"a": 1}', "", [])),
    ],
)
def test_thoughts_and_calls_are_told_apart(
    client: openai.OpenAI, session: Scripted, pieces: list[str], expected: Any, stream: bool
) -> None:
    session.script = lambda prompt: pieces
    found = chat(client, stream, tools=TOOLS)
    assert (found["text"], found["thought"].strip(), found["calls"]) == expected
    assert found["end"] == ("tool_calls" if expected[2] else "stop")


def test_thoughts_are_counted(client: openai.OpenAI, session: Scripted) -> None:
    session.script = lambda prompt: ["<think>", "a", "b", "</think>", "c"]
    usage = client.chat.completions.create(model="m", messages=ASK).usage
    assert usage is not None and usage.completion_tokens_details is not None
    assert usage.completion_tokens == 5
    assert usage.completion_tokens_details.reasoning_tokens == 3


def test_a_thought_that_the_prompt_has_opened(tmp_path: Path) -> None:
    session = Scripted(served.folder_of(tmp_path, "m"), script=lambda prompt: ["so", "</think>", "yes"])
    apply = session.apply_template
    session.apply_template = lambda messages, tools=None: apply(messages, tools) + "<think>\n"  # type: ignore[method-assign]
    with served.serving(served.pool_of(session)) as address, served.client_of(address) as client:
        found = chat(client, True)
        assert (found["text"], found["thought"]) == ("yes", "so")
        session.script = lambda prompt: ["{}"]
        assert chat(client, False, response_format={"type": "json_object"})["text"] == "{}"


def test_without_tools_nothing_is_a_call(client: openai.OpenAI, session: Scripted) -> None:
    reply = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    session.script = lambda prompt: [reply]
    assert chat(client, True)["text"] == reply
    assert chat(client, True, tools=TOOLS, tool_choice="none")["text"] == reply
    assert "tools" not in session.decode(session.asked[-1].prompt_ids)
    chat(client, False, tools=TOOLS, parallel_tool_calls=False)
    assert "tools" in session.decode(session.asked[-1].prompt_ids)


def test_a_template_that_knows_no_tools_is_told_in_words(tmp_path: Path) -> None:
    session = Scripted(served.folder_of(tmp_path, "m", template="{{ messages }}"))
    with served.serving(served.pool_of(session)) as address, served.client_of(address) as client:
        messages: list[Any] = [
            *ASK,
            {
                "role": "assistant",
                "tool_calls": [{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}],
            },
            {"role": "tool", "tool_call_id": "x", "content": "2"},
        ]
        client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
    lines = [json.loads(line) for line in session.decode(session.asked[-1].prompt_ids).splitlines()]
    assert [line["role"] for line in lines] == ["system", "user", "assistant", "user"]
    assert '"add"' in lines[0]["content"] and "<tool_call>" in lines[0]["content"]
    assert json.loads(lines[2]["content"].removeprefix("<tool_call>").removesuffix("</tool_call>")) == {
        "name": "add",
        "arguments": {"a": 1},
    }


def test_a_full_queue_says_when_to_come_back(client: openai.OpenAI, session: Scripted, address: str) -> None:
    session.allowed = threading.Semaphore(0)
    body = {"model": "m", "prompt": "x", "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=None) as first:
        assert first.status_code == 200
        waits = threading.Thread(target=lambda: client.completions.create(model="m", prompt="y"))
        waits.start()
        until(lambda: stats(address)["waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="m", prompt="z")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "rate_limit_exceeded"
        session.allowed.release(2)
        assert "[DONE]" in first.read().decode()
        waits.join(served.WAIT_SECONDS)
    assert stats(address)["done"] == 2


def stats(address: str) -> dict[str, Any]:
    """The engine's numbers."""
    found: dict[str, Any] = httpx.get(f"{address}/rlkit/stats").json()["models"][0]["engine"]
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_and_its_place_in_the_queue(
    address: str, session: Scripted, stream: bool
) -> None:
    session.allowed = threading.Semaphore(0)
    body = {"model": "m", "prompt": "x", "stream": stream, "max_tokens": 1000}
    session.script = lambda prompt: ["a"] * 1000
    clients = []
    for number in range(2):
        clients.append(_asking(address, body))
        until(lambda number=number: _places(address) == number + 1)
    assert (stats(address)["active"], stats(address)["waiting"]) == (1, 1)
    clients[1].close()  # the one that waits
    until(lambda: stats(address)["waiting"] == 0)
    clients[0].close()
    until(lambda: _places(address) == 0)
    session.allowed.release()  # the piece of work that is being done
    until(lambda: session.open_streams == 0)
    assert stats(address)["cancelled"] == 2
    assert stats(address)["tokens"] <= 1
    session.allowed.release()
    session.script = lambda prompt: ["fine"]
    answer = httpx.post(f"{address}/v1/completions", json={"model": "m", "prompt": "x"})
    assert answer.json()["choices"][0]["text"] == "fine"
    assert "rlkit_clients_gone_total 2" in httpx.get(f"{address}/metrics").text


def _places(address: str) -> int:
    try:
        now = stats(address)
        return int(now["active"] + now["waiting"])
    except TypeError:  # the bundle is not open yet, or has no engine yet
        return 0


def _asking(address: str, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request and reads nothing."""
    host, port = address.removeprefix("http://").split(":")
    text = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(text)}\r\n\r\n"
    made = socket.create_connection((host, int(port)))
    made.sendall((head + text).encode())
    return made


def test_many_prompts_wait_for_each_other_and_not_for_the_queue(address: str, session: Scripted) -> None:
    session.script = lambda prompt: [prompt.upper()]
    body = {"model": "m", "prompt": [f"p{number}" for number in range(20)], "n": 2}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=None).json()
    assert [choice["text"] for choice in answer["choices"]] == [f"P{number // 2}" for number in range(40)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(40))
    assert answer["usage"]["prompt_tokens"] == sum(len(f"p{number}") for number in range(20))


def test_the_first_token_is_sent_before_the_second_exists(address: str, session: Scripted) -> None:
    session.allowed = threading.Semaphore(1)
    session.script = lambda prompt: ["one", "two"]
    body = {"model": "m", "prompt": "x", "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=None) as answer:
        lines = answer.iter_lines()
        first = next(line for line in lines if line)
        assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "one"
        assert stats(address)["tokens"] == 1
        session.allowed.release()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_what_fails_within_a_stream_ends_it_with_an_error(address: str, session: Scripted) -> None:
    def script(prompt: str) -> Iterator[str]:
        yield "so far"
        raise ValueError(f"adapter x does not fit {session.folder}; remove it")

    session.script = script
    with served.client_of(address) as client:
        got = []
        with pytest.raises(openai.APIError, match="adapter x does not fit m; remove it"):
            for chunk in client.completions.create(model="m", prompt="x", stream=True):
                got.append(chunk.choices[0].text)
        assert got == ["so far"]
        with pytest.raises(openai.BadRequestError, match="does not fit m;"):
            client.completions.create(model="m", prompt="x")


def test_a_fault_of_ours_is_a_500_that_tells_nothing(
    address: str, session: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    def script(prompt: str) -> Iterator[str]:
        raise RuntimeError("secret path")
        yield ""

    session.script = script
    with served.client_of(address) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="m", prompt="x")
        assert "secret" not in str(caught.value) and caught.value.type == "server_error"
        assert "secret path" in caplog.text
        session.script = lambda prompt: ["back"]
        assert client.completions.create(model="m", prompt="x").choices[0].text == "back"


def test_the_end_of_the_server_lets_replies_finish(session: Scripted) -> None:
    session.script = lambda prompt: ["a", "b", "c"]
    session.allowed = threading.Semaphore(1)
    body = {"model": "m", "prompt": "x", "stream": True}
    with served.serving(served.pool_of(session)) as address:
        answer = httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=None)
        lines = answer.__enter__().iter_lines()
        next(lines)
        threading.Timer(0.2, session.allowed.release, args=(2,)).start()
    assert [line for line in lines if line][-1] == "data: [DONE]"
    answer.__exit__(None, None, None)
    assert session.closed and not session.open_streams
