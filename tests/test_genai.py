"""The runtime's own library by its C interface: results of its Python module, errors, the end of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest

import tiny
from rlkit.export.build import export_bundle
from rlkit.runtime import genai

IDS = np.arange(20, 50, dtype=np.int32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("genai")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


@pytest.fixture(scope="module")
def model(bundle: Path) -> genai.Model:
    config = genai.Config(str(bundle))
    config.clear_providers()
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    return genai.Model(config)


def generator(model: genai.Model, **options: bool | float) -> genai.Generator:
    params = genai.GeneratorParams(model)
    params.set_search_options(**{"max_length": 64, "do_sample": False, **options})
    return genai.Generator(model, params)


def test_it_computes_what_the_python_module_computes(model: genai.Model, bundle: Path) -> None:
    ours = generator(model, min_length=64)
    params = og.GeneratorParams(theirs := og.Model(str(bundle)))
    params.set_search_options(max_length=64, min_length=64, do_sample=False)
    other = og.Generator(theirs, params)
    for one in (ours, other):
        one.append_tokens(IDS[None])
    np.testing.assert_allclose(ours.get_logits(), other.get_logits(), atol=1e-5)
    assert ours.get_logits().shape == (1, 1, tiny.VOCAB)
    for one in (ours, other):
        while not one.is_done():
            one.generate_next_token()
        assert one.get_next_tokens().tolist() == one.get_sequence(0)[-1:].tolist()
    assert ours.get_sequence(0).tolist() == other.get_sequence(0).tolist()
    assert len(ours.get_sequence(0)) == 64


def test_logits_may_be_given(model: genai.Model) -> None:
    one = generator(model)
    one.append_tokens([5, 6, 7])
    scores = np.zeros((1, 1, tiny.VOCAB), np.float32)
    scores[0, 0, 99] = 1
    one.set_logits(scores)
    one.generate_next_token()
    assert one.get_next_tokens().tolist() == [99]
    assert one.get_sequence(0).tolist() == [5, 6, 7, 99]


def test_rewinding(model: genai.Model) -> None:
    one = generator(model)
    one.append_tokens(IDS[:10])
    expected = one.get_logits()
    one.append_tokens(IDS[10:])
    one.rewind_to(5)
    one.append_tokens(IDS[5:10])
    np.testing.assert_allclose(one.get_logits(), expected, atol=1e-5)
    assert one.get_sequence(0).tolist() == IDS[:10].tolist()


def test_logits_are_copies(model: genai.Model) -> None:
    one = generator(model)
    one.append_tokens([5])
    first = one.get_logits()
    kept = first.copy()
    one.append_tokens([6])
    one.get_logits()
    assert (first == kept).all()


def test_errors_are_the_librarys_words(model: genai.Model, tmp_path: Path) -> None:
    one = generator(model)
    with pytest.raises(RuntimeError, match="input_ids is empty"):
        one.append_tokens([])
    with pytest.raises(RuntimeError, match="exceeds max length"):
        one.append_tokens([5] * 65)
    with pytest.raises(RuntimeError, match="rewind"):
        one.rewind_to(5)
    with pytest.raises(RuntimeError, match="no_such_option"):
        generator(model, no_such_option=1)
    with pytest.raises(RuntimeError):
        genai.Config(str(tmp_path / "absent"))
    one.append_tokens([5])  # and goes on after each
    assert one.get_sequence(0).tolist() == [5]


@pytest.mark.parametrize("what", ["session", "stream", "engine", "engine and a reply"])
def test_a_process_ends_cleanly_whatever_is_open(what: str, bundle: Path) -> None:
    program = """
import pathlib, sys
from rlkit.runtime.engine import Engine
from rlkit.runtime.request import Request
from rlkit.runtime.session import open_bundle
session = open_bundle(pathlib.Path(sys.argv[1]), threads=1)
request = Request((5, 6, 7), 200, ignore_stop=True)
if sys.argv[2] == "stream":
    stream = session.stream(request)
    print(next(stream), next(stream))
if sys.argv[2].startswith("engine"):
    engine = Engine(session)
    ticket = engine.submit(request)
    if "reply" in sys.argv[2]:
        print(next(iter(ticket)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(bundle), what], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
