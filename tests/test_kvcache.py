"""Graphs with a quantized KV cache: what the runtime stores and reads, against plain numpy; what cannot be changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import tiny
from rlkit.export import graph, kvcache, lint
from rlkit.export.build import export_bundle
from rlkit.export.kvscales import SCHEMES, Attention, Choices, LayerScales, Scheme, calibrate, rounded
from rlkit.recover.source import read_json
from rlkit.runtime.kvsample import collect
from rlkit.runtime.plain import Plain

IDS = np.random.default_rng(4).integers(3, tiny.VOCAB, (2, 24))
BOTH = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kvcache")
    return export_bundle(tiny.checkpoint(tiny.llama(root / "hf"), root / "ckpt"), root / "bundle", accuracy_level=0)


@pytest.fixture
def bundle(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "bundle")


def decoder_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "genai_config.json")["model"]["decoder"]
    return found


def attentions(folder: Path) -> tuple[Attention, ...]:
    decoder = decoder_of(folder)
    return kvcache.attentions(graph.load(folder / "model.onnx"), folder, decoder["head_size"])


def scales_for(folder: Path, scheme: Scheme, choices: Choices | None = None) -> dict[str, LayerScales]:
    found = attentions(folder)
    samples = collect(folder, decoder_of(folder), found, IDS.tolist(), threads=1)
    return {one.node: calibrate(one, samples[one.node], scheme, choices or Choices()) for one in found}


def codes(stored: np.ndarray, scheme: Scheme) -> np.ndarray:
    """What the cache holds (..., bytes), as codes (..., numbers)."""
    if scheme.bits == 8:
        return stored.astype(np.int64)
    halves = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int64)
    return halves.reshape(*stored.shape[:-1], -1) - 8


@BOTH
def test_the_cache_holds_the_rounded_keys_and_values(bundle: Path, scheme: Scheme) -> None:
    scales = scales_for(bundle, scheme)
    kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales)
    first = attentions(bundle)[0]  # whose inputs are the same in both graphs
    exact = Plain(bundle, decoder_of(bundle), 1).outputs(first.presents, IDS)
    stored = Plain(bundle, decoder_of(bundle), 1, scheme.name).outputs(first.presents, IDS)
    found = scales[first.node]
    for values, kept, part in zip(exact, stored, (found.keys, found.values), strict=True):
        grid = part.reshape(first.heads, 1, first.head_size)
        expected = np.clip(np.rint(values / grid), scheme.lowest, scheme.highest)
        assert kept.nbytes * 32 == values.nbytes * scheme.bits
        assert kept.shape[:3] == values.shape[:3] and kept.shape[3] == scheme.nbytes(first.head_size)
        assert (codes(kept, scheme) == expected).all()


@BOTH
def test_attention_reads_what_was_rounded_even_in_the_prompt(bundle: Path, scheme: Scheme) -> None:
    """With values that round to nothing, attention of the very first step already adds nothing."""
    scales = {node: LayerScales(one.keys, one.values * 1e6) for node, one in scales_for(bundle, scheme).items()}
    kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales)
    silenced = Plain(bundle, decoder_of(bundle), 1, scheme.name).logits(IDS)
    assert np.abs(silenced - Plain(bundle, decoder_of(bundle), 1).logits(IDS)).max() > 0.01
    swapped = IDS.copy()
    swapped[:, :-1] = swapped[:, -2::-1]  # nothing of the other tokens reaches the last one
    np.testing.assert_allclose(
        silenced[:, -1], Plain(bundle, decoder_of(bundle), 1, scheme.name).logits(swapped)[:, -1], atol=1e-5
    )


def test_more_bits_are_closer_and_a_row_in_pieces_is_the_row(bundle: Path) -> None:
    exact = Plain(bundle, decoder_of(bundle), 1).logits(IDS)
    off = {}
    for name, scheme in SCHEMES.items():
        kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales_for(bundle, scheme))
        plain = Plain(bundle, decoder_of(bundle), 1, name)
        whole = plain.logits(IDS)
        off[name] = float(np.abs(whole - exact).max() / np.abs(exact).max())
        np.testing.assert_allclose(plain.tail(IDS[:1], 5, chunk=7), whole[:1, -5:], atol=1e-5)
        np.testing.assert_allclose(plain.tail(IDS[:1], 24), whole[:1], atol=1e-5)
    assert 0 < off["int8"] < 0.02 < off["int4"] < 0.3


@BOTH
@pytest.mark.parametrize("choices", [("channel", "tensor"), ("tensor", "channel"), ("tensor", "tensor")])
def test_keys_and_values_may_differ_in_their_scales(bundle: Path, scheme: Scheme, choices: tuple[str, str]) -> None:
    """The runtime refuses two kinds, so a single scale is written once for each channel beside the other kind."""
    scales = scales_for(bundle, scheme, Choices("mse", *choices))
    kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales)
    model = graph.load(bundle / f"model.kv-{scheme.name}.onnx")
    node = next(node for node in model.graph if node.op_type == kvcache.OP)
    kinds = {node.attributes[f"{part}_quant_type"].as_string() for part in "kv"}
    assert kinds == {"PER_TENSOR" if choices == ("tensor", "tensor") else "PER_CHANNEL"}
    assert np.isfinite(Plain(bundle, decoder_of(bundle), 1, scheme.name).logits(IDS)).all()


def test_files_are_small_linted_and_leave_the_others_alone(bundle: Path) -> None:
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    for scheme in SCHEMES.values():
        made = kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales_for(bundle, scheme))
        assert made == [f"logits.kv-{scheme.name}.onnx", f"model.kv-{scheme.name}.onnx"]
    after = {file.name: file for file in bundle.iterdir()}
    assert all(after[name].read_bytes() == content for name, content in before.items())
    assert len(after) == len(before) + 4
    assert all(after[name].stat().st_size < 2 * len(before["model.onnx"]) for name in set(after) - set(before))
    linted = lint.lint_folder(bundle)
    assert linted.files == ("model.onnx", "model.kv-int4.onnx", "model.kv-int8.onnx")
    assert not [finding for finding in linted.findings if finding.op == kvcache.OP]


def test_a_bundle_of_one_graph_gets_one(bundle: Path) -> None:
    (bundle / "logits.onnx").unlink()
    scheme = SCHEMES["int8"]
    assert kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales_for(bundle, scheme)) == ["model.kv-int8.onnx"]


def test_a_failed_write_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, scales = SCHEMES["int8"], scales_for(bundle, SCHEMES["int8"])

    def fail(_model: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "no space")

    monkeypatch.setattr(ir, "save", fail)
    before = sorted(file.name for file in bundle.iterdir())
    with pytest.raises(OSError, match="no space"):
        kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales)
    assert sorted(file.name for file in bundle.iterdir()) == before


def test_what_has_no_float_cache_is_refused(bundle: Path) -> None:
    scheme = SCHEMES["int8"]
    kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales_for(bundle, scheme))
    with pytest.raises(ValueError, match="not float32 that enters and leaves the graph"):
        kvcache.attentions(graph.load(bundle / "model.kv-int8.onnx"), bundle, 32)
    model = graph.load(bundle / "model.onnx")
    for node in model.graph:
        if node.op_type == kvcache.OP:
            node.op_type = "MultiHeadAttention"
    with pytest.raises(ValueError, match="has no GroupQueryAttention node, so it keeps no cache"):
        kvcache.attentions(model, bundle, 32)


def test_attention_that_would_be_slow_needs_a_word(bundle: Path) -> None:
    for name in ("model.onnx", "logits.onnx"):
        model = graph.load(bundle / name)
        for node in model.graph:
            if node.op_type == kvcache.OP:
                node.attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)
        ir.save(model, bundle / name)
    scheme = SCHEMES["int8"]
    scales = scales_for(bundle, scheme)
    with pytest.raises(ValueError, match=r"softcap keep it from the flash kernel; .*--allow-slow"):
        kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales)
    assert not (bundle / "model.kv-int8.onnx").exists()
    kvcache.add_graphs(bundle, decoder_of(bundle), scheme, scales, allow_slow=True)
    capped = Plain(bundle, decoder_of(bundle), 1, "int8").logits(IDS)
    assert np.abs(capped - Plain(bundle, decoder_of(bundle), 1).logits(IDS)).max() < 0.02 * np.abs(capped).max()


def test_scales_that_do_not_fit_are_refused_before_anything_is_written(bundle: Path) -> None:
    scheme = SCHEMES["int8"]
    short = {node: LayerScales(one.keys[:7], one.values[:7]) for node, one in scales_for(bundle, scheme).items()}
    with pytest.raises(ValueError, match="k_scale holds 7 numbers, not 64"):
        kvcache.add_graphs(bundle, decoder_of(bundle), scheme, short, allow_slow=True)
    assert not (bundle / "model.kv-int8.onnx").exists()


@BOTH
def test_samples_are_what_the_cache_holds(bundle: Path, scheme: Scheme) -> None:
    found = attentions(bundle)
    samples = collect(bundle, decoder_of(bundle), found, [IDS[0].tolist(), IDS[1, :9].tolist()], threads=1)
    keys, _values = Plain(bundle, decoder_of(bundle), 1).outputs(found[1].presents, IDS[1:, :9])
    sample = samples[found[1].node]
    assert sample.keys.shape == sample.values.shape == (33, 2, 32)
    np.testing.assert_allclose(sample.keys[24:], keys[0].transpose(1, 0, 2), rtol=2e-3, atol=1e-4)
    scales = calibrate(found[1], sample, scheme, Choices()).values
    values = np.asarray(sample.values, np.float32).reshape(33, -1)
    assert np.abs(rounded(values, scales, scheme) - values).max() < np.abs(values).max()
    assert found[0].rotation is not None and found[0].rotation.cos.shape == (256, 16)


def test_stock_genai_runs_and_rewinds_them(bundle: Path) -> None:
    import onnxruntime_genai as og

    decoder = decoder_of(bundle)
    for name, scheme in SCHEMES.items():
        (_logits, file) = kvcache.add_graphs(bundle, decoder, scheme, scales_for(bundle, scheme))
        config = og.Config(str(bundle))
        config.overlay(json.dumps({"model": {"decoder": {"filename": file}}}))
        model = og.Model(config)
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=64, min_length=64)
        generator = og.Generator(model, params)
        generator.append_tokens(IDS[:1].astype(np.int32))
        first = _greedy(generator, 8)
        row = np.array([[*IDS[0], *first]])
        expected = Plain(bundle, decoder, 1, name).logits(row)[0]
        expected[:, tiny_stop()] = -np.inf  # min_length forbids it
        assert first == expected.argmax(axis=1)[23:-1].tolist()
        generator.rewind_to(20)
        generator.append_tokens(IDS[:1, 20:].astype(np.int32))
        assert _greedy(generator, 8) == first


def tiny_stop() -> int:
    return 2


def _greedy(generator: Any, count: int) -> list[int]:
    found = []
    for _ in range(count):
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found
