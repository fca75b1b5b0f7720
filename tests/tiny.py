"""Tiny models made in code: a random two-layer Llama with a real tokenizer, and quantized checkpoints of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlkit.recover import packing, recipe
from rlkit.recover.adapter import snap
from rlkit.recover.checkpoint import Recovered, write_checkpoint
from rlkit.recover.correct import LowRank
from rlkit.recover.model import linears, quiet_transformers
from rlkit.recover.quantize import quantize_nearest

torch.set_num_threads(1)  # matrices this small gain nothing from a second one, and lose much on a busy machine

SENTENCES = (
    "the cat sat on the mat and looked at the dog",
    "a small model can still say something about the weather",
    "two bits are enough for some weights, four bits for most of them",
    "what is the capital of France? the capital of France is Paris.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 512
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

W4 = recipe.load("w4")
W4W2 = recipe.load("w4w2-gateup")
W8 = recipe.load("w8")


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on SENTENCES, with ChatML's special tokens and template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def llama(folder: Path, *, tied: bool = True, seed: int = 0, context: int = 256, **changes: Any) -> Path:
    """Write a random Llama (hidden 128, 2 layers, vocab 512) with its tokenizer as a Hugging Face folder."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "initializer_range": 0.06,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))
    model.eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def checkpoint(
    source: Path, folder: Path, plan: recipe.Recipe = W4, *, adapter_rank: int | None = None, seed: int = 1
) -> Path:
    """Quantize the folder `source` by round-to-nearest as `plan` says; adapters, where asked for, are random."""
    with quiet_transformers():
        model = LlamaForCausalLM.from_pretrained(source)
    modules = linears(model)
    schemes = {name: scheme for name in modules if (scheme := plan.scheme_for(name)) is not None}
    quantized = {
        name: quantize_nearest(modules[name].weight, scheme.resolve(modules[name].in_features))
        for name, scheme in schemes.items()
    }
    rng = torch.Generator().manual_seed(seed)
    low_ranks = {
        name: _random_correction(modules[name].weight, adapter_rank or scheme.adapter_rank, rng)
        for name, scheme in schemes.items()
        if scheme.adapter_rank and name.split(".")[-1] in LINEARS
    }
    shared = {"lm_head.weight", "model.embed_tokens.weight"} if model.config.tie_word_embeddings else set()
    packed = {f"{name}.weight" for name in quantized}
    skipped = packed | (shared if packed & shared else {"lm_head.weight"} & shared)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}
    folder.mkdir(parents=True)
    facts = {"source": {"reference": source.name}}
    tokens = PreTrainedTokenizerFast.from_pretrained(source)
    write_checkpoint(folder, Recovered(quantized, low_ranks, tensors), model, tokens, plan, facts)
    return folder


def _random_correction(weight: torch.Tensor, rank: int, rng: torch.Generator) -> LowRank:
    n, k = weight.shape
    size = 0.3 * float(weight.detach().abs().mean()) / rank**0.5
    return snap(LowRank(torch.randn(rank, k, generator=rng), size * torch.randn(n, rank, generator=rng)))


def dequantized(folder: Path) -> LlamaForCausalLM:
    """The float model that a checkpoint of `checkpoint` stands for, its adapters added to the weights."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    stored = load_file(folder / "model.safetensors")
    weights = {name: value.astype(np.float32) for name, value in stored.items() if name.endswith(".weight")}
    for module in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        scheme = {**quantization, **quantization["overrides"].get(module, {})}
        parts = [stored[f"{module}.{part}"] for part in ("qweight", "scales", "qzeros")]
        k = parts[0].shape[1] * 8 // scheme["bits"]
        weights[f"{module}.weight"] = packing.dequantize(*parts, scheme["bits"], scheme["group_size"], k)
    if config["tie_word_embeddings"] and "lm_head.weight" in weights:
        weights["model.embed_tokens.weight"] = weights["lm_head.weight"]
    for module, (a, b) in adapters(folder).items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + b @ a
    model = LlamaForCausalLM(LlamaConfig(**config))
    missing = model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}, missing
    assert not missing.unexpected_keys, missing
    return model.eval()


def adapters(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module name -> (A (r, K), B (N, r) times alpha / r) of a checkpoint's PEFT adapter."""
    if not (folder / "adapter").exists():
        return {}
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    found = {}
    for name, a in stored.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale = np.float32(config["lora_alpha"] / config["r"])
            found[module] = (a, stored[name.replace("lora_A", "lora_B")] * scale)
    return found


def logits(model: LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) float32 of a torch model."""
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)).logits.float())
