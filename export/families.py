"""What the stock GenAI builder gets wrong or leaves out, family by family, put right before its graph is made.

Every entry was found by comparing a tiny random model's logits with torch's (tests/test_families.py): windows that
apply to all layers, layers without positions, norms that subtract the mean, scales rounded to two decimals.
`ADJUSTMENTS` holds, by the name of the builder's class, a function that makes the methods to replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlkit.export.store import Store

Experts = Callable[[str], Any]  # name -> torch tensor (E, outputs, inputs)
E2M1 = np.array([s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], np.float32)  # 4-bit floats by code


def translate(config: Any) -> None:
    """Say in the builder's words what configurations say in others, or what it overlooks."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in rope and "sliding_attention" in rope:  # Gemma 3
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    kind = rope.get("rope_type", "default")
    phi = config.architectures[0] == "Phi3ForCausalLM"
    if kind == "longrope" and not phi:
        raise NotImplementedError("its long rope has two tables, chosen by length, which it makes for Phi-3 alone")
    rope |= {"rope_type": kind, "type": kind} if kind == "longrope" else {"rope_type": "default"}
    config.rope_parameters = rope  # all but long rope is in the tables that replace the builder's
    if phi and kind != "longrope":
        config.original_max_position_embeddings = config.max_position_embeddings  # else it looks for two tables
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "layer_types", None) is None:  # Mistral, Phi-3: the window is every layer's
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def _smollm3(original: Any, _experts: Experts) -> dict[str, Any]:
    """Layers without positions: the builder gives them the input `position_ids`, which the graph does not have."""

    def make_attention(self: Any, layer_id: int, *arguments: Any, **keywords: Any) -> None:
        attributes = self.attention_attrs
        before = attributes["rope"], attributes["use_rope_in_attn"]
        if not self.no_rope_layers[layer_id]:
            attributes["rope"] = attributes["use_rope_in_attn"] = False
        super(original, self).make_attention(layer_id, *arguments, **keywords)
        attributes["rope"], attributes["use_rope_in_attn"] = before

    return {"make_attention": make_attention}


def _olmo(original: Any, _experts: Experts) -> dict[str, Any]:
    """OLMo's norms subtract the mean, its epsilon is fixed, and some of its models clip queries, keys and values."""

    def make(self: Any, config: Any, *arguments: Any) -> None:
        original.__init__(self, config, *arguments)
        self.layernorm_attrs |= {"simple": False, "epsilon": 1e-5}
        self.rlkit_clip = config.clip_qkv

    def make_attention_input_proj(self: Any, layer_id: int, *arguments: Any, **keywords: Any) -> None:
        original.make_attention_input_proj(self, layer_id, *arguments, **keywords)
        if self.rlkit_clip is None:
            return
        bounds = [f"/model/constants/{self.to_str_dtype(self.io_dtype)}/{s * self.rlkit_clip}" for s in (-1.0, 1.0)]
        for part in ("q_path", "k_path", "v_path"):
            path = self.attention_attrs[part]
            if path:  # packed into one matrix, the keys and values are in the queries' path
                name = f"/model/layers.{layer_id}/attn/{part}/Clip"
                self.make_clip(name, [path, *bounds], self.io_dtype, self.values[path].shape)
                self.attention_attrs[part] = f"{name}/output_0"

    return {"__init__": make, "make_attention_input_proj": make_attention_input_proj}


def _gemma(original: Any, _experts: Experts) -> dict[str, Any]:
    """Embeddings are scaled by the root of their size; the builder rounds it to two decimals."""

    def make(self: Any, *arguments: Any) -> None:
        original.__init__(self, *arguments)
        self.embed_attrs["scale"] = self.hidden_size**0.5

    return {"__init__": make}


def _gptoss(original: Any, experts: Experts) -> dict[str, Any]:
    """GPT-OSS's experts (E, outputs, inputs), a layer at a time, from the store."""

    def load_mxfp4_experts(_self: Any, layer_id: int, decode: bool = False) -> tuple[Any, Any]:
        prefix = f"model.layers.{layer_id}.mlp.experts"
        return experts(f"{prefix}.gate_up_proj"), experts(f"{prefix}.down_proj")

    def make_moe_decomposed(self: Any, *_arguments: Any) -> None:
        raise NotImplementedError(f"{self.ep} has no operator for packed experts (QMoE); export it for cpu or webgpu")

    def make_rotary_embedding_caches_from_scratch(self: Any) -> Any:
        return super(original, self).make_rotary_embedding_caches_from_scratch()  # the tables are replaced anyway

    found = (load_mxfp4_experts, make_moe_decomposed, make_rotary_embedding_caches_from_scratch)
    return {function.__name__: function for function in found}


def load_experts(store: Store, name: str) -> NDArray[np.float32]:
    """The weights (E, outputs, inputs) of all experts of a layer, from float tensors or MXFP4 blocks."""
    if name in store.inventory.floats:  # (E, inputs, outputs)
        return store.tensor(name).swapaxes(-1, -2)
    return _from_mxfp4(store.tensor(f"{name}_blocks"), store.tensor(f"{name}_scales"))


def _from_mxfp4(blocks: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """Values (E, N, K) of codes (E, N, K / 32, 16), two 4-bit floats a byte, low bits first, and scale exponents.

    Open Compute Project, Microscaling Formats v1.0 (2023): e2m1 values times 2^(scale - 127), 32 share a scale.
    """
    pairs = blocks.astype(np.uint8)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], 32)
    values: NDArray[np.float32] = np.ldexp(E2M1[codes], scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*codes.shape[:2], -1)


ADJUSTMENTS: dict[str, Callable[[Any, Experts], dict[str, Any]]] = {
    "Gemma2Model": _gemma,
    "Gemma3Model": _gemma,
    "GemmaModel": _gemma,
    "GPTOSSModel": _gptoss,
    "OLMoModel": _olmo,
    "SmolLM3Model": _smollm3,
}
