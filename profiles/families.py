"""From the fields of a config.json to layers, family by family.

`recover.architectures` has the families that are exported; FAMILIES adds those that can only be forecast. Where fields
differ between publishers, the names are those of their config.json files; what a silent configuration means follows
the classes of transformers 5 (2026-11).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlkit.profiles.layer import LARGEST, Experts, Latent, Layer
from rlkit.recover import architectures
from rlkit.recover.architectures import Family

MOST_LAYERS = 1000
_QK = ("q_norm", "k_norm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_KEY = "attention_bias"

FAMILIES: dict[str, Family] = {
    **architectures.FAMILIES,
    "MixtralForCausalLM": Family(),
    "Qwen2MoeForCausalLM": Family(qkv_bias=True),
    "Qwen3MoeForCausalLM": Family(qk_norms=_QK, attention_bias=_KEY),
    "OlmoeForCausalLM": Family(qk_norms=_QK, attention_bias=_KEY),
    "Olmo2ForCausalLM": Family(norms=_AFTER, qk_norms=_QK, attention_bias=_KEY),
    "Olmo3ForCausalLM": Family(norms=_AFTER, qk_norms=_QK, attention_bias=_KEY),
    "GraniteMoeForCausalLM": Family(attention_bias=_KEY),
    "DeepseekV2ForCausalLM": Family(attention_bias=_KEY),
    "DeepseekV3ForCausalLM": Family(attention_bias=_KEY),
    "PhiForCausalLM": Family(norms=("input_layernorm",), qkv_bias=True, biased=True),
    "NemotronForCausalLM": Family(attention_bias=_KEY, mlp_bias="mlp_bias"),
    "Starcoder2ForCausalLM": Family(attention_bias="use_bias", mlp_bias="use_bias", biased=True, tied=True),
}
BY_MODEL_TYPE = {  # where a configuration names no class, or is the text part of a model that sees
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
}
WHOLE_QK_NORM = frozenset({"OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM"})
UNGATED = frozenset({"PhiForCausalLM", "NemotronForCausalLM", "Starcoder2ForCausalLM"})  # and their norms have offsets
HEAD_BIAS = frozenset({"PhiForCausalLM"})
ALL_BIASED = frozenset({"PhiForCausalLM", "GptOssForCausalLM"})  # their MLPs too
ROUTER_BIAS = frozenset({"GptOssForCausalLM", "DeepseekV3ForCausalLM"})
MIXTURES = frozenset(
    {
        "GptOssForCausalLM",
        "MixtralForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "OlmoeForCausalLM",
        "GraniteMoeForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
    }
)
LATENT = frozenset({"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"})
ALL_WINDOWED = frozenset({"MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "Starcoder2ForCausalLM"})
FROM_LAYER = frozenset({"Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"})
FULL_EVERY = {  # every how many layers one sees everything; the others have the window
    "GptOssForCausalLM": 2,
    "Gemma2ForCausalLM": 2,
    "Gemma3ForCausalLM": 6,
    "Olmo3ForCausalLM": 4,
}
_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts")


@dataclass(frozen=True, slots=True)
class Values:
    """The fields of a configuration, read with errors that name file, field, value and remedy."""

    fields: Mapping[str, Any]
    where: str

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive whole number under the first of `names` that has a value; `default` if none has."""
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise self.error(f"{name} = {value!r} is no size; the config is damaged, so fetch or make it again")
            return value
        if default is None:
            raise self.error(f"it lacks {' or '.join(names)}; the config is incomplete, so fetch or make it again")
        return default

    def maybe(self, name: str) -> int | None:
        """A size, or None where the field is missing or null."""
        return None if self.fields.get(name) is None else self.size(name)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null is the default."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{name} = {value!r} is neither true nor false; the config is damaged")
        return default if value is None else value

    def list(self, name: str) -> list[Any]:
        """A list; empty where the field is missing or null."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, list):
            raise self.error(f"{name} = {value!r} is no list; the config is damaged")
        return value or []

    def error(self, why: str) -> ValueError:
        """What to raise."""
        return ValueError(f"{self.where}: {why}")


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the language model; of a model that also sees, those are under text_config."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return dict(config)
    tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**tied, **inner}


def family_of(values: Values) -> tuple[Family, str]:
    """The family and its class name; ValueError naming what is known if it is not."""
    classes = [name for name in values.list("architectures") if isinstance(name, str)]
    kind = values.fields.get("model_type")
    by_type = BY_MODEL_TYPE.get(kind) if isinstance(kind, str) else None
    named = next((name for name in classes if name in FAMILIES), by_type)
    if named is None:
        found = classes[0] if classes else kind
        if found is None:
            raise values.error("it names neither architectures nor model_type; give a language model's config.json")
        close = difflib.get_close_matches(str(found), FAMILIES, n=1)
        hint = f"the nearest is {close[0]}; " if close else ""
        raise values.error(f"architecture {found} is not known to forecasts; {hint}known are {', '.join(FAMILIES)}")
    return FAMILIES[named], named


def layers(values: Values, family: Family, name: str) -> Iterator[Layer]:
    """Every layer of a model; windows and experts may differ between them."""
    count, hidden = values.size("num_hidden_layers"), values.size("hidden_size")
    if count > MOST_LAYERS:
        raise values.error(f"num_hidden_layers = {count} is more than {MOST_LAYERS}; the config is damaged")
    heads = values.size("num_attention_heads")
    biased = values.flag(family.attention_bias, family.biased)
    mlp_bias = name in ALL_BIASED or values.flag(family.mlp_bias, name in UNGATED and family.biased)
    biases = {"qkv": biased or family.qkv_bias, "o": biased, "mlp": mlp_bias}
    latent = _latent(values) if name in LATENT else None
    terms = 2 if name in UNGATED else 1
    common = Layer(
        heads=heads,
        kv_heads=heads if latent else values.size("num_key_value_heads", default=heads),
        head_dim=latent.nope + latent.rope if latent else _head_dim(values, family, hidden, heads),
        ffn=1,
        gated=name not in UNGATED,
        qk_norm=("all" if name in WHOLE_QK_NORM else "head") if family.qk_norms else "",
        biases=tuple(part for part, there in biases.items() if there),
        sinks=family.sinks,
        norms=len(family.norms) or 2,
        norm_terms=terms if family.norms else 0,
        fused=family.fused,
        latent=latent,
    )
    made: dict[tuple[int | None, bool], Layer] = {}
    for window, mixed in zip(_windows(values, name, count), _mixed(values, name, count), strict=True):
        if (window, mixed) not in made:
            made[window, mixed] = _with(common, values, name, window, mixed)
        yield made[window, mixed]


def _with(layer: Layer, values: Values, name: str, window: int | None, mixed: bool) -> Layer:
    experts = _experts(values, name) if mixed else None
    ffn = 0 if experts else values.size("intermediate_size")
    plain = {field: getattr(layer, field) for field in Layer.__slots__}
    return Layer(**{**plain, "window": window, "ffn": ffn, "experts": experts})


def _head_dim(values: Values, family: Family, hidden: int, heads: int) -> int:
    if values.maybe("head_dim") is None and not family.head_dim and hidden % heads:
        raise values.error(f"hidden_size {hidden} is no multiple of {heads} heads, and head_dim is missing; add it")
    return values.size("head_dim", default=family.head_dim or hidden // heads)


def _latent(values: Values) -> Latent:
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    kv_lora, nope, rope, v = (values.size(name) for name in names)
    return Latent(kv_lora, nope, rope, v, values.maybe("q_lora_rank"))


def _windows(values: Values, name: str, count: int) -> list[int | None]:
    """Each layer's window."""
    types, window = values.list("layer_types"), values.maybe("sliding_window")
    if types:
        if len(types) != count:
            raise values.error(f"{len(types)} layer_types for {count} layers contradict each other; fetch it again")
        if unknown := sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"}):
            raise values.error(f"layers of {', '.join(unknown)} are not known to forecasts; choose another model")
        if "sliding_attention" in types and window is None:
            raise values.error("layer_types has sliding layers, but there is no sliding_window; add it")
        return [window if kind == "sliding_attention" else None for kind in types]
    if window is None or not values.flag("use_sliding_window", name not in FROM_LAYER):
        return [None] * count
    if name in FROM_LAYER:
        first = values.size("max_window_layers", default=count) if values.fields.get("max_window_layers") != 0 else 0
        return [window if index >= first else None for index in range(count)]
    if name in FULL_EVERY:
        every = values.size("sliding_window_pattern", "_sliding_window_pattern", default=FULL_EVERY[name])
        return [window if (index + 1) % every else None for index in range(count)]
    return [window if name in ALL_WINDOWED else None] * count


