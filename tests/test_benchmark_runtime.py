"""The benchmark beside other runtimes: their models hold what they should, ratios are of paired rounds."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from rlkit.apps.benchmarks import peers, runtime
from rlkit.profiles import bench, worker
from rlkit.profiles.bench import Case, Kind, Measurement, Series
from rlkit.recover.source import ModelShape

TINY = ModelShape("Qwen3ForCausalLM", 2, 64, 128, 4, 2, 32, 512, True, 256, True)


def test_a_q4_0_file_has_every_matrix_of_the_shape(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(peers.write_q4_0(TINY, tmp_path / "tiny.gguf"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == 2 + 2 * (7 + 4)
    gate = found["blk.1.ffn_gate.weight"]
    assert gate.tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert tuple(gate.shape) == (64, 128)  # GGUF counts from the fastest
    values = gguf.quants.dequantize(gate.data, gate.tensor_type)
    assert values.shape == (128, 64)
    assert np.isfinite(values).all()
    assert np.abs(values).max() == 8 * float(peers.SCALE)
    assert not np.array_equal(values, gguf.quants.dequantize(found["blk.0.ffn_gate.weight"].data, gate.tensor_type))
    assert np.array_equal(found["blk.0.attn_q_norm.weight"].data, np.ones(32, np.float32))
    assert reader.get_field("qwen3.attention.head_count_kv").contents() == 2  # type: ignore[union-attr]
    assert not list(tmp_path.glob("*.part"))


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    llama = ModelShape("LlamaForCausalLM", 2, 64, 128, 4, 2, 32, 512, True, 256, False)
    with pytest.raises(ValueError, match="only tied Qwen3"):
        peers.write_q4_0(llama, tmp_path / "tiny.gguf")
    assert not list(tmp_path.iterdir())


def test_the_stock_bundle_runs_in_its_worker(tmp_path: Path) -> None:
    folder = peers.write_stock(TINY, tmp_path / "stock")
    assert not (tmp_path / "stock-checkpoint").exists()
    command = [sys.executable, "-m", "rlkit.apps.benchmarks.stock_worker", str(folder)]
    with worker.start("stock", command) as running:
        subject = bench.Subject("stock", running.generate, running.peak_nbytes, lambda _depth: None)
        (found,) = bench.measure([subject], bench.Plan((Case(Kind.DECODE, 3, 8), Case(Kind.PREFILL, 8)), 2, vocab=512))
    assert [len(series.rounds) for series in found.series] == [2, 2]


def test_a_worker_says_that_there_is_no_bundle(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlkit.apps.benchmarks.stock_worker", str(tmp_path)]
    with pytest.raises(ChildProcessError, match="is no bundle"), worker.start("stock", command):
        pass


def series(*rounds: float, nbytes: int | None = None) -> Series:
    return Series(Case(Kind.DECODE, 1), tuple((seconds,) for seconds in rounds), nbytes)


def test_ratios_are_medians_of_rounds_side_by_side_and_shares_of_the_reading_speed() -> None:
    ours = Measurement("w4w2", (series(1.0, 2.0, 1.0, nbytes=50),))
    peer = Measurement("q4_0", (series(1.5, 3.0, 9.0),))
    found = runtime.compared([ours, peer], 100.0)
    assert found["ratios"] == [{"against": "q4_0", "test": "tg1", "speed_ratio": 1.5, "bar": 1.25}]
    assert found["read_shares"] == {"w4w2": 0.5}


def test_a_side_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no side 'q8'"):
        runtime.side("q8", "qwen3-4b", TINY, tmp_path, 128, None)
