"""Simulated KV caches: kvpack, kvlayer, kvpeak, kvcache and kvchunks of recover/."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, JambaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import tiny
from rlkit.export import kvscales
from rlkit.recover import kvchunks, kvpack
from rlkit.recover.kvcache import QuantizedCache, kv_logits, kv_replies, kv_samples, kv_scorer, prefill
from rlkit.recover.kvformat import SCHEMES, KVFormat, KVScheme, nbytes, parse
from rlkit.recover.kvlayer import QuantizedLayer, Side
from rlkit.recover.kvpeak import Peak
from rlkit.recover.torchscorer import replies, torch_scorer

Floats = NDArray[np.float32]

H, T, D = 2, 150, 64  # KV heads, tokens, channels
BY_THEMSELVES = ("k8v8", "k4v4:g32", "k2v2:g16", "k4v4:sym", "k4v2:min", "k4v4:block:g16", "kivi2:w64", "kivi4:w20")
"""Schemes whose codes do not depend on how many tokens come at once."""


def keys_and_values(seed: int = 0, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with an offset by channel, as models have them, and values; float16 holds both exactly."""
    rng = torch.Generator().manual_seed(seed)
    offset = 8 * torch.randn(1, H, 1, D, generator=rng)
    keys = torch.randn(1, H, tokens, D, generator=rng) + offset
    return keys.half().float(), torch.randn(1, H, tokens, D, generator=rng).half().float()


def reference(x: Floats, form: KVFormat) -> Floats:
    """What asymmetric or symmetric rounding leaves of (H, n, D), written for one group at a time."""
    out = np.empty_like(x)
    heads, tokens, width = x.shape
    along, across, head = range(0, tokens, form.group), range(0, width, form.group), range(heads)
    boxes = {
        "token": [np.s_[h, t, g : g + form.group] for h in head for t in range(tokens) for g in across],
        "channel": [np.s_[h, t : t + form.group, c] for h in head for t in along for c in range(width)],
        "block": [np.s_[h, t : t + form.group, :] for h in head for t in along],
        "tensor": [np.s_[:]],
    }[form.granularity]
    levels = np.float32(2**form.bits - 1)
    for box in boxes:
        part = x[box]
        low, high = part.min(), part.max()
        largest = np.float32(max(abs(low), abs(high)))
        if form.symmetric:
            top = 2 ** (form.bits - 1)
            scale = np.float32(np.float16(largest / np.float32(top - 1)))
            out[box] = np.clip(np.rint(part / scale), -top, top - 1) * scale
            continue
        scale = np.float32(np.float16(max((high - low) / levels, largest / np.float32(2048))))
        if form.minimum:
            zero = np.float32(np.float16(low))
            out[box] = np.clip(np.rint((part - zero) / scale), 0, levels) * scale + zero
        else:
            zero = np.rint(-low / scale)
            out[box] = (np.clip(np.rint(part / scale + zero), 0, levels) - zero) * scale
    return out


def fed(side: Side, x: torch.Tensor, *sizes: int) -> Side:
    for part in torch.split(x, sizes, 2):
        side.add(part)
    return side


@pytest.mark.parametrize("words", BY_THEMSELVES)
def test_values_are_the_reference_bit_for_bit_and_bytes_the_formula(words: str) -> None:
    scheme, pair = parse(words), keys_and_values()
    layer = QuantizedLayer(scheme)
    for start, stop in ((0, 70), (70, 148), (148, 149), (149, 150)):
        found = layer.update(*(part[:, :, start:stop] for part in pair))
    for form, part, given in zip((scheme.keys, scheme.values), found, pair, strict=True):
        codes = form.settled(T, scheme.window)
        assert codes > 60
        np.testing.assert_array_equal(part[0, :, :codes], reference(given[0, :, :codes].numpy(), form))
        np.testing.assert_array_equal(part[0, :, codes:], given[0, :, codes:])
    assert layer.nbytes == nbytes(scheme, 1, H, D, T)


def test_one_scale_for_a_tensor_widens_where_tokens_need_more() -> None:
    form = parse("k4v4:tensor").keys
    _keys, values = keys_and_values()
    first = fed(Side(form), values[:, :, :100], 100)
    np.testing.assert_array_equal(first.read(torch.float32)[0], reference(values[0, :, :100].numpy(), form))
    first.add(3 * values[:, :, 100:])
    wide = torch.cat([values[:, :, :100], 3 * values[:, :, 100:]], 2)
    step = float(wide.max() - wide.min()) / 15
    assert float((first.read(torch.float32) - wide).abs().max()) < 1.2 * step  # rounded twice, at most
    assert sum(t.numel() for t in first.grid.tensors()) == 2


