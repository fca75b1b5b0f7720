"""The command bench: a tiny bundle measured in a process of its own, every format, comparisons, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from measured import entry, result
from rlkit.apps import cli
from rlkit.export.build import export_bundle
from rlkit.profiles.benchfile import read_result
from rlkit.recover.atomic import write_json

SMALL = ("--prompt", "8", "--generate", "4", "--repeats", "2", "--threads", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measure")
    checkpoint = tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt")
    return export_bundle(checkpoint, root / "bundle", accuracy_level=0)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    for name, seconds in (("a", (0.5, 0.51)), ("b", (0.25, 0.26))):
        write_json(tmp_path / f"{name}.json", result(entry("x", prefill=seconds)).to_json())
    return str(tmp_path / "a.json"), str(tmp_path / "b.json")


def test_a_bundle_is_measured_at_two_depths(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert cli.run(["bench", str(bundle), *SMALL, "--depth", "0,16", "-o", str(out), "--json"]) == 0
    found = read_result(out)
    assert json.loads(capsys.readouterr().out) == found.to_json()
    (kept,) = found.entries
    assert [series.test.name for series in kept.measurement.series] == ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"]
    assert [len(series.rounds) for series in kept.measurement.series] == [2] * 4
    assert (kept.recipe, kept.target, kept.measurement.provider, kept.measurement.threads) == ("w4", "cpu", "cpu", 1)
    deep, shallow = kept.measurement.series[3].nbytes_per_token, kept.measurement.series[1].nbytes_per_token
    assert deep is not None and shallow is not None and deep > shallow
    peaks = [series.peak_nbytes for series in kept.measurement.series]
    assert None in peaks or peaks == sorted(peaks)  # type: ignore[type-var]
    assert cli.run(["bench", str(bundle), *SMALL, "-o", str(out)]) == 2
    assert "pass --force" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "part"), [("md", "| bundle | recipe |"), ("csv", "ttft_seconds"), ("table", "TTFT")])
def test_results_are_printed_in_every_format(
    form: str, part: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", str(bundle), *SMALL, "--repeats", "1", "--warmups", "0", "--format", form]) == 0
    text = capsys.readouterr().out
    assert part in text and "pp8" in text and "tg4" in text


def test_a_bundle_for_another_device_runs_on_the_cpu_and_says_so(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = export_bundle(bundle.parent / "ckpt", tmp_path / "webgpu", target="igpu")
    assert cli.run(["bench", str(made), *SMALL, "--repeats", "1", "--warmups", "0", "--format", "md"]) == 0
    assert "webgpu was made for" in capsys.readouterr().out
    assert cli.run(["bench", str(made), *SMALL, "--provider", "dml"]) == 1
    assert "does not run on dml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "part"), [("table", "B is faster"), ("md", "| x | pp64 |"), ("csv", "x,pp64"), ("json", '"significant"')]
)
def test_two_files_are_compared(
    form: str, part: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", "--compare", *files, "--format", form]) == 0
    assert part in capsys.readouterr().out


def test_comparisons_refuse_other_files(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.json"
    write_json(old, {**result().to_json(), "schema_version": 1})
    for words, message in (
        (("--compare", files[0], str(old)), "schema_version 1, this rlkit reads 2"),
        (("bundle", "--compare", *files), "measures nothing; leave out bundle"),
        (("--compare", files[0], str(tmp_path / "absent.json")), "absent.json"),
    ):
        assert cli.run(["bench", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to measure"),
        (("nowhere",), "no rlkit bundle"),
        (("nowhere", "--prompt", "64;9"), "--prompt '64;9' is no list of numbers"),
        (("nowhere", "--depth", "x"), "--depth 'x' is no list of numbers"),
        (("nowhere", "--depth", "-1"), "none may be negative"),
        (("nowhere", "--prompt", "0", "--generate", "0"), "no test to run"),
        (("nowhere", "--repeats", "0"), "at least 1 repeat"),
    ],
)
def test_absurd_benchmarks_are_one_line_and_code_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_more_tokens_than_the_context_are_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", str(bundle), *SMALL, "--depth", "250"]) == 2
    assert "259 tokens exceed the context" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--help"]) == 0
    assert "Example: rlkit bench" in capsys.readouterr().out
