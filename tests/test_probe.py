"""Repeated operators run and compute what one of them computes; trials are folded; the generation loop runs."""

from __future__ import annotations

import itertools

import numpy as np
import onnxruntime as ort
import pytest

from rlkit.export import repeats
from rlkit.recover import packing
from rlkit.runtime import probe
from rlkit.runtime.probe import Trials


def outputs(repeated: repeats.Repeated, feeds: dict[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    values = [ort.OrtValue.ortvalue_from_numpy(value) for value in repeated.constants.values()]
    options.add_external_initializers(list(repeated.constants), values)
    session = ort.InferenceSession(repeated.model, options, providers=["CPUExecutionProvider"])
    return session.run(names, feeds)


@pytest.mark.parametrize(("bits", "block"), [(2, 32), (2, 128), (4, 32), (4, 64), (8, 128), (8, 32)])
def test_products_are_those_of_their_matrices(bits: int, block: int) -> None:
    n, k, tokens = 48, 192, 3
    repeated = repeats.products(bits, block, n, k, 3)
    x = np.random.default_rng(1).standard_normal((tokens, k)).astype(np.float32)
    found = outputs(repeated, {"x": x}, ["y0", "y2"])
    for y, name in zip(found, ("w0", "w2"), strict=True):
        codes = repeated.constants[name].reshape(n, -1)
        weights = packing.dequantize(
            codes, repeated.constants["scales"], repeated.constants["zeros"], bits, block, codes.shape[1] * 8 // bits
        )
        expected = x @ weights[:, :k].T  # (tokens, n)
        assert np.abs(y - expected).max() < 0.03 * np.abs(expected).max()


def test_matrices_differ_and_share_their_memory() -> None:
    for repeated in (repeats.products(4, 32, 128, 128, 5), repeats.products(32, 0, 128, 128, 5)):
        weights = [value for name, value in repeated.constants.items() if name.startswith("w")]
        assert len(weights) == 5
        assert all(not np.array_equal(one, other) for one, other in itertools.combinations(weights, 2))
        assert np.shares_memory(weights[0], weights[1])


def test_every_node_is_kept_by_the_runtime() -> None:
    for repeated, op in (
        (repeats.products(4, 32, 64, 64, 5), "MatMulNBits"),
        (repeats.products(32, 0, 64, 64, 5), "MatMul"),
        (repeats.attentions(4, 2, 16, 5, 32), "GroupQueryAttention"),
        (repeats.pointwise("norm", 64, 5), "SkipSimplifiedLayerNormalization"),
        (repeats.pointwise("add", 64, 5), "Add"),
        (repeats.pointwise("activation", 64, 5), "QuickGelu"),
    ):
        assert repeated.count == 5
        assert ran(repeated)[op] == 5, op


def test_a_chain_keeps_every_operator_of_every_block() -> None:
    repeated = repeats.chain(4, 32, 64, 5)
    found = ran(repeated)
    assert (found["MatMulNBits"], found["SkipSimplifiedLayerNormalization"], found["QuickGelu"]) == (10, 5, 5)
    weights = [value for name, value in repeated.constants.items() if name.startswith("w")]
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(weights, 2))


def ran(repeated: repeats.Repeated) -> dict[str, int]:
    """Operators of the graph that the runtime runs, asking for the last output alone."""
    import json
    import tempfile
    from collections import Counter
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "run"))
        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in repeated.constants.values()]
        options.add_external_initializers(list(repeated.constants), values)
        session = ort.InferenceSession(repeated.model, options, providers=["CPUExecutionProvider"])
        probe.Probe(repeated, session, values, iter(range(100)).__next__).time(2, 0.0, 3)
        events = json.loads(Path(session.end_profiling()).read_text())
    names = Counter(
        e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")
    )
    runs = probe.FEWEST + 1
    return {name: count // runs for name, count in names.items()}


def test_attention_shares_its_cache_with_its_output() -> None:
    heads, kv_heads, head, past, new = 4, 2, 16, 5, 2
    repeated = repeats.attentions(heads, kv_heads, head, 2, past + new)
    opened = probe.open_probe(repeated, 1, iter(range(100)).__next__)
    assert opened.time(new, 0.0, past).seconds == 0.5  # one tick of the clock for two of them
    assert [pair[0] for pair in repeated.caches] == ["past_k0", "past_v0", "past_k1", "past_v1"]


def test_one_session_answers_for_any_number_of_tokens() -> None:
    opened = probe.open_probe(repeats.products(4, 32, 64, 64, 2), 1, iter(range(1000)).__next__)
    assert [opened.time(tokens, 0.0).count for tokens in (1, 8, 33)] == [probe.FEWEST] * 3


def test_trials_take_the_faster_half_and_say_how_far_the_rest_is() -> None:
    found = Trials.of([1.0, 1.1, 1.2, 4.0, 9.0], parts=2)
    assert (found.seconds, found.median, found.count) == (0.55, 0.6, 5)
    assert found.spread == pytest.approx(1 - 0.55 / 0.6)
    assert Trials.of([2.0]).spread == 0.0
    assert Trials.of([0.0]).spread == 0.0


def test_trials_repeat_until_the_time_is_up() -> None:
    ticks = iter(range(10**6))
    runs: list[int] = []
    found = probe.repeat(lambda: runs.append(1), 10, clock=lambda: float(next(ticks)))
    assert found.count == len(runs) - 1  # one to warm up
    assert probe.FEWEST < found.count < 10
    assert probe.repeat(lambda: None, 0, clock=lambda: float(next(ticks))).count == probe.FEWEST
    assert probe.repeat(lambda: None, 10**9, clock=lambda: float(next(ticks))).count == probe.MOST


@pytest.mark.parametrize("layers", [1, 3])
def test_the_generation_loop_runs_around_a_model_that_computes_nothing(layers: int) -> None:
    ticks = iter(range(10**6))
    found = probe.time_tokens(*repeats.decoder(300, layers), 1, 0.0, lambda: float(next(ticks)))
    assert found.prompt.seconds == found.token.seconds == 1.0
    assert found.prompt.count == probe.FEWEST
    assert found.token.count == probe.FEWEST * (probe.REPLY - 1)