def test_given_scales_round_as_the_runtimes_own_caches() -> None:
    keys, _values = keys_and_values()
    keys = keys + 1e-4  # not of 16 bit: the runtime rounds float32
    rows = keys[0].transpose(0, 1).reshape(T, H * D).numpy()
    for name in ("int8", "int4", "int8-tensor", "int4-tensor"):
        form, scheme = parse(name).keys, kvscales.scheme_named(name.split("-")[0])
        scales = kvscales.scales_of(rows, scheme, "mse", form.granularity)
        side = fed(Side(form, scales=torch.from_numpy(scales)), keys, 100, 50)
        found = side.read(torch.float32)[0].transpose(0, 1).reshape(T, H * D)
        np.testing.assert_array_equal(found, kvscales.rounded(rows, scales, scheme))


def test_smoothing_saves_keys_whose_channels_lie_apart() -> None:
    keys, _values = keys_and_values()
    errors = {}
    for words in ("k4v4", "k4v4:smooth"):
        scheme = parse(words)
        found = fed(Side(scheme.keys, 0, scheme.smooth), keys, 10, 90, 50).read(torch.float32)
        errors[words] = float((found - keys).square().mean().sqrt())
    assert errors["k4v4:smooth"] < errors["k4v4"] / 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_codes_are_read_again(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (1, H, 5, D), dtype=torch.uint8)
    packed = kvpack.pack(codes, bits)
    assert packed.shape[-1] == D * bits // 8
    assert torch.equal(kvpack.unpack(packed, bits, torch.empty_like(codes)), codes)
    assert torch.equal(packed[..., 0] & ((1 << bits) - 1), codes[..., 0])  # the first channel in the lowest bits


def test_groups_without_a_range_and_of_zeros_keep_their_value() -> None:
    for value in (0.0, 1e-5, 3.25, -700.0):
        x = torch.full((1, 1, 4, D), value)
        for words in ("k4v4", "k4v4:sym", "k2v2:min", "k8v8:channel:g2"):
            found = fed(Side(parse(words).keys), x, 4).read(torch.float32)
            assert torch.allclose(found, x, rtol=2e-3, atol=1e-7), (value, words)


@pytest.mark.parametrize("words", ["k16v16", "k4v4", "k4v4:w20", "kivi4:w20", "k8v8:block:g16", "k4v4:tensor"])
def test_a_cropped_cache_has_the_bytes_of_its_length_and_goes_on(words: str) -> None:
    scheme, pair = parse(words), keys_and_values()
    layer = QuantizedLayer(scheme)
    layer.update(*pair)
    layer.crop(-45)
    assert layer.get_seq_length() == T - 45
    whole = QuantizedLayer(scheme)
    whole.update(*pair)
    again = layer.update(*(part[:, :, T - 45 :] for part in pair))
    close = 0.0 if words in ("k16v16", "k4v4") else 1.5  # elsewhere some tokens are rounded twice
    for part, other in zip(again, whole.update(*(part[:, :, :0] for part in pair)), strict=True):
        assert float((part - other).abs().max()) <= close
    assert layer.nbytes == whole.nbytes
    layer.crop(-T)
    assert layer.get_seq_length() == 0 and layer.nbytes == 0
    with pytest.raises(ValueError, match="negative"):
        layer.crop(5)


def test_rows_of_a_batch_are_picked_and_repeated() -> None:
    pairs = [keys_and_values(seed) for seed in (0, 1)]
    keys, values = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    layer = QuantizedLayer(parse("k4v4:smooth:w20"))
    layer.update(keys, values)
    none = keys[:, :, :0]
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    found, _values = layer.update(none, none)
    alone = QuantizedLayer(parse("k4v4:smooth:w20"))
    own, _values = alone.update(*pairs[0])
    assert torch.equal(found[1], own[0])
    layer.reset()
    assert layer.get_seq_length() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny.llama(tmp_path_factory.mktemp("tiny"), head_dim=D)).eval()


def ids(length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, tiny.VOCAB, length)


def test_16_bit_is_the_same_in_chunks_and_as_transformers_has_it(model: Any) -> None:
    row = torch.from_numpy(ids(100))[None]
    config = model.config
    found = {}
    for chunk in (None, 32, 7):
        cache = QuantizedCache(parse("k16v16"), config)
        found[chunk] = prefill(model, row, cache, chunk).logits
        assert cache.nbytes == nbytes(parse("k16v16"), 2, H, D, 100)
    assert torch.allclose(found[None], found[32], atol=1e-5) and torch.allclose(found[None], found[7], atol=1e-5)
    narrow = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    cache = QuantizedCache(parse("k16v16"), config)
    with torch.no_grad():
        own = narrow(row, past_key_values=DynamicCache(), logits_to_keep=1).logits[:, -1]
    assert torch.equal(prefill(narrow, row, cache, None).logits, own)


