"""The command run, as a person or a script uses it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from rlkit.apps import asking, cli
from rlkit.export import adapters, graph, write
from rlkit.export.adapters import LowRank
from rlkit.export.build import export_bundle
from rlkit.runtime.session import open_bundle


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
    assert "\x1b" not in out + err


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
    assert (result["finish_reason"], result["reused_tokens"], result["context_length"]) == ("length", 0, 2048)
    assert (result["device"], result["kv"], result["why"]) == ("cpu", None, "asked for")
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
        (["run", "BUNDLE", "hi", "--adapter", "poem"], "has no adapter 'poem'; there are none"),
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
    assert "has no adapter 'prose'; there are poem" in capsys.readouterr().err


def test_run_reads_a_pipe(bundle: Path) -> None:
    argv = [sys.executable, "-m", "rlkit.apps.cli", "run", str(bundle), "-", "-n", "5", "--json"]
    done = subprocess.run(argv, input="hello", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["new_tokens"] == 5


def reply(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.run(["run", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_run_stops_at_a_string(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = reply(capsys, str(bundle), "the cat", "--raw", "-n", "12")["text"]
    stop = whole[5:7]
    cut = reply(capsys, str(bundle), "the cat", "--raw", "-n", "12", "--stop", "never", "--stop", stop)
    assert cut["text"] == whole[: whole.index(stop)]
    assert (cut["finish_reason"], cut["stop"]) == ("stop", stop)


def test_run_gives_logprobs(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = reply(capsys, str(bundle), "the cat", "--raw", "-n", "5", "--logprobs", "3")["logprobs"]
    assert len(found) == 5
    for entry in found:
        assert len(entry["top"]) == 3
        assert entry["top"][0]["id"] == entry["id"] and entry["top"][0]["logprob"] == pytest.approx(entry["logprob"])
        assert entry["logprob"] < 0


def test_run_follows_a_regex_and_a_schema(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = reply(capsys, str(bundle), "hi", "-n", "12", "--regex", "[ab]{3}c")["text"]
    assert re.fullmatch("[ab]{3}c", text)
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    for given in (str(schema), schema.read_text()):
        text = reply(capsys, str(bundle), "hi", "-n", "40", "--json-schema", given)["text"]
        assert json.loads(text) in {"yes", "no"}


def test_a_schema_that_the_runtime_refuses_is_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--json-schema", '{"type": "nonsense"}'), ("--regex", "(?=a)b")):
        assert cli.run(["run", str(bundle), "hi", option, value]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and len(err.splitlines()) == 1 and out == ""


def test_sampling_options_change_the_reply(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (str(bundle), "the cat", "--raw", "-n", "12")
    likeliest = reply(capsys, *asked)["text"]
    hot = (*asked, "--temperature", "2", "--seed", "3")
    assert reply(capsys, *hot)["text"] != likeliest
    for narrow in (("--top-k", "1"), ("--min-p", "1"), ("--top-p", "0.000001")):
        assert reply(capsys, *hot, *narrow)["text"] == likeliest
    assert reply(capsys, *asked, "--repetition-penalty", "50")["text"] != likeliest


def test_where_a_reply_comes_from_is_said(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", str(bundle), "hi", "-n", "2", "--device", "auto"]
    assert cli.run(asked) == 0
    assert capsys.readouterr().err.startswith("on cpu: the processor: ")
    assert cli.run([*asked, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["why"].startswith("the processor: ") and err == ""


def test_a_template_that_opens_a_thought(bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    thinker = shutil.copytree(bundle, tmp_path / "thinker")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (thinker / name).is_file():
            text = (thinker / name).read_text()
            (thinker / name).write_text(
                text.replace("assistant\n'", "assistant\n<think>'").replace("assistant\\n'", "assistant\\n<think>'")
            )
    asked = (str(thinker), "hi", "-n", "20", "--temperature", "1", "--seed", "1")
    assert cli.run(["run", *asked]) == 0
    out, err = capsys.readouterr()
    assert out == "\n" and err.startswith("<think>\n") and "</think>" in err
    found = reply(capsys, *asked)
    assert found["text"] == "" and found["thought"]


@pytest.mark.parametrize("expression", [r"\p{L}+", "(?<name>a)b", r"[a-z&&[^b]]", "[[:alpha:]]", "(?i:a)b(?i)c", "a**"])
def test_an_expression_of_another_dialect_is_left_to_the_runtime(expression: str) -> None:
    shape = asking.guidance(None, expression)
    assert shape is not None and shape.text == expression


@pytest.mark.parametrize("expression", ["", "(", "a)", "[a", "*a", "a{3,2}", "a\\", "[z-a]"])
def test_an_expression_of_no_dialect_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"--regex .*(correct it|leave it out)"):
        asking.guidance(None, expression)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"[1]", "JSON list"), (b"{", "not valid JSON"), (b"\xff{}", "not UTF-8"), (b"[" * 99_999, "valid JSON")],
)
def test_a_file_that_is_no_schema_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        asking.guidance(str(tmp_path / "schema.json"), None)
    with pytest.raises(ValueError, match="neither JSON nor a file"):
        asking.guidance(str(tmp_path), None)
