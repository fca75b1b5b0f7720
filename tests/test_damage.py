"""The commands corrupt and recover --degraded, on tiny models: what they make, what they show, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from rlkit.apps import cli, damage
from rlkit.recover.corrupt import CORRUPTIONS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.llama(root / "hf")
    tiny.checkpoint(root / "hf", root / "checkpoint")
    return root


def test_the_help_lists_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(CORRUPTIONS) == damage.KINDS
    assert cli.run(["corrupt", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "rlkit corrupt smollm2-135m -o ./damaged" in shown and "--dry-run" in shown


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_makes_a_folder_and_says_what_was_done(
    models: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "damaged"
    assert cli.run(["corrupt", str(models / "hf"), "-o", str(out), "--kind", kind, "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert captured.err == "" and facts["path"] == str(out)
    assert facts["damage"]["kind"] == kind and facts["damage"]["amount"] == CORRUPTIONS[kind].amount
    assert len(facts["matrices"]) == 14 and all(0 < row["relative_error"] < 1.2 for row in facts["matrices"].values())
    assert facts == {"path": str(out)} | json.loads((out / "corruption.json").read_text())
    assert cli.run(["inspect", str(out)]) == 0
    assert f"{out}: hf" in capsys.readouterr().out


def test_a_person_gets_a_table_and_the_next_step(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "damaged"
    words = ["corrupt", str(models / "hf"), "-o", str(out), "--amount", "0.3", "--match", "*.up_proj"]
    assert cli.run([*words, "--match", "*.k_proj", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert "up_proj" in captured.out and "k_proj" in captured.out and "down_proj" not in captured.out
    assert captured.out.endswith(f"{out}: {models / 'hf'} with noise 0.3 in 4 matrices\n")
    assert captured.err.splitlines()[-1].startswith(f"next: rlkit recover --degraded {out} --teacher {models / 'hf'}")
    assert cli.run(words) == 2
    assert "exists already; pass --force" in capsys.readouterr().err
    assert cli.run([*words, "--force"]) == 0
    assert json.loads((out / "corruption.json").read_text())["damage"]["match"] == ["*.up_proj"]


def test_a_dry_run_makes_nothing(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["corrupt", str(models / "hf"), "-o", str(tmp_path / "out"), "--match", "*.layers.1.*", "--dry-run"]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    assert "gate_proj" in captured.out and "256 x 128" in captured.out
    assert "nothing is made with --dry-run" in captured.err
    assert cli.run([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["matrices"]
    assert {"module": "model.layers.1.mlp.down_proj", "shape": [128, 256]} in rows and len(rows) == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hf", "--kind", "rust"], "kind 'rust' is no damage known here; use one of noise"),
        (["hf", "--kind", "zero", "--amount", "2"], "amount = 2 of zero must be in 1e-06..1"),
        (["hf", "--match", "*.experts"], "pattern '*.experts' matches no matrix"),
        (["hf", "--seed", "-1"], "'--seed'"),
        (["checkpoint"], "is a checkpoint folder, which is quantized already; name a full-precision model"),
        (["nowhere"], "no such file, folder or asset"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_cannot_be_done_is_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str, dry: bool
) -> None:
    model, *options = arguments
    line = ["corrupt", str(models / model), "-o", str(tmp_path / "out"), *options, *(["--dry-run"] if dry else [])]
    assert cli.run(line) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("error: ") and words in last
    assert list(tmp_path.iterdir()) == []


AMOUNT = ["--sequences", "24", "--length", "24", "--steps", "2", "--batch", "8", "--adapters", "all:8"]


@pytest.fixture(scope="module")
def damaged(models: Path) -> Path:
    assert cli.run(["corrupt", str(models / "hf"), "-o", str(models / "damaged"), "--kind", "zero", "--json"]) == 0
    tiny.llama(models / "other", hidden_size=64)
    return models / "damaged"


def test_recover_repairs_and_merges(
    models: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out = tmp_path / "whole"
    pair = ["recover", "--degraded", str(damaged), "--teacher", str(models / "hf")]
    words = [*pair, "-o", str(out), "--merge", *AMOUNT]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    for part in ("degraded", "corrected", "distilled", f"{out}: the recovered model, everything in its weights"):
        assert part in captured.out
    assert captured.err.splitlines()[-1] == f"next: rlkit recover {out} -o CHECKPOINT"
    assert cli.run(["inspect", str(out)]) == 0
    assert f"{out}: hf" in capsys.readouterr().out
    assert cli.run(words) == 2
    assert "exists already; pass --force" in capsys.readouterr().err


def test_recover_keeps_an_adapter_and_says_so_in_json(
    models: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out = tmp_path / "adapter-only"
    pair = ["recover", "--degraded", str(damaged), "--teacher", str(models / "hf")]
    assert cli.run([*pair, "-o", str(out), "--json", *AMOUNT]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert captured.err == "" and facts["path"] == str(out) and facts["merged"] is False
    kl = [row["divergence"]["kl_mean"] for row in facts["stages"] if row["divergence"]]
    assert len(kl) == 3 and kl[-1] < kl[0]
    assert cli.run(["inspect", str(out)]) == 2
    assert "is an adapter alone, for" in capsys.readouterr().err
    assert cli.run([*pair, "-o", str(out), "--force", "--method", "corrected", *AMOUNT]) == 0
    captured = capsys.readouterr()
    assert f"{out}: an adapter for {damaged}" in captured.out and "distilled" not in captured.out
    assert "peft.PeftModel.from_pretrained(model, " in captured.err.splitlines()[-1]


def test_a_dry_repair_shows_the_adapters(
    models: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    pair = ["recover", "--degraded", str(damaged), "--teacher", str(models / "hf")]
    words = [*pair, "-o", str(tmp_path / "out"), "--dry-run", "--adapters", "kv:4"]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    assert "k_proj" in captured.out and "nothing is made with --dry-run" in captured.err
    assert cli.run([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ranks"] == {f"model.layers.{i}.self_attn.{part}_proj": 4 for i in (0, 1) for part in "kv"}
    assert facts["adapter_nbytes"] == 4 * 4 * 4 * (128 + 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--degraded", "damaged"], "name both models: --teacher MODEL, the sound one, is missing"),
        (["--teacher", "hf"], "name both models: --degraded DIR, the damaged model, is missing"),
        (["--merge"], "is missing"),
        (["--degraded", "other", "--teacher", "hf"], "is no damaged"),
        (["--degraded", "checkpoint", "--teacher", "hf"], "is a checkpoint folder, which is quantized already"),
        (["--degraded", "hf", "--teacher", "hf"], "holds the teacher's own weights, so there is nothing to recover"),
        (["--degraded", "damaged", "--teacher", "hf", "--method", "scales"], "method 'scales' is not for float models"),
    ],
)
def test_a_repair_that_cannot_be_is_one_line(
    models: Path,
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    capsys.readouterr()
    places = [str(models / word) if (models / word).exists() else word for word in arguments]
    assert cli.run(["recover", "-o", str(tmp_path / "out"), *places, *AMOUNT]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("error: ") and words in last
    assert list(tmp_path.iterdir()) == []
