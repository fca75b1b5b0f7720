"""The benchmark of KV caches: bytes against their limits, figures of every cache, cases that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

import tiny
from rlkit.apps.benchmarks import kv_cache
from rlkit.apps.kvcalibrate import Wanted, add_caches
from rlkit.export.build import export_bundle
from rlkit.export.kvscales import SCHEMES


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kv-bench")
    made = export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)
    add_caches(made, Wanted(tuple(SCHEMES.values()), tokens=300, measure=False))
    return made


@pytest.fixture(scope="module")
def corpus(bundle: Path) -> Path:
    file = bundle.parent / "text.txt"
    file.write_text("\f".join(tiny.SENTENCES * 30))
    return file


def run(bundle: Path, out: Path, corpus: Path, **changes: object) -> dict[str, dict[str, object]]:
    told: dict[str, object] = {"depth": 128, "contexts": "40,100000", "rows": 2, "last": 16, "threads": 1, "case": None}
    kv_cache.main(bundle, out, words=str(corpus), json=False, **{**told, **changes})  # type: ignore[arg-type]
    found: dict[str, dict[str, object]] = json.loads((out / "kv_cache.json").read_text())["caches"]
    return found


def test_every_cache_is_measured_once(bundle: Path, corpus: Path, tmp_path: Path) -> None:
    found = run(bundle, tmp_path / "out", corpus)
    assert list(found) == ["float", "int8", "int4"]
    assert [facts["share"] for facts in found.values()] == [1.0, 0.25, 0.125]
    assert all(facts["within_limit"] and facts["seconds_per_token"] > 0 for facts in found.values())  # type: ignore[operator]
    assert found["float"]["contexts"] == {}
    for length in ("40", "256"):  # what is longer than the context is cut to it
        kls = [found[name]["contexts"][length]["kl_mean"] for name in SCHEMES]  # type: ignore[index]
        assert 0 < kls[0] < kls[1] < 0.1
        assert found["int8"]["contexts"][length]["rows"] == 2  # type: ignore[index]
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*-*.json")}
    assert len(kept) == 6
    assert run(bundle, tmp_path / "out", corpus) == found
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*-*.json")} == kept


def test_a_cache_beyond_its_limit_is_a_failure(
    bundle: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"float": 100, "int8": 27, "int4": 16}

    def measured(case: kv_cache.Case) -> dict[str, object]:
        if case.what == "cost":
            return {"contexts": {}}
        speeds = {"seconds_per_token": 0.1, "seconds_per_token_short": 0.1}
        return {"nbytes_per_token": sizes[case.kv], "cache_nbytes": 1, "peak_nbytes": 1, **speeds}

    monkeypatch.setattr(kv_cache, "_measured", measured)
    with pytest.raises(typer.Exit) as stopped:
        run(bundle, tmp_path / "out", corpus)
    assert stopped.value.exit_code == 1
    caches = json.loads((tmp_path / "out" / "kv_cache.json").read_text())["caches"]
    assert [facts["within_limit"] for facts in caches.values()] == [True, True, False]
    assert "16.0%" in capsys.readouterr().out


def test_too_little_text_is_said(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text(tiny.SENTENCES[0])
    shared = (str(tmp_path), 64, (40,), 3, 8, str(file), 1)
    with pytest.raises(ValueError, match=r"has \d+ tokens, fewer than 120"):
        kv_cache.cost(kv_cache.Case("cost", str(bundle), "float", *shared))
