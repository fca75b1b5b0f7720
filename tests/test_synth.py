"""The command synthesize on tiny models: what it makes of a model and of given text, what it shows, what it refuses."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.apps import cli, synth
from rlkit.recover.corpus import Corpus
from rlkit.recover.progress import Progress, silent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.checkpoint(tiny.llama(root / "hf"), root / "checkpoint")
    return root / "hf"


SMALL = ["--sequences", "12", "--length", "16", "--kept", "8"]


def test_a_corpus_is_made_and_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "corpus"
    words = ["synthesize", str(model), "-o", str(out), *SMALL]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    told = rf"{re.escape(str(out))}: 12 rows of 16 tokens, \d+ tokens/s, 0 duplicates and 0 loops replaced, 10\.\d kB\n"
    assert re.fullmatch(told, captured.out)
    assert "synthesize: 100%" in captured.err
    assert captured.err.splitlines()[-1] == f"next: rlkit recover {model} --corpus {out} -o CHECKPOINT"
    corpus = Corpus.open(out)
    assert corpus.ids.shape == (12, 16) and corpus.top_k == 8
    assert cli.run(words) == 2
    assert "exists already; pass --force" in capsys.readouterr().err
    assert cli.run([*words, "--force", "--seed", "1", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert captured.err == ""
    assert facts.pop("path") == str(out) and facts.pop("tokens_per_s") > 0
    assert facts == Corpus.open(out).facts == json.loads((out / "corpus.json").read_text())
    assert (Corpus.open(out).ids != corpus.ids).any()


def test_every_option_reaches_the_sampling(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"temperature": 0.8, "top_k": 20, "chat_share": 0.0, "seed": 5, "kept": 3, "length": 20, "sequences": 9}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.run(["synthesize", str(model), "-o", str(tmp_path / "out"), "--json", *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sampling"] == options | {"batch": 192}


TEXT = [f"{sentence} {number}" for number in range(40) for sentence in tiny.SENTENCES]


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.jsonl.gz"])
def test_given_text_is_scored(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    lines = "\n".join(json.dumps({"text": document}) for document in TEXT)
    data = tmp_path / name
    if name.endswith(".gz"):
        data.write_bytes(gzip.compress(lines.encode()))
    else:
        data.write_text("\n".join(TEXT) if name.endswith(".txt") else lines)
    words = ["synthesize", str(model), "-o", str(tmp_path / "out"), "--data", str(data), *SMALL]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    assert "score: 100%" in captured.err and "12 rows of 16 tokens" in captured.out and "loops" not in captured.out
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.facts["origin"] == "text" and corpus.top_k == 8
    said = tiny.tokenizer().decode(corpus.ids[0])
    assert any(word in said for word in ("cat", "model", "bits", "France"))


def test_dry_runs_say_how_much_and_make_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["synthesize", str(model), "-o", str(tmp_path / "out"), "--dry-run"]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    assert captured.out == "384 rows of 128 tokens, 49152 tokens, with 64 log-probabilities each: 19.2 MB\n"
    assert "nothing is made with --dry-run" in captured.err
    assert cli.run([*words, "--json", *SMALL]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan == {"sequences": 12, "length": 16, "tokens": 192, "nbytes": 192 * (4 + 8 * 6 + 2)}
    assert list(tmp_path.iterdir()) == []
    assert cli.run([*words[:-1], *SMALL, "--json"]) == 0
    nbytes = sum(shard["nbytes"] for shard in json.loads(capsys.readouterr().out)["shards"])
    assert plan["nbytes"] < nbytes < plan["nbytes"] + 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["checkpoint"], "is a checkpoint; name the full-precision model"),
        (["nowhere"], "no such file, folder or asset"),
        (["hf", "--length", "300"], "length = 300 is more than the model's context of 256 tokens"),
        (["hf", "--temperature", "0"], "temperature = 0.0 must be in (0, 5]"),
        (["hf", "--chat-share", "2"], "chat_share = 2.0"),
        (["hf", "--kept", "1000"], "1000 tokens are more than the vocabulary of 512"),
        (["hf", "--top-k", "-1"], "'--top-k'"),
        (["hf", "--sequences", "0"], "'--sequences'"),
        (["hf", "--length", "8"], "leaves nothing to sample behind the"),
        (["hf", "--data", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["hf", "--data", "empty.txt"], "empty.txt holds no text"),
        (["hf", "--data", "bad.jsonl"], "bad.jsonl, line 2 is not"),
        (["hf", "--data", "short.txt"], "the text has 2 tokens, fewer than one row of 128"),
        (["hf", "--data", "short.doc"], "short.doc is no text that can be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_made(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "short.doc").write_text("a")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    name, *options = arguments
    place = model.parent / name
    words = ["synthesize", str(place) if place.exists() else name, "-o", "out", *options]
    assert cli.run(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("error: ") and said in captured.err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "empty.txt", "short.doc", "short.txt"]


def test_a_damaged_corpus_can_be_made_again(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the error says to do helps: the same command with --force."""
    out = tmp_path / "out"
    words = ["synthesize", str(model), "-o", str(out), *SMALL, "--json"]
    assert cli.run(words) == 0
    before = Corpus.open(out).ids
    shard = out / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"run the same `rlkit synthesize` again with --force"):
        Corpus.open(out)
    assert cli.run([*words, "--force"]) == 0
    np.testing.assert_array_equal(Corpus.open(out).ids, before)
    capsys.readouterr()


def test_the_speed_is_of_this_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("rlkit.apps.synth.time.perf_counter", lambda: next(clock))
    speed = synth._Speed(silent)
    speed.tell(Progress("synthesize", 1000, 2000))  # sampled by an earlier run
    assert speed.tokens_per_s is None
    speed.tell(Progress("synthesize", 1500, 2000))
    speed.tell(Progress("synthesize", 2000, 2000))
    assert speed.tokens_per_s == 250
