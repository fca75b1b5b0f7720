"""The option --kv-from: what `rlkit kv` chose, taken by run, chat, serve and export, for its own model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from rlkit.apps import cli, kvfrom
from rlkit.apps.asking import Place
from rlkit.export.build import export_bundle
from rlkit.profiles.frontier import result
from rlkit.profiles.frontier.identity import identity_of
from rlkit.profiles.frontier.result import Budget, FrontierResult, KvSettings, Row, settings_of
from rlkit.profiles.frontier.search import Evaluated
from rlkit.profiles.frontier.space import Point
from rlkit.profiles.needs import Memory
from rlkit.recover import source
from rlkit.runtime.request import Prefilled, Request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("kvfrom") / "hf")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    return export_bundle(tiny.checkpoint(folder, folder.parent / "ckpt"), folder.parent / "bundle")


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    return tiny.llama(folder.parent / "other", intermediate_size=320)


def saved(model: Path, path: Path, *chosen: KvSettings) -> Path:
    rows = tuple(Row(Evaluated(one.point, Memory(1, 1, 1)), {}, 0.0, None, True) for one in chosen)
    result.save(FrontierResult(identity_of(source.resolve(model)), rows, chosen, Budget(), 0.0, 0.0), path)
    return path


def settings(kv: str = "float", chunk: int | None = 3) -> KvSettings:
    return settings_of(Point("w4", kv, chunk, 64))


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert cli.run([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_run_reads_prompts_in_the_chosen_chunks(
    folder: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(folder, tmp_path / "kv.json", settings())
    assert cli.run(["run", str(bundle), "the cat", "-n", "4", "--kv-from", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kv"] == "float" and err == f"{file}: kv float, chunks of 3\n"
    assert cli.run(["run", str(bundle), "the cat", "-n", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == json.loads(out)["text"]
    session = Place(kv_from=file).open(bundle)
    request = Request((5, 6, 7, 8, 9, 10, 11), 2)
    assert [event.done for event in session.stream(request) if isinstance(event, Prefilled)] == [3, 6, 7]
    assert Place(kv_from=saved(folder, tmp_path / "whole.json", settings(chunk=None))).open(bundle).chunk_tokens > 7


def test_chat_opens_only_bundles_of_the_results_model(
    folder: Path, bundle: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wider = export_bundle(tiny.checkpoint(other, tmp_path / "ckpt"), tmp_path / "wider")
    file, said = saved(folder, tmp_path / "kv.json", settings()), tmp_path / "said"
    said.write_text(f"/model {wider}\n/model\nhello\n")
    with said.open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        assert cli.run(["chat", str(bundle), "-n", "4", "--kv-from", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "error: " in err and "kv.json is of another model" in err and f"model: {bundle}; " in err
    assert json.loads(out.splitlines()[-1])["kv"] == "float"


@pytest.mark.parametrize("command", ["run", "chat", "serve", "export"])
def test_what_is_refused_is_one_line(
    command: str, folder: Path, bundle: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"run": [bundle, "hi"], "chat": [bundle], "serve": [bundle], "export": [folder, "-o", tmp_path / "made"]}
    theirs = saved(other, tmp_path / "theirs.json", settings())
    said = error(capsys, command, *words[command], "--kv-from", theirs)
    assert f"{theirs} is of another model, " in said and "; measure this one with `rlkit kv`" in said
    ours = saved(folder, tmp_path / "ours.json", settings())
    said = error(capsys, command, *words[command], "--kv", "int8", "--kv-from", ours)
    assert said.endswith("both say which cache; leave one of them out")
    said = error(capsys, command, *words[command], "--kv-from", saved(folder, tmp_path / "none.json"))
    assert "chose nothing" in said
    capsys.readouterr()
    assert cli.run([command, *map(str, words[command]), "--kv-from", "absent.json"]) != 0
    assert "there is no result absent.json; make one with: rlkit kv MODEL -o" in capsys.readouterr().err


def test_a_cache_that_is_not_there_says_how_to_have_one(
    folder: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(folder, tmp_path / "kv.json", settings("k2v2"))
    with pytest.raises(ValueError, match=r"has no int4 cache, only float; add it with: rlkit kv-calibrate .* --add"):
        Place(kv_from=file).open(bundle)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{file}: kv int4, chunks of 3 (measured with k2v2; the runtime has no such cache, int4 is the next wider one; "
        "to choose among what it has, search with --kv k8v8:smooth,k4v4:smooth)"
    )
    assert kvfrom.chosen(None, file, [folder, bundle]).caches == "int4"
    assert result.read_settings(file, source.resolve(bundle)).chunk == 3
