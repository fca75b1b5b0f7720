"""Architectures from configurations as they are published: sizes against published totals, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import configs
from configs import DEEPSEEK_V3, GEMMA3_1B, GPT_OSS_20B, LLAMA2_7B, PARAMETERS, QWEN3_4B, QWEN3_30B, QWEN25_7B
from rlkit.profiles.architecture import Architecture, Experts, Latent, Layer, of_config, of_shape, read_architecture
from rlkit.recover.source import Source, SourceKind, read_shape
from shapes import FOUR, SMOLLM2_135M


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_totals(name: str) -> None:
    config, expected = PARAMETERS[name]
    assert of_config(config).parameters == expected


def test_linear_parameters_of_a_layer() -> None:
    expected = [
        (67_108_864, 135_266_304),
        (41_943_040, 176_160_768),
        (26_214_400, 74_711_040),
        (41_943_040, 150_994_944),
    ]
    configured = (configs.LLAMA2_7B, configs.LLAMA31_8B, configs.QWEN3_4B, configs.QWEN3_8B)
    everything = (6_476_005_376, 6_979_321_856, 3_633_315_840, 6_945_767_424)
    for config, (attention, mlp), whole in zip(configured, expected, everything, strict=True):
        made = of_config(config)
        first = [(module, n * k) for module, n, k, _copies in made.linears() if module.startswith("model.layers.0.")]
        assert sum(size for module, size in first if ".self_attn." in module) == attention
        assert sum(size for module, size in first if ".mlp." in module) == mlp
        assert sum(n * k for module, n, k, _copies in made.linears() if module != "lm_head") == whole


def test_a_mixture_counts_all_experts_and_says_how_many_are_active() -> None:
    made = of_config(GPT_OSS_20B)
    sizes = {module.removeprefix("model.layers.0."): (n, k, copies) for module, n, k, copies in made.linears()}
    assert sizes["mlp.experts.gate_proj"] == (2880, 2880, 32) and sizes["mlp.router"] == (32, 2880, 1)
    layer = made.layers[0]
    attention = sum(linear.n * linear.k for linear in layer.linears(2880) if "self_attn" in linear.module)
    biases = sum(linear.n for linear in layer.linears(2880) if linear.biased and "self_attn" in linear.module)
    assert (attention, biases, layer.heads * layer.sinks) == (26_542_080, 8_000, 64)
    experts = [linear for linear in layer.linears(2880) if linear.module.startswith("mlp.experts.")]
    assert sum(linear.n * linear.k for linear in experts) == 24_883_200
    assert sum(linear.n for linear in experts if linear.biased) == 8_640
    assert 24 * 32 * 24_883_200 == 19_110_297_600
    assert made.active_parameters == 3_608_307_264  # the 3.61 billion without the embedding


def test_windows_alternate_where_the_family_does() -> None:
    assert [layer.window for layer in of_config(GPT_OSS_20B).layers[:3]] == [128, None, 128]
    silent = {key: value for key, value in GPT_OSS_20B.items() if key != "layer_types"}
    assert of_config(silent).layers == of_config(GPT_OSS_20B).layers
    gemma = [layer.window for layer in of_config(GEMMA3_1B).layers]
    assert gemma[:6] == [512] * 5 + [None] and gemma.count(None) == 4
    assert {layer.window for layer in of_config(configs.PHI3).layers} == {2047}
    assert {layer.window for layer in of_config(configs.PHI3 | {"sliding_window": 4096}).layers} == {None}


def test_a_window_that_is_off_is_none() -> None:
    assert {layer.window for layer in of_config(QWEN25_7B).layers} == {None}
    some = QWEN25_7B | {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 20}
    assert [layer.window for layer in of_config(some).layers] == [None] * 20 + [1024] * 8
    assert {layer.window for layer in of_config(some | {"max_window_layers": 0}).layers} == {1024}
    assert {layer.window for layer in of_config(LLAMA2_7B | {"sliding_window": 1024}).layers} == {None}


def test_some_layers_of_a_mixture_are_dense() -> None:
    deepseek = of_config(DEEPSEEK_V3)
    assert [layer.experts is None for layer in deepseek.layers[:4]] == [True, True, True, False]
    assert deepseek.layers[3].experts == Experts(256, 8, 2048, shared=2048, router_bias=True)
    assert deepseek.layers[0].latent == Latent(512, 128, 64, 128, 1536)
    other = of_config(QWEN3_30B | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [layer.experts is None for layer in other.layers[:6]] == [True, False, True, True, True, False]
    assert other.layers[0].ffn == 6144 and other.layers[1].ffn == 0


def test_the_text_part_of_a_model_that_sees_is_read() -> None:
    inner = {**QWEN3_4B, "model_type": "qwen3_vl_text", "architectures": None}
    del inner["tie_word_embeddings"]
    seeing = {"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": inner, "tie_word_embeddings": True}
    assert of_config(seeing) == of_config(QWEN3_4B)


def test_it_agrees_with_what_recovery_and_export_know() -> None:
    for shape, config in zip(FOUR, (configs.LLAMA2_7B, configs.LLAMA31_8B, QWEN3_4B, configs.QWEN3_8B), strict=True):
        made = of_shape(shape)
        assert made == of_config(config)
        assert [(module, n, k) for module, n, k, _copies in made.linears()] == list(shape.linears())


@pytest.mark.parametrize("name", ["gpt-oss-20b", "phi-3-mini", "gemma-3-1b", "qwen2.5-7b", "olmo-1b", "smollm3-3b"])
def test_shapes_of_other_families_hold_as_many_numbers(name: str, tmp_path: Path) -> None:
    config, expected = PARAMETERS[name]
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert of_shape(read_shape(Source("x", SourceKind.HF, tmp_path))).parameters == expected


@pytest.mark.parametrize("name", PARAMETERS)
def test_json_there_and_back(name: str) -> None:
    made = of_config(PARAMETERS[name][0])
    assert Architecture.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert len(made.to_json()["kinds"]) <= 2


def test_from_json_of_something_else_is_refused() -> None:
    whole = of_config(LLAMA2_7B).to_json()
    for changes in ({"kinds": None}, {"layers": [7]}, {"hidden": None}, {"kinds": [{"heads": 1}]}):
        with pytest.raises(ValueError, match=r"no architecture|damaged"):
            Architecture.from_json({**whole, **changes})


def test_read_from_a_file_of_any_name_a_folder_or_a_source(tmp_path: Path) -> None:
    expected = of_config(GPT_OSS_20B)
    (tmp_path / "gpt-oss.json").write_text(json.dumps(GPT_OSS_20B))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(GPT_OSS_20B))
    assert read_architecture(tmp_path / "gpt-oss.json") == expected
    assert read_architecture(tmp_path / "model" / "config.json") == expected
    assert read_architecture(str(tmp_path / "model")) == expected
    assert read_architecture(Source("x", SourceKind.HF, tmp_path / "model")) == expected


def test_read_from_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"put the model's config\.json beside it"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(configs.SMOLLM2_135M))
    beside = read_architecture(tmp_path)
    (tmp_path / "rlkit.json").write_text(json.dumps({"shape": SMOLLM2_135M.to_json()}))
    assert read_architecture(tmp_path) == beside == of_shape(SMOLLM2_135M)


def head_of(path: Path, kind: str, facts: dict[str, int], tensors: dict[str, tuple[int, ...]]) -> Path:
    """A .gguf file whose tensors are all zero."""
    writer = gguf.GGUFWriter(path, kind)
    for name, value in facts.items():
        writer.add_uint32(f"{kind}.{name}", value)
    for name, size in tensors.items():
        writer.add_tensor(name, np.zeros(size, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


COMMON = {
    "block_count": 2,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 256,
}
SAME = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 48,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("kind", "facts", "tensors", "config"),
    [
        (
            "llama",
            {},
            {"output.weight": (48, 64)},
            {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
        ),
        (
            "llama",
            {"expert_count": 8, "expert_used_count": 2},
            {},
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2},
        ),
        ("qwen2", {}, {}, {"architectures": ["Qwen2ForCausalLM"]}),
        ("qwen3", {"attention.key_length": 32}, {}, {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}),
        (
            "gpt-oss",
            {
                "expert_count": 4,
                "expert_used_count": 2,
                "expert_feed_forward_length": 80,
                "attention.sliding_window": 128,
                "attention.key_length": 16,
            },
            {"blk.0.attn_output.bias": (64,)},
            {
                "architectures": ["GptOssForCausalLM"],
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 80,
                "sliding_window": 128,
                "head_dim": 16,
            },
        ),
        (
            "deepseek2",
            {
                "expert_count": 8,
                "expert_used_count": 2,
                "expert_feed_forward_length": 32,
                "expert_shared_count": 1,
                "leading_dense_block_count": 1,
                "attention.kv_lora_rank": 32,
                "attention.key_length": 40,
                "attention.key_length_mla": 24,
                "attention.value_length": 32,
                "attention.value_length_mla": 16,
                "rope.dimension_count": 8,
            },
            {"blk.1.exp_probs_b.bias": (8,)},
            {
                "architectures": ["DeepseekV3ForCausalLM"],
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            },
        ),
    ],
    ids=["llama", "mixtral", "qwen2", "qwen3", "gpt-oss", "deepseek"],
)
def test_a_gguf_head_says_what_a_config_says(
    kind: str, facts: dict[str, int], tensors: dict[str, tuple[int, ...]], config: dict[str, Any], tmp_path: Path
) -> None:
    path = head_of(tmp_path / "m.gguf", kind, COMMON | facts, {"token_embd.weight": (48, 64), **tensors})
    assert read_architecture(path) == of_config(SAME | config)


def test_a_gguf_head_that_is_not_known_or_lacks_something(tmp_path: Path) -> None:
    table = {"token_embd.weight": (48, 64)}
    with pytest.raises(ValueError, match="architecture mamba is not known to forecasts"):
        read_architecture(head_of(tmp_path / "a.gguf", "mamba", COMMON, table))
    with pytest.raises(ValueError, match=r"b\.gguf lacks token_embd\.weight"):
        read_architecture(head_of(tmp_path / "b.gguf", "llama", COMMON, {"output.weight": (48, 64)}))
    with pytest.raises(ValueError, match="it lacks hidden_size"):
        short = {key: value for key, value in COMMON.items() if key != "embedding_length"}
        read_architecture(head_of(tmp_path / "c.gguf", "llama", short, table))
    with pytest.raises(ValueError, match="it lacks kv_lora_rank"):
        read_architecture(head_of(tmp_path / "d.gguf", "deepseek2", COMMON, table))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not known to forecasts"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "the nearest is Qwen3ForCausalLM"),
        ({"architectures": None}, "names neither architectures nor model_type"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"hidden_size": -4096}, "hidden_size = -4096 is no size"),
        ({"hidden_size": 4096.0}, "hidden_size = 4096.0 is no size"),
        ({"vocab_size": True}, "vocab_size = True is no size"),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000 is no size"),
        ({"num_hidden_layers": 10**6}, "more than 1000"),
        ({"num_key_value_heads": 5}, "do not share 5 KV heads evenly"),
        ({"num_attention_heads": 24, "num_key_value_heads": 24}, "hidden_size 4096 is no multiple of 24 heads"),
        ({"tie_word_embeddings": "no"}, "neither true nor false"),
        ({"layer_types": ["full_attention"] * 31}, "31 layer_types for 32 layers"),
        ({"layer_types": ["sliding_attention"] * 32}, "there is no sliding_window"),
        ({"layer_types": ["linear_attention"] * 32}, "layers of linear_attention are not known"),
        ({"layer_types": 5}, "layer_types = 5 is no list"),
    ],
)
def test_missing_and_contradictory_fields_are_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        of_config(LLAMA2_7B | changes, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GPT_OSS_20B, {"num_local_experts": None}, "lacks num_local_experts or n_routed_experts or num_experts"),
        (GPT_OSS_20B, {"num_experts_per_tok": 33}, "33 active experts of 32"),
        (QWEN3_30B, {"mlp_only_layers": [48]}, "names layer 48 of 48"),
        (DEEPSEEK_V3, {"kv_lora_rank": None}, "lacks kv_lora_rank"),
        (DEEPSEEK_V3, {"q_lora_rank": 0}, "q_lora_rank = 0 is no size"),
    ],
)
def test_so_are_those_of_mixtures(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_config(config | changes)


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="neither an MLP"):
        Layer(8, 8, 64)
    with pytest.raises(ValueError, match="are unknown"):
        Layer(8, 8, 64, 128, biases=("everything",))
    with pytest.raises(ValueError, match="window = 0"):
        Layer(8, 8, 64, 128, window=0)


def test_it_needs_nothing_heavy() -> None:
    code = (
        "import sys, rlkit.profiles.operators; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
