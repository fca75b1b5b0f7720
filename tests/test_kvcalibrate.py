"""The command `kv-calibrate` and `export --kv`: caches added beside a bundle, what the manifest says, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from rlkit.apps import cli, publish
from rlkit.apps import kvcalibrate as command
from rlkit.export.build import export_bundle
from rlkit.recover.source import read_json
from rlkit.runtime.session import open_bundle

NAMES = ["logits.kv-int4.onnx", "logits.kv-int8.onnx", "model.kv-int4.onnx", "model.kv-int8.onnx"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kv-command")
    return tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt")


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return export_bundle(checkpoint, checkpoint.parent / "bundle", accuracy_level=0)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_caches_are_added_beside_the_weights(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (bundle / "model.onnx.data").stat()
    words = ["kv-calibrate", str(bundle), "--add", "int8,int4", "--tokens", "400"]
    assert cli.run([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["kv_cache"]
    assert list(shown) == ["float", "int8", "int4"]
    assert sorted(file.name for file in bundle.glob("*.kv-*")) == NAMES
    now = (bundle / "model.onnx.data").stat()
    assert (now.st_ino, now.st_mtime_ns) == (weights.st_ino, weights.st_mtime_ns)
    manifest = publish.read_manifest(bundle)
    assert set(NAMES) < set(publish.files_to_send(bundle, manifest))  # their sums are right
    for name, bits in (("int8", 8), ("int4", 4)):
        facts = manifest["kv_cache"][name]
        assert facts["bits"] == bits and facts["nbytes_per_token"] * 32 == facts["float_nbytes_per_token"] * bits
        assert facts["calibration"]["tokens"] >= 400 and facts["calibration"]["seed"] == 0
        assert facts["calibration"]["ranges"] == "mse" and 0 < facts["calibration"]["key_error"] < 0.2
        assert facts["divergence"]["tokens"] > 100
    assert manifest["kv_cache"]["int8"]["divergence"]["kl_mean"] < manifest["kv_cache"]["int4"]["divergence"]["kl_mean"]
    assert "| int8 | `model.kv-int8.onnx` |" in (bundle / "README.md").read_text()


def test_the_session_runs_each_cache(bundle: Path) -> None:
    assert cli.run(["kv-calibrate", str(bundle), "--add", "int8,int4", "--tokens", "200", "--no-measure"]) == 0
    ids = np.random.default_rng(2).integers(3, tiny.VOCAB, (1, 12))
    found = {}
    for name in ("float", "int8", "int4"):
        session = open_bundle(bundle, kv=name)
        tokens = [token.id for token in session.generate(ids[0].tolist(), 6, ignore_stop=True)]
        found[name] = session.logits(ids)
        assert tokens[0] == found[name][0, -1].argmax()
    off = [np.abs(found[name] - found["float"]).max() for name in ("int8", "int4")]
    assert 0 < off[0] < off[1]


def test_one_cache_later_and_again_keeps_the_other(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["kv-calibrate", str(bundle), "--tokens", "200", "--no-measure"]
    assert cli.run([*words, "--add", "int4"]) == 0
    first = read_json(bundle / "rlkit.json")["kv_cache"]
    assert cli.run([*words, "--add", "int8", "--ranges", "max", "--values", "tensor"]) == 0
    second = read_json(bundle / "rlkit.json")["kv_cache"]
    assert list(second) == ["int8", "int4"] and second["int4"] == first["int4"]
    assert second["int8"]["calibration"] | {"ranges": "max", "values": "tensor"} == second["int8"]["calibration"]
    before = (bundle / "model.kv-int8.onnx").read_bytes()
    assert cli.run([*words, "--add", "int8"]) == 0
    assert (bundle / "model.kv-int8.onnx").read_bytes() != before
    assert cli.run([*words, "--add", "int8", "--seed", "0"]) == 0
    assert publish.files_to_send(bundle, publish.read_manifest(bundle))
    capsys.readouterr()
    assert cli.run(["kv-calibrate", str(bundle)]) == 0
    table = capsys.readouterr().out
    assert "25.0%" in table and "12.5%" in table and "float" in table


def test_the_same_seed_gives_the_same_graphs(bundle: Path) -> None:
    words = ["kv-calibrate", str(bundle), "--tokens", "200", "--no-measure", "--add", "int8"]
    graphs = []
    for seed in ("3", "3", "4"):
        assert cli.run([*words, "--seed", seed]) == 0
        graphs.append((bundle / "model.kv-int8.onnx").read_bytes())
    assert graphs[0] == graphs[1] != graphs[2]


def test_what_the_model_writes_itself_does_too(bundle: Path, tmp_path: Path) -> None:
    words = ["kv-calibrate", str(bundle), "--tokens", "100", "--add", "int8"]
    assert cli.run([*words, "--text", "generated"]) == 0
    facts = read_json(bundle / "rlkit.json")["kv_cache"]["int8"]
    assert facts["calibration"]["text"] == "generated" and facts["divergence"]["kl_mean"] < 0.01
    file = tmp_path / "own.txt"
    file.write_text(" ".join(tiny.SENTENCES) * 8)
    assert cli.run([*words, "--text", str(file)]) == 0
    assert read_json(bundle / "rlkit.json")["kv_cache"]["int8"]["calibration"]["text"] == "own.txt"


def test_an_interrupted_run_is_run_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bundle / "rlkit.json").read_bytes()

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    words = ["kv-calibrate", str(bundle), "--add", "int8,int4", "--tokens", "200"]
    with monkeypatch.context() as patched:
        patched.setattr(command.divergence, "compare", stop)
        assert cli.run(words) == 130
    assert (bundle / "rlkit.json").read_bytes() == before
    assert cli.run(words) == 0
    assert publish.files_to_send(bundle, publish.read_manifest(bundle))


def test_export_adds_them_at_once(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--kv", "int8", "--no-measure"]
    assert cli.run([*words, "--dry-run"]) == 0 and not (tmp_path / "b").exists()
    capsys.readouterr()
    assert cli.run(words) == 0
    assert "kv int8: 25.0% of the float cache's bytes" in capsys.readouterr().out
    manifest = publish.read_manifest(tmp_path / "b")
    assert list(manifest["kv_cache"]) == ["int8"] and "divergence" not in manifest["kv_cache"]["int8"]
    assert open_bundle(tmp_path / "b", kv="int8").kv == "int8"
    with pytest.raises(
        ValueError, match=r"has no int4 cache, only float, int8; add it with: rlkit kv-cal.* --add int4"
    ):
        open_bundle(tmp_path / "b", kv="int4")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kv", "int2"], "kv 'int2' is no kind of quantized cache; use int8 or int4"),
        (["--kv", ""], "kv '' is no kind of quantized cache"),
        (["--kv", "int8,int8"], "names a cache twice"),
        (["--kv", "int8", "--target", "npu"], "npu has no kernel for a quantized KV cache; use --target cpu"),
        (["--kv", "int8", "--target", "igpu"], "kvCacheQuantizationBits=4"),
    ],
)
def test_export_refuses_before_it_works(
    words: list[str], says: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["export", str(checkpoint), "-o", str(tmp_path / "b"), *words]) == 2
    assert says in last_line(capsys)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--add", "int3"], "kv 'int3' is no kind of quantized cache; use int8 or int4"),
        (["--add", "float"], "kv 'float' is no kind of quantized cache"),
        (["--add", "int8", "--ranges", "best"], "use max, percentile, mse"),
        (["--add", "int8", "--keys", "head"], "scales per 'head' do not exist; use channel or tensor"),
        (["--add", "int8", "--tokens", "3"], "3 tokens are too few to choose scales on; use at least 64"),
        (["--add", "int8", "--text", "no-such-text"], "no text 'no-such-text'"),
        (["--add", "int8", "--seed", "-1"], "seed = -1 is negative"),
        (["--add", "int8", "--context", "0"], "a context of 0 tokens holds nothing"),
    ],
)
def test_bad_words_are_one_line(words: list[str], says: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kv-calibrate", str(bundle), *words]) == 2
    assert says in last_line(capsys)
    assert not list(bundle.glob("*.kv-*"))


def test_bad_folders_are_one_line(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["kv-calibrate", str(tmp_path / "absent"), "--add", "int8"]) == 2
    assert "absent has no rlkit.json, so it is no rlkit bundle" in last_line(capsys)
    assert cli.run(["kv-calibrate", str(checkpoint), "--add", "int8"]) == 2
    assert "is no rlkit bundle" in last_line(capsys)
    short = tmp_path / "short.txt"
    short.write_text("the cat sat")
    assert cli.run(["kv-calibrate", str(bundle), "--add", "int8", "--text", str(short)]) == 2
    assert "too few to choose scales on; name a longer text, or --text generated" in last_line(capsys)
    manifest = read_json(bundle / "rlkit.json") | {"target": "webgpu"}
    (bundle / "rlkit.json").write_text(json.dumps(manifest))
    assert cli.run(["kv-calibrate", str(bundle), "--add", "int8"]) == 2
    assert "webgpu has no kernel for a quantized KV cache" in last_line(capsys)
    assert not list(bundle.glob("*.kv-*"))