def test_codes_per_token_do_not_depend_on_the_chunk(model: Any) -> None:
    row = ids(100)[None]
    found = [kv_logits(model, parse("k4v4"), chunk)(row) for chunk in (100, 33)]
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)  # a code at a tie may fall to the other side
    whole = kv_logits(model, parse("k16v16"), 33)(row)
    assert np.abs(found[0] - whole).max() > 10 * np.abs(found[0] - found[1]).max()
    assert np.abs(kv_logits(model, parse("k8v8"), 33)(row) - whole).max() < np.abs(found[0] - whole).max() / 4


@pytest.mark.parametrize("words", [*SCHEMES, "k4v4:smooth", "k2v2:block:g16", "k4v4:tensor"])
def test_every_scheme_has_the_bytes_of_the_formula(model: Any, words: str) -> None:
    scheme = parse(words)
    scales = given_scales(scheme)
    cache = QuantizedCache(scheme, model.config, scales)
    logits = prefill(model, torch.from_numpy(ids(170))[None], cache, 64).logits
    assert torch.isfinite(logits).all()
    assert cache.nbytes == nbytes(scheme, 2, H, D, 170)


def given_scales(scheme: KVScheme) -> Any:
    if not scheme.static:
        return None
    count = H * D if scheme.keys.granularity == "channel" else 1
    return [(np.full(count, 0.05, np.float32), np.full(count, 0.05, np.float32))] * 2


def test_activations_grow_with_the_chunk_and_leave_the_cache_out(model: Any) -> None:
    row = torch.from_numpy(ids(200))[None]
    peaks = {}
    for words, chunk in (("k16v16", 200), ("k16v16", 50), ("k4v4", 50)):
        cache = QuantizedCache(parse(words), model.config)
        peaks[words, chunk] = prefill(model, row, cache, chunk, watch=True).activation_nbytes
    assert peaks["k16v16", 200] > 2 * peaks["k16v16", 50] > 0
    assert peaks["k16v16", 50] == peaks["k4v4", 50]
    assert prefill(model, row, QuantizedCache(parse("k4v4"), model.config)).activation_nbytes is None


def test_a_peak_counts_what_lives_at_once() -> None:
    x = torch.zeros(1000)
    with Peak() as peak:
        first = x + 1
        second = first.view(10, 100).t()[3:] * 2
        del first
        with peak.aside():
            aside = torch.zeros(10_000)
        third = second[:1].clone() + aside[0]
    assert third.shape == (1, 10)
    assert peak.nbytes == 4000 + 4 * 97 * 10


def test_a_scorer_judges_as_the_plain_one_and_as_if_nothing_were_shared(model: Any) -> None:
    shared = ids(60).tolist()
    pairs = [(shared + ids(9, seed).tolist(), ids(4, seed + 9).tolist()) for seed in (1, 2)]
    pairs.append((shared[:40], ids(3, 30).tolist()))
    plain = [found.logprob for found in torch_scorer(model).score(pairs)]
    whole = [found.logprob for found in kv_scorer(model, parse("k16v16"), 16).score(pairs)]
    np.testing.assert_allclose(whole, plain, atol=0.02)
    for words in ("k2v2", "kivi2:w10"):
        scorer = kv_scorer(model, parse(words), 500)
        together = [found.logprob for found in scorer.score(pairs)]
        again = [found.logprob for found in scorer.score(pairs)]
        alone = [kv_scorer(model, parse(words), 500).score([pair])[0].logprob for pair in pairs]
        np.testing.assert_allclose(together, again, atol=1e-4)
        if words == "k2v2":
            np.testing.assert_allclose(together, alone, atol=1e-4)
        assert np.abs(np.array(together) - plain).max() > 0.01


def test_replies_are_those_of_the_model_where_nothing_is_rounded(model: Any) -> None:
    prompt = ids(30).tolist()
    plain = replies(model)(prompt, 12)
    reply = kv_replies(model, parse("k16v16"), 8)
    assert reply(prompt, 12) == plain
    assert reply(prompt, 0) == []
    assert len(kv_replies(model, parse("k2v2"))(prompt, 5)) <= 5
    assert len(reply(ids(250).tolist(), 100)) <= 7  # 256 tokens are read, one more is said


