"""The command report: every format, the page, files that cannot be read, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import measured
import runs
from rlkit.apps import cli
from rlkit.recover.atomic import write_json


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    cpu, gpu = tmp_path / "cpu.json", tmp_path / "gpu.json"
    write_json(cpu, runs.run(runs.row(promise=0.011), runs.row(runs.PREFILL, 0.5)).to_json())
    write_json(gpu, runs.run(runs.row(seconds=0.005, threads=None), part=runs.IGPU).to_json())
    return str(cpu), str(gpu)


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ("table", "AMD Radeon 890M webgpu decodes at 2.00 times"),
        ("md", "| model | recipe | test | AMD Ryzen AI 9 HX 370 CPU | AMD Radeon 890M webgpu |"),
        ("csv", "machine,cpu,family"),
        ("json", '"kind": "device-report"'),
    ],
)
def test_reports_are_printed_in_every_format(
    form: str, part: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", *files, "--format", form]) == 0
    shown = capsys.readouterr()
    assert part in shown.out and shown.err == ""


def test_json_alone_is_printed(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["lines"]) == 2 and "decodes at 2.00 times" in found["findings"][0]


def test_a_page_is_written_once(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert cli.run(["report", *files, "-o", str(page)]) == 0
    first = page.read_text()
    assert "AMD Radeon 890M webgpu" in first and str(tmp_path) not in first
    assert cli.run(["report", *files, "-o", str(page)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert cli.run(["report", *files, "-o", str(page), "--force"]) == 0
    assert page.read_text() == first


def test_a_file_that_cannot_be_read_is_named_and_left_out(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, damaged, page = tmp_path / "old.json", tmp_path / "damaged.json", tmp_path / "report.html"
    write_json(old, {**runs.run().to_json(), "schema_version": 7})
    damaged.write_text("{")
    bad = (str(old), str(damaged), str(tmp_path / "absent.json"))
    assert cli.run(["report", *files, *bad, "-o", str(page), "--format", "md"]) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert ["schema_version 7" in errors[0], "damaged.json" in errors[1], "absent.json" in errors[2]] == [True] * 3
    assert len(errors) == 3 and "| smollm2-135m" in shown.out and "left out:" in shown.out
    assert "left out:" in page.read_text() and "schema_version 7" in page.read_text()


@pytest.mark.parametrize(
    ("content", "why"), [('{"schema_version": 3, "kind": "bench"}', "schema_version 3, this"), ("[]", "object")]
)
def test_nothing_readable_is_one_line(
    content: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert cli.run(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1 and str(path) in error


def test_a_file_named_twice_is_read_once(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", files[0], files[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_results_of_bench_are_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "bench.json", measured.result().to_json())
    assert cli.run(["report", str(tmp_path / "bench.json")]) == 0
    assert "Some 9000 CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [(("-o", "report.pdf"), "end it with .html"), (("--format", "xml"), "xml"), ((), "Missing argument")],
)
def test_absurd_words_are_one_line_and_code_2(
    words: tuple[str, ...], why: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", *(files if words else ()), *words]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", "--help"]) == 0
    assert "Example: rlkit report" in capsys.readouterr().out
