"""The commands recover and export, on tiny models: what they refuse, what they show, what they make."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from rlkit.apps import cli
from test_source import write_gguf


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.checkpoint(tiny.llama(root / "hf"), root / "checkpoint", tiny.W4W2)
    return root


def test_export_makes_a_bundle_and_says_what_it_is(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert cli.run(["export", str(models / "checkpoint"), "-o", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert (facts["kind"], facts["path"], facts["recipe"]) == ("bundle", str(out), "w4w2-gateup")
    assert captured.err == ""
    assert cli.run(["export", str(models / "checkpoint"), "-o", str(out)]) == 2
    assert "exists already; pass --force" in capsys.readouterr().err
    assert cli.run(["export", str(models / "checkpoint"), "-o", str(out), "--force"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: bundle, ") and f'next: rlkit run {out} "Hello"' in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_recover_makes_a_checkpoint_that_export_takes(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    words = ["recover", str(models / "hf"), "-o", str(made), "--sequences", "16", "--length", "16", "--steps", "1"]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    assert "corrected" in captured.out and f"next: rlkit export {made}" in captured.err
    assert cli.run(["inspect", str(made)]) == 0
    assert "recipe w4w2-gateup, KL to the original 0." in capsys.readouterr().out
    assert cli.run([*words, "--json"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.run([*words, "--json", "--force", "--recipe", "w4"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["recipe"] == "w4" and facts["divergence"]["kl_mean"] > 0 and captured.err == ""
    assert cli.run(["export", str(made), "-o", str(tmp_path / "bundle"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "w4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "made"]


@pytest.mark.parametrize(
    "arguments", [["export", "checkpoint"], ["recover", "hf", "--recipe", "w4w2-gateup"]], ids=lambda words: words[0]
)
def test_dry_runs_agree_and_make_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    command, model, *options = arguments
    words = [command, str(models / model), "-o", str(tmp_path / "out"), "--dry-run", *options]
    assert cli.run(words) == 0
    assert "nothing is made with --dry-run" in capsys.readouterr().err
    assert cli.run([*words, "--json"]) == 0
    bits = {row["kind"]: row["bits"] for row in json.loads(capsys.readouterr().out)["plan"]["tensors"]}
    assert bits["gate_up"] == 2 and bits["down"] == bits["attention"] == bits["lm_head"] == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "checkpoint", "--adapter", "german"], "is not NAME=DIR"),
        (["export", "checkpoint", "--recipe", "w4"], "has adapters already, so no recipe can be applied"),
        (["export", "checkpoint", "--max-kl", "0"], "max KL = 0.0 is no limit"),
        (["export", "checkpoint", "--max-kl", "1", "--no-measure"], "needs a measurement"),
        (["export", "hf", "--target", "cpu", "--provider", "dml"], "cpu has no provider"),
        (["export", "nowhere"], "no such file, folder or asset"),
        (["export", "checkpoint", "--target", "moon"], "target 'moon' does not exist; use cpu, igpu, npu"),
        (["export", "checkpoint", "--accuracy-level", "7"], "accuracy_level = 7 does not exist"),
        (["export", "checkpoint", "--threads", "0"], "'--threads'"),
        (["recover", "checkpoint"], "is a checkpoint already; name the model it was made of"),
        (["recover", "hf", "--recipe", "w3"], "no recipe 'w3': named ones are"),
        (["recover", "hf", "--recipe", "bad.toml"], "bad.toml, line 2: bits = 3 is not offered"),
        (["recover", "gemma.gguf"], "architecture gemma3 is not supported"),
        (["recover", "hf", "--method", "magic"], "no method 'magic'; there are none, recover-lora"),
        (["recover", "hf", "--quantizer", "magic"], "no quantizer 'magic'; use one of nearest"),
        (["recover", "hf", "--adapters", "gate-up:x"], "rank 'x' is no whole number"),
        (["recover", "hf", "--adapters", "*.moon"], "match no linear that can take an adapter"),
        (["recover", "hf", "--divergence", "sideways"], "direction = 'sideways' is not offered"),
        (["recover", "hf", "--corpus", "nowhere"], "nowhere"),
        (["recover", "hf", "--budget", "3.5"], "add --recipe auto, or leave them out"),
        (["recover", "hf", "--recipe", "auto"], "give one of --budget and --max-bytes"),
        (["recover", "hf", "--recipe", "auto", "--budget", "0.5"], "bits per weight"),
        (["recover", "hf", "--degraded", "hf", "--teacher", "hf"], "are two models to recover"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_made(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("[[rule]]\nbits = 3\n", encoding="utf-8")
    write_gguf(Path("gemma.gguf"), architecture="gemma3")
    command, model, *options = arguments
    place = models / model if (models / model).exists() else Path(model)
    assert cli.run([command, str(place), "-o", "out", *options]) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert out == "" and line.startswith("error: ") and words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.toml", "gemma.gguf"]


SMALL = ["--sequences", "16", "--length", "16", "--steps", "1"]


def test_recover_takes_methods_placements_and_a_corpus(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, corpus = str(models / "hf"), str(tmp_path / "corpus")
    assert cli.run(["synthesize", model, "-o", corpus, "--sequences", "16", "--length", "16", "--json"]) == 0
    capsys.readouterr()
    words = ["recover", model, "-o", str(tmp_path / "a"), "--corpus", corpus, "--method", "recover-lora", *SMALL]
    assert cli.run([*words, "--adapters", "gate-up:4", "--divergence", "reverse", "--temperature", "2"]) == 0
    captured = capsys.readouterr()
    assert "search" in captured.out and "distilled" in captured.out and "synthesize:" not in captured.err
    facts = json.loads((tmp_path / "a" / "recovery.json").read_text())
    assert (facts["settings"]["method"], facts["settings"]["adapters"]) == ("recover-lora", "gate-up:4")
    assert facts["settings"]["distillation"]["direction"] == "reverse"
    assert json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_an_automatic_recipe_is_printed_and_saved(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recover", str(models / "hf"), "-o", str(tmp_path / "a"), "--method", "none", *SMALL]
    assert cli.run([*words, "--recipe", "auto", "--budget", "4.6", "--dry-run"]) == 0
    assert "auto-4.6 is found by measuring" in capsys.readouterr().out
    assert cli.run([*words, "--recipe", "auto", "--budget", "4.6"]) == 0
    out = capsys.readouterr().out
    assert 'name = "auto-4.6"' in out and "lm_head" in out
    assert (tmp_path / "a" / "recipe.toml").read_text() in out
    facts = json.loads((tmp_path / "a" / "recovery.json").read_text())
    assert facts["auto"]["rows"] and facts["auto"]["figures"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_several_processes_make_what_one_makes(models: Path, tmp_path: Path) -> None:
    words = ["recover", str(models / "hf"), "--sequences", "24", "--length", "16", "--steps", "4", "--batch", "4"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    for name, start in {"one": ["-m"], "two": [*launch, "-m"]}.items():
        command = [sys.executable, *start, "rlkit.apps.cli", *words, "-o", str(tmp_path / name), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout)["kind"] == "checkpoint"
    one, two = (json.loads((tmp_path / name / "recovery.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    figures = [[row["divergence"] for row in facts["stages"] if row["divergence"]] for facts in (one, two)]
    for mine, theirs in zip(*figures, strict=True):
        assert mine["kl_mean"] == pytest.approx(theirs["kl_mean"], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupted_export_leaves_nothing(models: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rlkit.apps.cli",
        "export",
        str(models / "checkpoint"),
        "-o",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert err.splitlines()[-1].startswith("interrupted") and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["recover", "hf"], ["export", "checkpoint"]])
def test_a_full_disk_is_told_before_anything_is_written(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("rlkit.recover.atomic.shutil.disk_usage", lambda _path: free)
    word, model = command
    assert cli.run([word, str(models / model), "-o", str(tmp_path / "out"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "GB free; free some space or choose another folder" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_on_a_terminal_export_draws_its_bars_and_ends(models: Path, tmp_path: Path) -> None:
    """The builder prints and draws bars of its own, which once fed rich's bars to themselves without end."""
    master, terminal = os.openpty()
    words = ["export", str(models / "checkpoint"), "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "rlkit.apps.cli", *words]
    with subprocess.Popen(command, stdin=terminal, stdout=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        drawn = b""
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # what reading a closed terminal raises
                    drawn += os.read(master, 65536)
        process.kill()
    os.close(master)
    assert process.returncode == 0
    assert b"graph" in drawn and b"100%" in drawn
