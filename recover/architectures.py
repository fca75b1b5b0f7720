"""The families of decoders that rlkit knows, what their tensors are, and why some others do not work.

What is listed exports: a tiny random model of each is compared with torch in tests/test_families.py. Recovery goes
through a model layer by layer itself, and was tried with fewer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """What all models of an architecture have in common; the rest is in each one's configuration.

    norms: those of a layer, by name; without any there is none at the end either, or none with weights.
    qk_norms: norms of each head's queries and keys. fused: q, k and v are one matrix, gate and up another.
    attention_bias, mlp_bias: the configuration's key that gives the linears there a bias; "" where none does.
    qkv_bias: q, k and v have one whatever it says. tied, head_dim, biased: what a configuration means that is silent.
    """

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    qk_norms: tuple[str, ...] = ()
    fused: bool = False
    sinks: bool = False
    qkv_bias: bool = False
    attention_bias: str = ""
    mlp_bias: str = ""
    biased: bool = False
    tied: bool = False
    head_dim: int | None = None


_QK = ("q_norm", "k_norm")
_FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_KEY, _MLP_KEY = "attention_bias", "mlp_bias"
FAMILIES = {
    "LlamaForCausalLM": Family(attention_bias=_KEY, mlp_bias=_MLP_KEY),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norms=_QK, attention_bias=_KEY, head_dim=128),
    "Phi3ForCausalLM": Family(fused=True),
    "GemmaForCausalLM": Family(attention_bias=_KEY, tied=True, head_dim=256),
    "Gemma2ForCausalLM": Family(norms=_FOUR, attention_bias=_KEY, tied=True, head_dim=256),
    "Gemma3ForCausalLM": Family(norms=_FOUR, qk_norms=_QK, attention_bias=_KEY, tied=True, head_dim=256),
    "SmolLM3ForCausalLM": Family(attention_bias=_KEY, mlp_bias=_MLP_KEY, tied=True),
    "GptOssForCausalLM": Family(sinks=True, attention_bias=_KEY, biased=True, head_dim=64),
    "OlmoForCausalLM": Family(norms=(), attention_bias=_KEY),
    "GraniteForCausalLM": Family(attention_bias=_KEY, mlp_bias=_MLP_KEY),
    "Ernie4_5ForCausalLM": Family(attention_bias="use_bias", mlp_bias="use_bias", tied=True, head_dim=128),
    "HunYuanDenseV1ForCausalLM": Family(qk_norms=("query_layernorm", "key_layernorm"), attention_bias=_KEY),
}
SUPPORTED = tuple(FAMILIES)
RECOVERABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_FOREIGN = "its code is not part of transformers, and rlkit runs none from a model's folder"
_NO_GATE = "its MLP has no gate"
_NO_EXPERTS = "the GenAI model builder 0.18 has no graph for its experts"
_NORMS_AFTER = "the GenAI model builder 0.18 has no graph with norms after attention and MLP alone"
_PICTURES = "it reads pictures or sound too; name a model of text alone"
UNSUPPORTED = {  # what people will try, and why it does not work
    "ChatGLMModel": _FOREIGN,
    "InternLM2ForCausalLM": _FOREIGN,
    "Phi3SmallForCausalLM": _FOREIGN,
    "NemotronForCausalLM": _NO_GATE,
    "PhiForCausalLM": _NO_GATE,
    "GPT2LMHeadModel": _NO_GATE,
    "MixtralForCausalLM": _NO_EXPERTS,
    "OlmoeForCausalLM": _NO_EXPERTS,
    "Qwen2MoeForCausalLM": _NO_EXPERTS,
    "Qwen3MoeForCausalLM": _NO_EXPERTS,
    "PhiMoEForCausalLM": "the GenAI model builder 0.18 makes its experts for CUDA only",
    "Olmo2ForCausalLM": _NORMS_AFTER,
    "Olmo3ForCausalLM": _NORMS_AFTER,
    "GraniteMoeHybridForCausalLM": "its layers are state spaces in part",
    "Lfm2ForCausalLM": "its layers are convolutions in part",
    "Qwen3_5ForConditionalGeneration": "its layers are linear attention in part",
    "Gemma3ForConditionalGeneration": _PICTURES,
    "Mistral3ForConditionalGeneration": _PICTURES,
    "Phi3VForCausalLM": _PICTURES,
    "Phi4MMForCausalLM": _PICTURES,
    "Qwen2_5_VLForConditionalGeneration": _PICTURES,
    "Qwen3VLForConditionalGeneration": _PICTURES,
}


def unsupported(architecture: object, known: Iterable[str] = SUPPORTED) -> str:
    """Why a model of this architecture is refused, and what to do, in one line."""
    why = f"{UNSUPPORTED[architecture]}; " if isinstance(architecture, str) and architecture in UNSUPPORTED else ""
    return f"architecture {architecture} is not supported: {why}rlkit knows {', '.join(known)}; choose such a model"


def check_recoverable(architecture: str) -> None:
    """ValueError for a family whose embedding, layers or experts recovery's pass through a model does not follow."""
    if architecture not in RECOVERABLE:
        why = f"{architecture} can be exported, but recovery knows {', '.join(RECOVERABLE)} alone"
        raise ValueError(f"{why}; choose such a model, or export this one with a recipe, without recovery")
