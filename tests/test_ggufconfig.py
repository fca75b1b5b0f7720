"""The small files that are made from a GGUF: configuration, rotary positions, tokenizer; against transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tiny
from ggufs import SIZES, always, opened, random_model, with_tensor, write
from rlkit.recover.ggufconfig import rope_parameters
from rlkit.recover.ggufheader import read_header
from rlkit.recover.model import load_model, quiet_transformers
from rlkit.recover.source import read_shape, resolve


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama") / "model.gguf", random_model())


def test_the_small_files_are_what_transformers_makes_of_it(llama_file: Path, tmp_path: Path) -> None:
    opened(llama_file).prepare(tmp_path / "made")
    with quiet_transformers():
        theirs = AutoConfig.from_pretrained(llama_file.parent, gguf_file=llama_file.name)
        words = AutoTokenizer.from_pretrained(llama_file.parent, gguf_file=llama_file.name)
    ours, tokenizer = (kind.from_pretrained(tmp_path / "made") for kind in (AutoConfig, AutoTokenizer))
    skipped = {"_name_or_path", "architectures", "dtype", "unk_token_id", "transformers_version"}
    expected = {key: value for key, value in theirs.to_dict().items() if key not in skipped}
    assert {key: ours.to_dict()[key] for key in expected} == expected
    assert ours.architectures == ["LlamaForCausalLM"]
    assert not hasattr(ours, "quantization_config")
    for sentence in (*tiny.SENTENCES, "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.encode(sentence) == words.encode(sentence) == tiny.tokenizer().encode(sentence)
    messages = [{"role": "user", "content": "hi"}]
    made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert made == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    generation = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)


def test_a_model_made_of_the_small_files_and_the_tensors_says_the_same(tmp_path: Path) -> None:
    model = random_model("qwen3")
    store = opened(write(tmp_path / "model.gguf", model, always(Kind.F32), architecture="qwen3"))
    store.prepare(tmp_path / "made")
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "made")).eval()
    made.load_state_dict({name: torch.from_numpy(store.tensor(name)) for name in made.state_dict()})
    ids = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(tiny.logits(made, ids), tiny.logits(model, ids))


def test_further_end_tokens_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", random_model(), **{"tokenizer.ggml.eot_token_id": 0})
    opened(path).prepare(tmp_path / "made")
    assert json.loads((tmp_path / "made" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_a_mistral_is_a_llama_to_the_file_and_to_us(tmp_path: Path) -> None:
    store = opened(write(tmp_path / "model.gguf", random_model(), **{"general.name": "mistral"}))
    store.prepare(tmp_path / "made")
    assert AutoConfig.from_pretrained(tmp_path / "made").architectures == ["LlamaForCausalLM"]


def llama3_factors(scale: float, theta: float) -> np.ndarray:
    """transformers' own scaled frequencies, as the divisors that llama.cpp stores."""
    rope = {"rope_type": "llama3", "factor": scale, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": theta}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**{**SIZES, "rope_parameters": rope}), None)
    plain = theta ** (-np.arange(0, SIZES["head_dim"], 2) / SIZES["head_dim"])
    return (plain / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize("scale", [8.0, 32.0])
def test_llama_3_s_rotary_factors_become_its_configuration(tmp_path: Path, scale: float) -> None:
    factors = llama3_factors(scale, 5e5)
    path = with_tensor(tmp_path / "model.gguf", "rope_freqs.weight", factors, **{"rope.freq_base": 5e5})
    found = rope_parameters(path, read_header(path), read_shape(resolve(path)))
    assert (found["rope_type"], found["low_freq_factor"], found["high_freq_factor"]) == ("llama3", 1.0, 4.0)
    assert (found["factor"], found["original_max_position_embeddings"]) == (scale, 8192)
    spoiled = with_tensor(tmp_path / "b.gguf", "rope_freqs.weight", 2 * factors, **{"rope.freq_base": 5e5})
    with pytest.raises(ValueError, match=r"rope_freqs.weight is not Llama 3's scaling"):
        opened(spoiled)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {"rope_type": "default"}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_scaled_rotary_positions(tmp_path: Path, facts: dict[str, Any], expected: dict[str, Any]) -> None:
    store = opened(write(tmp_path / "model.gguf", random_model("qwen2"), architecture="qwen2", **facts))
    store.prepare(tmp_path / "made")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["rope_parameters"] == {**expected, "rope_theta": 5e4}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"rope.scaling.type": "longrope"}, "scales rotary positions by 'longrope'"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "lacks the original context length"),
        ({"rope.dimension_count": 16}, "rotates 16 of the 32 dimensions"),
        ({"attention.layer_norm_rms_epsilon": None}, "lacks attention.layer_norm_rms_epsilon"),
        ({"feed_forward_length": 288}, r"blk.0.ffn_gate.weight is \(256, 128\), but its metadata ask for \(288, 128\)"),
        ({"block_count": 3}, r"lacks blk.2.attn_q.weight"),
        ({"block_count": 1}, r"has no use for 'blk.1"),
        ({"attention.head_count": 3}, "do not share"),
        ({"block_count": None}, "lacks 'block_count'"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(tmp_path: Path, facts: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "model.gguf", random_model(), **facts)
    with pytest.raises(ValueError, match=words) as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    store = opened(with_tensor(tmp_path / "model.gguf", "output_norm.weight", np.ones(128, np.float32)))
    with pytest.raises(ValueError, match="has no tokenizer that transformers can read") as caught:
        store.prepare(tmp_path / "made")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    model = random_model()
    model.resize_token_embeddings(100)
    store = opened(write(tmp_path / "model.gguf", model))
    with pytest.raises(ValueError, match="359 tokens, but an embedding of 100 rows"):
        store.prepare(tmp_path / "made")


def test_the_torch_model_of_a_file_turns_as_the_file_says(tmp_path: Path) -> None:
    """transformers' reader leaves the scaling out, which would make the reference of a gate another model."""
    plain = random_model()
    scaled = copy.deepcopy(plain)
    scaled.config.rope_parameters = {**plain.config.rope_parameters, "rope_type": "linear", "factor": 4.0}
    scaled.model.rotary_emb = type(scaled.model.rotary_emb)(scaled.config)
    facts = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    file = write(tmp_path / "scaled.gguf", plain, always(Kind.F32), **facts)
    loaded, _tokenizer = load_model(resolve(file))
    ids = np.random.default_rng(0).integers(3, 500, (1, 40))
    found, expected = (tiny.logits(model, ids) for model in (loaded, scaled))
    assert np.abs(found - expected).max() <= 1e-5
    assert np.abs(found - tiny.logits(plain, ids)).max() > 1e-3
