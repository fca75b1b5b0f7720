"""The examples of docs/library.md, run one after the other against a tiny bundle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tiny
from rlkit.export.build import export_bundle

PAGE = Path(__file__).parent.parent / "docs" / "library.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny.checkpoint(tiny.llama(tmp_path / "hf", context=1024), tmp_path / "ckpt")
    names: dict[str, object] = {"bundle": export_bundle(checkpoint, tmp_path / "bundle", accuracy_level=0)}
    text = PAGE.read_text(encoding="utf-8")
    examples = list(EXAMPLE.finditer(text))
    assert len(examples) == text.count("```python") >= 7
    for example in examples:
        line = text.count("\n", 0, example.start()) + 1  # where the code begins, less the one that compile counts
        exec(compile("\n" * line + example[1], str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "no bundle folder" in said
    assert "perplexity" in said
    assert "Stats(slots=2, queue=8" in said
