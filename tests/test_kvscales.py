"""Scales of quantized KV caches: what each way to choose them promises, and keys turned on to deeper positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.export import kvscales
from rlkit.export.kvscales import METHODS, SCHEMES, Attention, Choices, Rotation, Sample, Scheme

RNG = np.random.default_rng(0)
TAILED = RNG.standard_t(3, (2000, 6)).astype(np.float32) * np.array([1, 2, 0.5, 10, 0.01, 3], np.float32)


def tables(positions: int, half: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(positions)[:, None] / 100.0 ** (np.arange(half) / half)  # (positions, half)
    return (scale * np.cos(angles)).astype(np.float32), (scale * np.sin(angles)).astype(np.float32)


def turned(keys: np.ndarray, at: np.ndarray, rotation: Rotation) -> np.ndarray:
    """Keys (n, heads, size) turned to positions, by complex numbers."""
    half = rotation.cos.shape[1]
    pairs = keys[..., : 2 * half]
    if rotation.interleaved:
        points = pairs[..., ::2] + 1j * pairs[..., 1::2]
    else:
        points = pairs[..., :half] + 1j * pairs[..., half:]
    points = points * (rotation.cos[at] + 1j * rotation.sin[at])[:, None]
    parts = (points.real, points.imag)
    joined = np.stack(parts, -1).reshape(pairs.shape) if rotation.interleaved else np.concatenate(parts, -1)
    return np.concatenate([joined, keys[..., 2 * half :]], -1)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_the_search_is_never_worse_than_the_others_and_max_clips_nothing(scheme: Scheme) -> None:
    errors = {}
    for name in METHODS:
        scales = kvscales.scales_of(TAILED, scheme, name, "channel")
        assert scales.shape == (6,) and scales.dtype == np.float32 and (scales > 0).all()
        errors[name] = np.square(kvscales.rounded(TAILED, scales, scheme) - TAILED).mean(axis=0)
    assert (errors["mse"] <= errors["max"]).all()
    assert errors["mse"].sum() <= errors["percentile"].sum()
    whole = kvscales.by_max(TAILED, scheme)
    assert np.abs(kvscales.rounded(TAILED, whole, scheme) - TAILED).max(axis=0) == pytest.approx(whole / 2, rel=0.02)
    assert (kvscales.scales_of(TAILED, scheme, "percentile", "channel") < whole).all()


def test_channels_of_their_own_are_better_than_one_scale_for_all() -> None:
    scheme = SCHEMES["int4"]
    one = kvscales.scales_of(TAILED, scheme, "mse", "tensor")
    own = kvscales.scales_of(TAILED, scheme, "mse", "channel")
    assert one.shape == (1,)
    small = slice(4, 5)  # the channel that the large ones drown
    assert kvscales.relative_error(TAILED[:, small], one, scheme) == pytest.approx(1.0)
    assert kvscales.relative_error(TAILED[:, small], own[small], scheme) < 0.3


def test_a_silent_channel_has_a_scale_all_the_same() -> None:
    for name in METHODS:
        scales = kvscales.scales_of(np.zeros((9, 2), np.float32), SCHEMES["int8"], name, "channel")
        assert np.isfinite(scales).all() and (scales > 0).all()
    assert kvscales.relative_error(np.zeros((9, 2), np.float32), scales, SCHEMES["int8"]) == 0.0


@given(bits=st.sampled_from([4, 8]), size=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_rounding_is_idempotent_and_stays_on_the_grid(bits: int, size: float, seed: int) -> None:
    scheme = SCHEMES[f"int{bits}"]
    sample = (np.random.default_rng(seed).standard_normal((50, 3)) * size).astype(np.float32)
    scales = kvscales.by_mse(sample, scheme)
    once = kvscales.rounded(sample, scales, scheme)
    codes = np.rint(once / scales)
    assert codes.min() >= scheme.lowest and codes.max() <= scheme.highest
    assert (kvscales.rounded(once, scales, scheme) == once).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_turning_on_is_what_the_same_keys_would_be_further_on(interleaved: bool, scale: float) -> None:
    cos, sin = tables(64, 3)
    rotation, kept = Rotation(cos, sin, interleaved), Rotation(scale * cos, scale * sin, interleaved)
    plain = RNG.standard_normal((40, 2, 8)).astype(np.float32)  # two of the eight channels are never turned
    here = turned(plain, np.arange(40) % 20, rotation)
    found = kvscales.deeper(here.astype(np.float32), kept, seed=3)
    by = np.random.default_rng(3).integers(0, 64, 40)
    np.testing.assert_allclose(found, turned(here, by, rotation), atol=1e-5)
    assert (found[..., 6:] == here[..., 6:].astype(np.float32)).all()
    assert (found == kvscales.deeper(here.astype(np.float32), kept, seed=3)).all()
    assert (found != kvscales.deeper(here.astype(np.float32), kept, seed=4)).any()


def test_keys_that_turn_get_a_range_that_holds_at_depth() -> None:
    cos, sin = tables(512, 1)
    keys = np.zeros((200, 1, 2), np.float32)
    keys[..., 0] = 5.0  # at the start of the text all of it is in one channel ...
    attention = Attention("a", ("k", "v"), 1, 2, Rotation(cos, sin))
    sample = Sample(keys, np.ones_like(keys))
    deep = kvscales.calibrate(attention, sample, SCHEMES["int8"], Choices("max"))
    step = SCHEMES["int8"].room / 127
    assert deep.keys == pytest.approx([5 * step, 5 * step], rel=0.01)  # ... further on in both
    near = kvscales.calibrate(attention, sample, SCHEMES["int8"], Choices("max", context=2))
    assert near.keys[0] == deep.keys[0] and near.keys[1] == pytest.approx(5 * np.sin(1.0) * step, rel=0.01)
    flat = kvscales.calibrate(Attention("a", ("k", "v"), 1, 2, None), sample, SCHEMES["int8"], Choices("max"))
    assert flat.keys[1] < 1e-6 and flat.key_error < 0.01
    assert deep.values == pytest.approx([step, step])


def test_keys_and_values_are_apart() -> None:
    sample = Sample(RNG.standard_normal((50, 2, 4)), 8 * RNG.standard_normal((50, 2, 4)))
    attention = Attention("a", ("k", "v"), 2, 4, None)
    found = kvscales.calibrate(attention, sample, SCHEMES["int4"], Choices(keys="channel", values="tensor"))
    assert found.keys.shape == (8,) and found.values.shape == (1,)
    assert found.values[0] > 3 * found.keys.max()
    assert 0 < found.key_error < 0.2 and 0 < found.value_error < 0.3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    keys = np.ones((5, 1, 2), np.float32)
    keys[3, 0, 1] = bad
    for sample in (Sample(keys, np.ones_like(keys)), Sample(np.ones_like(keys), keys)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            kvscales.calibrate(Attention("a", ("k", "v"), 1, 2, None), sample, SCHEMES["int8"], Choices())


def test_names_and_sizes() -> None:
    assert [scheme.name for scheme in kvscales.schemes_named("int4, int8")] == ["int4", "int8"]
    assert kvscales.file_name("model.onnx", "int8") == "model.kv-int8.onnx"
    assert (SCHEMES["int4"].nbytes(64), SCHEMES["int8"].nbytes(64)) == (32, 64)
    for words in ("", "int2", "int8,", "INT8", "int8;int4", "../int8"):
        with pytest.raises(ValueError, match="use int8 or int4"):
            kvscales.schemes_named(words)
    with pytest.raises(ValueError, match="twice"):
        kvscales.schemes_named("int8,int8")


def test_choices_are_checked() -> None:
    with pytest.raises(ValueError, match="use max, percentile, mse"):
        Choices(ranges="median")
    with pytest.raises(ValueError, match="scales per 'head' do not exist; use channel or tensor"):
        Choices(values="head")
    with pytest.raises(ValueError, match="seed = -1 is negative"):
        Choices(seed=-1)
    with pytest.raises(ValueError, match="a context of 0 tokens holds nothing"):
        Choices(context=0)


def test_targets_without_a_kernel_and_heads_it_refuses() -> None:
    int8 = (SCHEMES["int8"],)
    kvscales.refuse("cpu", 64, int8)
    with pytest.raises(ValueError, match=r"webgpu has no kernel .* kvCacheQuantizationBits=4"):
        kvscales.refuse("webgpu", 64, int8)
    with pytest.raises(ValueError, match=r"npu has no kernel .* use --target cpu, or leave --kv out"):
        kvscales.refuse("npu", 64, int8)
    with pytest.raises(ValueError, match="heads of 100 numbers are no multiple of 8"):
        kvscales.refuse("cpu", 100, int8)
