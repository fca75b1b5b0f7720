"""Tiny random models for benchmarks/webgpu_parity.py, exported to WebGPU as float32: gate and up 2-bit, the rest 4-bit.

Accuracy level 0, so that both providers multiply floats. The Llama is a bundle as it ships. The Qwen3 is built with
fuse_qk_norm_gqa=false, as the runtime that is compared does not know the fused form: its norms of queries and keys are
nodes of their own, and attention gets three inputs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.recover.atomic import fresh_folder, write_json

VOCAB, CONTEXT = 512, 128
HIDDEN, FFN, HEAD, LAYERS = 128, 256, 32, 2
FAMILIES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_CONFIG = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_SHAPES: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj": (4 * HEAD, HIDDEN),
    "self_attn.k_proj": (2 * HEAD, HIDDEN),
    "self_attn.v_proj": (2 * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 4 * HEAD),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
_QK_NORMS: dict[str, tuple[int, ...]] = {"self_attn.q_norm": (HEAD,), "self_attn.k_norm": (HEAD,)}


def tiny_bundle(family: str, folder: Path) -> Path:
    """The exported model of a family, made in `folder` unless it is there: model.onnx and genai_config.json."""
    bundle = folder / f"{family}-webgpu"
    if not bundle.is_dir():
        source = folder / family
        if not source.is_dir():
            write_tiny(family, source)
        (_export if family == "llama" else _export_unfused)(source, bundle)
    return bundle


def write_tiny(family: str, folder: Path) -> Path:
    """A Hugging Face folder with random weights and a tokenizer that knows the words w0, w1, ..."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    layer = _SHAPES | (_QK_NORMS if family == "qwen3" else {})
    shapes = {f"model.layers.{index}.{name}.weight": shape for index in range(LAYERS) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    weights = {}
    for name, shape in shapes.items():
        spread = rng.standard_normal(shape).astype(np.float32)
        weights[name] = 1 + spread / 8 if len(shape) == 1 else spread / 16
    words = {"type": "WordLevel", "vocab": {f"w{index}": index for index in range(VOCAB)}, "unk_token": "w0"}
    files: dict[str, dict[str, Any]] = {
        "config.json": {"architectures": [FAMILIES[family]], "model_type": family, **_CONFIG},
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": words,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "w1",
            "eos_token": "w2",
            "pad_token": "w2",
        },
    }
    with fresh_folder(folder) as made:
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            write_json(made / name, content)
    return folder


def _export(source: Path, bundle: Path) -> None:
    from rlkit.export.build import export_bundle
    from rlkit.recover import recipe

    export_bundle(
        source,
        bundle,
        target="igpu",
        provider="webgpu",
        dtype="float32",
        recipe=recipe.load("w4w2-gateup"),
        accuracy_level=0,
        logits="all",
    )


def _export_unfused(source: Path, bundle: Path) -> None:
    """The graph alone: the norms of queries and keys are left as the builder makes them without fusing."""
    from rlkit.export import fill, plan, skeleton, store, targets, write
    from rlkit.recover import recipe
    from rlkit.recover.source import resolve

    tensors = store.open_store(resolve(source), recipe.load("w4w2-gateup"))
    target = targets.target_named("igpu", "webgpu", "float32")
    with fresh_folder(bundle) as work, tempfile.TemporaryDirectory() as scratch:
        made = skeleton.make_skeleton(tensors, target, {"fuse_qk_norm_gqa": "false"}, Path(scratch))
        fill.fill(made.model, tensors, plan.plan_inventory(tensors.inventory, target=target, accuracy_level=0))
        write.write(made.model, work / "model.onnx")
        write_json(work / "genai_config.json", made.config)
