"""The head of a .gguf file in the words of a config.json, so that one reader makes layers of both."""

from __future__ import annotations

from typing import Any

from rlkit.recover.ggufheader import GgufHeader

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "deepseek2": "DeepseekV2ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
FIELDS = {  # of config.json -> of the head, without the architecture's name
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
}
EXPERTS_OF_LLAMA = "MixtralForCausalLM"  # which GGUF calls llama too
ROUTER_BIAS = "blk.{}.exp_probs_b.bias"  # what V3 has and V2 has not, of the architecture that GGUF gives both


def config_of(header: GgufHeader, where: str) -> dict[str, Any]:
    """The fields of a config.json that the head states; ValueError for an architecture that is not known."""
    kind = header.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{where}: architecture {kind} is not known to forecasts; known are {known}")
    facts: dict[str, Any] = {key.removeprefix(f"{kind}."): value for key, value in header.metadata.items()}
    rows = {tensor.name: tensor.shape[0] for tensor in header.tensors}
    if "token_embd.weight" not in rows:
        raise ValueError(f"{where} lacks token_embd.weight; it is no complete language model, so download another")
    config = {name: facts[key] for name, key in FIELDS.items() if key in facts}
    config["vocab_size"], config["tie_word_embeddings"] = rows["token_embd.weight"], "output.weight" not in rows
    config["attention_bias"] = "blk.0.attn_output.bias" in rows
    name = ARCHITECTURES[kind]
    if name == "LlamaForCausalLM" and facts.get("expert_count"):
        name = EXPERTS_OF_LLAMA
    if name == "DeepseekV2ForCausalLM":
        config |= _latent(facts)
        blocks = range(facts.get("block_count", 0))
        name = "DeepseekV3ForCausalLM" if any(ROUTER_BIAS.format(block) in rows for block in blocks) else name
    return {**config, "architectures": [name]}


def _latent(facts: dict[str, Any]) -> dict[str, Any]:
    """Sizes of latent heads; newer files give the cached sizes as key_length and the heads' own with _mla."""
    key = facts.get("attention.key_length_mla", facts.get("attention.key_length"))
    value = facts.get("attention.value_length_mla", facts.get("attention.value_length"))
    rope = facts.get("rope.dimension_count")
    if not (isinstance(key, int) and isinstance(value, int) and isinstance(rope, int)):
        return {}  # and the reader says what is missing
    return {"qk_nope_head_dim": key - rope, "v_head_dim": value}