def test_a_sliding_window_is_the_masks() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(**shape, num_key_value_heads=2, head_dim=32, vocab_size=64, sliding_window=16)
    windowed = MistralForCausalLM(config).eval()
    row = torch.from_numpy(ids(60) % 64)[None]
    with torch.no_grad():
        own = windowed(row).logits[:, -1]
    assert torch.allclose(prefill(windowed, row, QuantizedCache(parse("k16v16"), config), 20).logits, own, atol=1e-3)


def test_samples_are_keys_and_values_of_every_token(model: Any) -> None:
    samples = kv_samples(model, [ids(20).tolist(), ids(15, 1).tolist()])
    assert [(keys.shape, values.shape) for keys, values in samples] == [((35, H, D), (35, H, D))] * 2
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.from_numpy(ids(15, 1))[None], past_key_values=cache)
    np.testing.assert_allclose(samples[1][0][20:], cache.layers[1].keys[0].transpose(0, 1), atol=5e-3)


def test_what_does_not_fit_is_refused_in_one_line(model: Any, tmp_path: Path) -> None:
    k4, row = parse("k4v4"), torch.from_numpy(ids(5))[None]
    scales = [(np.ones(3, np.float32), np.ones(3, np.float32))] * 2
    cases = [
        (lambda: QuantizedCache(k4, JambaConfig()), "linear_attention"),
        (lambda: QuantizedCache(parse("k4v4:g128"), model.config), "not divisible by groups of 128; use a group of 64"),
        (lambda: QuantizedCache(parse("int8"), model.config), "needs scales chosen beforehand"),
        (lambda: QuantizedCache(parse("int8"), model.config, scales[:1]), "1 were given for 2"),
        (lambda: prefill(model, row, QuantizedCache(parse("int8"), model.config, scales)), "3 scales were given"),
        (lambda: prefill(model, row[:, :0], QuantizedCache(k4, model.config)), "no prompt"),
        (lambda: prefill(model, row, QuantizedCache(k4, model.config), 0), "chunk of 0"),
        (lambda: kv_scorer(model, k4, -1), "chunk of -1"),
        (
            lambda: prefill(model, torch.zeros(1, 257, dtype=torch.long), QuantizedCache(k4, model.config)),
            "context of 256",
        ),
        (lambda: kv_logits(model, k4)(ids(300)[None]), "300 tokens are more"),
        (lambda: QuantizedLayer(k4).recorded_pair(), "did not record"),
    ]
    for attempt, reason in cases:
        with pytest.raises(ValueError, match=reason) as caught:
            attempt()
        assert "\n" not in str(caught.value)


CHUNKS = (1, 7, 64, 300)


def test_chunks_change_nothing_but_the_order_of_sums(model: Any) -> None:
    row, exact = ids(80).tolist(), copy.deepcopy(model).double()
    for one in kvchunks.apart(exact, row, CHUNKS, exact=True):
        assert (one.differ, one.numbers) == (0, 2 * 2 * H * D * 80)  # bit for bit
        assert one.logits < 1e-12 and one.kl < 1e-12
    narrow = list(kvchunks.apart(model, row, CHUNKS, exact=False))
    assert [one.chunk for one in narrow] == list(CHUNKS)
    assert narrow[0].differ > 0 and all(one.logits < 1e-3 and one.kl < 1e-6 for one in narrow)
    assert (narrow[-1].differ, narrow[-1].logits) == (0, 0.0)  # longer than the prompt


def test_a_fault_in_chunks_is_no_rounding(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first token is lost to some chunks only, all that the next layer keeps differs."""
    exact = copy.deepcopy(model).double()
    read = Side.read

    def short(side: Side, dtype: torch.dtype) -> torch.Tensor:
        found = read(side, dtype).clone()
        found[:, :, 0] *= found.shape[2] < 100
        return found

    monkeypatch.setattr(Side, "read", short)
    (one,) = kvchunks.apart(exact, ids(120).tolist(), (64,), exact=True)
    assert one.logits > 1e-3 and one.differ > one.numbers / 8


def test_what_cannot_be_compared_in_chunks(model: Any) -> None:
    cases = [
        (ids(20), {"exact": True}, "torch.float32 does not compute in float64"),
        (ids(300), {"exact": False}, "300 tokens are more than the model's context"),
        (ids(7), {"exact": False}, "7 tokens are too few"),
    ]
    for row, how, says in cases:
        with pytest.raises(ValueError, match=says):
            list(kvchunks.apart(model, row.tolist(), (4,), **how))
