"""The loop of `rlkit chat`: messages, commands, interrupts, JSON; and a real bundle behind a pipe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.apps import cli
from rlkit.export import adapters, graph, write
from rlkit.export.adapters import LowRank
from rlkit.export.build import export_bundle
from rlkit.runtime.chat import Chat, Manner
from rlkit.runtime.request import Event, Request, Sampling
from rooms import Echo, held, room

Out = pytest.CaptureFixture[str]


def test_a_conversation(capsys: Out) -> None:
    model = Echo(reply="sure")
    asked = ("/stats", "hi", "", "there", "/stats", "/clear", "new", " /is this a command?", "/quit", "unheard")
    script = held(room(model), *asked)
    out, err = capsys.readouterr()
    assert out.split() == ["sure"] * 4
    assert model.prompts[:3] == ["u:hi\na:", "u:hi\na:sure\nu:there\na:", "u:new\na:"]
    assert model.prompts[3].endswith("u:/is this a command?\na:")
    assert err.count("4 new, first after 0.50 s, then 4.0 tokens/s") == 5
    assert "[22 prompt tokens (7 reused), 4 new" in err
    assert "context 26 of 200 (13 %)" in err
    assert "no reply yet" in err
    assert script.unread == 1


@pytest.mark.parametrize(
    ("typed", "meant"), [("/stat", "/stats"), ("/adaptor", "/adapter"), ("/exit", "/"), ("/QUIT", "/"), ("/", "/")]
)
def test_an_unknown_command_is_one_line_with_the_nearest(typed: str, meant: str, capsys: Out) -> None:
    model = Echo()
    held(room(model), typed)
    out, err = capsys.readouterr()
    assert err.startswith(f"no command {typed}; did you mean {meant}")
    assert len(err.splitlines()) == 1 and out == "" and not model.requests


def test_a_message_of_several_lines() -> None:
    model = Echo()
    held(room(model), "one\\", "two\\", "three", '"""four', "/quit", 'five"""', "/stats\\", "six")
    assert [prompt.split("u:")[-1] for prompt in model.prompts] == [
        "one\ntwo\nthree\na:",
        "four\n/quit\nfive\na:",
        "/stats\nsix\na:",
    ]


def test_the_manner_reaches_the_model_and_a_cut_reply_says_so(capsys: Out) -> None:
    model = Echo()
    held(room(model, manner=Manner(2, Sampling(0.5, seed=3))), "hi", "/stats")
    out, err = capsys.readouterr()
    assert out == "ye\n"
    assert "cut at 2 tokens" in err and "temperature 0.5, top-k 50" in err
    assert model.requests[0].sampling == Sampling(0.5, seed=3)


def test_a_message_without_room_does_not_end_the_conversation(capsys: Out) -> None:
    held(room(Echo(context_length=20)), "x" * 50, "hi")
    out, err = capsys.readouterr()
    assert "error: the message has" in err
    assert "yes!" in out


def test_what_is_left_out_is_told(capsys: Out) -> None:
    held(room(Echo(context_length=100), manner=Manner(5)), *["a question"] * 9)
    told = [line for line in capsys.readouterr().err.splitlines() if "not sent any more" in line]
    assert told == [f"[the context is full: the oldest {count} messages are not sent any more]" for count in (6, 12)]


class Failing(Echo):
    """Fails at its first reply, in the middle, as the runtime does; the second works."""

    def _events(self, request: Request, reused: int) -> Generator[Event, None, None]:
        for index, event in enumerate(super()._events(request, reused)):
            if len(self.requests) == 1 and index == 3:
                raise RuntimeError("no memory\nfor this")
            yield event


def test_a_fault_of_the_runtime_does_not_end_the_conversation(capsys: Out) -> None:
    model = Failing()
    held(room(model), "hi", "again")
    out, err = capsys.readouterr()
    assert out == "ye\nyes!\n"
    assert "error: RuntimeError: no memory for this" in err
    assert model.prompts[1] == "u:again\na:"


def test_json_is_a_line_per_reply(capsys: Out) -> None:
    there = room(
        Echo(reply="<think>hm</think>yes", context_length=120),
        json=True,
        manner=Manner(sampling=Sampling(), logprobs=1),
    )
    held(there, "hi", "again", "x" * 200)
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [reply["schema_version"] for reply in replies] == [1, 1, 1]
    assert [reply["text"] for reply in replies[:2]] == ["yes", "yes"]
    first = replies[0]
    assert first["thought"] == "hm" and first["finish_reason"] == "stop" and not first["stopped"]
    assert (first["prompt_tokens"], first["new_tokens"], first["context_tokens"]) == (7, 20, 27)
    assert replies[1]["reused_tokens"] == 7
    assert len(first["logprobs"]) == 20
    assert first["logprobs"][0] == {
        "id": 60,
        "text": "<",
        "logprob": -0.5,
        "top": [{"id": 60, "text": "<", "logprob": -0.5}],
    }
    assert "the context holds 120" in replies[2]["error"]


def test_ctrl_c_twice_on_an_empty_line_leaves(capsys: Out) -> None:
    stop = KeyboardInterrupt
    script = held(room(), stop, "hi", stop, stop, "unheard", interactive=True)
    assert script.unread == 1
    assert capsys.readouterr().err.count("Ctrl-C once more leaves") == 2
    script = held(room(), stop, stop, "heard", interactive=True, empty=False)  # something had been typed
    assert script.unread == 0
    script = held(room(), '"""a', stop, '"""b', stop, "heard", interactive=True)
    assert script.unread == 0
    with pytest.raises(KeyboardInterrupt):
        held(room(), stop)


class Interrupted(Echo):
    """Presses Ctrl-C while it replies."""

    def _events(self, request: Request, reused: int) -> Generator[Event, None, None]:
        for index, event in enumerate(super()._events(request, reused)):
            if index == 3 and len(self.requests) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield event


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_stops_the_reply_and_keeps_what_was_said(as_json: bool, capsys: Out) -> None:
    model = Interrupted()
    there = room(model, json=as_json)
    held(there, "hi", "go on")
    out = capsys.readouterr().out
    if as_json:
        replies = [json.loads(line) for line in out.splitlines()]
        assert [(reply["text"], reply["stopped"], reply["finish_reason"]) for reply in replies] == [
            ("yes", True, None),
            ("yes!", False, "stop"),
        ]
    else:
        assert out == "yes (stopped)\nyes!\n"
    assert model.prompts[1] == "u:hi\na:yes\nu:go on\na:"
    assert model.closed == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
from rlkit.apps import chat
from rlkit.apps.chatinput import Keyboard
from rooms import Echo, room

class Slow(Echo):
    def _events(self, request, reused):
        for event in super()._events(request, reused):
            yield event
            time.sleep(0.02)

chat.converse(room(Slow(context_length=4000, reply="yes, and " * 300)), Keyboard(lambda line: []))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_stops_the_reply_and_not_the_app() -> None:
    argv = [sys.executable, "-c", SLOW, str(Path(__file__).parent)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as app:
        assert app.stdin is not None
        assert app.stdout is not None
        app.stdin.write("tell me a story\n")
        app.stdin.flush()
        said = app.stdout.read(20)
        app.send_signal(signal.SIGINT)
        said += app.stdout.readline()
        out, err = app.communicate("/stats\n/quit\n", timeout=60)
    assert app.returncode == 0, err
    assert said.endswith(" (stopped)\n")
    assert len(said) < 2000
    assert out == ""
    assert err.count("first after") == 2  # the stopped reply's line, and /stats


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf", context=2048), root / "ckpt"), root / "bundle")


@pytest.fixture(scope="module")
def adapted(bundle: Path) -> Path:
    """The bundle with an adapter, poem, that changes what the first layer says."""
    out = bundle.parent / "adapted"
    shutil.copytree(bundle, out)
    model, module = graph.load(out / "model.onnx"), "model.layers.0.self_attn.o_proj"
    slots = adapters.add_inputs(model, {module: (128, 128)})
    write.write_graph(model, out / "model.onnx")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 128)).astype(np.float32)
    adapters.write_adapter(out, "poem", {module: LowRank(a, b.T)}, slots)
    return out


def piped(said: str | bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "rlkit.apps.cli", "chat", *arguments]
    return subprocess.run(argv, input=said if isinstance(said, bytes) else said.encode(), capture_output=True)


def test_chat_answers_a_pipe(bundle: Path) -> None:
    done = piped("hello\n\n/stats\nagain", str(bundle), "-n", "5")
    err = done.stderr.decode()
    assert done.returncode == 0, err
    assert err.count("first after") == 3
    assert " reused), 5 new" in err
    assert done.stdout.strip() and b"\x1b" not in done.stdout + done.stderr


def test_bytes_that_are_no_text_are_a_message_too(bundle: Path) -> None:
    done = piped(b"caf\xe9 \xff\x00\n/quit\n", str(bundle), "-n", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 3


def test_chat_with_an_adapter(adapted: Path) -> None:
    done = piped("hello\n/adapter\n/adapter none\nhello\n", str(adapted), "-n", "5", "--adapter", "poem")
    err = done.stderr.decode()
    assert done.returncode == 0, err
    assert "adapter: poem (poem)" in err
    assert "adapter: none (poem)" in err
    assert err.count("first after") == 2


def test_another_bundle_goes_on_with_the_conversation(bundle: Path, adapted: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    said = f"hello\n/model {adapted}\n/adapter poem\nagain\n/model {bundle}\n/model {tmp_path}\n/save {file}\n/stats\n"
    done = piped(said, str(bundle), "-n", "5", "--json")
    err = done.stderr.decode()
    assert done.returncode == 0, err
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(reply["bundle"], reply["adapter"]) for reply in replies] == [(str(bundle), None), (str(adapted), "poem")]
    assert replies[1]["prompt_tokens"] > replies[0]["prompt_tokens"] + 5
    assert f"model: {bundle}; context of 2048 tokens" in err and "adapter poem stays behind" in err
    assert f"error: {tmp_path} is no bundle" in err
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["hello", "again"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adapter", "../poem"], "has no adapter '../poem'; there are none"),
        (["--temperature", "nan"], "temperature = nan"),
        (["--top-k", "-1"], "top_k = -1"),
        (["--top-p", "0"], "top_p = 0"),
        (["--min-p", "2"], "min_p = 2"),
        (["--repetition-penalty", "0"], "repetition_penalty = 0"),
        (["--seed", "-1"], "seed = -1"),
        (["--stop", ""], "stop strings"),
        (["--logprobs", "2"], "add --json"),
        (["--logprobs", "21", "--json"], "less than or equal to 20"),
        (["--json-schema", "{"], "--json-schema is not valid JSON"),
        (["--json-schema", "/no/such"], "neither JSON nor a file"),
        (["--regex", "("], "no regular expression"),
        (["--regex", "a", "--json-schema", "{}"], "cannot both shape"),
        (["--device", "abacus"], "abacus"),
        (["--kv", "int3"], "int3"),
        (["--threads", "0"], "greater than or equal to 1"),
    ],
)
@pytest.mark.parametrize("name", ["chat", "run"])
def test_a_bad_option_is_one_line_before_the_model_is_loaded(
    name: str, options: list[str], says: str, bundle: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime_genai as og

    def loaded(*_arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(og, "Model", loaded)
    words = ["hello"] if name == "run" else []
    assert cli.run([name, str(bundle), *words, *options]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


def test_an_adapter_of_the_start_is_used() -> None:
    model = Echo(adapters=("poem",))
    held(room(talk=Chat(model, adapter="poem")), "a")
    assert model.adapted == ["poem"]
