"""Which graph a kind of KV cache opens, and that sessions and steps over it are what they are over the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from rlkit.apps.kvcalibrate import Wanted, add_caches
from rlkit.export.build import export_bundle
from rlkit.export.kvscales import SCHEMES
from rlkit.recover.source import read_json
from rlkit.runtime import kv
from rlkit.runtime.kvsample import CHUNK, generated
from rlkit.runtime.plain import Plain
from rlkit.runtime.session import open_bundle
from rlkit.runtime.stepper import open_stepper


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kv")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


@pytest.fixture(scope="module")
def bundle(plain: Path) -> Path:
    source = plain.parent
    made = export_bundle(source / "ckpt", source / "cached", accuracy_level=0)
    add_caches(made, Wanted(tuple(SCHEMES.values()), tokens=300, measure=False))
    return made


def config_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "genai_config.json")


def test_graphs_and_sizes(bundle: Path) -> None:
    config = config_of(bundle)
    assert kv.offered(bundle, config) == ("float", "int8", "int4")
    files = {name: kv.graph_of(bundle, config, name) for name in (None, *kv.KINDS)}
    assert files[None] == files["float"]
    assert [file for file, _cache in files.values()] == [
        "model.onnx",
        "model.onnx",
        "model.kv-int8.onnx",
        "model.kv-int4.onnx",
    ]
    nbytes = {name: cache.nbytes_per_token for name, (_file, cache) in files.items()}
    assert nbytes["float"] == 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, numbers, bytes
    assert nbytes["int8"] <= 0.27 * nbytes["float"] and nbytes["int4"] <= 0.15 * nbytes["float"]


def test_a_cache_that_is_not_there_is_named_with_the_remedy(plain: Path) -> None:
    config = config_of(plain)
    assert kv.offered(plain, config) == ("float",)
    with pytest.raises(ValueError, match=r"has no int8 cache, only float; add it with: rlkit kv-cal.* --add int8"):
        kv.graph_of(plain, config, "int8")
    for name in ("int2", "../int8", "INT8", " "):
        with pytest.raises(ValueError, match="is no kind of cache; use float, int8, int4"):
            kv.graph_of(plain, config, name)
    with pytest.raises(ValueError, match="has no int4 cache"):
        Plain(plain, config["model"]["decoder"], 1, "int4")
    with pytest.raises(ValueError, match="has no int4 cache"):
        open_stepper(plain, kv="int4")


def test_an_odd_head_takes_a_whole_byte() -> None:
    assert kv.Cache("int4", 4, 1, 1, 5).nbytes_per_token == 2 * 3


def test_what_genai_must_be_told(bundle: Path) -> None:
    told = json.loads(json.dumps(kv.overlay("model.kv-int4.onnx")))
    assert told["model"]["decoder"]["filename"] == "model.kv-int4.onnx"
    assert told["search"]["past_present_share_buffer"] is True


@pytest.mark.parametrize(
    ("name", "kind", "width"), [("float", np.float32, 32), ("int8", np.int8, 32), ("int4", np.uint8, 16)]
)
def test_steps_write_their_own_places(bundle: Path, name: str, kind: Any, width: int) -> None:
    stepper = open_stepper(bundle, threads=1, kv=name)
    assert stepper.step(3, 9) > 0
    keys = np.array(stepper._buffers["past_key_values.0.key"].numpy())
    assert keys.dtype == kind and keys.shape == (1, 2, 12, width)
    stepper.step(3, 9)
    again = np.array(stepper._buffers["past_key_values.0.key"].numpy())
    assert (again == keys).all()
    stepper.step(1, 11, seed=1)
    later = np.array(stepper._buffers["past_key_values.0.key"].numpy())
    assert (later[:, :, :11] == keys[:, :, :11]).all() and (later[:, :, 11] != keys[:, :, 11]).any()


def test_a_graph_of_the_last_logits_alone_gives_the_cache_too(bundle: Path) -> None:
    ids = np.random.default_rng(0).integers(3, tiny.VOCAB, (1, 12))
    decoder = config_of(bundle)["model"]["decoder"]
    names = ["present.1.key", "present.0.value"]
    for name in kv.KINDS:
        whole = Plain(bundle, decoder, 1, name).outputs(names, ids)
        short = Plain(bundle, decoder, 1, name, whole=False).outputs(names, ids)
        assert all((a == b).all() for a, b in zip(whole, short, strict=True))


def test_a_model_writes_its_own_text_by_seed(plain: Path) -> None:
    session = open_bundle(plain)
    rows = generated(session, 150, seed=1)
    assert [len(row) for row in rows] == [CHUNK] * 3
    assert generated(session, 150, seed=1) == rows
    assert generated(session, 150, seed=2) != rows
    assert all(0 <= token < tiny.VOCAB for row in rows for token in row)
