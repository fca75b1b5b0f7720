"""Operator models against arithmetic done by hand from published model shapes."""

from __future__ import annotations

import pytest

from rlkit.export.plan import plan_recipe
from rlkit.profiles.operators import (
    Kind,
    Operator,
    Step,
    Storage,
    causal_pairs,
    embedding_nbytes,
    matrices,
    operators,
    score_flops,
)
from rlkit.recover import recipe
from rlkit.recover.recipe import Recipe, Rule, Scheme
from rlkit.recover.source import ModelShape
from shapes import FOUR, LLAMA2_7B, QWEN3_4B, SMOLLM2_135M

HALF = Storage(scale_bits=16, float_bits=16, activation_bits=16, kv_bits=16)


def uniform(bits: int, group: int, rank: int = 0) -> Recipe:
    return Recipe("uniform", (Rule(("*",), Scheme(bits, group, adapter_rank=rank)),))


FLOAT = Recipe("float", (Rule(("*",), Scheme(16, 32)),))


def streamed(shape: ModelShape, how: Recipe, storage: Storage) -> int:
    return sum(matrix.streamed_nbytes for matrix in matrices(shape, how, storage))


def total(ops: tuple[Operator, ...], kind: Kind) -> int:
    return sum(op.count * op.flops for op in ops if op.kind is kind)


@pytest.mark.parametrize(
    ("how", "storage", "expected"),
    [
        (FLOAT, HALF, (13_214_154_752, 15_009_316_864, 8_044_544_000, 15_136_194_560)),
        (uniform(4, 128), HALF, (3_432_583_168, 3_898_904_576, 2_089_696_000, 3_931_863_040)),
        (
            uniform(4, 32),
            Storage(scale_bits=16, zero_bits=0),
            (3_716_481_024, 4_221_370_368, 2_262_528_000, 4_257_054_720),
        ),
        (
            uniform(4, 32),
            Storage(scale_bits=16, zero_bits=16),
            (4_129_423_360, 4_690_411_520, 2_513_920_000, 4_730_060_800),
        ),
        (uniform(2, 64), HALF, (1_884_049_408, 2_140_000_256, 1_146_976_000, 2_158_090_240)),
    ],
    ids=["fp16", "w4g128", "q4_0", "q4_1", "w2g64"],
)
def test_weight_bytes_of_every_token(how: Recipe, storage: Storage, expected: tuple[int, ...]) -> None:
    assert tuple(streamed(shape, how, storage) for shape in FOUR) == expected


def test_weight_bytes_with_lm_head_left_at_sixteen_bits() -> None:
    mixed = Recipe("mixed", (Rule(("lm_head",), Scheme(16, 32)), *uniform(4, 128).rules))
    expected = (3_626_631_168, 4_676_648_960, 2_665_533_440, 4_853_202_944)
    assert tuple(streamed(shape, mixed, HALF) for shape in FOUR) == expected


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        (HALF, (524_288, 131_072, 147_456, 147_456)),
        (Storage(kv_bits=8), (262_144, 65_536, 73_728, 73_728)),
        (Storage(kv_bits=4, kv_vector_bits=32), (139_264, 34_816, 39_168, 39_168)),
    ],
    ids=["fp16", "int8", "int4"],
)
def test_cache_bytes_of_a_token(storage: Storage, expected: tuple[int, ...]) -> None:
    assert tuple(storage.kv_token_nbytes(shape) for shape in FOUR) == expected


def test_prefill_flops_of_1024_tokens() -> None:
    linear = (13_262_859_010_048, 14_293_651_161_088, 7_441_030_840_320, 14_224_931_684_352)
    attention = (275_146_342_400, 275_146_342_400, 309_539_635_200, 309_539_635_200)
    together = (13_538_267_496_448, 14_569_848_176_640, 7_751_348_387_840, 14_535_715_979_264)
    for index, shape in enumerate(FOUR):
        ops = operators(shape, matrices(shape, FLOAT, HALF), HALF, Step(1024))
        lm_head = sum(op.flops for op in ops if op.name == "lm_head")
        scores = score_flops(shape, causal_pairs(1024))
        assert total(ops, Kind.LINEAR) - lm_head == linear[index]
        assert scores == attention[index]
        assert total(ops, Kind.LINEAR) + scores == together[index]


def test_decode_flops_and_cache_read_at_1025_attended_tokens() -> None:
    linear = (13_214_154_752, 15_009_316_864, 8_044_544_000, 15_136_194_560)
    attention = (537_395_200, 537_395_200, 604_569_600, 604_569_600)
    read = (537_395_200, 134_348_800, 151_142_400, 151_142_400)
    for index, shape in enumerate(FOUR):
        ops = operators(shape, matrices(shape, FLOAT, HALF), HALF, Step(1, 1024))
        assert total(ops, Kind.LINEAR) == linear[index]
        assert score_flops(shape, causal_pairs(1, 1024)) == attention[index]
        cache = sum(op.count * op.kv_nbytes for op in ops)
        assert cache == read[index] + HALF.kv_token_nbytes(shape)  # one token is written


