"""Packing is lossless, and what it unpacks to is what ONNX Runtime's MatMulNBits multiplies with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from rlkit.recover import packing

BITS = st.sampled_from(packing.BITS)


@st.composite
def coded(draw: st.DrawFn, rows: int = 17, columns: int = 300) -> tuple[int, np.ndarray]:
    """A bit width and any codes (N, K) of that width."""
    bits = draw(BITS)
    shape = (draw(st.integers(1, rows)), draw(st.integers(1, columns)))
    return bits, draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, (1 << bits) - 1)))


@given(coded())
def test_pack_round_trip(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    packed = packing.pack(codes, bits)
    assert packed.shape == (codes.shape[0], -(-codes.shape[1] * bits // 8))
    np.testing.assert_array_equal(packing.unpack(packed, bits, codes.shape[1]), codes)


def test_low_bits_come_first() -> None:
    assert packing.pack(np.array([[1, 2, 3, 0, 1]], np.uint8), 2).tolist() == [[0b00111001, 0b01]]
    assert packing.pack(np.array([[1, 15, 7]], np.uint8), 4).tolist() == [[0xF1, 0x07]]


@given(coded(columns=200), st.sampled_from([16, 32, 64, 128]), st.booleans(), st.integers(0, 2**32 - 1))
def test_dequantize_follows_its_formula(case: tuple[int, np.ndarray], group: int, zeroed: bool, seed: int) -> None:
    bits, codes = case
    n, k = codes.shape
    groups = -(-k // group)
    rng = np.random.default_rng(seed)
    scales = rng.standard_normal((n, groups)).astype(np.float32)
    zeros = rng.integers(0, 1 << bits, (n, groups)).astype(np.uint8) if zeroed else None
    weight = packing.dequantize(
        packing.pack(codes, bits), scales, None if zeros is None else packing.pack(zeros, bits), bits, group, k
    )
    at = np.arange(k) // group
    zero = np.full((n, groups), 1 << (bits - 1)) if zeros is None else zeros
    expected = (codes.astype(np.float32) - zero[:, at].astype(np.float32)) * scales[:, at]
    np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 128), (37, 256), (250, 32), (13, 200), (5, 577)])
def test_onnx_runtime_agrees(bits: int, group: int, zeroed: bool, n: int, k: int) -> None:
    rng = np.random.default_rng([bits, group, zeroed, n, k])
    codes = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    groups = -(-k // group)
    scales = (0.01 + rng.random((n, groups))).astype(np.float32)
    zeros = rng.integers(0, 1 << bits, (n, groups)).astype(np.uint8) if zeroed else None
    x = rng.standard_normal((3, k)).astype(np.float32)
    measured = run_matmul_nbits(x, codes, scales, zeros, bits=bits, group=group)
    qzeros = None if zeros is None else packing.pack(zeros, bits)
    weight = packing.dequantize(packing.pack(codes, bits), scales, qzeros, bits, group, k)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    assert np.abs(measured - expected).max() <= 1e-5 * np.abs(expected).max()


@settings(deadline=None, max_examples=30)
@given(coded(rows=9, columns=200), st.sampled_from([32, 64, 128]), st.booleans(), st.integers(0, 2**32 - 1))
def test_onnx_runtime_agrees_anywhere(case: tuple[int, np.ndarray], group: int, zeroed: bool, seed: int) -> None:
    bits, codes = case
    n, k = codes.shape
    rng = np.random.default_rng(seed)
    scales = (0.01 + rng.random((n, -(-k // group)))).astype(np.float32)
    zeros = rng.integers(0, 1 << bits, scales.shape).astype(np.uint8) if zeroed else None
    x = rng.standard_normal((2, k)).astype(np.float32)
    measured = run_matmul_nbits(x, codes, scales, zeros, bits=bits, group=group)
    qzeros = None if zeros is None else packing.pack(zeros, bits)
    weight = packing.dequantize(packing.pack(codes, bits), scales, qzeros, bits, group, k)
    magnitude = (np.abs(x) @ np.abs(weight).T).max() + 1e-30
    assert np.abs(measured - x @ weight.T).max() <= 1e-5 * magnitude


def run_matmul_nbits(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, *, bits: int, group: int
) -> np.ndarray:
    """x @ dequantized.T by a session of one MatMulNBits node with exact activations."""
    n, k = codes.shape
    constants: dict[str, Any] = {"b": packing.blocks(codes, bits, group), "scales": scales}
    if zeros is not None:
        constants["zeros"] = packing.pack(zeros, bits)
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=group
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], n])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96, 128, 160, 256])),
        elements=st.floats(-(2.0**126), 2.0**126, width=32),
    )
)
def test_snapping_twice_changes_nothing(weight: np.ndarray) -> None:
    once = packing.snap8(weight)
    twice = packing.snap8(once.dequantized)
    np.testing.assert_array_equal(twice.codes, once.codes)
    np.testing.assert_array_equal(twice.scales, once.scales)
    np.testing.assert_array_equal(twice.dequantized, once.dequantized)


@given(st.integers(0, 2**32 - 1), st.floats(1e-30, 1e30))
def test_snapping_is_near_and_readable_by_dequantize(seed: int, size: float) -> None:
    weight = (np.random.default_rng(seed).standard_normal((4, 192)) * size).astype(np.float32)
    snapped = packing.snap8(weight)
    assert snapped.block == 64
    assert snapped.codes.min() >= 1
    assert np.abs(snapped.codes.reshape(4, 3, 64).astype(int) - 128).max(axis=2).min() == 127
    step = np.repeat(snapped.scales, 64, axis=1)
    assert np.all(np.abs(snapped.dequantized - weight) <= 0.5001 * step)
    again = packing.dequantize(packing.pack(snapped.codes, 8), snapped.scales, None, 8, 64, 192)
    np.testing.assert_array_equal(again, snapped.dequantized)


def test_snapping_zero_gives_zero() -> None:
    snapped = packing.snap8(np.zeros((2, 32), np.float32))
    assert not snapped.scales.any()
    assert not snapped.dequantized.any()
    assert (snapped.codes == 128).all()


@pytest.mark.parametrize(("k", "block"), [(32, 32), (64, 64), (96, 32), (576, 64), (1536, 128), (48, None)])
def test_snap_block(k: int, block: int | None) -> None:
    assert packing.snap_block(k) == block


ONE = np.zeros((1, 1), np.uint8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: packing.pack(ONE, 3), "bits = 3"),
        (lambda: packing.unpack(ONE, 16, 1), "bits = 16"),
        (lambda: packing.pack(np.array([[4]], np.uint8), 2), "code 4 does not fit in 2 bits"),
        (lambda: packing.pack(np.zeros((1, 1), np.int64), 2), "uint8 matrix"),  # type: ignore[arg-type]
        (lambda: packing.pack(np.zeros(3, np.uint8), 2), "uint8 matrix"),
        (lambda: packing.unpack(ONE, 4, 3), "3 codes of 4 bits"),
        (lambda: packing.unpack(ONE, 4, 0), "0 codes"),
        (lambda: packing.dequantize(ONE, np.ones((1, 2)), None, 4, 32, 2), "scales are"),
        (lambda: packing.dequantize(ONE, np.ones((1, 1)), np.zeros((2, 1), np.uint8), 4, 32, 2), "zero points have 2"),
        (lambda: packing.dequantize(ONE, np.ones((1, 1)), None, 4, 0, 2), "group = 0"),
        (lambda: packing.blocks(ONE, 2, 3), "whole number of bytes"),
        (lambda: packing.snap8(np.ones((1, 31))), "31 weights"),
        (lambda: packing.snap8(np.full((1, 32), np.nan)), "NaN"),
        (lambda: packing.snap8(np.full((1, 32), np.inf)), "NaN, infinite"),
        (lambda: packing.snap8(np.ones(32)), "needs a matrix"),
    ],
)
def test_bad_input_is_named(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        call()
