"""The commands run and chat, as a person or a script uses them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.apps import cli, talk
from rlkit.export import adapters, graph, write
from rlkit.export.adapters import LowRank
from rlkit.export.build import export_bundle
from rlkit.runtime.chat import Chat
from rlkit.runtime.session import open_bundle
from test_chat import Echo


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf", context=2048), root / "ckpt"), root / "bundle")


def test_run_streams_the_reply(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["run", str(bundle), "the cat", "--raw", "-n", "6"]) == 0
    out, err = capsys.readouterr()
    session = open_bundle(bundle)
    expected = "".join(token.text for token in session.generate(session.encode("the cat"), 6))
    assert out == expected + "\n"
    assert "tokens/s" in err
    assert "first after" in err


def test_run_uses_the_template(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(bundle), "hello", "--system", "be kind", "-n", "4", "--json"]
    assert cli.run(arguments) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    text = tiny.tokenizer().apply_chat_template(
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert result["prompt_tokens"] == len(tiny.tokenizer().encode(text))
    assert result["new_tokens"] == 4
    assert result["schema_version"] == 1
    assert err == ""


def test_run_repeats_with_a_seed(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies = []
    for seed in ("5", "5", "6"):
        assert cli.run(["run", str(bundle), "hi", "-n", "9", "--temperature", "1", "--seed", seed, "--json"]) == 0
        replies.append(json.loads(capsys.readouterr().out)["text"])
    assert replies[0] == replies[1] != replies[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "/nowhere/bundle", "hi"], "no bundle folder /nowhere/bundle"),
        (["run", "BUNDLE", " "], "the prompt is empty"),
        (["run", "BUNDLE", "hi", "--temperature", "-1"], "temperature = -1.0"),
        (["run", "BUNDLE", "hi", "--temperature", "nan"], "temperature = nan"),
        (["run", "BUNDLE", "hi", "-n", "0"], "greater than or equal to 1"),
        (["run", "BUNDLE", "hi", "--raw", "--system", "x"], "--raw has no place for --system"),
        (["run", "BUNDLE", "the weather " * 3000], "the context holds 2048"),
        (["chat", "/nowhere/bundle"], "no bundle folder"),
        (["run", "BUNDLE", "hi", "--adapter", "poem"], "has no adapter 'poem'; it has none, so leave the adapter out"),
        (["chat", "BUNDLE", "--adapter", "../poem"], "no adapter '../poem' here; there are none"),
    ],
)
def test_bad_use_is_one_line(arguments: list[str], says: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(bundle) if word == "BUNDLE" else word for word in arguments]
    assert cli.run(words) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize("name", ["run", "chat"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([name, "--help"]) == 0
    assert f"rlkit {name} ./bundle" in capsys.readouterr().out


def lines(*texts: str) -> Callable[[], str]:
    """Asks that get these answers, and then the end of the input."""
    rest: Iterator[str] = iter(texts)

    def ask() -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return ask


def test_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    model = Echo(reply="sure")
    talk.converse(
        Chat(model), ask=lines("/stats", "hi", "", "there", "/stats", "/clear", "new", "/what", "/quit", "unheard")
    )
    out, err = capsys.readouterr()
    assert out.split() == ["sure"] * 3
    assert model.prompts == ["u:hi\na:", "u:hi\na:sure\nu:there\na:", "u:new\na:"]
    assert err.count("tokens/s") == 4
    assert "no reply yet" in err
    assert "no command /what" in err


def test_the_adapter_changes_in_a_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    model = Echo(adapters=("french", "poem"))
    asked = ("/adapter", "a", "/adapter poem", "b", "/adapter german", "c", "/adapter none", "d", "/adapters")
    talk.converse(Chat(model), ask=lines(*asked))
    err = capsys.readouterr().err
    assert model.adapted == [None, "poem", "poem", None]
    assert err.count("adapter: none (french, poem)") == 2
    assert err.count("adapter: poem (french, poem)") == 1
    assert "error: no adapter 'german' here; there are french, poem" in err
    assert "no command /adapters" in err


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


def test_run_with_an_adapter(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies = {}
    for options in ((), ("--adapter", "poem")):
        assert cli.run(["run", str(adapted), "the cat", "--raw", "-n", "9", "--json", *options]) == 0
        reply = json.loads(capsys.readouterr().out)
        replies[reply["adapter"]] = reply["text"]
    session = open_bundle(adapted)
    ids = session.encode("the cat")
    for name, text in replies.items():
        assert text == "".join(token.text for token in session.generate(ids, 9, adapter=name))
    assert replies[None] != replies["poem"]
    assert cli.run(["run", str(adapted), "the cat", "--adapter", "prose"]) == 2
    assert "has no adapter 'prose'; use poem" in capsys.readouterr().err


def test_chat_with_an_adapter(adapted: Path) -> None:
    argv = [sys.executable, "-m", "rlkit.apps.cli", "chat", str(adapted), "-n", "5", "--adapter", "poem"]
    said = "hello\n/adapter\n/adapter none\nhello\n"
    done = subprocess.run(argv, input=said, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr
    assert "adapter: poem (poem)" in done.stderr
    assert "adapter: none (poem)" in done.stderr
    assert done.stderr.count("first after") == 2


def test_a_long_message_does_not_end_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    talk.converse(Chat(Echo(context_length=20)), ask=lines("x" * 50, "hi"))
    out, err = capsys.readouterr()
    assert "error: the message has" in err
    assert "yes!" in out


def test_chat_answers_a_pipe(bundle: Path) -> None:
    argv = [sys.executable, "-m", "rlkit.apps.cli", "chat", str(bundle), "-n", "5"]
    done = subprocess.run(argv, input="hello\n\n/stats\nagain", capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("first after") == 3
    assert done.stdout.strip()


def test_chat_as_json_is_a_line_per_reply(capsys: pytest.CaptureFixture[str]) -> None:
    talk.converse(Chat(Echo()), ask=lines("hi", "again"), json=True)
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [reply["text"] for reply in replies] == ["yes!", "yes!"]
    assert all(reply["new_tokens"] == 4 and not reply["stopped"] for reply in replies)


def test_run_reads_a_pipe(bundle: Path) -> None:
    argv = [sys.executable, "-m", "rlkit.apps.cli", "run", str(bundle), "-", "-n", "5", "--json"]
    done = subprocess.run(argv, input="hello", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["new_tokens"] == 5


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
from rlkit.apps import talk
from rlkit.runtime.chat import Chat
from test_chat import Echo

class Slow(Echo):
    def generate(self, prompt_ids, max_new_tokens, **sampling):
        for token in super().generate(prompt_ids, max_new_tokens, **sampling):
            yield token
            time.sleep(0.02)

talk.converse(Chat(Slow(context_length=4000, reply="yes, and " * 300)), max_new_tokens=2700)
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
