"""What a model reference is and what shape the model has, without loading it.

A reference is an asset name (`smollm2-135m`), a hub id (`Qwen/Qwen3-4B`), a Hugging Face folder, a .gguf file, a
checkpoint folder or a bundle folder. An asset name means the asset; write `./smollm2-135m` for a folder of that name.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from rlkit.recover import assets, hub
from rlkit.recover.architectures import FAMILIES, Family, unsupported
from rlkit.recover.ggufheader import read_header
from rlkit.recover.progress import Tell, silent

GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ACCEPTED = "an asset name, a hub id, a Hugging Face folder, a .gguf file, a checkpoint folder or a bundle folder"
MARKS = ("config.json", "genai_config.json", "recovery.json", "rlkit.json", "model.onnx", "model.safetensors")


class SourceKind(StrEnum):
    """The four forms in which a model lies on disk."""

    HF = "hf"
    GGUF = "gguf"
    CHECKPOINT = "checkpoint"
    BUNDLE = "bundle"


@dataclass(frozen=True, slots=True)
class Source:
    """A model on disk: `path` is always a folder; a GGUF file is `path / gguf_file`, as transformers wants it."""

    reference: str
    kind: SourceKind
    path: Path
    gguf_file: str | None = None

    @property
    def file(self) -> Path:
        """The .gguf file if this is one, else the folder."""
        return self.path / self.gguf_file if self.gguf_file else self.path


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder with gated MLPs; `ffn` is the inner size of one MLP, or of one expert of a mixture."""

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_context: int
    qk_norm: bool
    attention_bias: bool = False  # of all four linears there; some families have one of three without it
    mlp_bias: bool = False
    experts: int | None = None
    active_experts: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in FAMILIES:
            raise ValueError(unsupported(self.architecture))
        for field in fields(self):
            value = getattr(self, field.name)
            sized = field.type == "int" or (field.type == "int | None" and value is not None)
            if sized and (type(value) is not int or value <= 0):
                raise ValueError(f"{field.name} = {value!r} is no positive whole number; the model's config is damaged")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} KV heads evenly; the config is damaged")

    @property
    def family(self) -> Family:
        """What it has in common with all models of its architecture."""
        return FAMILIES[self.architecture]

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections add a bias."""
        return self.attention_bias or self.family.qkv_bias

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Yield (module name, N outputs, K inputs) of every linear, layer by layer, lm_head last; no experts."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q_proj": query, "k_proj": key, "v_proj": key}
        mlp = {"gate_proj": self.ffn, "up_proj": self.ffn}
        if self.family.fused:
            attention, mlp = {"qkv_proj": query + 2 * key}, {"gate_up_proj": 2 * self.ffn}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name, n in attention.items():
                yield f"{prefix}.self_attn.{name}", n, self.hidden
            yield f"{prefix}.self_attn.o_proj", self.hidden, query
            if self.experts is None:
                for name, n in mlp.items():
                    yield f"{prefix}.mlp.{name}", n, self.hidden
                yield f"{prefix}.mlp.down_proj", self.hidden, self.ffn
        yield "lm_head", self.vocab, self.hidden

    def others(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of every tensor but the matrices of `linears` and the embedding: norms, biases, experts.

        Experts' matrices are (experts, inputs, outputs), as GPT-OSS has them.
        """
        for module, n, _k in self.linears():
            if self._has_bias(module.rpartition(".")[2]):
                yield f"{module}.bias", (n,)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name in self.family.norms:
                yield f"{prefix}.{name}.weight", (self.hidden,)
            for name in self.family.qk_norms:
                yield f"{prefix}.self_attn.{name}.weight", (self.head_dim,)
            if self.family.sinks:
                yield f"{prefix}.self_attn.sinks", (self.heads,)
            if self.experts is not None:
                yield from self._experts(f"{prefix}.mlp", self.experts)
        if self.family.norms:
            yield "model.norm.weight", (self.hidden,)

    def _has_bias(self, name: str) -> bool:
        if name in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.attention_bias if name == "o_proj" else self.mlp_bias and name != "lm_head"

    def _experts(self, prefix: str, count: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.router.weight", (count, self.hidden)
        yield f"{prefix}.router.bias", (count,)
        for name, k, n in (("gate_up_proj", self.hidden, 2 * self.ffn), ("down_proj", self.ffn, self.hidden)):
            yield f"{prefix}.experts.{name}", (count, k, n)
            yield f"{prefix}.experts.{name}_bias", (count, n)

    @property
    def parameters(self) -> int:
        """How many numbers the model holds; a tied embedding counts once."""
        matrices = sum(n * k for _name, n, k in self.linears())
        embedding = 0 if self.tied else self.vocab * self.hidden
        return matrices + embedding + sum(math.prod(shape) for _name, shape in self.others())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, one per field."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> ModelShape:
        """The shape that `to_json` wrote; unknown keys are ignored."""
        missing = [field.name for field in fields(ModelShape) if field.default is MISSING and field.name not in value]
        if missing:
            raise ValueError(f"the shape lacks {', '.join(missing)}; write it again with this rlkit")
        return ModelShape(**{field.name: value[field.name] for field in fields(ModelShape) if field.name in value})


def resolve(reference: str | Path, *, download: bool = False, tell: Tell = silent) -> Source:
    """Find what `reference` names. Without `download` nothing is fetched and only kept downloads are found.

    Raises FileNotFoundError or ValueError saying what the reference is not and how to get it.
    """
    name = str(reference)
    if isinstance(reference, str) and name in assets.registry():
        return _asset(name, download, tell)
    path = Path(reference).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        return _file(name, path)
    if hub.is_hub_id(name):
        return _hub(name, download, tell)
    close = difflib.get_close_matches(name, assets.registry(), n=1)
    hint = f"did you mean {close[0]}?" if close else f"give {ACCEPTED}"
    raise FileNotFoundError(f"no model {name!r}: no such file, folder or asset; {hint}")


def _asset(name: str, download: bool, tell: Tell) -> Source:
    asset = assets.find(name)
    if asset.kind is not assets.AssetKind.MODEL:
        raise ValueError(f"asset {name} is a {asset.kind}, not a model; `rlkit assets` lists the models")
    kept = assets.fetch(asset, tell) if download else assets.cached(asset)
    if kept is None:
        raise FileNotFoundError(f"{name} is not downloaded yet; run `rlkit pull {name}` ({asset.nbytes / 1e6:.0f} MB)")
    return _folder(name, kept) if kept.is_dir() else _file(name, kept)


def _hub(name: str, download: bool, tell: Tell) -> Source:
    kept = hub.fetch(name, tell) if download else hub.cached(name)
    if kept is None:
        why = f"no file or folder {name}, and the hub's model of that name is not downloaded"
        raise ValueError(f"{why}; check the path, or run `rlkit pull {name}`")
    return _folder(name, kept)


def _file(name: str, path: Path) -> Source:
    if path.name in MARKS:
        return _folder(name, path.parent)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return Source(name, SourceKind.GGUF, path.parent, path.name)
    why = "an empty or truncated download" if path.suffix == ".gguf" else f"a {path.suffix or 'plain'} file"
    raise ValueError(f"{name} is no model: {why} that does not start with GGUF; give {ACCEPTED}")


def _folder(name: str, path: Path) -> Source:
    if (path / "genai_config.json").is_file():
        return Source(name, SourceKind.BUNDLE, path)
    if (path / "recovery.json").is_file():
        return _recovered(name, path)
    if (path / "config.json").is_file():
        quantization = read_json(path / "config.json").get("quantization_config") or {}
        olive = quantization.get("quant_method") == "olive"
        return Source(name, SourceKind.CHECKPOINT if olive else SourceKind.HF, path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _file(name, ggufs[0])
    if ggufs:
        raise ValueError(f"{name} holds {len(ggufs)} .gguf files; name one of them, e.g. {ggufs[0]}")
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{name} is an adapter alone; name the model it belongs to")
    raise ValueError(f"{name} is no model folder: no config.json, genai_config.json or .gguf in it; give {ACCEPTED}")


def _recovered(name: str, path: Path) -> Source:
    """A checkpoint; or, recovered from a damaged float model, such a model again, or its adapter alone."""
    facts = read_json(path / "recovery.json")
    if "merged" not in facts:
        return Source(name, SourceKind.CHECKPOINT, path)
    if not facts["merged"]:
        base = (facts.get("degraded") or {}).get("reference", "a damaged model")
        raise ValueError(f"{name} is an adapter alone, for {base}; recover that one with --merge to have a whole model")
    return Source(name, SourceKind.HF, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError naming the file if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); the file is damaged, so fetch or make it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged, no JSON object; fetch or make it again")
    return value


def read_shape(source: Source) -> ModelShape:
    """The shape of the model, from the small files beside its weights."""
    if source.kind is SourceKind.GGUF:
        return _shape_of_gguf(source.file)
    if source.kind is SourceKind.BUNDLE:
        return _shape_of_bundle(source.path)
    return _shape_of_config(source.path / "config.json")


def _shape_of_config(path: Path) -> ModelShape:
    config = read_json(path)
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ValueError(f"{path}: {unsupported(architecture)}")
    family = FAMILIES[architecture]
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return ModelShape(
            architecture=architecture,
            layers=config["num_hidden_layers"],
            hidden=hidden,
            ffn=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or family.head_dim or hidden // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", family.tied)),
            max_context=config["max_position_embeddings"],
            qk_norm=bool(family.qk_norms),
            attention_bias=bool(config.get(family.attention_bias, family.biased)),
            mlp_bias=bool(config.get(family.mlp_bias)),
            experts=config.get("num_local_experts"),
            active_experts=config.get("num_experts_per_tok"),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; the config is incomplete, so fetch or make it again") from error


def _shape_of_bundle(folder: Path) -> ModelShape:
    manifest = folder / "rlkit.json"
    if manifest.is_file() and "shape" in (value := read_json(manifest)):
        return ModelShape.from_json(value["shape"])
    if (folder / "config.json").is_file():
        return _shape_of_config(folder / "config.json")
    why = "no rlkit.json, and genai_config.json does not state the size of the MLP"
    raise ValueError(f"{folder}: {why}; put the model's config.json beside it, or export it with `rlkit export`")


def _shape_of_gguf(path: Path) -> ModelShape:
    header = read_header(path)
    rows = {tensor.name: tensor.shape[0] for tensor in header.tensors}
    name = header.metadata.get("general.architecture")
    if name not in GGUF_ARCHITECTURES:
        raise ValueError(f"{path}: {unsupported(name, GGUF_ARCHITECTURES)}")
    facts: dict[str, Any] = {key.removeprefix(f"{name}."): value for key, value in header.metadata.items()}
    try:
        heads, hidden = facts["attention.head_count"], facts["embedding_length"]
        return ModelShape(
            architecture=GGUF_ARCHITECTURES[name],
            layers=facts["block_count"],
            hidden=hidden,
            ffn=facts["feed_forward_length"],
            heads=heads,
            kv_heads=facts.get("attention.head_count_kv", heads),
            head_dim=facts.get("attention.key_length", hidden // heads),
            vocab=rows["token_embd.weight"],
            tied="output.weight" not in rows,
            max_context=facts["context_length"],
            qk_norm=name == "qwen3",
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; it is no complete language model, so download another") from error
