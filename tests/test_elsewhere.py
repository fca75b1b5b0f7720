"""The process that times bundles in another environment: its steps choose the session's tokens, its protocol holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from rlkit.export.build import export_bundle
from rlkit.profiles import worker
from rlkit.profiles.bench import Work
from rlkit.recover.atomic import write_json
from rlkit.recover.source import read_json
from rlkit.runtime import elsewhere
from rlkit.runtime.session import open_bundle

PROMPT = [300, 17, 401, 256, 90]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elsewhere")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


def greedy(bundle: Path, count: int) -> list[int]:
    return [token.id for token in open_bundle(bundle, threads=1).generate(PROMPT, count, ignore_stop=True)]


def test_steps_choose_the_tokens_of_the_session(bundle: Path) -> None:
    graph = elsewhere.Graph(bundle, "cpu", 1)
    graph._prepare(PROMPT[:3], 64)
    token, past, found = graph.step(PROMPT[3:], 3), len(PROMPT), []
    for _ in range(6):
        found.append(token)
        token, past = graph.step([token], past), past + 1
    assert found == greedy(bundle, 6)


def test_a_later_prompt_writes_over_an_earlier_one(bundle: Path) -> None:
    graph = elsewhere.Graph(bundle, "cpu", 1)
    assert all(second > 0 for second in graph.generate(PROMPT[:3], [5, 6, 7, 8, 9], 4, 64))
    cache = dict(graph._cache)
    seconds = list(graph.generate(PROMPT[:3], PROMPT[3:], 4, 64))
    assert len(seconds) == 4 and graph._cache == cache  # nothing was filled again
    fresh = elsewhere.Graph(bundle, "cpu", 1)
    list(fresh.generate(PROMPT[:3], PROMPT[3:], 4, 64))
    used = len(PROMPT) + 3
    for name, value in graph._cache.items():
        np.testing.assert_array_equal(value.numpy()[:, :, :used], fresh._cache[name].numpy()[:, :, :used])


def test_a_deep_fill_goes_in_by_pieces(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = list(range(256, 296))
    caches = []
    for size in (elsewhere.FILL_TOKENS, 16):
        monkeypatch.setattr(elsewhere, "FILL_TOKENS", size)
        graph = elsewhere.Graph(bundle, "cpu", 1)
        graph._prepare(fill, 64)
        caches.append([value.numpy()[:, :, : len(fill)].copy() for value in graph._cache.values()])
    for whole, pieces in zip(*caches, strict=True):
        np.testing.assert_allclose(whole, pieces, atol=1e-4)


def test_genai_is_timed_as_it_is(bundle: Path) -> None:
    timed = elsewhere.Genai(bundle, "cpu", 1)
    for prompt in (PROMPT, PROMPT[:2]):
        assert len(list(timed.generate([300] * 20, prompt, 3, 64))) == 3
    assert timed._generator.token_count() == 20 + 2 + 3
    with pytest.raises(ValueError, match="bundle names no provider, not RyzenAI"):
        elsewhere.Genai(bundle, "RyzenAI", 0)


def test_what_cannot_run_is_said(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no DmlExecutionProvider"):
        elsewhere.Graph(bundle, "dml", 0)
    graph = elsewhere.Graph(bundle, "cpu", 1)
    with pytest.raises(ValueError, match="a cache of 999 tokens exceeds the context of 256"):
        list(graph.generate([], PROMPT, 1, 999))
    config = read_json(bundle / "genai_config.json")
    config["search"]["past_present_share_buffer"] = False
    write_json(tmp_path / "genai_config.json", config)
    with pytest.raises(ValueError, match="does not keep past and present in one buffer"):
        elsewhere.Graph(tmp_path, "cpu", 1)


@pytest.mark.parametrize("engine", ["onnx", "genai"])
def test_it_speaks_as_a_worker_does(engine: str, bundle: Path) -> None:
    command = [sys.executable, "-I", elsewhere.__file__, engine, "cpu", "1", str(bundle)]
    with worker.start("x", command, {"RLKIT_TEST": "1"}) as process:
        assert (process.threads, process.provider) == (1, "cpu")
        seconds = list(process.generate(Work([300] * 8, PROMPT, 3, 32)))
        assert len(seconds) == 3 and min(seconds) > 0
        peak = process.peak_nbytes()
        assert peak is None or peak > 2**20


def test_errors_reach_the_other_end_in_one_line(bundle: Path) -> None:
    command = [sys.executable, "-I", elsewhere.__file__, "onnx", "dml", "0", str(bundle)]
    with pytest.raises(ChildProcessError, match=r"x failed: onnxruntime .* has no DmlExecutionProvider"):  # noqa: SIM117
        with worker.start("x", command):
            pass


def test_variables_reach_the_process(bundle: Path) -> None:
    script = "import json, os; print(json.dumps({'threads': int(os.environ['COUNT']), 'provider': os.environ['PATH']}))"
    with worker.start("x", [sys.executable, "-c", script], {"COUNT": "7"}) as process:
        assert (process.threads, process.provider) == (7, os.environ["PATH"])


def test_facts_are_one_line_of_json() -> None:
    command = [sys.executable, "-I", elsewhere.__file__, "facts"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert "CPUExecutionProvider" in found["providers"] and found["versions"]["onnxruntime"]


def test_it_imports_nothing_of_this_project() -> None:
    """Another environment has numpy and a runtime, and nothing else."""
    text = Path(elsewhere.__file__).read_text(encoding="utf-8")
    assert "import rlkit" not in text and "from rlkit" not in text and "psutil" not in text
