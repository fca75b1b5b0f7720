"""Tiny models made in code: a random two-layer Llama with a real tokenizer, and quantized checkpoints of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlkit.recover import packing, recipe

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
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    tensors, overrides = _quantize_all(weights, plan, tied=config["tie_word_embeddings"])
    config["quantization_config"] = {"quant_method": "olive", "bits": 4, "group_size": 32, "symmetric": False}
    config["quantization_config"]["overrides"] = overrides
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "recipe.toml").write_text(plan.to_toml())
    (folder / "recovery.json").write_text(json.dumps({"schema_version": 1, "source": {"reference": source.name}}))
    _write_adapters(folder / "adapter", weights, plan, adapter_rank, np.random.default_rng(seed))
    return folder


def _quantize_all(
    weights: dict[str, np.ndarray], plan: recipe.Recipe, *, tied: bool
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, int]]]:
    tensors: dict[str, np.ndarray] = {}
    overrides: dict[str, dict[str, int]] = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module == "lm_head" and tied:
            continue
        target = "lm_head" if tied and module == "model.embed_tokens" else module
        is_matrix = weight.ndim == 2 and (tied or module != "model.embed_tokens")
        scheme = plan.scheme_for(target) if is_matrix else None
        if scheme is None:
            tensors[name] = weight
            continue
        scheme = scheme.resolve(weight.shape[1])
        parts = round_to_nearest(weight, scheme.bits, scheme.group)
        tensors |= {f"{target}.{part}": value for part, value in parts.items()}
        overrides[target] = {"bits": scheme.bits, "group_size": scheme.group}
        if target != module:
            table = packing.dequantize(
                parts["qweight"], parts["scales"], parts["qzeros"], scheme.bits, scheme.group, weight.shape[1]
            )
            tensors[name] = table.astype(np.float16)
    return tensors, overrides


def round_to_nearest(weight: np.ndarray, bits: int, group: int) -> dict[str, np.ndarray]:
    """The packed parts of `weight` (N, K), each group's range mapped onto all codes, scales on float16."""
    n, k = weight.shape
    grouped = weight.astype(np.float32).reshape(n, k // group, group)
    low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
    scales = np.maximum((high - low) / ((1 << bits) - 1), 1e-6).astype(np.float16).astype(np.float32)  # (N, G)
    zeros = np.clip(np.rint(-low / scales), 0, (1 << bits) - 1)
    codes = np.clip(np.rint(grouped / scales[:, :, None]) + zeros[:, :, None], 0, (1 << bits) - 1)
    return {
        "qweight": packing.pack(codes.astype(np.uint8).reshape(n, k), bits),
        "scales": scales,
        "qzeros": packing.pack(zeros.astype(np.uint8), bits),
    }


def _write_adapters(
    folder: Path, weights: dict[str, np.ndarray], plan: recipe.Recipe, rank: int | None, rng: np.random.Generator
) -> None:
    tensors: dict[str, np.ndarray] = {}
    adapted: list[str] = []
    top_rank = 0
    for name, weight in sorted(weights.items()):
        module = name.removesuffix(".weight")
        scheme = plan.scheme_for(module) if module.split(".")[-1] in LINEARS else None
        r = 0 if scheme is None or not scheme.adapter_rank else rank or scheme.adapter_rank
        if not r:
            continue
        n, k = weight.shape
        size = 0.3 * float(np.abs(weight).mean()) / np.sqrt(r)
        parts = {"A": rng.standard_normal((r, k)), "B": size * rng.standard_normal((n, r))}
        for letter, value in parts.items():
            on_grid = value.astype(np.float32)
            if value.shape[1] % 32 == 0:
                on_grid = packing.snap8(on_grid).dequantized
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = on_grid
        adapted.append(module.split(".")[-1])
        top_rank = r
    if not tensors:
        return
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": top_rank, "lora_alpha": top_rank, "target_modules": sorted(set(adapted))}
    config |= {"task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def dequantized(folder: Path) -> LlamaForCausalLM:
    """The float model that a checkpoint of `checkpoint` stands for, its adapters added to the weights."""
    config = json.loads((folder / "config.json").read_text())
    overrides = config.pop("quantization_config")["overrides"]
    stored = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in stored.items() if name.endswith(".weight")}
    for module, scheme in overrides.items():
        qweight = stored[f"{module}.qweight"]
        k = qweight.shape[1] * 8 // scheme["bits"]
        parts = (qweight, stored[f"{module}.scales"], stored[f"{module}.qzeros"])
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