def _mixed(values: Values, name: str, count: int) -> list[bool]:
    """Which layers have experts."""
    if name not in MIXTURES:
        return [False] * count
    values.size(*_COUNTS)
    dense = values.list("mlp_only_layers")
    if wrong := [index for index in dense if type(index) is not int or not 0 <= index < count]:
        raise values.error(f"mlp_only_layers names layer {wrong[0]!r} of {count}; fetch it again")
    first = values.size("first_k_dense_replace", default=0) if values.fields.get("first_k_dense_replace") else 0
    every, step = values.size("moe_layer_freq", default=1), values.size("decoder_sparse_step", default=1)
    return [
        index >= first and index % every == 0 and (index + 1) % step == 0 and index not in dense
        for index in range(count)
    ]


def _experts(values: Values, name: str) -> Experts:
    ffn = values.size("moe_intermediate_size", "intermediate_size")
    own = values.fields.get("shared_expert_intermediate_size")
    shared = values.size("shared_expert_intermediate_size") if own else 0
    if not shared and values.fields.get("n_shared_experts"):
        shared = ffn * values.size("n_shared_experts")
    return Experts(
        count=values.size(*_COUNTS),
        active=values.size("num_experts_per_tok", "experts_per_token"),
        ffn=ffn,
        shared=shared,
        shared_gate=bool(own),
        router_bias=name in ROUTER_BIAS,
    )
