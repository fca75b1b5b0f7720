"""What begins with a slash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlkit.apps import chatcommands
from rlkit.apps.chatcommands import COMMANDS, completions
from rlkit.runtime.chat import Chat
from rooms import Echo, held, room

Out = pytest.CaptureFixture[str]


def test_help_lists_every_command(capsys: Out) -> None:
    held(room(), "/help")
    err = capsys.readouterr().err
    listed = [line.split()[0] for line in err.splitlines() if line.startswith("  /")]
    assert listed == list(COMMANDS)
    assert {"/model", "/adapter", "/system", "/stats", "/save", "/load", "/retry", "/clear"} <= set(listed)


def test_the_adapter_changes_in_a_conversation(capsys: Out) -> None:
    model = Echo(adapters=("french", "poem"))
    asked = ("/adapter", "a", "/adapter poem", "b", "/adapter german", "c", "/adapter none", "d", "/adapters")
    held(room(model), *asked)
    err = capsys.readouterr().err
    assert model.adapted == [None, "poem", "poem", None]
    assert err.count("adapter: none (french, poem)") == 2
    assert err.count("adapter: poem (french, poem)") == 1
    assert "error: no adapter 'german' here; there are french, poem" in err
    assert "no command /adapters; did you mean /adapter?" in err


def test_the_system_message_changes(capsys: Out) -> None:
    model = Echo()
    held(room(model), "/system", "/system be  brief", "hi", "/system none", "hi")
    assert [prompt[:7] for prompt in model.prompts] == ["s:be  b", "u:hi\na:"]
    err = capsys.readouterr().err
    assert err.count("system: none") == 2 and "system: be  brief" in err


def test_retry_and_undo(capsys: Out) -> None:
    model = Echo()
    held(room(model), "/retry", "/undo", "one", "two", "/retry", "/undo", "/undo", "/undo", "three")
    out, err = capsys.readouterr()
    assert out == "yes!\n" * 4
    assert model.prompts[1] == model.prompts[2] != model.prompts[0]
    assert model.prompts[3] == "u:three\na:"
    assert model.requests[2].sampling.temperature == 0.7
    assert "error: nothing has been said yet; say something first" in err
    assert err.count("with temperature 0.7") == 2 and "undone: two" in err
    assert err.count("there is nothing to undo") == 2


def test_a_conversation_is_saved_and_loaded(tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "my talk.json"
    model = Echo(reply="<think>hm</think>yes", adapters=("poem",))
    held(room(talk=Chat(model, system="s", adapter="poem")), "one", f"/save {file}")
    saved = json.loads(file.read_text())
    assert saved == {
        "schema_version": 1,
        "bundle": "echo",
        "adapter": "poem",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "yes", "thought": "hm"},
        ],
    }
    again = Echo(adapters=("poem",))
    held(room(again), "gone", f"/load '{file}'", "two")
    assert again.prompts[-1] == "s:s\nu:one\na:yes\nu:two\na:"
    assert again.adapted == [None, "poem"]
    bare = Echo()
    held(room(bare), f"/load {file}", "two", "/retry")
    assert bare.prompts[-1] == again.prompts[-1]
    assert "it was held with adapter poem, which is not here" in capsys.readouterr().err


def test_a_file_is_never_overwritten_silently(tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "talk.json"
    file.write_text("mine")
    held(room(), "hi", f"/save {file}", "/save", f"/save {tmp_path}", f"/save {file}/x")
    err = capsys.readouterr().err
    assert file.read_text() == "mine"
    assert f"error: {file} exists already; /save --force {file} replaces it" in err
    assert "no path is given" in err and "is a folder; name a file" in err
    assert err.count("error: ") == 4
    held(room(), "hi", f"/save --force {file}")
    assert len(json.loads(file.read_text())["messages"]) == 2
    assert [found.name for found in tmp_path.iterdir()] == ["talk.json"]


GOOD = {"schema_version": 1, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        ([], "holds no conversation"),
        ({"schema_version": 1, "messages": "a"}, "holds no conversation"),
        ({**GOOD, "schema_version": 2}, "schema_version 2"),
        ({**GOOD, "schema_version": True}, "schema_version True"),
        ({"messages": []}, "schema_version None"),
        ({**GOOD, "messages": ["a"]}, "message 1 lacks role or content"),
        ({**GOOD, "messages": [{"role": "user", "content": 3}]}, "message 1 lacks"),
        ({**GOOD, "messages": [{"role": "robot", "content": "a"}]}, "role 'robot'"),
        ({**GOOD, "messages": [*GOOD["messages"], {"role": "system", "content": "a"}]}, "may only be the first"),  # type: ignore[misc]
        ({**GOOD, "messages": [{"role": "assistant", "content": "a"}]}, "take turns"),
        ({**GOOD, "messages": [{"role": "user", "content": "a"}]}, "has no reply"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(content: Any, says: str, tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "talk.json"
    raw = content if isinstance(content, str | bytes) else json.dumps(content)
    file.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    model = Echo()
    held(room(model), "one", f"/load {file}", f"/load {file}x", "two")
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert says in errors[0] and f"no file {file}x" in errors[1] and len(errors) == 2
    assert model.prompts[-1] == "u:one\na:yes!\nu:two\na:"


class Closing(Echo):
    """A model that says when it is closed."""

    closed_at = 0

    def close(self) -> None:
        self.closed_at = len(self.requests)


def test_another_model_goes_on(tmp_path: Path, capsys: Out) -> None:
    first, second = Closing(adapters=("poem",)), Closing(reply="no")

    def opened(path: Path) -> Echo:
        if path != tmp_path / "b":
            raise FileNotFoundError(f"no bundle folder {path}")
        return second

    there = room(talk=Chat(first, adapter="poem"), opened=opened)
    held(there, "one", "/model", "/model /nowhere", "two", f'/model "{tmp_path / "b"}"', "three")
    err = capsys.readouterr().err
    assert "model: echo; context of 200 tokens" in err
    assert "error: no bundle folder /nowhere" in err
    assert "adapter poem stays behind" in err
    assert first.closed_at == 2 and second.closed_at == 0
    assert second.prompts == ["u:one\na:yes!\nu:two\na:yes!\nu:three\na:"]
    assert second.adapted == [None]


def test_ctrl_c_while_a_model_opens_keeps_the_one_there_is(capsys: Out) -> None:
    def opened(path: Path) -> Echo:
        raise KeyboardInterrupt

    model = Echo()
    held(room(model, opened=opened), "/model b", "one")
    assert model.prompts == ["u:one\na:"]
    assert "(stopped)" in capsys.readouterr().err


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = room(Echo(adapters=("french", "poem")))
    assert completions(there, "/s") == ["/system", "/stats", "/save"]
    assert completions(there, "/") == list(COMMANDS)
    assert completions(there, "s") == completions(there, "") == completions(there, "/stats ") == []
    assert completions(there, "/adapter p") == ["poem"]
    assert completions(there, "/adapter ") == ["french", "poem", "none"]
    (tmp_path / "talk[1].json").write_text("")
    (tmp_path / "bundle").mkdir()
    assert completions(there, f"/load {tmp_path}/talk[") == [f"{tmp_path}/talk[1].json"]
    assert completions(there, f"/model {tmp_path}/b") == [f"{tmp_path}/bundle/"]
    assert completions(there, f"/save --force {tmp_path}/t") == [f"{tmp_path}/talk[1].json"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completions(there, "/model ~/b") == [f"{tmp_path}/bundle/"]


def test_a_home_that_is_none_is_a_path(capsys: Out) -> None:
    chatcommands.obey(room(), "/load ~nobody-by-this-name/x")
    assert "error: no file ~nobody-by-this-name/x" in capsys.readouterr().err