def test_one_layer_of_decode() -> None:
    def of(shape: ModelShape) -> dict[str, tuple[int, int]]:
        ops = operators(shape, matrices(shape, uniform(4, 128), HALF), HALF, Step(1, 1023))
        return {op.name: (op.flops, op.weight_nbytes) for op in ops}

    llama, qwen = of(LLAMA2_7B), of(QWEN3_4B)
    assert llama["q_proj"] == llama["k_proj"] == llama["o_proj"] == (33_554_432, 8_716_288)
    assert llama["gate_proj"] == llama["down_proj"] == (90_177_536, 23_425_024)
    assert qwen["q_proj"] == qwen["o_proj"] == (20_971_520, 5_447_680)
    assert qwen["k_proj"] == qwen["v_proj"] == (5_242_880, 1_361_920)
    assert qwen["up_proj"] == (49_807_360, 12_938_240)


def test_attention_counts_scores_softmax_rotation_and_cache() -> None:
    ops = operators(LLAMA2_7B, matrices(LLAMA2_7B, FLOAT, HALF), HALF, Step(1, 1023))
    (attention,) = [op for op in ops if op.kind is Kind.ATTENTION]
    assert attention.flops == 2 * 8_388_608 + 163_840 + 24_576
    assert attention.kv_nbytes == 16_777_216 + 16_384
    assert attention.count == 32


def test_causal_pairs_do_not_depend_on_chunks() -> None:
    assert causal_pairs(2048) == 2_098_176
    assert sum(causal_pairs(512, past) for past in range(0, 2048, 512)) == 2_098_176
    assert causal_pairs(1, 9) == 10


def test_adapters_cost_their_rank() -> None:
    how = Recipe("q and v", (Rule(("*.q_proj", "*.v_proj"), Scheme(4, 32, adapter_rank=32)), *FLOAT.rules))
    plain = Storage(scale_bits=32)
    (query,) = [matrix for matrix in matrices(LLAMA2_7B, how, plain) if matrix.name == "q_proj"]
    # A is (32, 4096) in blocks of 128, B is (4096, 32) in blocks of 32, a byte each and a 4-byte scale per block
    assert query.adapter_nbytes == 2 * 32 * 4096 + 4 * (32 * 32 + 4096)
    ops = operators(LLAMA2_7B, matrices(LLAMA2_7B, how, plain), plain, Step(1))
    adapters = [op for op in ops if op.kind is Kind.ADAPTER]
    assert sum(op.count for op in adapters) == 64
    assert {op.flops for op in adapters} == {2 * 32 * 8192 + 4096}  # and the addition to the base's output


def test_a_rank_without_blocks_stays_float() -> None:
    assert Storage().adapter_nbytes(64, 64, 10) == 4 * 10 * 128


@pytest.mark.parametrize("name", recipe.NAMED)
def test_bytes_agree_with_the_plan_of_the_export(name: str) -> None:
    how = recipe.load(name)
    for shape in (SMOLLM2_135M, QWEN3_4B):
        planned = plan_recipe(shape, how).by_kind()
        expected = sum(planned.get(kind, 0) for kind in ("attention", "gate_up", "down", "lm_head", "adapter"))
        assert streamed(shape, how, Storage()) == expected


def test_equal_layers_are_counted_together() -> None:
    found = matrices(SMOLLM2_135M, recipe.load("w4w2-gateup"), Storage())
    assert {matrix.name: matrix.count for matrix in found}["gate_proj"] == 30
    assert found[-1].name == "lm_head" and found[-1].count == 1
    ops = operators(SMOLLM2_135M, found, Storage(), Step(4))
    assert ops[-1].name == "lm_head" and ops[-1].flops == 2 * 576 * 49152
    assert len(ops) < 20


def test_a_tied_embedding_is_stored_once() -> None:
    assert embedding_nbytes(QWEN3_4B, FLOAT, HALF) == 0
    assert embedding_nbytes(LLAMA2_7B, FLOAT, HALF) == 2 * 32000 * 4096


def test_normalized_queries_and_keys_add_two_norms() -> None:
    ops = operators(QWEN3_4B, matrices(QWEN3_4B, FLOAT, HALF), HALF, Step(1))
    assert sum(op.flops * op.count for op in ops if op.kind is Kind.NORM) == 36 * 4 * (2 * 2560 + 40 * 128) + 4 * 2560


@pytest.mark.parametrize("step", [(0, 0, 0), (1, -1, 1), (4, 0, 5)])
def test_impossible_steps_are_refused(step: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is no step"):
        Step(*step)


def test_impossible_storage_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_bits = 0"):
        Storage(kv_bits=0)
