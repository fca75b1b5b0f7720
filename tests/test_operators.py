"""Operator models against arithmetic done by hand from published configurations."""

from __future__ import annotations

import dataclasses
import math

import pytest

import configs
from rlkit.export.plan import plan_recipe
from rlkit.profiles.architecture import Architecture, Latent, Layer, of_config, of_shape
from rlkit.profiles.operators import (
    FORMATS,
    NAMED,
    Adapters,
    Cache,
    Format,
    Kind,
    Operator,
    Options,
    Step,
    Storage,
    Weights,
    cache_nbytes,
    causal_pairs,
    format_named,
    operators,
    operators_of,
    packed,
    prefill_steps,
    score_flops,
    unique_experts,
    weigh,
)
from rlkit.recover import recipe
from rlkit.recover.ggufheader import TYPES
from rlkit.recover.recipe import Recipe, Rule, Scheme
from shapes import QWEN3_4B as QWEN3_4B_SHAPE
from shapes import SMOLLM2_135M as SMOLLM2_SHAPE

FOUR = tuple(of_config(c) for c in (configs.LLAMA2_7B, configs.LLAMA31_8B, configs.QWEN3_4B, configs.QWEN3_8B))
LLAMA2_7B, _LLAMA31_8B, QWEN3_4B, _QWEN3_8B = FOUR
GPT_OSS = of_config(configs.GPT_OSS_20B)
DEEPSEEK = of_config(configs.DEEPSEEK_V3)
SMOLLM2 = of_config(configs.SMOLLM2_135M)
HALF = Storage(scale_bits=16, float_bits=16, activation_bits=16, kv=Cache(16))
PUBLISHED = dataclasses.replace(HALF, formats=(("*.experts.*", FORMATS["mxfp4"]),))  # GPT-OSS as it is distributed
APART = Options(fused_qkv=False, fused_gate_up=False)


def stored_as(name: str) -> Storage:
    return dataclasses.replace(HALF, formats=(("*", format_named(name)),))


def uniform(bits: int, group: int, rank: int = 0, *, symmetric: bool = False) -> Recipe:
    return Recipe("uniform", (Rule(("*",), Scheme(bits, group, symmetric, rank)),))


def streamed(weights: Weights) -> int:
    """Bytes of the matrices that a token uses, without biases and norms."""
    return sum(matrix.streamed_nbytes for matrix in weights.matrices)


def total(ops: tuple[Operator, ...], *kinds: Kind) -> int:
    return sum(op.count * op.flops for op in ops if op.kind in kinds)


def counted(architecture: Architecture, step: Step, options: Options = APART) -> tuple[Operator, ...]:
    return operators(architecture, weigh(architecture, None, HALF), HALF, step, options)


@pytest.mark.parametrize(
    ("how", "storage", "expected"),
    [
        (None, HALF, (13_214_154_752, 15_009_316_864, 8_044_544_000, 15_136_194_560)),
        (uniform(4, 128), HALF, (3_432_583_168, 3_898_904_576, 2_089_696_000, 3_931_863_040)),
        (None, stored_as("Q4_0"), (3_716_481_024, 4_221_370_368, 2_262_528_000, 4_257_054_720)),
        (None, stored_as("Q4_1"), (4_129_423_360, 4_690_411_520, 2_513_920_000, 4_730_060_800)),
        (uniform(2, 64), HALF, (1_884_049_408, 2_140_000_256, 1_146_976_000, 2_158_090_240)),
    ],
    ids=["fp16", "w4g128", "q4_0", "q4_1", "w2g64"],
)
def test_weight_bytes_of_every_token(how: Recipe | None, storage: Storage, expected: tuple[int, ...]) -> None:
    assert tuple(streamed(weigh(each, how, storage)) for each in FOUR) == expected


def test_weight_bytes_with_lm_head_left_at_sixteen_bits() -> None:
    mixed = Recipe("mixed", (Rule(("lm_head",), Scheme(16, 32)), *uniform(4, 128).rules))
    expected = (3_626_631_168, 4_676_648_960, 2_665_533_440, 4_853_202_944)
    assert tuple(streamed(weigh(each, mixed, HALF)) for each in FOUR) == expected


