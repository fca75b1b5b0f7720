"""Fields of config.json files as their models publish them, cut down to what describes the shape."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _dense(name: str, layers: int, hidden: int, ffn: int, heads: tuple[int, int], vocab: int, **more: Any) -> Config:
    return {
        "architectures": [f"{name}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        **more,
    }


_QWEN = {"head_dim": 128, "max_position_embeddings": 40960, "attention_bias": False, "use_sliding_window": False}
LLAMA2_7B = _dense("Llama", 32, 4096, 11008, (32, 32), 32000)
LLAMA31_8B = _dense("Llama", 32, 4096, 14336, (32, 8), 128256, max_position_embeddings=131072, mlp_bias=False)
QWEN3_4B = _dense("Qwen3", 36, 2560, 9728, (32, 8), 151936, **_QWEN, tie_word_embeddings=True, max_window_layers=36)
QWEN3_8B = _dense("Qwen3", 36, 4096, 12288, (32, 8), 151936, **_QWEN, sliding_window=None)
GPT_OSS_20B = _dense(
    "GptOss",
    24,
    2880,
    2880,
    (64, 8),
    201088,
    attention_bias=True,
    head_dim=64,
    num_local_experts=32,
    num_experts_per_tok=4,
    experts_per_token=4,
    sliding_window=128,
    layer_types=["sliding_attention", "full_attention"] * 12,
    max_position_embeddings=131072,
)
DEEPSEEK_V3 = _dense(
    "DeepseekV3",
    61,
    7168,
    18432,
    (128, 128),
    129280,
    attention_bias=False,
    first_k_dense_replace=3,
    moe_layer_freq=1,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=163840,
)
DEEPSEEK_V2_LITE = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 102400,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
}
MIXTRAL = _dense("Mixtral", 32, 4096, 14336, (32, 8), 32000, num_local_experts=8, num_experts_per_tok=2)
QWEN3_30B = _dense(
    "Qwen3Moe",
    48,
    2048,
    6144,
    (32, 4),
    151936,
    **_QWEN,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
QWEN15_MOE = _dense(
    "Qwen2Moe",
    24,
    2048,
    5632,
    (16, 16),
    151936,
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
    sliding_window=32768,
    use_sliding_window=False,
)
OLMOE = _dense("Olmoe", 16, 2048, 1024, (16, 16), 50304, num_experts=64, num_experts_per_tok=8)
GEMMA2_2B = _dense("Gemma2", 26, 2304, 9216, (8, 4), 256000, head_dim=256, sliding_window=4096)
GEMMA2_2B |= {"tie_word_embeddings": None, "max_position_embeddings": 8192}
GEMMA3_1B = _dense("Gemma3", 26, 1152, 6912, (4, 1), 262144, head_dim=256, sliding_window=512)
GEMMA3_1B |= {"tie_word_embeddings": None, "sliding_window_pattern": 6, "max_position_embeddings": 32768}
STARCODER2 = _dense("Starcoder2", 30, 3072, 12288, (24, 2), 49152, use_bias=True, tie_word_embeddings=None)
PHI3 = _dense("Phi3", 32, 3072, 8192, (32, 32), 32064, sliding_window=2047)
PHI2 = _dense("Phi", 32, 2560, 10240, (32, 32), 51200, num_key_value_heads=None)
QWEN25_7B = _dense("Qwen2", 28, 3584, 18944, (28, 4), 152064, max_window_layers=28, sliding_window=131072)
SMOLLM3 = _dense("SmolLM3", 36, 2048, 11008, (16, 4), 128256, tie_word_embeddings=None)
OLMO_1B = _dense("Olmo", 16, 2048, 8192, (16, 16), 50304, tie_word_embeddings=True)
OLMO2_7B = _dense("Olmo2", 32, 4096, 11008, (32, 32), 100352)
SMOLLM2_135M = _dense("Llama", 30, 576, 1536, (9, 3), 49152, tie_word_embeddings=True, max_position_embeddings=8192)

PARAMETERS = {  # what the publishers' weight files hold, in numbers
    "llama-2-7b": (LLAMA2_7B, 6_738_415_616),
    "llama-3.1-8b": (LLAMA31_8B, 8_030_261_248),
    "qwen3-4b": (QWEN3_4B, 4_022_468_096),
    "qwen3-8b": (QWEN3_8B, 8_190_735_360),
    "gpt-oss-20b": (GPT_OSS_20B, 20_914_757_184),
    "deepseek-v3": (DEEPSEEK_V3, 671_026_419_200),
    "deepseek-v2-lite": (DEEPSEEK_V2_LITE, 15_706_484_224),
    "mixtral-8x7b": (MIXTRAL, 46_702_792_704),
    "qwen3-30b-a3b": (QWEN3_30B, 30_532_122_624),
    "qwen1.5-moe": (QWEN15_MOE, 14_315_784_192),
    "olmoe": (OLMOE, 6_919_161_856),
    "gemma-2-2b": (GEMMA2_2B, 2_614_341_888),
    "gemma-3-1b": (GEMMA3_1B, 999_885_952),
    "starcoder2-3b": (STARCODER2, 3_030_371_328),
    "phi-3-mini": (PHI3, 3_821_079_552),
    "phi-2": (PHI2, 2_779_683_840),
    "qwen2.5-7b": (QWEN25_7B, 7_615_616_512),
    "smollm3-3b": (SMOLLM3, 3_075_098_624),
    "olmo-1b": (OLMO_1B, 1_176_764_416),
    "olmo-2-7b": (OLMO2_7B, 7_298_617_344),
    "smollm2-135m": (SMOLLM2_135M, 134_515_008),
}
