"""The command `export`, and that the bundle of every target computes what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import families
import ggufs
import tiny
from rlkit.apps import cli
from rlkit.export.build import export_bundle
from rlkit.export.lint import lint_file
from rlkit.recover import recipe
from rlkit.runtime.session import open_bundle

W2 = recipe.parse('[[rule]]\nmatch = ["*.gate_proj", "*.up_proj"]\nbits = 2\ngroup = 64\n[[rule]]\nbits = 4\n')
IDS = np.random.default_rng(4).integers(3, tiny.VOCAB, (2, 20))
TARGETS: dict[str, dict[str, Any]] = {
    "cpu": {"target": "cpu", "accuracy_level": 0},
    "webgpu float32": {"target": "igpu", "dtype": "float32", "accuracy_level": 0},
    "webgpu": {"target": "igpu", "accuracy_level": 0},
    "dml": {"target": "igpu", "provider": "dml"},
    "npu": {"target": "npu"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ship")
    return tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt", W2)


@pytest.mark.parametrize("name", TARGETS)
def test_every_targets_bundle_runs_on_the_cpu_too(name: str, checkpoint: Path, tmp_path: Path) -> None:
    out = export_bundle(checkpoint, tmp_path / "b", **TARGETS[name])
    session, expected = open_bundle(out), tiny.logits(tiny.dequantized(checkpoint), IDS)
    found = session.logits(IDS)
    half = name not in ("cpu", "webgpu float32")
    assert np.abs(found - expected).max() <= (5e-3 if half else 1e-5) * np.abs(expected).max()
    tokens = [token.id for token in session.generate(IDS[0].tolist(), 4, ignore_stop=True)]
    assert tokens[0] == expected[0, -1].argmax() or half
    assert len(tokens) == 4
    manifest = json.loads((out / "rlkit.json").read_text())
    stored = (out / "model.onnx.data").stat().st_size
    assert manifest["nbytes"] == manifest["plan"]["nbytes"]
    assert abs(stored - manifest["nbytes"]) <= 0.02 * manifest["nbytes"]
    bits = {tensor["bits"] for tensor in manifest["tensors"] if tensor["kind"] == "gate_up"}
    assert bits == ({4} if name in ("dml", "npu") else {2})
    assert lint_file(out / "logits.onnx", target=manifest["target"]) == [] or name == "cpu"  # level 0 is slow there


def test_an_npus_folder_says_what_is_next(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--target", "npu", "--mode", "token-fusion"]
    assert cli.run([*words, "--no-measure", "--finish"]) == 2  # AMD's tool is not here ...
    err = capsys.readouterr().err
    assert "install Ryzen AI" in err.splitlines()[-1]
    notes = json.loads((tmp_path / "b" / "npu.json").read_text())  # ... but what it needs is
    assert notes["mode"] == "token-fusion" and "model_generate" in notes["next"][-1]
    assert cli.run([*words, "--no-measure", "--force"]) == 0
    assert "model_generate" in "".join(capsys.readouterr())


def test_a_gguf_is_exported_and_measured_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ggufs.write(tmp_path / "model.gguf", ggufs.random_model())
    assert cli.run(["export", str(file), "-o", str(tmp_path / "b"), "--accuracy-level", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "bundle"
    manifest = json.loads((tmp_path / "b" / "rlkit.json").read_text())
    assert manifest["divergence"]["kl_mean"] < 1e-3  # only what is float in the file was rounded
    assert {row["type"] for row in manifest["report"]} >= {"Q4_0", "Q8_0"}


def test_a_float_model_is_rounded_held_to_a_limit_and_carded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.llama(tmp_path / "hf")
    words = ["export", str(source), "-o", str(tmp_path / "b")]
    assert cli.run([*words, "--recipe", "w4w2-gateup", "--max-kl", "0.000001"]) == 2
    assert "more than the 1e-06 asked for" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "b").exists()
    assert cli.run(words) == 0
    assert "the file that ships: KL 0." in capsys.readouterr().out
    manifest = json.loads((tmp_path / "b" / "rlkit.json").read_text())
    assert manifest["recipe"]["name"] == "w4-g32" and manifest["divergence"]["reference"]["kind"] == "original"
    assert f"{manifest['divergence']['kl_mean']:.4f}" in (tmp_path / "b" / "README.md").read_text()


def test_the_plan_gives_its_reasons(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--target", "igpu", "--provider", "dml", "--dry-run"]
    assert cli.run(words) == 0
    out = capsys.readouterr().out
    assert "2 bits in 4-bit fields, lossless" in out and "DirectML 4-bit" in out and "not verified" in out
    assert not (tmp_path / "b").exists()
    assert cli.run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["target"] == "dml"


def test_a_qwen3_for_webgpu_is_measured_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms of queries and keys stay outside of attention, which no CPU and no older WebGPU runtime does inside."""
    source = families.folder("qwen3", tmp_path / "hf")
    assert cli.run(["export", str(source), "-o", str(tmp_path / "b"), "--target", "igpu"]) == 0
    assert "the file that ships: KL" in capsys.readouterr().out