@pytest.mark.parametrize(
    ("found", "bits"),
    [
        (packed(8, 128, 16, 0), 8.125),
        (packed(4, 128), 4.15625),
        (packed(4, 32), 4.625),
        (packed(2, 64), 2.28125),
        (format_named("q4_0"), 4.5),
        (format_named("Q4_1"), 5.0),
        (format_named("q8_0"), 8.5),
        (format_named("mxfp4"), 4.25),
        (format_named("q6_k"), 6.5625),
        (format_named("fp16"), 16.0),
        (format_named("bf16"), 16.0),
        (format_named("fp32"), 32.0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bits_per_weight(found: Format, bits: float) -> None:
    assert found.bits_per_weight == bits
    assert found.nbytes(7, 256) * 8 == 7 * 256 * bits


def test_formats_of_gguf_files_take_what_their_blocks_take() -> None:
    for name, block, nbytes in TYPES.values():
        stored = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(name, name)
        assert format_named(stored).nbytes(3, 4 * 256) == 3 * 4 * 256 // block * nbytes


def test_zero_points_are_packed_row_by_row_and_groups_are_whole() -> None:
    # 9 groups of 64: 288 bytes of codes, 36 of scales, 4.5 -> 5 of zero points
    assert packed(4, 64, 32).nbytes(10, 576) == 10 * (288 + 36 + 5)
    assert packed(4, 64, 32, 0).nbytes(10, 576) == 10 * (288 + 36)
    assert packed(4, 128, 16, 0).nbytes(1, 576) == 5 * (64 + 2)


def test_symmetric_schemes_may_do_without_zero_points() -> None:
    how = uniform(4, 32, symmetric=True)
    per_group = {True: 16 + 4 + 0.5, False: 16 + 4}
    for kept, nbytes in per_group.items():
        (first, *_rest) = weigh(LLAMA2_7B, how, Storage(symmetric_zeros=kept)).matrices
        assert first.nbytes == 4096 * 4096 // 32 * nbytes
    assert weigh(LLAMA2_7B, uniform(4, 32), Storage(zero_bits=0)).matrices[0].nbytes == 4096 * 4096 // 32 * 20


def test_a_recipe_goes_before_formats_and_formats_before_floats() -> None:
    how = Recipe("part", (Rule(("*.q_proj",), Scheme(4, 32)), Rule(("*.k_proj",), Scheme(16, 32))))
    storage = dataclasses.replace(HALF, formats=(("*.k_proj", FORMATS["q8_0"]), ("*.q_proj", FORMATS["q8_0"])))
    bits = {matrix.name: matrix.format.name for matrix in weigh(LLAMA2_7B, how, storage).matrices}
    assert (bits["q_proj"], bits["k_proj"], bits["v_proj"]) == ("w4g32", "q8_0", "fp16")


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (Cache(16), (524_288, 131_072, 147_456, 147_456)),
        (Cache(32), (1_048_576, 262_144, 294_912, 294_912)),
        (Cache(8), (262_144, 65_536, 73_728, 73_728)),
        (Cache(4, 16, 16), (139_264, 34_816, 39_168, 39_168)),
        (Cache(4, 16, 16, per="group", group=128), (139_264, 34_816, 39_168, 39_168)),
        (Cache(4, 16, 16, per="group", group=32), (163_840, 40_960, 46_080, 46_080)),
    ],
    ids=["fp16", "fp32", "int8", "int4", "int4 g128", "int4 g32"],
)
def test_cache_bytes_of_a_token(cache: Cache, expected: tuple[int, ...]) -> None:
    assert tuple(cache_nbytes(each, cache, 1) for each in FOUR) == expected
    assert tuple(cache_nbytes(each, cache, 1000, batch=3) for each in FOUR) == tuple(3000 * size for size in expected)


def test_scales_of_channels_are_shared_by_tokens() -> None:
    plain = cache_nbytes(LLAMA2_7B, Cache(8), 64)
    scales = 32 * 2 * 32 * 128 * 2  # one of 16 bits for each number of a layer's keys and values
    assert cache_nbytes(LLAMA2_7B, Cache(8, 16, per="channel"), 64) == plain + scales
    assert cache_nbytes(LLAMA2_7B, Cache(8, 16, per="channel", group=32), 64) == plain + 2 * scales
    assert cache_nbytes(LLAMA2_7B, Cache(8, 16, per="tensor"), 64) == plain


def test_prefill_flops_of_1024_tokens() -> None:
    linear = (13_262_859_010_048, 14_293_651_161_088, 7_441_030_840_320, 14_224_931_684_352)
    attention = (275_146_342_400, 275_146_342_400, 309_539_635_200, 309_539_635_200)
    together = (13_538_267_496_448, 14_569_848_176_640, 7_751_348_387_840, 14_535_715_979_264)
    for index, each in enumerate(FOUR):
        for options in (APART, Options(), NAMED["eager"]):
            ops = counted(each, Step(1024), options)
            lm_head = sum(op.flops for op in ops if op.name == "lm_head")
            assert total(ops, Kind.LINEAR) - lm_head == linear[index]
            assert score_flops(each, Step(1024)) == attention[index]
            assert total(ops, Kind.LINEAR) + score_flops(each, Step(1024)) == together[index]


def test_decode_flops_and_cache_read_at_1025_attended_tokens() -> None:
    linear = (13_214_154_752, 15_009_316_864, 8_044_544_000, 15_136_194_560)
    attention = (537_395_200, 537_395_200, 604_569_600, 604_569_600)
    read = (537_395_200, 134_348_800, 151_142_400, 151_142_400)
    for index, each in enumerate(FOUR):
        ops = counted(each, Step(1, 1024))
        assert total(ops, Kind.LINEAR) == linear[index]
        assert score_flops(each, Step(1, 1024)) == attention[index]
        assert sum(op.count * op.kv_nbytes for op in ops) == read[index] + cache_nbytes(each, HALF.kv, 1)


def test_one_layer_of_decode() -> None:
    def of(architecture: Architecture) -> dict[str, tuple[int, int]]:
        weights = weigh(architecture, uniform(4, 128), HALF)
        ops = operators(architecture, weights, HALF, Step(1, 1023), APART)
        found = {
            name: {(op.flops, op.weight_nbytes) for op in ops if op.name == name} for name in (op.name for op in ops)
        }
        return {name: min(values) for name, values in found.items()}

    llama, qwen = of(LLAMA2_7B), of(QWEN3_4B)
    assert llama["q_proj"] == llama["o_proj"] == (33_554_432, 8_716_288)
    assert llama["gate_proj"] == llama["down_proj"] == (90_177_536, 23_425_024)
    assert qwen["q_proj"] == qwen["o_proj"] == (20_971_520, 5_447_680)
    assert qwen["k_proj"] == (5_242_880, 1_361_920)
    assert qwen["up_proj"] == (49_807_360, 12_938_240)


def test_attention_of_a_layer_counts_scores_softmax_rotation_and_cache() -> None:
    (attention,) = [op for op in counted(LLAMA2_7B, Step(1, 1023)) if op.kind is Kind.ATTENTION]
    assert attention.flops == 2 * 8_388_608 + 163_840 + 24_576
    assert attention.kv_nbytes == 16_777_216 + 16_384
    assert (attention.count, attention.bits, attention.launches) == (32, 16, 1)
    (qwen,) = [op for op in counted(QWEN3_4B, Step(1, 1023)) if op.kind is Kind.ATTENTION]
    assert qwen.kv_nbytes == 4_194_304 + 4_096


def test_causal_pairs_do_not_depend_on_chunks() -> None:
    assert causal_pairs(2048) == 2_098_176
    assert sum(causal_pairs(512, past) for past in range(0, 2048, 512)) == 2_098_176
    assert causal_pairs(1, 9) == 10


@pytest.mark.parametrize("window", [1, 2, 7, 64, 1000, None])
def test_pairs_of_a_window_are_counted_one_by_one(window: int | None) -> None:
    for new, past in ((1, 0), (1, 63), (1, 64), (5, 0), (64, 3), (100, 200), (7, 6)):
        expected = sum(min(position + 1, window or 10**9) for position in range(past, past + new))
        assert causal_pairs(new, past, window) == expected


def test_chunks_read_weights_and_past_again() -> None:
    whole, chunks = prefill_steps(2048), prefill_steps(2048, 512)
    assert whole == (Step(2048),) and [step.past_tokens for step in chunks] == [0, 512, 1024, 1536]
    assert sum(step.past_tokens for step in chunks) == 3072
    weights = weigh(LLAMA2_7B, None, HALF)
    once, four = (operators_of(LLAMA2_7B, weights, HALF, steps) for steps in (whole, chunks))
    assert total(four, Kind.ATTENTION) == total(once, Kind.ATTENTION)
    extra = sum(op.count * op.kv_nbytes for op in four) - sum(op.count * op.kv_nbytes for op in once)
    assert extra == 3072 * 524_288
    counts = {op.name: op.count for op in four}
    assert counts["down_proj"] == 4 * 32 and counts["lm_head"] == 4  # a graph cannot leave its lm_head out
    assert total(four, Kind.LINEAR) - total(once, Kind.LINEAR) == 3 * 2 * 131_072_000


@pytest.mark.parametrize("architecture", [LLAMA2_7B, GPT_OSS, DEEPSEEK], ids=lambda made: made.name)
def test_steps_together_are_the_sum_of_steps_alone(architecture: Architecture) -> None:
    steps = (*prefill_steps(700, 200), Step(1, 700), Step(1, 701), Step(200, 0, 1, batch=2))
    weights = weigh(architecture, None, HALF)
    alone = [op for step in steps for op in operators(architecture, weights, HALF, step)]
    together = operators_of(architecture, weights, HALF, steps)
    for field in ("flops", "weight_nbytes", "activation_nbytes", "kv_nbytes", "launches"):
        sums = [sum(op.count * getattr(op, field) for op in ops) for ops in (alone, together)]
        assert sums[0] == sums[1]
    assert operators_of(architecture, weights, HALF, ()) == ()


def test_the_last_chunk_is_what_is_left() -> None:
    assert [step.new_tokens for step in prefill_steps(1000, 300)] == [300, 300, 300, 100]
    everything = prefill_steps(10, 4, past_tokens=5, all_logits=True, batch=2)
    assert everything == (Step(4, 5, 4, 2), Step(4, 9, 4, 2), Step(2, 13, 2, 2))
    for wrong in ((0, None), (10, 0)):
        with pytest.raises(ValueError, match="are no prompt"):
            prefill_steps(*wrong)


def test_a_mixture_as_it_is_published() -> None:
    weights = weigh(GPT_OSS, None, PUBLISHED)
    assert weights.stored_nbytes == 13_761_264_768
    assert weights.streamed_nbytes == 3_708_083_328
    experts = [matrix for matrix in weights.matrices if matrix.experts]
    assert sum(matrix.count * matrix.nbytes for matrix in experts) == 10_152_345_600
    active = sum(matrix.active * matrix.whole_nbytes for matrix in experts)
    assert weights.streamed_nbytes - active == 2_437_381_248


def test_a_mixtures_prefill_of_1024_tokens() -> None:
    ops = counted(GPT_OSS, Step(1024))
    lm_head = sum(op.flops for op in ops if op.name == "lm_head")
    assert lm_head == 1_158_266_880
    assert total(ops, Kind.LINEAR, Kind.EXPERTS) - lm_head == 6_201_362_350_080
    assert (causal_pairs(1024), causal_pairs(1024, 0, 128)) == (524_800, 122_944)
    assert score_flops(GPT_OSS, Step(1024)) == 127_351_652_352


def test_a_windows_cache_stops_growing() -> None:
    assert cache_nbytes(GPT_OSS, Cache(16, windowed=False), 1) == 49_152
    assert cache_nbytes(GPT_OSS, Cache(16), 8192) == 204_472_320
    assert cache_nbytes(GPT_OSS, Cache(16, windowed=False), 8192) == 8192 * 49_152
    ops = counted(GPT_OSS, Step(1, 8191))
    windowed, full = [op for op in ops if op.kind is Kind.ATTENTION]
    assert (windowed.name, windowed.count, full.count) == ("attention in a window of 128", 12, 12)
    assert windowed.kv_nbytes == (128 + 1) * 2 * 8 * 64 * 2 and full.kv_nbytes == (8192 + 1) * 2 * 8 * 64 * 2


@pytest.mark.parametrize(("tokens", "expected"), [(1, 4.0), (4, 13.24), (16, 28.22), (64, 31.994)])
def test_unique_experts(tokens: int, expected: float) -> None:
    assert unique_experts(32, 4, tokens) == pytest.approx(expected, abs=0.005)


def test_skewed_routing_touches_fewer() -> None:
    for tokens in (2, 16, 256):
        found = [unique_experts(32, 4, tokens, skew) for skew in (0.0, 0.5, 1.0, 2.0, 10.0)]
        assert found == sorted(found, reverse=True) and 4 <= found[-1] < found[0] <= 32
    assert unique_experts(32, 4, 1, 1.0) == 4.0 and unique_experts(8, 8, 5, 1.0) == 8.0
    assert unique_experts(32, 4, 0) == 0.0
    for wrong in ((32, 33, 1), (32, 0, 1), (32, 4, -1)):
        with pytest.raises(ValueError, match="contradictory"):
            unique_experts(*wrong)
    for skew in (-1.0, math.nan, 11.0):
        with pytest.raises(ValueError, match="outside 0"):
            unique_experts(32, 4, 4, skew)


def test_experts_weights_are_read_once_for_all_tokens_that_share_them() -> None:
    weights = weigh(GPT_OSS, None, PUBLISHED)

    def read(step: Step, **changes: float) -> int:
        ops = operators(GPT_OSS, weights, PUBLISHED, step, dataclasses.replace(Options(), **changes))
        return sum(op.count * op.weight_nbytes for op in ops if op.kind is Kind.EXPERTS)

    each = 24 * (13_219_200 + 17_280)
    assert read(Step(1)) == 4 * each
    assert read(Step(1, batch=4)) == read(Step(4)) == pytest.approx(13.24 * each, rel=1e-3)
    assert read(Step(4096)) == 32 * each
    assert read(Step(16), skew=1.0) < read(Step(16))
    (down,) = [op for op in counted(GPT_OSS, Step(16)) if op.name == "experts.down_proj"]
    assert down.flops == 2 * 16 * 4 * 2880 * 2880


def test_experts_are_one_operator_or_products_expert_by_expert() -> None:
    def launches(step: Step, **changes: bool) -> int:
        ops = counted(GPT_OSS, step, dataclasses.replace(Options(), **changes))
        return sum(op.count * op.launches for op in ops if op.kind is Kind.EXPERTS)

    assert launches(Step(1)) == launches(Step(1), fused_gate_up=False) == 24
    assert launches(Step(1), fused_experts=False) == 24 * 2 * 4
    assert launches(Step(64), fused_experts=False, fused_gate_up=False) == 24 * 3 * 32


def test_latent_attention_caches_one_vector() -> None:
    assert cache_nbytes(DEEPSEEK, Cache(16), 1) == 70_272
    layer = DEEPSEEK.layers[0]
    assert 61 * 2 * layer.heads * (layer.key_size + layer.value_size) == 4_997_120  # if all keys and values were kept
    (attention,) = [op for op in counted(DEEPSEEK, Step(1, 999)) if op.kind is Kind.ATTENTION]
    assert attention.kv_nbytes * 61 == 1001 * 70_272


def test_latent_attention_is_absorbed_or_expanded() -> None:
    def ops(step: Step, latent: str) -> dict[str, Operator]:
        options = dataclasses.replace(APART, latent=latent)
        return {op.name: op for op in counted(DEEPSEEK, step, options)}

    decode = ops(Step(1, 1023), "absorbed")
    rotated = 3 * 129 * 64
    assert decode["attention"].flops == 2 * 128 * 1024 * (576 + 512) + 5 * 128 * 1024 + rotated
    assert decode["kv_b_proj"].flops == 2 * 128 * 256 * 512
    expanded = ops(Step(1, 1023), "expanded")
    assert expanded["attention"].flops == 2 * 128 * 1024 * (192 + 128) + 5 * 128 * 1024 + rotated
    assert expanded["kv_b_proj"].flops == 1024 * 2 * 128 * 256 * 512
    assert ops(Step(1, 1023), "cheaper") == decode
    prompt = Step(4096)
    assert ops(prompt, "cheaper") == ops(prompt, "expanded") != ops(prompt, "absorbed")


def test_latent_queries_may_come_from_the_input() -> None:
    made = of_config(configs.DEEPSEEK_V2_LITE)
    names = {op.name for op in counted(made, Step(1))}
    assert "q_proj" in names and "q_a_proj" not in names and "shared_expert.down_proj" in names


def test_adapters_of_rank_16_on_queries_and_values() -> None:
    weights = weigh(LLAMA2_7B, None, HALF, Adapters(16, ("*.q_proj", "*.v_proj")))
    held = [matrix.count * matrix.rank * (matrix.n + matrix.k) for matrix in weights.matrices]
    assert sum(held) == 8_388_608 == 32 * 262_144
    ops = operators(LLAMA2_7B, weights, HALF, Step(1))
    adapters = [op for op in ops if op.kind is Kind.ADAPTER]
    assert sum(op.count * op.flops for op in adapters) == 16_777_216
    assert sum(op.count * op.launches for op in adapters) == 2 * 64
    assert sum(op.count * op.weight_nbytes for op in adapters) == 2 * 8_388_608  # rank 16 has no blocks of 8 bits
    assert not {"qkv_proj"} & {op.name for op in ops}  # a branch keeps them apart
    assert weigh(LLAMA2_7B, None, HALF, Adapters(0)) == weigh(LLAMA2_7B, None, HALF)


def test_a_recipes_adapters_are_stored_in_blocks() -> None:
    how = Recipe("q and v", (Rule(("*.q_proj", "*.v_proj"), Scheme(4, 32, adapter_rank=32)),))
    weights = weigh(LLAMA2_7B, how, Storage())
    query = next(matrix for matrix in weights.matrices if matrix.name == "q_proj")
    # A is (32, 4096) in blocks of 128, B is (4096, 32) in blocks of 32, a byte each and a 4-byte scale per block
    assert query.adapter_nbytes == 2 * 32 * 4096 + 4 * (32 * 32 + 4096)
    added = [op for op in operators(LLAMA2_7B, weights, Storage(), Step(3)) if op.name == "adapters: sum"]
    assert [(op.count, op.flops, op.launches) for op in added] == [(64, 3 * 4096, 1)]
    assert weigh(LLAMA2_7B, how, Storage(), Adapters(0)).matrices[0].rank == 0


def test_a_rank_without_blocks_and_adapters_kept_apart_stay_float() -> None:
    assert Storage().adapter_nbytes(64, 64, 10) == 4 * 10 * 128
    assert Storage(adapter_bits=16).adapter_nbytes(64, 64, 32) == 2 * 32 * 128
    assert Storage().adapter_nbytes(64, 64, 0) == 0


@pytest.mark.parametrize("name", recipe.NAMED)
def test_bytes_agree_with_the_plan_of_the_export(name: str) -> None:
    how = recipe.load(name)
    for shape in (SMOLLM2_SHAPE, QWEN3_4B_SHAPE):
        planned = plan_recipe(shape, how).by_kind()
        expected = sum(planned.get(kind, 0) for kind in ("attention", "gate_up", "down", "lm_head", "adapter"))
        assert streamed(weigh(of_shape(shape), how)) == expected


def test_equal_layers_are_counted_together() -> None:
    weights = weigh(SMOLLM2, recipe.load("w4w2-gateup"))
    assert {matrix.name: matrix.count for matrix in weights.matrices}["gate_proj"] == 30
    assert weights.matrices[-1].name == "lm_head" and len(weights.blocks) == 1
    ops = operators(SMOLLM2, weights, Storage(), Step(4))
    assert ops[-1].name == "lm_head" and ops[-1].flops == 2 * 576 * 49152 and ops[-1].tokens == 1
    assert len(ops) < 20


def test_recipes_may_single_out_layers() -> None:
    names = tuple(f"model.layers.{index}.mlp.down_proj" for index in (0, 29))
    rules = (Rule(names, Scheme(8, 64)), Rule(("model.layers.1?.self_attn.*",), Scheme(2, 64)), *uniform(4, 32).rules)
    weights = weigh(SMOLLM2, Recipe("picked", rules))
    found = {(matrix.name, matrix.bits): matrix.count for matrix in weights.matrices}
    assert found["down_proj", 8] == 2 and found["down_proj", 4] == 28
    assert found["q_proj", 2] == 10 and found["q_proj", 4] == 20
    assert sorted(block.count for block in weights.blocks) == [2, 10, 18]
    spelled = tuple(module for module, *_sizes in SMOLLM2.linears())
    assert streamed(weigh(SMOLLM2, Recipe("all", (Rule(spelled, Scheme(4, 32)),)))) == streamed(
        weigh(SMOLLM2, uniform(4, 32))
    )


def test_the_first_rule_that_matches_wins_as_in_recipes() -> None:
    rules = (
        Rule(("*.q_proj",), Scheme(2, 64)),
        Rule(("model.layers.3.self_attn.q_proj", "*.k_proj"), Scheme(8, 64)),
        Rule(("model.layers.[0-4].*",), Scheme(16, 32)),
        Rule(("*",), Scheme(4, 32)),
    )
    how = Recipe("order", rules)
    bits: dict[str, int] = {}
    for index, (module, _n, k, _copies) in enumerate(SMOLLM2.linears()):
        scheme = how.scheme_for(module)
        bits[f"{index}"] = Storage().format_of(scheme, module, k).bits
    found = sum(matrix.count * matrix.bits for matrix in weigh(SMOLLM2, how).matrices)
    assert found == sum(bits.values())


def test_inputs_that_no_group_fits_are_named() -> None:
    odd = of_config(configs.LLAMA2_7B | {"intermediate_size": 11000})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj: input size 11000 is not a multiple"):
        weigh(odd, uniform(4, 32))


def test_a_tied_embedding_is_stored_once() -> None:
    assert weigh(QWEN3_4B, None, HALF).stored_nbytes == 2 * 4_022_468_096
    assert weigh(LLAMA2_7B, None, HALF).stored_nbytes == 2 * 6_738_415_616
    assert weigh(LLAMA2_7B, None, HALF).embedding_nbytes == 2 * 32000 * 4096
    assert weigh(SMOLLM2, uniform(4, 32)).row_nbytes == 288 + 18 * 4 + 9  # a row of the packed lm_head


@pytest.mark.parametrize("options", NAMED)
@pytest.mark.parametrize("name", configs.PARAMETERS)
def test_a_decode_step_reads_every_weight_that_it_uses(name: str, options: str) -> None:
    made = of_config(configs.PARAMETERS[name][0])
    weights = weigh(made, None, HALF, Adapters(8))
    ops = operators(made, weights, HALF, Step(1, 100), NAMED[options])
    assert sum(op.count * op.weight_nbytes for op in ops) == weights.streamed_nbytes + weights.row_nbytes
    assert weigh(made, None, HALF).streamed_nbytes == 2 * made.active_parameters
    assert all(value >= 0 for op in ops for value in (op.flops, op.nbytes, op.launches)) and len(ops) < 60


def test_joining_saves_reads_of_the_input_and_launches() -> None:
    weights = weigh(LLAMA2_7B, uniform(4, 32))
    apart, joined = (operators(LLAMA2_7B, weights, Storage(), Step(8), each) for each in (APART, Options()))
    names = {op.name: op for op in joined}
    assert names["qkv_proj"].flops == 2 * 8 * 4096 * 3 * 4096 and names["gate_up_proj"].flops == 2 * 8 * 4096 * 22016
    assert names["split"].flops == 0  # gate and up again
    assert not {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} & set(names)
    read = [sum(op.count * op.activation_nbytes for op in ops if op.kind is Kind.LINEAR) for ops in (apart, joined)]
    assert read[0] - read[1] == 32 * 3 * 8 * 4096 * 4
    launches = [sum(op.count * op.launches for op in ops) for ops in (apart, joined)]
    assert launches[0] - launches[1] == 32 * (2 + 1 - 1)
    assert total(apart, Kind.LINEAR) == total(joined, Kind.LINEAR)


def test_what_differs_or_has_a_branch_is_not_joined() -> None:
    def names(how: Recipe) -> set[str]:
        return {op.name for op in operators(SMOLLM2, weigh(SMOLLM2, how), Storage(), Step(1))}

    assert "gate_up_proj" not in names(recipe.load("w4w2-gateup")) and "qkv_proj" in names(recipe.load("w4w2-gateup"))
    one = Recipe("one", (Rule(("model.layers.4.self_attn.v_proj",), Scheme(8, 64)), *uniform(4, 64).rules))
    assert "qkv_proj" not in names(one)  # one layer keeps them apart in all
    mlp = Recipe("mlp", (Rule(("model.layers.4.mlp.up_proj",), Scheme(8, 64)), *uniform(4, 64).rules))
    assert {"gate_up_proj", "gate_proj", "qkv_proj"} <= names(mlp)  # gate and up go layer by layer
    floats = names(uniform(16, 32))
    assert "gate_proj" in floats and "qkv_proj" in floats


def test_a_layer_of_the_cpu_export_node_by_node() -> None:
    ops = operators(SMOLLM2, weigh(SMOLLM2, uniform(4, 64)), Storage(), Step(1, 10))
    launches = {op.name: op.count * op.launches for op in ops}
    each = {"residual and norm": 60, "qkv_proj": 30, "attention": 30, "o_proj": 30, "gate_up_proj": 30, "split": 30}
    assert launches == {
        "embedding": 1,
        "inputs": 6,
        **each,
        "activation": 60,
        "down_proj": 30,
        "norm": 1,
        "lm_head": 1,
    }


def test_normalized_queries_and_keys_add_two_norms() -> None:
    apart = counted(QWEN3_4B, Step(1), dataclasses.replace(APART, fused_norm=False))
    assert total(apart, Kind.NORM) == 36 * 4 * (2 * 2560 + 40 * 128) + 4 * 2560
    inside = counted(QWEN3_4B, Step(1), NAMED["webgpu"])
    assert "head norm" not in {op.name for op in inside}
    flops = [total(ops, Kind.NORM, Kind.ATTENTION, Kind.ELEMENTWISE) for ops in (apart, inside)]
    assert flops[0] == flops[1]


def test_eager_attention_writes_every_score() -> None:
    fused, eager = (counted(LLAMA2_7B, Step(64, 64), o) for o in (APART, dataclasses.replace(APART, attention="eager")))
    (one,) = [op for op in fused if op.kind is Kind.ATTENTION]
    scores, softmax, values = [op for op in eager if op.kind is Kind.ATTENTION]
    pairs = 64 * 128
    assert softmax.flops == 5 * 32 * pairs and values.flops == 2 * 32 * 128 * pairs
    assert scores.kv_nbytes + values.kv_nbytes == one.kv_nbytes
    written = sum(op.activation_nbytes for op in (scores, softmax, values)) - one.activation_nbytes
    assert written == 2 * 2 * 32 * pairs * 2
    assert sum(op.launches for op in (scores, softmax, values)) == 4


def test_copies_of_the_cache_are_charged_where_a_runtime_makes_them() -> None:
    def moved(kv_copy: str) -> int:
        ops = counted(QWEN3_4B, Step(1, 1023), dataclasses.replace(APART, kv_copy=kv_copy))
        return sum(op.activation_nbytes for op in ops if op.kind is Kind.ATTENTION)

    assert moved("cache") - moved("none") == 2 * 1024 * 8 * 256 * 2
    assert moved("heads") - moved("none") == 2 * 1024 * 32 * 256 * 2


def test_rotation_may_be_an_operator_of_its_own() -> None:
    apart, inside = (counted(LLAMA2_7B, Step(5), o) for o in (NAMED["dml"], dataclasses.replace(APART)))
    (rotary,) = [op for op in apart if op.name == "rotary"]
    assert (rotary.flops, rotary.launches, rotary.count) == (3 * 5 * 64 * 128, 2, 32)
    kinds = (Kind.ATTENTION, Kind.ELEMENTWISE)
    assert total(apart, *kinds) == total(inside, *kinds)


def test_unpacking_costs_two_flops_a_weight() -> None:
    weights = weigh(LLAMA2_7B, uniform(4, 32))
    plain, unpacked = (
        total(operators(LLAMA2_7B, weights, Storage(), Step(7), o), Kind.LINEAR)
        for o in (Options(), Options(unpacking=True))
    )
    assert unpacked - plain == 2 * (6_476_005_376 + 131_072_000)


def test_a_batch_shares_the_weights_and_nothing_else() -> None:
    one, four = (counted(QWEN3_4B, step) for step in (Step(3, 50), Step(3, 50, 1, batch=4)))
    for single, batched in zip(one, four, strict=True):
        assert single.name == batched.name and batched.flops == 4 * single.flops
        assert batched.kv_nbytes == 4 * single.kv_nbytes
        weights = 4 * single.weight_nbytes if single.kind is Kind.EMBEDDING else single.weight_nbytes
        assert batched.weight_nbytes == weights


def test_logits_for_none_one_or_all() -> None:
    def head(step: Step) -> int:
        return sum(op.flops for op in counted(LLAMA2_7B, step) if op.name == "lm_head")

    assert [head(Step(9, 0, logits)) for logits in (0, 1, 9)] == [0, 2 * 131_072_000, 9 * 2 * 131_072_000]


@pytest.mark.parametrize(
    "step", [(0, 0, 0), (1, -1, 1), (4, 0, 5), (4, 0, -1), (4, 0, 1, 0), (10**12, 0, 1), (1.5, 0, 1), (True, 0, 1)]
)
def test_impossible_steps_are_refused(step: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is no step"):
        Step(*step)


def test_impossible_storage_and_options_are_refused() -> None:
    for message, make in {
        "scale_bits = 0": lambda: Storage(scale_bits=0),
        "zero_bits = 99": lambda: Storage(zero_bits=99),
        "no storage width": lambda: Cache(0),
        "per = 'head'": lambda: Cache(8, per="head"),
        "group = 0 shares no scale": lambda: Cache(8, 16, per="group"),
        "bits = 0": lambda: packed(0, 32),
        "contradicts itself": lambda: packed(4, 0),
        "storage format 'q9' is not known": lambda: format_named("q9"),
        "rank = -1": lambda: Adapters(-1),
        "attention = 'flash'": lambda: Options(attention="flash"),
        "small_launches = -1": lambda: Options(small_launches=-1),
        "latent = ''": lambda: Options(latent=""),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


def test_a_step_of_a_deep_model_is_no_longer_list_than_of_a_shallow_one() -> None:
    """What keeps sweeps fast: work follows the layers that differ, not their number."""

    def operators_of_depth(layers: int) -> list[str]:
        made = Architecture("x", 64, 128, True, 512, (Layer(4, 2, 16, 96),) * layers)
        return [op.name for op in operators(made, weigh(made, uniform(4, 32)), Storage(), Step(1, 7))]

    assert operators_of_depth(96) == operators_of_depth(1)


def test_a_latent_layer_has_sizes_of_its_own() -> None:
    layer = Layer(16, 16, 192, 64, latent=Latent(512, 128, 64, 128))
    assert (layer.key_size, layer.value_size, layer.cached) == (192, 128, ((1, 576),))
